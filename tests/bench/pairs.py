"""Two proxies with mutual TLS between them: the cases of `make bench` in which the origin is on another node.

    client namespace (10.61.k.2)                               server namespace (10.61.k.1)
      load -> 10.96.0.10:PORT, REDIRECT -> source :15001  --veth-->  :15008 destination -> origin

Both proxies run on the proxies' core, load and origin on the other; what a unit of work costs is what both cost. Each pair has
namespaces and an origin of its own, since every destination listens on 15008.

    envoy-hbone   tcp_proxy into CONNECT streams, and out of them: what Narrows does at layer 4
    envoy-mtls    HTTP/1.1 parsed at both ends, HTTP/1.1 in TLS between: sidecars as they are
    haproxy-h2    HTTP/1.1 parsed at both ends, HTTP/2 in TLS between: the best of the peers
    haproxy-h1    the same with HTTP/1.1 between
    narrows       bytes into CONNECT streams; with `http` HTTP/1.1 parsed at the source (tunnels.py)
"""
from __future__ import annotations

import datetime
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tests.bench import tunnels
from tests.bench.proxies import Proxy, envoy, fill, program
from tests.bench.tools import HTTP_PORT, SOURCE_PORT, start_origin
from tests.bench.topology import CAPTURED_PORT, PROXY_CORE, Site, Topology, pin, wait_listening

HBONE_PORT = 15008
CLIENT, SERVER = "spiffe://cluster.local/ns/default/sa/client", "spiffe://cluster.local/ns/default/sa/server"
FILES = {  # name: (program, files' name, ALPN between them)
    "envoy-hbone": ("envoy", "envoy-hbone", ""),
    "envoy-mtls": ("envoy", "envoy-mtls", ""),
    "haproxy-h2": ("haproxy", "haproxy-mtls", "h2"),
    "haproxy-h1": ("haproxy", "haproxy-mtls", "http/1.1"),
}


@dataclass(frozen=True)
class Authority:
    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    def sign(self, request: x509.CertificateSigningRequest, identity: str) -> x509.Certificate:
        public = request.public_key()
        assert isinstance(public, ec.EllipticCurvePublicKey)
        return _certificate("narrows", public, identity, self.key)


def certificates(home: Path) -> Authority:
    """A P-256 root, and for client and server a key and a certificate with a SPIFFE id, as PEM; `.both` is what HAProxy wants."""
    root_key = ec.generate_private_key(ec.SECP256R1())
    root = _certificate("root", root_key.public_key(), None, root_key)
    (home / "root.pem").write_bytes(root.public_bytes(serialization.Encoding.PEM))
    for name, identity in (("client", CLIENT), ("server", SERVER)):
        key = ec.generate_private_key(ec.SECP256R1())
        chain = _certificate(name, key.public_key(), identity, root_key).public_bytes(serialization.Encoding.PEM)
        secret = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        (home / f"{name}.pem").write_bytes(chain)
        (home / f"{name}.key").write_bytes(secret)
        (home / f"{name}.both").write_bytes(chain + secret)
    return Authority(root_key, root)


def _certificate(name: str, public: ec.EllipticCurvePublicKey, identity: str | None,
                 signer: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    made = (x509.CertificateBuilder().subject_name(subject).issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "root")]))
            .public_key(public).serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=2)).not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=identity is None, path_length=None), critical=True))
    if identity is not None:
        made = made.add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(identity)]), critical=False)
        made = made.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
    return made.sign(signer, hashes.SHA256())


def start(name: str, mode: str, site: Site, server: Site, port: int, folder: Path, full: bool = False) -> Proxy:
    """`mode`: tunnel-http is layer 7 at the source; the peers' names say what they do. `full`: no session is resumed.

    BenchError says what a peer said when it does not come up.
    """
    home = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=folder))
    authority = certificates(home)
    if name == "narrows":
        source, destination = tunnels.start(site, server, mode == "tunnel-http", home, authority.certificate, authority.sign)

        def end() -> None:
            source.stop()
            destination.stop()

        return _pinned(Proxy(name, site, port, source.pid, end, destination.pid, home))
    kind, files, alpn = FILES[name]
    made: list[subprocess.Popen[bytes]] = []
    for end, where, listens in (("destination", server, HBONE_PORT), ("source", site, CAPTURED_PORT)):
        suffix = {"envoy": "yaml", "haproxy": "cfg"}[kind]
        config = fill(f"{files}-{end}.{suffix}", home / f"{end}.{suffix}", ORIGIN=site.address, PORT=port, DIR=home, ALPN=alpn,
                      CLIENT=CLIENT, SERVER=SERVER, FULL=str(full).lower())
        argv = [envoy(), "-c", str(config), "--concurrency", "1", "--log-level", "error", "--disable-hot-restart"] \
            if kind == "envoy" else [program("haproxy"), "-db", "-f", str(config)]
        log = home / f"{end}.log"
        with open(log, "wb") as out:
            made.append(where.netns.start(*argv, stdin=subprocess.DEVNULL, stdout=out, stderr=out))
        wait_listening(where.netns, listens, made[-1], log)

    def stop() -> None:
        for process in reversed(made):
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(5)

    return _pinned(Proxy(name, site, port, made[1].pid, stop, made[0].pid, home))


def _pinned(pair: Proxy) -> Proxy:
    pin(pair.pids(), PROXY_CORE)
    return pair


def sites(topology: Topology, label: str, folder: Path) -> tuple[Site, Site]:
    """Client and server, with an origin in the server's namespace."""
    site, server = topology.pair(label)
    log = folder / f"origin-{server.netns.name}.log"
    start_origin(server.netns, log)
    for port in (HTTP_PORT, SOURCE_PORT):
        wait_listening(server.netns, port, server.netns.started[0], log)
    return site, server
