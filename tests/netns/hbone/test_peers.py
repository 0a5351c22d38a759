"""Our ends of a tunnel beside programs that know nothing of ours: Envoy on either side, openssl s_client, Python's ssl with h2."""
from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h2.config
import h2.connection
import h2.events
import pytest

from agent import netlink
from agent.model.workload import Protocol
from tests.support.backends import program
from tests.support.hbone import CLIENT_ID, SERVER_ID, configure, enrol
from tests.support.mesh import TCP_PORT, Mesh, Web, echo, read_message, receive, receive_all, request, response
from tests.support.netns import Netns
from tests.support.pki import Authority, Issued
from tests.support.wait import until

pytestmark = pytest.mark.netns
ROOT = Authority()
PEERS = Path(__file__).parents[2] / "bench" / "peers"
REMOTE_ID = "spiffe://cluster.local/ns/default/sa/remote"


@pytest.fixture
def pair(mesh: Mesh) -> Mesh:
    enrol(mesh, ROOT)
    return mesh


# ---- Python as the client ---------------------------------------------------------------------------------------------------------

@dataclass
class Tunnel:
    """One connection with one CONNECT."""

    socket: ssl.SSLSocket
    h2: h2.connection.H2Connection
    status: str = ""
    body: bytes = b""
    ended: bool = False

    @classmethod
    def dial(cls, netns: Netns, to: str, issued: Issued | None, folder: Path, root: Authority = ROOT) -> Tunnel:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.load_verify_locations(root.pem(folder))
        context.set_alpn_protocols(["h2"])
        if issued is not None:
            context.load_cert_chain(issued.pem(folder))
        plain = netlink.in_netns(netns.path, lambda: socket.create_connection((to, 15008), timeout=10))
        made = cls(context.wrap_socket(plain), h2.connection.H2Connection(h2.config.H2Configuration(
            validate_outbound_headers=False, normalize_outbound_headers=False)))
        made.h2.initiate_connection()
        return made

    def ask(self, authority: str, method: str = "CONNECT") -> str:
        """The status."""
        fields = [(":method", method), (":authority", authority)]
        if method != "CONNECT":
            fields += [(":scheme", "https"), (":path", "/")]
        self.h2.send_headers(1, fields)
        while not self.status:
            self.turn()
        return self.status

    def turn(self) -> None:
        self.socket.sendall(self.h2.data_to_send())
        data = self.socket.recv(65536)
        assert data, "the tunnel was closed"
        for event in self.h2.receive_data(data):
            if isinstance(event, h2.events.ResponseReceived):
                self.status = dict(event.headers)[b":status"].decode()
            elif isinstance(event, h2.events.DataReceived):
                self.body += event.data
                self.h2.acknowledge_received_data(event.flow_controlled_length, 1)
            elif isinstance(event, h2.events.StreamEnded | h2.events.StreamReset):
                self.ended = True
        self.socket.sendall(self.h2.data_to_send())

    def exchange(self, data: bytes, size: int) -> bytes:
        for at in range(0, len(data), 16_384):
            self.h2.send_data(1, data[at:at + 16_384])
        while len(self.body) < size:
            self.turn()
        return self.body

    def close(self) -> None:
        self.socket.close()


@pytest.fixture
def dialled(pair: Mesh, tmp_path: Path) -> Iterator[Any]:
    made: list[Tunnel] = []

    def dial(issued: Issued | None = None) -> Tunnel:
        made.append(Tunnel.dial(pair.pods.other, pair.pods.server.ip, issued or ROOT.issue(REMOTE_ID), tmp_path))
        return made[-1]

    yield dial
    for one in made:
        one.close()


def test_a_stranger_to_our_code_gets_through_and_keeps_its_address(pair: Mesh, dialled: Any) -> None:
    configure(pair, protocol=Protocol.TCP)
    origin = pair.origin(8080, echo)
    tunnel = dialled()
    assert tunnel.ask(f"{pair.pods.server.ip}:8080") == "200"
    assert tunnel.exchange(b"x" * 30_000, 30_000) == b"x" * 30_000
    assert origin.peers == [pair.pods.other.ip]
    tunnel.h2.end_stream(1)
    while not tunnel.ended:
        tunnel.turn()


def test_http_is_read_at_the_destination_too(pair: Mesh, dialled: Any) -> None:
    configure(pair)
    web = Web(response(b"hello"))
    pair.origin(8080, web)
    tunnel = dialled()
    assert tunnel.ask(f"{pair.pods.server.ip}:8080") == "200"
    assert b"hello" in tunnel.exchange(request("/a"), 20)
    assert "x-request-id" in dict(web.seen[0].headers), "our HTTP, not opaque bytes"


