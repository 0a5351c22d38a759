"""Tunnels that are there before a request needs them: how many connections had to wait for a handshake."""
from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import h2.config
import h2.connection
import h2.events
import pytest
from hyperframe.frame import GoAwayFrame

from agent import netlink
from agent.dataplane import blobs
from agent.model.routing import Balancer, Cluster, Destination, Endpoint, VirtualHost, WeightedCluster
from agent.model.settings import ProxySettings
from agent.model.workload import Protocol, WorkloadPort
from tests.support.hbone import SERVER_ID, configure, enrol, workload
from tests.support.mesh import (
    HOST,
    HTTP_PORT,
    SCOPE,
    SERVER,
    SERVICE,
    SERVICE_INDEX,
    TCP_PORT,
    Mesh,
    Web,
    any_path,
    echo,
    read_message,
    receive,
    receive_until,
    request,
    response,
)
from tests.support.netns import Netns
from tests.support.pki import Authority
from tests.support.wait import until

pytestmark = pytest.mark.netns
ROOT = Authority()
MORE = ("10.244.1.101", "10.244.1.102", "10.244.1.103")  # endpoints beside the server pod's own address, all inside it


@pytest.fixture
def pair(mesh: Mesh) -> Mesh:
    enrol(mesh, ROOT)
    return mesh


def early(mesh: Mesh, tunnels: int) -> None:
    """One worker has both pods: a tunnel between them has to be asked for."""
    mesh.worker.commit(blobs.put_settings(ProxySettings(same_node_tunnel=True, early_tunnels=tunnels)))


def endpoints(mesh: Mesh, *addresses: str, protocol: Protocol = Protocol.TCP, weights: tuple[int, ...] = ()) -> None:
    """A service of several workloads, each at an address of its own."""
    made = [Endpoint(ip_address(address), 8080, weight=weight) for address, weight in
            zip(addresses, weights or (1,) * len(addresses), strict=True)]
    declared = WorkloadPort(SERVICE, HTTP_PORT, 8080, protocol)
    workloads = [blobs.put_workload(20 + number, replace(workload(SERVER, mesh.pods.server, "server", declared), uid=f"w-{number}",
                                                         addresses=(ip_address(address),)), lambda _: SERVICE_INDEX)
                 for number, address in enumerate(addresses) if address != mesh.pods.server.ip]
    configure(mesh, *workloads, blobs.put_cluster(Cluster(SCOPE, "all", SERVICE, Balancer.ROUND_ROBIN, 1000, tuple(made)),
                                                  lambda _: SERVICE_INDEX), protocol=protocol)


@pytest.fixture
def several(pair: Mesh) -> Iterator[Mesh]:
    for address in MORE:
        netlink.add_address(pair.pods.server.path, "eth0", f"{address}/24")
    endpoints(pair, pair.pods.server.ip, *MORE)
    yield pair
    for address in MORE:
        pair.pods.server.run("ip", "address", "del", f"{address}/24", "dev", "eth0")


def settled(mesh: Mesh) -> None:
    """No handshake is under way, and both pods have sockets to spare again. For tests in which no tunnel ends."""
    def is_so() -> bool:
        header = mesh.worker.header
        return header["tunnels_open"] == header["tunnels_opened"] and header["sockets_ready"] >= 6

    until(is_so, "every tunnel is open, and the stocks are full")


def talk(mesh: Mesh) -> socket.socket:
    connection = mesh.dial(port=TCP_PORT)
    connection.sendall(b"x")
    assert receive(connection, 1) == b"x"
    return connection


@pytest.mark.parametrize(("tunnels", "waited"), [(0, 4), (8, 1)])
def test_only_the_first_connection_to_a_service_waits_for_a_handshake(several: Mesh, tunnels: int, waited: int) -> None:
    early(several, tunnels)
    several.origin(8080, echo)
    settled(several)
    for _ in range(8):
        talk(several)
        settled(several)
    header = several.worker.header
    assert header["tunnels_waited"] == waited
    assert header["tunnels_opened"] == 8, "four, both ends of each"
    assert (header["tunnels_early"], header["tunnels_early_used"]) == ((3, 3) if tunnels else (0, 0))


def test_no_more_are_dialled_ahead_than_a_pod_may_have(several: Mesh) -> None:
    early(several, 1)
    several.origin(8080, echo)
    settled(several)
    talk(several)
    settled(several)
    assert several.worker.header["tunnels_early"] == 1
    talk(several)
    settled(several)
    assert several.worker.header["tunnels_early"] == 2, "the first is in use now: one more"


