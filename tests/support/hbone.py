"""Pods of a mesh with identities: keys and certificates in a real worker, and workloads that are reached by tunnels."""
from __future__ import annotations

import fcntl
import os
import struct
from dataclasses import replace
from ipaddress import ip_address

from agent.dataplane import blobs
from agent.model.identity import Certificate, Trust
from agent.model.routing import WeightedCluster
from agent.model.workload import IPAddress, Protocol, Service, ServicePort, Tunnel, Workload, WorkloadPort
from tests.support.mesh import (
    AUTO_PORT,
    CLIENT,
    HOST,
    HTTP_PORT,
    SCOPE,
    SERVER,
    SERVICE,
    SERVICE_INDEX,
    TCP_PORT,
    VIP,
    VIP6,
    Mesh,
    any_path,
    cluster,
    destination,
)
from tests.support.mesh import workload as plain_workload
from tests.support.netns import Netns
from tests.support.pki import Authority, Issued
from tests.support.worker import Worker

KEY = 72
DOMAIN = "cluster.local"
CLIENT_ID, SERVER_ID = (f"spiffe://{DOMAIN}/ns/default/sa/{name}" for name in ("client", "server"))
UIDS = {CLIENT: "Kubernetes//Pod/default/client-0", SERVER: "Kubernetes//Pod/default/server-0"}


def give_key(worker: Worker, number: int, identity: str, key: bytes) -> None:
    """As the keeper does: PKCS#8 in a sealed memfd."""
    fd = os.memfd_create("narrows-key", os.MFD_ALLOW_SEALING)
    os.write(fd, key)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
    name = identity.encode()
    worker.send(KEY, struct.pack("<II", number, len(name)) + name, [fd])
    os.close(fd)


def certificate(issued: Issued, identity: str, key: int) -> blobs.Put:
    leaf = issued.certificates[0]
    return blobs.put_certificate(Certificate(identity, key, int(leaf.not_valid_before_utc.timestamp()),
                                             int(leaf.not_valid_after_utc.timestamp()), tuple(issued.chain)))


def trust(*roots: Authority, crls: tuple[bytes, ...] = ()) -> blobs.Put:
    return blobs.put_trust(Trust(DOMAIN, tuple(root.der for root in roots), crls))


def workload(index: int, pod: Netns, account: str, *ports: WorkloadPort, tunnel: Tunnel = Tunnel.HBONE) -> Workload:
    return replace(plain_workload(UIDS[index], pod, *ports), service_account=account, tunnel=tunnel)


def addresses(pod: Netns) -> tuple[IPAddress, ...]:
    return ip_address(pod.ip), ip_address(pod.ip6)


def configure(mesh: Mesh, *extra: blobs.Entry, protocol: Protocol = Protocol.HTTP, tunnel: Tunnel = Tunnel.HBONE,
              expected: str = "server") -> None:
    """Client and server, both with an identity; the server is reached by `tunnel`, as the service account `expected`."""
    ports = tuple(ServicePort(port, 8080, declared) for port, declared in (
        (HTTP_PORT, Protocol.HTTP), (AUTO_PORT, Protocol.AUTO), (TCP_PORT, Protocol.TCP)))
    service = Service("default", HOST, "origin", (ip_address(VIP), ip_address(VIP6)), ports)
    declared = WorkloadPort(SERVICE, HTTP_PORT, 8080, protocol)
    one = WeightedCluster("all", 1)
    mesh.worker.commit(
        blobs.put_pod("pod-c", 1, UIDS[CLIENT], SCOPE, addresses(mesh.pods.client), CLIENT_ID),
        blobs.put_pod("pod-s", 2, UIDS[SERVER], SCOPE, addresses(mesh.pods.server), SERVER_ID),
        blobs.put_service(SERVICE_INDEX, service),
        blobs.put_workload(CLIENT, workload(CLIENT, mesh.pods.client, "client", tunnel=tunnel), lambda _: SERVICE_INDEX),
        blobs.put_workload(SERVER, workload(SERVER, mesh.pods.server, expected, declared, tunnel=tunnel), lambda _: SERVICE_INDEX),
        cluster("all", mesh.endpoint()),
        destination(HTTP_PORT, http=(any_path(one),)),
        destination(AUTO_PORT, http=(any_path(one),), tcp=(one,)),
        destination(TCP_PORT, tcp=(one,)),
        *extra)


def enrol(mesh: Mesh, root: Authority, *, who: tuple[int, ...] = (CLIENT, SERVER)) -> dict[int, Issued]:
    """Keys and certificates of both pods."""
    made = {}
    for index, identity in ((CLIENT, CLIENT_ID), (SERVER, SERVER_ID)):
        if index in who:
            made[index] = root.issue(identity)
            give_key(mesh.worker, 100 + index, identity, made[index].key)
            mesh.worker.commit(trust(root), certificate(made[index], identity, 100 + index))
    return made