@pytest.mark.parametrize(("authority", "method", "status"), [
    ("10.244.1.99:8080", "CONNECT", "400"), ("origin.default.svc.cluster.local:8080", "CONNECT", "400"), ("{ip}", "CONNECT", "400"),
    ("{ip}:0x50", "CONNECT", "400"), ("{ip}:15006", "CONNECT", "400"), ("{ip}:15008", "CONNECT", "400"),
    ("127.0.0.1:8080", "CONNECT", "400"),
    ("{ip}:65536", "CONNECT", "400"), ("{ip}:8080", "GET", "400"), ("{ip}:8081", "CONNECT", "503"), ("[{ip6}]:8081", "CONNECT", "503"),
])
def test_what_cannot_be_is_answered(pair: Mesh, dialled: Any, authority: str, method: str, status: str) -> None:
    configure(pair, protocol=Protocol.TCP)
    server = pair.pods.server
    assert dialled().ask(authority.format(ip=server.ip, ip6=server.ip6), method) == status


def test_who_is_not_believed_is_told_to_the_operator(pair: Mesh, dialled: Any) -> None:
    configure(pair, protocol=Protocol.TCP)
    cases = {Authority("stranger").issue(REMOTE_ID): "does not chain to a root",
             ROOT.issue("spiffe://other.example/ns/default/sa/remote"): "another trust domain",
             ROOT.issue(REMOTE_ID, days=(-2, -1)): "has expired"}
    for issued, text in cases.items():
        with pytest.raises((ssl.SSLError, OSError, AssertionError)):
            dialled(issued).ask(f"{pair.pods.server.ip}:8080")
        record = pair.worker.record()
        assert text in record["failure"] and "/ns/default/sa/remote" in record["failure"]
        assert (record["flag"], record["details"]) == ("DPE", "peer_not_trusted")
        assert record["downstream_remote"].startswith(pair.pods.other.ip)


