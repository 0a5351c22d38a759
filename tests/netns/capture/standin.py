"""Stand-in for the proxy inside a pod: listens on 15001 and 15006, relays to the original destination, reports each
connection as a JSON line. It uses the kernel as the real one does: mark, SO_ORIGINAL_DST, transparent source.

usage: standin.py [VIRTUAL:PORT=REAL:PORT ...]
"""
from __future__ import annotations

import json
import os
import socket
import struct
import sys
import threading

SO_MARK, IP_TRANSPARENT, IPV6_TRANSPARENT, SO_ORIGINAL_DST = 36, 19, 75, 80
SERVICES = dict(pair.split("=") for pair in sys.argv[1:])


def say(what: dict[str, object]) -> None:
    os.write(1, json.dumps(what).encode() + b"\n")  # one write: threads share the pipe


def plain(address: str) -> str:
    return address.removeprefix("::ffff:")


def destination(client: socket.socket) -> tuple[str, int]:
    if client.getpeername()[0].startswith("::ffff:"):
        port, raw = struct.unpack("!2xH4s8x", client.getsockopt(socket.SOL_IP, SO_ORIGINAL_DST, 16))
        return socket.inet_ntop(socket.AF_INET, raw), port
    port, raw = struct.unpack("!2xH4x16s4x", client.getsockopt(socket.IPPROTO_IPV6, SO_ORIGINAL_DST, 28))
    return socket.inet_ntop(socket.AF_INET6, raw), port


def marked(family: int) -> socket.socket:
    made = socket.socket(family)
    made.setsockopt(socket.SOL_SOCKET, SO_MARK, 0x539)
    if family == socket.AF_INET6:
        made.setsockopt(socket.IPPROTO_IPV6, IPV6_TRANSPARENT, 1)
    else:
        made.setsockopt(socket.SOL_IP, IP_TRANSPARENT, 1)
    return made


def pump(source: socket.socket, sink: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        pass


def serve(client: socket.socket, side: str) -> None:
    address, port = destination(client)
    peer = plain(client.getpeername()[0])
    say({"side": side, "peer": peer, "to": f"{address} {port}"})
    target = SERVICES.get(f"{address}:{port}", f"{address}:{port}").rpartition(":")
    family = socket.AF_INET6 if ":" in target[0] else socket.AF_INET
    with client, marked(family) as upstream:
        try:
            if side == "inbound" and peer != address:
                upstream.bind((peer, 0))
            upstream.connect((target[0], int(target[2])))
        except OSError as error:
            say({"side": side, "error": str(error)})
            return
        back = threading.Thread(target=pump, args=(upstream, client), daemon=True)
        back.start()
        pump(client, upstream)
        back.join()


def listen(port: int, side: str) -> None:
    listener = marked(socket.AF_INET6)
    listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("::", port))
    listener.listen(128)
    say({"listening": port})
    while True:
        client, _ = listener.accept()
        threading.Thread(target=serve, args=(client, side), daemon=True).start()


threading.Thread(target=listen, args=(15001, "outbound"), daemon=True).start()
listen(15006, "inbound")
