"""Narrows' own pair for the tunnel cases (pairs.py): two keepers with one worker each, as two nodes have them, without agents.

Keys are made in the keepers, and the requests for certificates signed by the root that the pair's other files name. Both ends know the
same mesh: a service of the address that clients dial, and one workload that is reached by HBONE. The server's namespace has Narrows' rules
too, since the last hop keeps the client's address.
"""
from __future__ import annotations

import asyncio
import ctypes
import os
from collections.abc import Callable
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from agent import netlink
from agent.capture.plan import plan
from agent.capture.reconcile import Reconciler
from agent.dataplane import blobs
from agent.dataplane.client import connect
from agent.model.identity import Certificate, Trust
from agent.model.pod import CaptureSettings
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
from agent.model.workload import Protocol, Service, ServicePort, Tunnel, Workload, WorkloadPort
from tests.bench.proxies import HOST, SCOPE, SETTINGS
from tests.bench.tools import HTTP_PORT, SOURCE_PORT
from tests.bench.topology import CAPTURED_PORT, VIP, BenchError, Site, family, wait_listening
from tests.support.keeper import Keeper
from tests.support.wait import until

OPENSSL = "NARROWS_BENCH_OPENSSL"  # of the environment: a folder with another libssl.so.3 and libcrypto.so.3
DOMAIN = "cluster.local"
SERVICE = f"default/{HOST}"
# indexes in counters, and the pods' handles
CLIENT, SERVER, SERVED = 1, 2, 3
Sign = Callable[[x509.CertificateSigningRequest, str], x509.Certificate]


class Mesh:
    """What both ends are told. `http`: layer 7 at the source; the destination passes bytes on in either case."""

    def __init__(self, site: Site, server: Site, http: bool) -> None:
        self.site, self.server, self.http = site, server, http
        origin = ip_address(site.address)
        declared = Protocol.HTTP if http else Protocol.TCP
        ports = (HTTP_PORT, SOURCE_PORT)
        self.service = Service("default", HOST, "origin", (ip_address(VIP),), tuple(ServicePort(port, port, declared) for port in ports))
        self.workloads = {
            CLIENT: _workload("client", site.netns.ip),
            SERVER: replace(_workload("server", site.address), tunnel=Tunnel.HBONE,
                            ports=tuple(WorkloadPort(SERVICE, port, port, Protocol.TCP) for port in ports)),
        }
        self.clusters = [Cluster(SCOPE, f"origin-{port}", SERVICE, Balancer.ROUND_ROBIN, 5_000, (Endpoint(origin, port),))
                         for port in ports]
        self.destinations = []
        for port in ports:
            one = (WeightedCluster(f"origin-{port}", 1),)
            any_path = Route("all", RouteMatch(StringMatch(MatchKind.PREFIX, "/")), one, timeout_ms=15_000)
            hosts = (VirtualHost("all", ("*",), (any_path,)),)
            self.destinations.append(Destination(SCOPE, f"{HOST}:{port}", hosts if http else None, None if http else one))

    def entries(self) -> list[blobs.Entry]:
        return [
            blobs.put_settings(SETTINGS),
            blobs.put_service(SERVED, self.service),
            *(blobs.put_workload(index, one, lambda _: SERVED) for index, one in self.workloads.items()),
            *(blobs.put_cluster(one, lambda _: SERVED) for one in self.clusters),
            *(blobs.put_destination(one) for one in self.destinations),
        ]


def _workload(account: str, address: str) -> Workload:
    uid = f"Kubernetes//Pod/default/{account}"
    return Workload(uid, account, "default", (ip_address(address),), f"node-{account}", account, DOMAIN, account, "pod", account, "v1",
                    "Kubernetes", True, ())


def openssl(folder: str) -> str:
    """The version of the libcrypto.so.3 in `folder`. BenchError: there is none, or it cannot be loaded here."""
    try:
        library = ctypes.CDLL(str(Path(folder) / "libcrypto.so.3"))
    except OSError as error:
        raise BenchError(f"no OpenSSL 3 in {folder}: {error}") from error
    library.OpenSSL_version.restype = ctypes.c_char_p
    return str(library.OpenSSL_version(0).decode())


def start(site: Site, server: Site, http: bool, home: Path, root: x509.Certificate, sign: Sign) -> tuple[Keeper, Keeper]:
    """(source, destination), both ready, with the OpenSSL of NARROWS_BENCH_OPENSSL if it names a folder. Whoever calls stops them."""
    wanted = os.environ.get(OPENSSL)
    mesh = Mesh(site, server, http)
    made: list[Keeper] = []
    try:
        for index, where, listens in ((SERVER, server, 15008), (CLIENT, site, CAPTURED_PORT)):
            keeper = Keeper(home / f"run-{index}", "--workers", "1", env={"LD_LIBRARY_PATH": wanted} if wanted else None).wait()
            made.append(keeper)
            until(lambda keeper=keeper: "is ready" in keeper.text, "the worker is ready", timeout=15)
            if wanted:
                _check_openssl(keeper, wanted)
            asyncio.run(_configure(keeper, mesh, index, where, root, sign))
            wait_listening(where.netns, listens, None, keeper.log)
    except BaseException:
        for keeper in made:
            keeper.stop()
        raise
    return made[1], made[0]


def _check_openssl(keeper: Keeper, folder: str) -> None:
    for pid in family(keeper.pid):
        maps = Path(f"/proc/{pid}/maps").read_text()
        for name in ("libssl.so.3", "libcrypto.so.3"):
            used = {line.split(maxsplit=5)[5] for line in maps.splitlines() if line.endswith(f"/{name}")}
            if used - {str(Path(folder).resolve() / name)}:
                raise BenchError(f"process {pid} uses {', '.join(sorted(used))} instead of {folder}'s")
    if not used:
        raise BenchError(f"the worker {pid} uses no libcrypto")


async def _configure(keeper: Keeper, mesh: Mesh, index: int, where: Site, root: x509.Certificate, sign: Sign) -> None:
    if not where.captured:
        instance = f"bench{os.getpid()}"
        await Reconciler(instance).apply(where.netns.path, plan(CaptureSettings(), (4,), instance))
    workload = mesh.workloads[index]
    uid = f"pod-{workload.name}"
    client = await connect(keeper.path)
    try:
        key, request = await client.make_key(workload.identity)
        leaf = sign(x509.load_der_x509_csr(request), workload.identity)
        begins, ends = (int(when.timestamp()) for when in (leaf.not_valid_before_utc, leaf.not_valid_after_utc))
        await client.commit([
            *mesh.entries(),
            blobs.put_pod(uid, index, workload.uid, SCOPE, workload.addresses, workload.identity),
            blobs.put_trust(Trust(DOMAIN, (root.public_bytes(Encoding.DER),))),
            blobs.put_certificate(Certificate(workload.identity, key, begins, ends, (leaf.public_bytes(Encoding.DER),))),
        ])
        fd = netlink.open_namespace(where.netns.path)
        try:
            await client.add_pod(index, uid, (4,), fd, workload.identity)
        finally:
            os.close(fd)
    finally:
        await client.close()
