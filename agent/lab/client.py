"""The other end of lab.sock, for the subcommands."""
from __future__ import annotations

import http.client
import json
import socket
from typing import Any
from urllib.parse import quote

from agent.lab.place import Place

SECONDS = 60.0  # for an answer; `wait` asks for its own


class LabRefused(RuntimeError):
    """The lab said no, and why."""


class NotUp(RuntimeError):
    """No lab of that name answers."""


class Client:
    """Asks the supervisor of one lab."""

    def __init__(self, place: Place) -> None:
        self._place = place

    def ask(self, method: str, url: str, body: Any = None, seconds: float = SECONDS) -> Any:
        """JSON of an answer, or its text. NotUp when nobody listens, LabRefused with the reason, OSError otherwise."""
        connection = http.client.HTTPConnection("lab", timeout=seconds)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(seconds)
        try:
            connection.sock.connect(str(self._place.socket))
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise NotUp(f"lab {self._place.name!r} is not up; start it with "
                        f"`narrows lab up PATH --name {self._place.name}`") from error
        try:
            data = None if body is None else json.dumps(body)
            connection.request(method, url, data, {"Content-Type": "application/json"} if data else {})
            answer = connection.getresponse()
            text = answer.read().decode()
        except http.client.HTTPException as error:
            raise OSError(f"{self._place.socket}: no answer ({type(error).__name__}); the lab may be ending") from error
        finally:
            connection.close()
        value = json.loads(text) if "json" in (answer.getheader("Content-Type") or "") else text
        if answer.status == 503:
            raise OSError(value["error"] if isinstance(value, dict) else text)
        if answer.status != 200:
            raise LabRefused(value["error"] if isinstance(value, dict) else text)
        return value

    def status(self) -> Any:
        return self.ask("GET", "/status")

    def pod(self, ref: str) -> Any:
        return self.ask("GET", f"/pod?ref={quote(ref, safe='')}")
