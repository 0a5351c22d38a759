"""A server that reads requests with h11 and says, one JSON line each, what it read: `recorder.py NAME=PORT ...`.

It stands behind nginx, HAProxy and Envoy too, on a port for each: what such a proxy passes on is what it understood.
Only whole requests are told of; each is answered with its own target, so that a client can tell whose answer it got.
"""
from __future__ import annotations

import json
import socket
import sys
import threading

import h11


def tell(name: str, request: h11.Request, body: bytes) -> None:
    host = b",".join(value for field, value in request.headers if field == b"host")
    line = json.dumps({"at": name, "method": request.method.decode(), "target": request.target.decode("latin-1"),
                       "body": body.decode("latin-1"), "host": host.decode("latin-1")})
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def exchange(name: str, connection: socket.socket, h: h11.Connection) -> bool:
    """One request and its answer. False: the connection ends."""
    request, body = None, b""
    while True:
        event = h.next_event()
        if event is h11.NEED_DATA:
            if h.they_are_waiting_for_100_continue:
                connection.sendall(h.send(h11.InformationalResponse(status_code=100, headers=[])))
            h.receive_data(connection.recv(65536))
        elif isinstance(event, h11.Request):
            request = event
        elif isinstance(event, h11.Data):
            body += bytes(event.data)
        elif isinstance(event, h11.EndOfMessage):
            break
        else:
            return False
    assert request is not None
    if request.method == b"CONNECT":  # this is no proxy
        connection.sendall(h.send(h11.Response(status_code=405, headers=[("content-length", b"0"), ("connection", b"close")])))
        return False
    tell(name, request, body)
    said = b"" if request.method == b"HEAD" else b"seen"
    connection.sendall(h.send(h11.Response(status_code=200, headers=[("x-seen", request.target[:100]), ("content-length", b"4")])) +
                       (h.send(h11.Data(data=said)) if said else b"") + h.send(h11.EndOfMessage()))
    return True


def serve(name: str, connection: socket.socket) -> None:
    h = h11.Connection(h11.SERVER, max_incomplete_event_size=200_000)
    try:
        while exchange(name, connection, h):
            if h.our_state is h11.MUST_CLOSE:
                break
            h.start_next_cycle()
    except h11.RemoteProtocolError as error:
        if h.our_state is h11.IDLE or h.our_state is h11.SEND_RESPONSE:
            connection.sendall(h.send(h11.Response(status_code=error.error_status_hint, headers=[("content-length", b"0"),
                                                                                                 ("connection", b"close")])))
    except (OSError, h11.LocalProtocolError):
        pass
    finally:
        connection.close()


def listen(name: str, port: int) -> None:
    with socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=512) as server:
        while True:
            threading.Thread(target=serve, args=(name, server.accept()[0]), daemon=True).start()


if __name__ == "__main__":
    for name, _, port in (word.partition("=") for word in sys.argv[1:]):
        threading.Thread(target=listen, args=(name, int(port)), daemon=True).start()
    threading.Event().wait()
