"""An application: tells every client whom it sees, then echoes. usage: app.py PORT..."""
from __future__ import annotations

import os
import socket
import sys
import threading


def serve(client: socket.socket) -> None:
    with client:
        try:
            client.sendall(client.getpeername()[0].removeprefix("::ffff:").encode() + b"\n")
            while data := client.recv(65536):
                client.sendall(data)
        except OSError:
            pass


def listen(port: int) -> None:
    listener = socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=128)
    os.write(1, f"{port}\n".encode())  # one write: threads share the pipe
    while True:
        client, _ = listener.accept()
        threading.Thread(target=serve, args=(client,), daemon=True).start()


for port in sys.argv[2:]:
    threading.Thread(target=listen, args=(int(port),), daemon=True).start()
listen(int(sys.argv[1]))
