"""Two captured pods on a node, a worker that serves both, and origins whose behaviour a test writes itself."""
from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any

from agent import netlink
from agent.dataplane import blobs
from agent.model.routing import (
    Balancer,
    Cluster,
    Destination,
    Endpoint,
    MatchKind,
    Route,
    RouteMatch,
    StringMatch,
    VirtualHost,
    WeightedCluster,
)
from agent.model.settings import ProxySettings
from agent.model.workload import Protocol, Service, ServicePort, Workload, WorkloadPort
from tests.support.netns import Netns
from tests.support.wait import until
from tests.support.worker import Worker

SCOPE = "ns=default"
VIP, VIP6 = "10.96.0.10", "fd00:10:96::10"  # routed to nowhere: only the mesh answers there
HOST = "origin.default.svc.cluster.local"
SERVICE = f"default/{HOST}"
SERVICE_INDEX, CLIENT, SERVER = 7, 1, 2
HTTP_PORT, AUTO_PORT, TCP_PORT = 9080, 9081, 9082  # service ports by declared protocol
Behaviour = Callable[[socket.socket], None]


class Origin:
    """A server in the server's pod. Each connection runs `behaviour` in a thread of its own, then closes."""

    def __init__(self, netns: Netns, port: int, behaviour: Behaviour) -> None:
        self.behaviour = behaviour
        self.peers: list[str] = []
        self.open = 0
        self.errors: list[BaseException] = []
        self._connections: list[socket.socket] = []
        self._lock = threading.Lock()
        self.socket = netlink.in_netns(netns.path, lambda: socket.create_server(
            ("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=512))
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, address = self.socket.accept()
            except OSError:
                return
            connection.settimeout(20)
            with self._lock:
                self.peers.append(address[0].removeprefix("::ffff:"))
                self._connections.append(connection)
                self.open += 1
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            self.behaviour(connection)
        except OSError:
            pass  # the other side went away: many tests want that
        except BaseException as error:
            self.errors.append(error)
        finally:
            connection.close()
            with self._lock:
                self._connections.remove(connection)
                self.open -= 1

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()
        with self._lock:
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        assert self.errors == []


@dataclass
class Pods:
    """Namespaces, `client` and `server` with capture: shared by all tests of a module."""

    client: Netns
    server: Netns
    other: Netns


@dataclass
class Mesh:
    pods: Pods
    worker: Worker
    origins: list[Origin] = field(default_factory=list)
    sockets: list[socket.socket] = field(default_factory=list)

    def origin(self, port: int, behaviour: Behaviour, netns: Netns | None = None) -> Origin:
        made = Origin(netns or self.pods.server, port, behaviour)
        self.origins.append(made)
        return made

    def dial(self, address: str = VIP, port: int = HTTP_PORT, netns: Netns | None = None) -> socket.socket:
        """A connected socket made inside a pod (the client's). The worker's listener accepts it in any case."""
        made = netlink.in_netns((netns or self.pods.client).path,
                                lambda: socket.create_connection((address, port), timeout=10))
        self.sockets.append(made)
        return made

    def settings(self, **changed: int) -> None:
        self.worker.commit(blobs.put_settings(ProxySettings(**changed)))

    def configure(self, *extra: blobs.Entry, protocol: Protocol = Protocol.HTTP) -> None:
        """Who is where; `protocol` is what the server's workload declares for 8080. What to do with it is `extra`."""
        ports = tuple(ServicePort(port, 8080, declared) for port, declared in (
            (HTTP_PORT, Protocol.HTTP), (AUTO_PORT, Protocol.AUTO), (TCP_PORT, Protocol.TCP)))
        service = Service("default", HOST, "origin", (ip_address(VIP), ip_address(VIP6)), ports)
        declared = WorkloadPort(SERVICE, HTTP_PORT, 8080, protocol)
        self.worker.commit(
            blobs.put_pod("pod-c", 1, "w-client", SCOPE, (ip_address(self.pods.client.ip),)),
            blobs.put_pod("pod-s", 2, "w-server", SCOPE, (ip_address(self.pods.server.ip),)),
            blobs.put_service(SERVICE_INDEX, service),
            blobs.put_workload(CLIENT, workload("w-client", self.pods.client), lambda _: SERVICE_INDEX),
            blobs.put_workload(SERVER, workload("w-server", self.pods.server, declared), lambda _: SERVICE_INDEX),
            *extra)

    def endpoint(self, port: int = 8080) -> Endpoint:
        return Endpoint(ip_address(self.pods.server.ip), port)

    def quiet(self) -> int:
        """Every client's connection has ended, and with the pods detached nothing is left of them; then they are attached anew.

        Returns how many descriptors the worker has when it has no pod.
        """
        # What is left then are idle connections between the two hops. A request that is still on its way must not find
        # its listener gone: three looks in a row, since one may fall between two steps of it.
        calm = 0

        def settled() -> bool:
            nonlocal calm
            header = self.worker.header
            idle = header["upstream_open"] == header["upstream_idle"] and header["downstream_open"] <= header["upstream_idle"]
            calm = calm + 1 if idle else 0
            return calm >= 3

        until(settled, "clients ended", timeout=8)
        for handle in (1, 2):
            self.worker.detach(handle)
        try:
            until(lambda: (self.worker.header["downstream_open"], self.worker.header["upstream_open"]) == (0, 0),
                  "no open connection", timeout=5)
        except AssertionError:
            raise AssertionError(f"connections are left: {self.worker.header}") from None
        until(lambda: (self.worker.header["buffered_bytes"], self.worker.header["held"],
                       self.worker.header["sockets_ready"]) == (0, 0, 0), "nothing is held", timeout=2)
        descriptors = self.worker.descriptors()
        self.attach()
        return descriptors

    def attach(self) -> None:
        for handle in (1, 2):
            self.attach_one(handle)

    def attach_one(self, handle: int) -> None:
        self.worker.attach(handle, self.pods.client if handle == 1 else self.pods.server)


def workload(uid: str, pod: Netns, *ports: WorkloadPort) -> Workload:
    return Workload(uid, uid, "default", (ip_address(pod.ip), ip_address(pod.ip6)), "n1", "default", "cluster.local", uid,
                    "pod", uid, "v1", "Kubernetes", True, ports)


def cluster(name: str, *endpoints: Endpoint, connect_timeout_ms: int = 1000) -> blobs.Put:
    return blobs.put_cluster(Cluster(SCOPE, name, SERVICE, Balancer.ROUND_ROBIN, connect_timeout_ms, endpoints),
                             lambda _: SERVICE_INDEX)


def any_path(*clusters: WeightedCluster, prefix: str = "/", **more: Any) -> Route:
    return Route("r", RouteMatch(StringMatch(MatchKind.PREFIX, prefix)), clusters, **more)


def destination(port: int, http: tuple[Route, ...] | None = None,
                tcp: tuple[WeightedCluster, ...] | None = None) -> blobs.Put:
    hosts = None if http is None else (VirtualHost("v", ("*",), http),)
    return blobs.put_destination(Destination(SCOPE, f"{HOST}:{port}", hosts, tcp))


def everything(mesh: Mesh, **route: Any) -> tuple[blobs.Put, ...]:
    """All three service ports lead to the server's 8080."""
    one = WeightedCluster("all", 1)
    return (cluster("all", mesh.endpoint()),
            destination(HTTP_PORT, http=(any_path(one, **route),)),
            destination(AUTO_PORT, http=(any_path(one, **route),), tcp=(one,)),
            destination(TCP_PORT, tcp=(one,)))


def entered(pod: Netns, worker: Worker, app: int = 8080) -> list[int]:
    """The inbound listener (15006, 15008) of each open connection that this worker took in a pod. Where sk_lookup captures, one of 15006
    has the port of the application, which was dialled."""
    said = pod.run("ss", "-Htnp", "state", "established", f"( sport = :15006 or sport = :15008 or sport = :{app} )").stdout
    ports = [int(line.split()[2].rpartition(":")[2]) for line in said.splitlines() if f"pid={worker.pid}," in line]
    return [port if port == 15008 else 15006 for port in ports]


# ---- what every test says over again --------------------------------------------------------------------------------

def half_close(connection: socket.socket) -> None:
    """No more from us. A peer that has reset the connection by now is a reset, as it is for a read."""
    try:
        connection.shutdown(socket.SHUT_WR)
    except OSError as error:
        if error.errno != errno.ENOTCONN:
            raise
        raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET)) from error


def receive_all(connection: socket.socket) -> bytes:
    parts = []
    while data := connection.recv(262_144):
        parts.append(data)
    return b"".join(parts)


def receive(connection: socket.socket, size: int) -> bytes:
    got = b""
    while len(got) < size:
        data = connection.recv(size - len(got))
        if not data:
            raise AssertionError(f"closed after {got!r}")
        got += data
    return got


def receive_until(connection: socket.socket, end: bytes) -> bytes:
    got = b""
    while not got.endswith(end):
        data = connection.recv(1)
        if not data:
            raise ConnectionError(f"closed after {got!r}")
        got += data
    return got


def echo(connection: socket.socket) -> None:
    while data := connection.recv(65536):
        connection.sendall(data)


# ---- HTTP, written out so that every byte is the test's -----------------------------------------------------------------

@dataclass
class Message:
    """A request or response as it came over the wire; `body` without framing."""

    first: str
    headers: list[tuple[str, str]]
    body: bytes
    trailers: list[tuple[str, str]] = field(default_factory=list)

    def all(self, name: str) -> list[str]:
        return [value for key, value in self.headers if key == name]

    def one(self, name: str) -> str:
        found = self.all(name)
        assert len(found) == 1, f"{name}: {found} in {self.first} {self.headers}"
        return found[0]

    @property
    def status(self) -> int:
        return int(self.first.split(" ")[1])


def _fields(head: bytes) -> list[tuple[str, str]]:
    return [(name.lower(), value.strip()) for name, _, value in
            (line.partition(":") for line in head.decode("latin-1").split("\r\n") if line)]


def read_message(connection: socket.socket, *, head_only: bool = False, to_head: bool = False) -> Message:
    """The next message. ConnectionError when the connection ends before or within it."""
    head = receive_until(connection, b"\r\n\r\n")
    first, _, rest = head.partition(b"\r\n")
    made = Message(first.decode("latin-1"), _fields(rest), b"")
    status = made.status if made.first.startswith("HTTP/") else 0
    if head_only or status in (204, 304) or 100 <= status < 200:
        return made
    lengths = made.all("content-length")
    if made.all("transfer-encoding") == ["chunked"]:
        parts = []
        while size := int(receive_until(connection, b"\r\n"), 16):
            parts.append(_exactly(connection, size + 2)[:-2])
        made.body = b"".join(parts)
        while (line := receive_until(connection, b"\r\n")) != b"\r\n":
            made.trailers += _fields(line)
    elif lengths:
        made.body = _exactly(connection, int(lengths[0]))
    elif status and to_head is False:
        made.body = receive_all(connection)
    return made


def _exactly(connection: socket.socket, size: int) -> bytes:
    parts, left = [], size
    while left:
        data = connection.recv(min(left, 1 << 20))
        if not data:
            raise ConnectionError(f"closed {left} bytes before the end")
        parts.append(data)
        left -= len(data)
    return b"".join(parts)


def response(body: bytes = b"ok", status: str = "200 OK", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"content-length: {len(body)}", *headers]
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + body


def request(path: str = "/", *headers: str, method: str = "GET", body: bytes = b"", host: str = HOST) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", *headers]
    if body:
        lines.append(f"Content-Length: {len(body)}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + body


class Web:
    """Behaviour of an origin that answers request after request; `seen` holds what reached it."""

    def __init__(self, *answers: bytes) -> None:
        self.answers = answers or (response(),)
        self.seen: list[Message] = []

    def __call__(self, connection: socket.socket) -> None:
        while True:
            try:
                self.seen.append(read_message(connection))
            except ConnectionError:
                return
            connection.sendall(self.answers[min(len(self.seen), len(self.answers)) - 1])


CUT = b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nonly this"


def cut(connection: socket.socket) -> None:
    """Behaviour of an origin that leaves in the midst of its answer."""
    read_message(connection)
    connection.sendall(CUT)


def ask_what_is_cut(mesh: Mesh) -> bytes:
    """All that a client gets of it before its connection is reset."""
    mesh.origin(8080, cut)
    connection = mesh.dial()
    connection.sendall(request())
    got = b""
    with contextlib.suppress(ConnectionResetError):
        while data := connection.recv(65_536):
            got += data
    return got


def start(mesh: Mesh, *answers: bytes, **route: Any) -> Web:
    """An origin with these answers, behind a route that `route` describes (`everything`)."""
    web = Web(*answers)
    mesh.configure(*everything(mesh, **route))
    mesh.origin(8080, web)
    return web


def ask(mesh: Mesh, *args: Any, **more: Any) -> Any:
    """One request on a connection of its own, and its answer."""
    connection = mesh.dial()
    connection.sendall(request(*args, **more))
    return read_message(connection)
