"""A pod that another one of the same worker must not harm."""
from __future__ import annotations

import contextlib
import socket
import threading
import time

from agent import netlink
from tests.support.mesh import Mesh, read_message, request
from tests.support.netns import Netns
from tests.support.wait import until

VICTIM_PORT = 8099     # in the pod `other`: passed through as TCP
DEADLINE = 15.0


class Victim:
    """Asks and asks again, on a kept connection and on new ones, in a thread. `asked` requests were all answered with 200."""

    def __init__(self, mesh: Mesh, netns: Netns, address: str) -> None:
        self._mesh, self._netns, self._address = mesh, netns, address
        self._stop = threading.Event()
        self.asked = 0
        self.slowest = 0.0
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _dial(self) -> socket.socket:
        return netlink.in_netns(self._netns.path, lambda: socket.create_connection((self._address, VICTIM_PORT), timeout=DEADLINE))

    def _run(self) -> None:
        try:
            with self._dial() as kept:
                while not self._stop.is_set():
                    with contextlib.closing(self._dial()) if self.asked % 8 == 0 else contextlib.nullcontext(kept) as connection:
                        began = time.monotonic()
                        connection.sendall(request())
                        assert read_message(connection).status == 200
                        self.slowest = max(self.slowest, time.monotonic() - began)
                    self.asked += 1
        except BaseException as error:
            self.error = error

    def served(self, more: int = 20) -> None:
        """It is served `more` times from now on."""
        goal = self.asked + more
        until(lambda: self.asked >= goal or self.error is not None, f"the victim is served {more} times more", timeout=DEADLINE)
        self.check()

    def check(self) -> None:
        if self.error is not None:
            raise AssertionError(f"the victim's request failed after {self.asked} that succeeded: {self.error!r}")

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(DEADLINE)
        self.check()
