"""Makes a proxy's sockets in namespaces of pods, on request over a socket pair (capture.py, Maker), and ends with it."""
from __future__ import annotations

import json
import socket
import sys

from agent import netlink
from tests.support.worker import prepared_listener, prepared_socket


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    while asked := control.recv(4096):
        what, path, *numbers = json.loads(asked)
        made: list[socket.socket] = []

        def make(what: str = what, numbers: list[int] = numbers, made: list[socket.socket] = made) -> None:
            for _ in range(numbers[1] if what == "upstream" else 1):
                made.append(prepared_socket(numbers[0]) if what == "upstream" else prepared_listener(numbers[0]))

        number = 0
        try:
            netlink.in_netns(path, make)
        except OSError as error:
            number = error.errno or 1
        socket.send_fds(control, [str(number).encode()], [one.fileno() for one in made])
        for one in made:
            one.close()


main()