# ---- Python as the server ---------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def refuser(netns: Netns, status: str, folder: Path) -> Iterator[list[bytes]]:
    """Answers every CONNECT with `status`; "" resets the stream instead. Gives the authorities that were asked for."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(ROOT.pem(folder))
    context.load_cert_chain(ROOT.issue(SERVER_ID).pem(folder))
    context.set_alpn_protocols(["h2"])
    listener = netlink.in_netns(netns.path, lambda: socket.create_server((netns.ip, 15008)))
    asked: list[bytes] = []

    def serve() -> None:
        with contextlib.suppress(OSError), listener:
            plain, _ = listener.accept()
            with context.wrap_socket(plain, server_side=True) as connection:
                peer = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, validate_inbound_headers=False))
                peer.initiate_connection()
                connection.sendall(peer.data_to_send())
                while data := connection.recv(65536):
                    for event in peer.receive_data(data):
                        if isinstance(event, h2.events.RequestReceived):
                            asked.append(dict(event.headers)[b":authority"])
                            if status:
                                peer.send_headers(event.stream_id, [(":status", status)], end_stream=True)
                            else:
                                peer.reset_stream(event.stream_id)
                    connection.sendall(peer.data_to_send())

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield asked
    finally:
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(("status", "text"), [
    ("401", "answered 401: its policy denies this identity"), ("400", "answered 400: it does not serve that address"),
    ("503", "answered 503: it could not connect to the application"), ("302", "refused the connection"),
    ("", "the tunnel's stream was reset before it was answered"),
])
def test_what_the_destinations_proxy_refuses_is_told_in_words(pair: Mesh, tmp_path: Path, status: str, text: str) -> None:
    other = pair.pods.other
    pair.pods = replace(pair.pods, server=other)
    configure(pair, protocol=Protocol.TCP)
    with refuser(other, status, tmp_path) as asked:
        connection = pair.dial(port=TCP_PORT)
        with contextlib.suppress(ConnectionError):
            connection.sendall(b"x")
            assert connection.recv(1) == b"", "nobody was reached"
        record = pair.worker.record()
    assert asked == [f"{other.ip}:8080".encode()]
    assert text in record["failure"] and (record["reporter"], record["flag"]) == ("source", "UF")


# ---- openssl s_client ------------------------------------------------------------------------------------------------------------------

def s_client(mesh: Mesh, folder: Path, *more: str, issued: Issued | None) -> str:
    argv = ["openssl", "s_client", "-connect", f"{mesh.pods.server.ip}:15008", "-CAfile", ROOT.pem(folder), "-alpn", "h2", *more]
    if issued is not None:
        argv += ["-cert", issued.pem(folder), "-key", issued.pem(folder)]
    done = mesh.pods.other.run(*argv, check=False, input="", errors="replace")
    return done.stdout + done.stderr


def test_openssl_sees_what_is_promised(pair: Mesh, tmp_path: Path) -> None:
    configure(pair)
    said = s_client(pair, tmp_path, issued=ROOT.issue(REMOTE_ID))
    for text in ("TLSv1.3", "TLS_AES_128_GCM_SHA256", "ALPN protocol: h2", "Server Temp Key: X25519", "Verify return code: 0 (ok)"):
        assert text in said, said
    assert "Peer signing digest: SHA256" in said and "New Session Ticket" not in said


def test_openssl_without_certificate_and_of_tls_1_2_is_refused(pair: Mesh, tmp_path: Path) -> None:
    configure(pair)
    assert "alert certificate required" in s_client(pair, tmp_path, "-ign_eof", issued=None)
    assert "showed no certificate" in pair.worker.record()["failure"]
    assert "alert protocol version" in s_client(pair, tmp_path, "-tls1_2", issued=ROOT.issue(REMOTE_ID))
    assert "does not speak TLS 1.3" in pair.worker.record()["failure"]


# ---- Envoy ------------------------------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def envoy(netns: Netns, name: str, folder: Path, port: int, **values: str) -> Iterator[None]:
    text = (PEERS / f"{name}.yaml").read_text()
    for key, value in {"DIR": str(folder), "FULL": "true", "PORT": "8080", "CLIENT": CLIENT_ID, "SERVER": SERVER_ID, **values}.items():
        text = text.replace(f"@{key}@", value)
    path = folder / f"{name}.yaml"
    path.write_text(text)
    process = netns.start(program("envoy"), "-c", str(path), "--concurrency", "1", "--log-level", "error", "--disable-hot-restart")

    def listens() -> bool:
        assert process.poll() is None, "Envoy ended"
        return bool(netns.run("ss", "-Htnl", f"sport = :{port}").stdout)

    try:
        until(listens, "Envoy listens", timeout=30)
        yield
    finally:
        process.kill()
        process.wait(timeout=5)


def files(folder: Path, name: str, issued: Issued) -> None:
    for kind in ("pem", "key"):
        (folder / f"{name}.{kind}").write_text(Path(issued.pem(folder)).read_text())
    (folder / "root.pem").write_text(Path(ROOT.pem(folder)).read_text())


def test_envoy_dials_us(pair: Mesh, tmp_path: Path) -> None:
    configure(pair)
    web = Web(response(b"from behind the tunnel"))
    pair.origin(8080, web)
    files(tmp_path, "client", ROOT.issue(REMOTE_ID))
    with envoy(pair.pods.other, "envoy-hbone-source", tmp_path, 15001, ORIGIN=pair.pods.server.ip):
        for _ in range(3):
            connection = netlink.in_netns(pair.pods.other.path, lambda: socket.create_connection(("127.0.0.1", 15001), timeout=10))
            with connection:
                connection.sendall(request("/envoy") * 2)
                assert [read_message(connection).body for _ in range(2)] == [b"from behind the tunnel"] * 2
        assert len(web.seen) == 6


def test_we_dial_envoy(pair: Mesh, tmp_path: Path) -> None:
    other = pair.pods.other
    pair.pods = replace(pair.pods, server=other)
    configure(pair, protocol=Protocol.TCP)
    origin = pair.origin(8080, echo, other)
    files(tmp_path, "server", ROOT.issue(SERVER_ID))
    with envoy(other, "envoy-hbone-destination", tmp_path, 15008, ORIGIN=other.ip):
        data = bytes(range(256)) * 20_000
        for _ in range(3):
            connection = pair.dial(port=TCP_PORT)
            connection.sendall(b"x")
            assert receive(connection, 1) == b"x"
            connection.shutdown(socket.SHUT_WR)
            assert receive_all(connection) == b""
        connection = pair.dial(port=TCP_PORT)
        connection.settimeout(20)
        for at in range(0, len(data), 256_000):
            connection.sendall(data[at:at + 256_000])
            assert receive(connection, len(data[at:at + 256_000])) == data[at:at + 256_000]
        assert len(origin.peers) == 4


def test_envoy_of_another_identity_is_not_dialled(pair: Mesh, tmp_path: Path) -> None:
    other = pair.pods.other
    pair.pods = replace(pair.pods, server=other)
    configure(pair, protocol=Protocol.TCP)
    origin = pair.origin(8080, echo, other)
    files(tmp_path, "server", ROOT.issue(REMOTE_ID))
    with envoy(other, "envoy-hbone-destination", tmp_path, 15008, ORIGIN=other.ip):
        with pytest.raises((ConnectionError, AssertionError)):
            connection = pair.dial(port=TCP_PORT)
            connection.sendall(b"secret")
            receive(connection, 1)
        record = until(lambda: [r for r in pair.worker.records() if r["reporter"] == "source"], "a record")[0]
        assert record["failure"].startswith(f"{REMOTE_ID}: it is not the identity") and origin.peers == []
