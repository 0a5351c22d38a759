"""What the client pod runs: one named piece of traffic, its findings as JSON on stdout. `traffic.py NAME ARG...`"""
from __future__ import annotations

import collections
import hashlib
import http.client
import json
import socket
import sys
import time
from typing import Any

BLOCK = bytes(range(256)) * 256


def connect(host: str, port: int | str, timeout: float = 10) -> socket.socket:
    return socket.create_connection((host, int(port)), timeout)


def receive_all(connection: socket.socket) -> bytes:
    out = bytearray()
    try:
        while piece := connection.recv(65536):
            out += piece
    except ConnectionResetError:
        out += b"<reset>"
    return bytes(out)


def kept(host: str, port: str, count: str) -> Any:
    """`count` requests on one connection; the server's connections and the times."""
    connection, used, times = http.client.HTTPConnection(host, int(port), timeout=10), set(), []
    for _ in range(int(count)):
        start = time.perf_counter()
        connection.request("GET", "/who")
        used.add(json.load(connection.getresponse())["connection"])
        times.append((time.perf_counter() - start) * 1000)
    times.sort()
    return {"connections": sorted(used), "p50": times[len(times) // 2], "p99": times[len(times) * 99 // 100]}


def posts(host: str, port: str, count: str) -> Any:
    """As http.client does it: head and body in two segments, which is what Nagle and delayed acknowledgement stall on."""
    connection, times = http.client.HTTPConnection(host, int(port), timeout=10), []
    for _ in range(int(count)):
        start = time.perf_counter()
        connection.putrequest("POST", "/who")
        connection.putheader("Content-Length", "5")
        connection.endheaders()
        connection.send(b"hello")
        assert json.load(connection.getresponse())["length"] == 5
        times.append((time.perf_counter() - start) * 1000)
    times.sort()
    return {"p50": times[len(times) // 2]}


def fresh(host: str, port: str, count: str) -> Any:
    """A connection for each request."""
    used = set()
    for _ in range(int(count)):
        connection = http.client.HTTPConnection(host, int(port), timeout=10)
        connection.request("GET", "/who")
        used.add(json.load(connection.getresponse())["connection"])
        connection.close()
    return sorted(used)


def get(host: str, port: str, path: str) -> Any:
    """Length and checksum of an answer, and what came behind it."""
    connection = connect(host, port, 60)
    connection.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    response = http.client.HTTPResponse(connection)
    response.begin()
    digest, length = hashlib.sha256(), 0
    while piece := response.read(1 << 16):
        digest.update(piece)
        length += len(piece)
    return {"length": length, "sha256": digest.hexdigest()}


def upload(host: str, port: str, size: str, how: str) -> Any:
    connection, left = http.client.HTTPConnection(host, int(port), timeout=60), int(size)
    pieces = [BLOCK] * (left // len(BLOCK)) + [BLOCK[:left % len(BLOCK)]] * (left % len(BLOCK) > 0)
    headers = {} if how == "chunked" else {"Content-Length": size}
    connection.request("POST", "/who", body=iter(pieces), headers=headers, encode_chunked=how == "chunked")
    found = json.load(connection.getresponse())
    return {"length": found["length"], "sha256": found["sha256"], "ours": hashlib.sha256(b"".join(pieces)).hexdigest()}


def raw(host: str, port: str, hexed: str) -> Any:
    """Bytes out, everything that comes until the end back. The writing side stays open."""
    connection = connect(host, port)
    connection.sendall(bytes.fromhex(hexed))
    return receive_all(connection).decode("latin-1")


def raws(host: str, port: str) -> Any:
    """`raw` for each line of hexadecimal on stdin."""
    return [raw(host, port, line.strip()) for line in sys.stdin]


def half_close(host: str, port: str, size: str) -> Any:
    connection, data = connect(host, port, 30), BLOCK * (int(size) // len(BLOCK) + 1)
    data = data[:int(size)]
    connection.sendall(data)
    connection.shutdown(socket.SHUT_WR)
    return {"answer": receive_all(connection).decode(), "ours": f"{len(data)} {hashlib.sha256(data).hexdigest()}\n"}


def stall(host: str, port: str) -> Any:
    """Writes until nothing goes any more; how much that was."""
    connection, sent = connect(host, port), 0
    connection.settimeout(1)
    try:
        while sent < 256 << 20:
            sent += connection.send(BLOCK)
    except TimeoutError:
        pass
    return sent


def tunnel(host: str, port: str) -> Any:
    connection = connect(host, port)
    connection.sendall(f"GET /upgrade HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n".encode())
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += connection.recv(1)
    echoed = 0
    for size in (1, 100, 65536):
        connection.sendall(BLOCK[:size])
        back = b""
        while len(back) < size:
            back += connection.recv(65536)
        echoed += back == BLOCK[:size]
    connection.shutdown(socket.SHUT_WR)
    return {"status": head.split()[1].decode(), "echoed": echoed, "rest": receive_all(connection).decode()}


def leave(host: str, port: str, path: str, after: str) -> Any:
    """Sends a request and leaves: `after` is `request`, or a number of bytes of the answer."""
    connection = connect(host, port)
    connection.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    if after == "request":
        time.sleep(0.3)  # it must have reached the server
    else:
        connection.recv(int(after), socket.MSG_WAITALL)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    connection.close()
    return "left"


def burst(host: str, port: str, count: str, seconds: str) -> Any:
    """Many connections at once, one request on each: how many ended how."""
    connections, deadline = [], time.monotonic() + float(seconds)
    found: collections.Counter[str] = collections.Counter()
    for _ in range(int(count)):
        connection = connect(host, port)
        connection.sendall(f"GET /who HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        connections.append(connection)
    for connection in connections:
        connection.settimeout(max(deadline - time.monotonic(), 0.01))
        try:
            head = connection.recv(12)
            found[head[9:].decode() if len(head) == 12 else "closed"] += 1
        except TimeoutError:
            found["waited"] += 1
        except OSError:
            found["closed"] += 1
    return found


def mix(host: str, port: str, wanted: str) -> Any:
    """As many requests of each code as asked, one after the other on one connection; bytes of both sides and the time."""
    connection, sent, received, start = connect(host, port), 0, 0, time.perf_counter()
    for code, count in json.loads(wanted).items():
        request = f"GET /status?code={code} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
        for _ in range(count):
            connection.sendall(request)
            sent += len(request)
            answer = connection.recv(65536)
            while b"\r\n\r\n" not in answer or (code != "204" and not answer.endswith(b"as asked\n")):
                answer += connection.recv(65536)
            assert answer[9:12].decode() == code
            received += len(answer)
    return {"sent": sent, "received": received, "milliseconds": (time.perf_counter() - start) * 1000}


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