@pytest.mark.parametrize("tunnels", [0, 8])
def test_a_client_that_connects_and_then_asks_finds_the_tunnel(pair: Mesh, tunnels: int) -> None:
    configure(pair)
    early(pair, tunnels)
    settled(pair)
    pair.origin(8080, lambda connection: (read_message(connection), connection.sendall(response(b"ok")))[1])
    connection = pair.dial()
    if tunnels:
        until(lambda: pair.worker.header["tunnels_opened"] == 2, "there is a tunnel before there is a request")
    connection.sendall(request())
    assert read_message(connection).body == b"ok"
    assert pair.worker.header["tunnels_waited"] == (0 if tunnels else 1)


@pytest.mark.parametrize(("missing", "empty", "looked_at"), [(3, 0, True), (4, 0, False), (0, 3, True), (0, 4, False)])
def test_a_connection_looks_at_so_many_clusters_and_hosts_whether_they_are_there_or_not(
        pair: Mesh, missing: int, empty: int, looked_at: bool) -> None:
    configure(pair)
    early(pair, 8)
    routes = [any_path(WeightedCluster(f"none-{n}", 1), prefix=f"/none/{n}") for n in range(missing)]
    routes.append(any_path(WeightedCluster("all", 1)))
    hosts = (*(VirtualHost(f"empty-{n}", (f"empty-{n}",), ()) for n in range(empty)), VirtualHost("v", ("*",), tuple(routes)))
    pair.worker.commit(blobs.put_destination(Destination(SCOPE, f"{HOST}:{HTTP_PORT}", hosts, None)))
    settled(pair)
    pair.origin(8080, lambda connection: (read_message(connection), connection.sendall(response(b"ok")))[1])
    connection = pair.dial()
    if looked_at:
        until(lambda: pair.worker.header["tunnels_opened"] == 2, "there is a tunnel before there is a request")
    connection.sendall(request())
    assert read_message(connection).body == b"ok"
    assert pair.worker.header["tunnels_early"] == (1 if looked_at else 0)


@pytest.mark.parametrize(("tunnels", "waited"), [(0, 2), (8, 1)])
def test_another_is_dialled_before_a_tunnel_is_full(pair: Mesh, tunnels: int, waited: int) -> None:
    configure(pair, protocol=Protocol.TCP)
    early(pair, tunnels)
    pair.origin(8080, echo)
    connections = [talk(pair) for _ in range(76)]
    settled(pair)
    connections += [talk(pair) for _ in range(14)]  # a reason to look again, if there was no socket to spare
    settled(pair)
    connections += [talk(pair) for _ in range(30)]
    header = pair.worker.header
    assert (header["tunnels_waited"], header["tunnels_opened"]) == (waited, 4)


def test_where_it_failed_none_is_dialled_ahead(pair: Mesh) -> None:
    endpoints(pair, pair.pods.server.ip, pair.pods.other.ip, weights=(1000, 1), protocol=Protocol.HTTP)
    early(pair, 8)
    settled(pair)
    pair.origin(8080, lambda connection: (read_message(connection), connection.sendall(response(b"ok")))[1])
    for _ in range(3):
        begun = time.monotonic()
        connection = pair.dial()
        connection.sendall(request())
        assert read_message(connection).body == b"ok"
        until(lambda: time.monotonic() > begun + 1.1, "the next connection is a reason to look again")  # noqa: B023
    assert pair.worker.header["tunnels_failed"] == 1, "nobody listens there"


# ---- GOAWAY -----------------------------------------------------------------------------------------------------------------------------

