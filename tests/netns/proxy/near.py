"""What tests of two pods of one worker share: both in one mesh, and what the worker says of them."""
from __future__ import annotations

import socket
from dataclasses import replace
from ipaddress import ip_address
from typing import Any

from agent.dataplane import blobs
from agent.model.policy import Action, Policy, Rule, Scope
from agent.model.workload import Protocol, Tunnel, WorkloadPort, spiffe
from tests.support.mesh import (
    CLIENT,
    HTTP_PORT,
    SCOPE,
    SERVER,
    SERVICE,
    SERVICE_INDEX,
    TCP_PORT,
    VIP,
    Mesh,
    entered,
    everything,
    receive,
    workload,
)
from tests.support.netns import Netns
from tests.support.wait import until

CLIENT_ID, SERVER_ID = (spiffe("cluster.local", "default", name) for name in ("client", "server"))


def put_pod(mesh: Mesh, index: int, *, identity: str | None = None, excluded: tuple[int, ...] | None = ()) -> blobs.Put:
    pod, uid, who = ((mesh.pods.client, "w-client", CLIENT_ID) if index == CLIENT else (mesh.pods.server, "w-server", SERVER_ID))
    return blobs.put_pod(f"pod-{uid}", index, uid, SCOPE, (ip_address(pod.ip), ip_address(pod.ip6)), who if identity is None else identity,
                         excluded)


def start(mesh: Mesh, protocol: Protocol = Protocol.HTTP, *, excluded: tuple[int, ...] | None = (), tunnel: Tunnel = Tunnel.NONE) -> None:
    mesh.configure(*everything(mesh), protocol=protocol)
    declared = WorkloadPort(SERVICE, HTTP_PORT, 8080, protocol)
    server = replace(workload("w-server", mesh.pods.server, declared), service_account="server", tunnel=tunnel)
    client = replace(workload("w-client", mesh.pods.client), service_account="client")
    mesh.worker.commit(blobs.Delete(blobs.Kind.POD, "pod-c"), blobs.Delete(blobs.Kind.POD, "pod-s"),
                       put_pod(mesh, CLIENT), put_pod(mesh, SERVER, excluded=excluded),
                       blobs.put_workload(CLIENT, client, lambda _: SERVICE_INDEX),
                       blobs.put_workload(SERVER, server, lambda _: SERVICE_INDEX))


def put(action: Action, *rules: Rule, dry_run: bool = False) -> blobs.Put:
    return blobs.put_policy(Policy("default", "p", Scope.NAMESPACE, action, rules, dry_run))


def hops(mesh: Mesh, pod: Netns) -> list[int]:
    """Open connections to our own listeners: none when two pods are connected directly."""
    return entered(pod, mesh.worker)


def opened(mesh: Mesh, address: str = VIP, port: int = TCP_PORT) -> socket.socket:
    connection = mesh.dial(address, port)
    connection.sendall(b"x")
    assert receive(connection, 1) == b"x"
    return connection


def talks(mesh: Mesh, address: str = VIP, port: int = TCP_PORT) -> bool:
    try:
        opened(mesh, address, port).close()
        return True
    except (ConnectionError, AssertionError):
        return False


def ended(connection: socket.socket) -> bool:
    connection.settimeout(10)
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def records(mesh: Mesh, many: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    until(lambda: found.extend(mesh.worker.records()) or len(found) >= many, f"{many} log records")
    assert len(found) == many, found
    return sorted(found, key=lambda one: str(one["reporter"]))


def counted(mesh: Mesh, field: str) -> dict[tuple[str, bool], int]:
    """By (reporter, mutual TLS), where there are any."""
    found: dict[tuple[str, bool], int] = {}
    for key, values in mesh.worker.series():
        if values[field]:
            place = (key["reporter"], key["mutual_tls"])
            found[place] = found.get(place, 0) + values[field]
    return found


BOTH = {("source", True), ("destination", True)}
