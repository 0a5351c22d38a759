"""Asks the admin sockets of agents, for the commands that show something. Blocking, standard library only."""
from __future__ import annotations

import http.client
import json
import socket
from pathlib import Path
from typing import Any

from agent.cli.main import EX_CONFIG, EX_NOPERM, EX_UNAVAILABLE, CommandError

RUN = Path("/run/narrows")
SECONDS = 10.0
ANSWER_LIMIT = 1 << 28  # bytes; a config dump of 50,000 workloads is about 50 MB


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(SECONDS)
        self.sock.connect(str(self._path))


def ask(path: Path, what: str, method: str = "GET") -> Any:
    """The JSON that `what` (path and query) answers at the socket `path`. Raises CommandError."""
    connection = _UnixConnection(path)
    try:
        connection.request(method, what)
        answer = connection.getresponse()
        body = answer.read(ANSWER_LIMIT)
        value = json.loads(body) if body else None
    except PermissionError:
        raise CommandError(f"{path} may not be opened: run this as root", EX_NOPERM) from None
    except (FileNotFoundError, ConnectionRefusedError):
        raise CommandError(f"nobody answers at {path}: the agent is not running (its log is agent.log beside it)",
                           EX_UNAVAILABLE) from None
    except TimeoutError:
        raise CommandError(f"the agent at {path} did not answer within {SECONDS:g} s") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise CommandError(f"{path}{what}: {error}") from None
    finally:
        connection.close()
    if answer.status >= 400 and not what.startswith("/ready"):
        reason = value.get("error") if isinstance(value, dict) else answer.reason
        raise CommandError(f"{path}{what}: {reason}")
    return value


def instances(name: str | None, run_dir: Path | None, root: Path = RUN) -> dict[str, Path]:
    """Node -> run directory: that of `--run-dir`, else those of the lab `name`, else every instance of this machine.

    Raises CommandError when there is none.
    """
    if run_dir is not None:
        if not run_dir.is_dir():
            raise CommandError(f"{run_dir} is no directory", EX_CONFIG)
        return {run_dir.name: run_dir}
    lab = root / "lab" / (name or "default") / "nodes"
    found = {path.name: path for path in sorted(lab.iterdir()) if path.is_dir()} if lab.is_dir() else {}
    if name is None and root.is_dir():
        found |= {path.name: path for path in sorted(root.iterdir()) if (path / "admin.sock").exists()}
    if not found:
        where = f"the lab {name!r}" if name else "this machine"
        raise CommandError(f"no instance of Narrows on {where}: start one with `narrows lab up PATH`, "
                           "or name its directory with --run-dir")
    return found