class Leaver:
    """A server of tunnels that answers HTTP in each stream, and says GOAWAY when it is told to. No code of ours."""

    def __init__(self, netns: Netns, folder: Path, together: int) -> None:
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.verify_mode = ssl.CERT_REQUIRED
        self.context.load_verify_locations(ROOT.pem(folder))
        self.context.load_cert_chain(ROOT.issue(SERVER_ID).pem(folder))
        self.context.set_alpn_protocols(["h2"])
        self.listener = netlink.in_netns(netns.path, lambda: socket.create_server((netns.ip, 15008)))
        self.together = together  # the first so many requests are answered when all of them came
        self.first: list[Callable[[], None]] = []
        self.tunnels = 0
        self.leave = threading.Event()
        self.threads = [threading.Thread(target=self._accept, daemon=True)]
        self.threads[0].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                plain, _ = self.listener.accept()
                self.tunnels += 1
                self.threads.append(threading.Thread(target=self._serve, args=(plain, self.tunnels == 1), daemon=True))
                self.threads[-1].start()

    def _serve(self, plain: socket.socket, leaves: bool) -> None:
        with contextlib.suppress(OSError), self.context.wrap_socket(plain, server_side=True) as connection:
            connection.settimeout(0.02)
            peer = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, validate_inbound_headers=False))
            peer.initiate_connection()
            while True:
                if self.leave.is_set() and leaves:
                    connection.sendall(peer.data_to_send() + GoAwayFrame(0, last_stream_id=2**31 - 1, error_code=0).serialize())
                    leaves = False
                connection.sendall(peer.data_to_send())
                try:
                    data = connection.recv(65536)
                except TimeoutError:
                    continue
                if not data:
                    return
                for event in peer.receive_data(data):
                    if isinstance(event, h2.events.RequestReceived):
                        peer.send_headers(event.stream_id, [(":status", "200")])
                    elif isinstance(event, h2.events.DataReceived):
                        peer.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                        self._answer(peer, event.stream_id)

    def _answer(self, peer: h2.connection.H2Connection, stream: int) -> None:
        def say() -> None:
            peer.send_data(stream, response(b"ok"))

        if self.together == 0:
            say()
            return
        self.first.append(say)
        if len(self.first) == self.together:
            self.together = 0
            for one in self.first:
                one()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()


class Clients:
    """Four of them ask, each on one connection, as long as the block lasts. Each answer was 200 when it ends without an exception."""

    def __init__(self, pair: Mesh) -> None:
        self.answers: list[int] = []
        self._broken: list[BaseException] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(pair.dial(),)) for _ in range(4)]

    def _ask(self, connection: socket.socket) -> None:
        try:
            while not self._stop.is_set():
                connection.sendall(request())
                self.answers.append(read_message(connection).status)
        except BaseException as error:
            self._broken.append(error)

    def go_on(self, many: int) -> None:
        """So many more answers come."""
        wanted = len(self.answers) + many
        until(lambda: self._broken or len(self.answers) > wanted, "requests flow", timeout=20)

    def __enter__(self) -> Clients:
        for one in self._threads:
            one.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stop.set()
        for one in self._threads:
            one.join(timeout=20)
        if kind is None:
            assert self._broken == [] and set(self.answers) == {200}


@pytest.mark.parametrize("tunnels", [0, 8])
def test_no_request_waits_for_the_handshake_that_follows_a_goaway(pair: Mesh, tmp_path: Path, tunnels: int) -> None:
    other = pair.pods.other
    pair.pods = replace(pair.pods, server=other)
    configure(pair)
    early(pair, tunnels)
    leaver = Leaver(other, tmp_path, together=4)
    try:
        with Clients(pair) as clients:
            clients.go_on(100)
            until(lambda: pair.worker.header["sockets_ready"] >= 4, "sockets are ready", timeout=20)
            waited = pair.worker.header["tunnels_waited"]
            leaver.leave.set()
            until(lambda: leaver.tunnels == 2, "another tunnel is dialled", timeout=20)
            clients.go_on(200)
    finally:
        leaver.close()
    since = pair.worker.header["tunnels_waited"] - waited
    assert since == 0 if tunnels else since > 0


POD_GO = 73  # ext/core/protocol.pxd


def test_a_pod_whose_peers_are_to_go_elsewhere_ends_its_tunnels_with_their_last_stream_and_no_request_fails(pair: Mesh) -> None:
    configure(pair)
    early(pair, 8)

    rest = threading.Event()

    class Slow(Web):
        def __call__(self, connection: socket.socket) -> None:
            if b"/long" not in connection.recv(64, socket.MSG_PEEK):
                super().__call__(connection)
                return
            whole = response(b"x" * 1000)
            connection.sendall(whole[:-900])
            rest.wait(60)
            connection.sendall(whole[-900:])

    pair.origin(8080, Slow())
    long = pair.dial()
    long.sendall(request("/long"))
    receive_until(long, b"x" * 100)
    try:
        with Clients(pair) as clients:
            clients.go_on(100)
            before = pair.worker.header
            pair.worker.send(POD_GO, struct.pack("<I", 2))
            until(lambda: pair.worker.header["tunnels_opened"] >= before["tunnels_opened"] + 2, "another tunnel in its place", timeout=20)
            clients.go_on(100)
            assert pair.worker.header["tunnels_open"] > before["tunnels_open"], "the old one has a stream"
            rest.set()
            assert receive(long, 900) == b"x" * 900
            until(lambda: pair.worker.header["tunnels_open"] == before["tunnels_open"], "it ends with its last stream", timeout=20)
            clients.go_on(100)
    finally:
        rest.set()
