"""Runs the control plane until SIGTERM or SIGINT."""
from __future__ import annotations

import asyncio
import logging
import resource
import signal
import socket
import uuid
from collections.abc import Iterable
from contextlib import AsyncExitStack
from pathlib import Path

import uvloop

from controlplane.app.admin import Admin
from controlplane.app.leader import Election
from controlplane.app.metrics import Metrics
from controlplane.app.plane import Plane
from controlplane.app.security import Security, SecurityOptions, opened
from controlplane.app.status import StatusWriter
from controlplane.ca.identity import DEFAULT_TRUST_DOMAIN
from controlplane.ca.secret import SecretStore
from controlplane.model.security import ROOT_NAMESPACE
from controlplane.server.grpc_server import Server
from controlplane.sources.cluster import Cluster
from controlplane.sources.watch import Watch
from protos.kubernetes.client import Client
from protos.kubernetes.configuration import Configuration

SYNC_LOOK = 0.05  # s between looks whether the cluster was read, at the start

log = logging.getLogger("narrows.controlplane")


def run(config: Iterable[Path], listen: Iterable[str], admin: str | None, version: str, security: SecurityOptions | None = None,
        root_namespace: str = ROOT_NAMESPACE, kubernetes: Configuration | None = None, lease: tuple[str, str] | None = None) -> None:
    """Returns when it was told to end. Raises ListenError when a place to listen at is taken; StoreError and MaterialError when the
    certificate authority cannot start."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a client is a descriptor; the usual 1,024 are fewer than hub.CLIENTS_BOUND
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_run(tuple(config), tuple(listen), admin, version, security, root_namespace, kubernetes, lease))


async def _run(config: tuple[Path, ...], listen: tuple[str, ...], admin: str | None, version: str, options: SecurityOptions | None,
               root_namespace: str, kubernetes: Configuration | None, lease: tuple[str, str] | None) -> None:
    loop = asyncio.get_running_loop()
    end = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end.set)
    # the name of Istio's trust domain is told by saying nothing, as istiod does
    domain = options.trust_domain if options and options.trust_domain != DEFAULT_TRUST_DOMAIN else ""
    async with AsyncExitStack() as stack:
        following: list[asyncio.Task[None]] = []
        ending = asyncio.create_task(end.wait(), name="end")
        stack.push_async_callback(_cancel, following, ending)
        client = cluster = None
        if kubernetes is not None:
            client = await stack.enter_async_context(Client(kubernetes, f"narrows-control-plane/{version}"))
            cluster = Cluster(client)
        plane = Plane(config, domain, root_namespace, cluster)
        security = None
        in_secret = options.source if options is not None and isinstance(options.source, SecretStore) else None
        if in_secret and client and not await opened(in_secret, client, domain or DEFAULT_TRUST_DOMAIN, ending):
            return
        if options is not None:
            security = Security(options, plane, client)
            stack.callback(security.close)
        authority = security.service if security else None
        metrics = Metrics(plane, version, authority)
        watch = Watch(config)  # before reading: what changes meanwhile is seen
        stack.callback(watch.close)
        if admin is not None:
            door = Admin(plane, metrics, authority)
            await door.start(Path(admin.removeprefix("unix:")))
            stack.push_async_callback(door.stop)
        plane.load()
        if cluster is not None:
            following += [asyncio.create_task(cluster.run(), name="cluster"),
                          asyncio.create_task(_follow_cluster(plane, cluster), name="objects")]
            if not await _synced(plane, following, ending):
                return
        ports = [one for one in listen if not one.startswith("unix:")]
        network = security.network(ports) if security and ports else None
        for one in listen:
            server = Server(plane.hub, f"narrows {version}", [authority.handler()] if authority else [], network)
            stack.push_async_callback(server.stop)
            where = await server.start(one)
            log.info("serving", extra={"listen": where, "admin": admin or "", "config": [str(path) for path in config]})
        following.append(asyncio.create_task(_follow(plane, watch), name="follow"))
        if client is not None and lease is not None:
            election = Election(client, *lease, f"{socket.gethostname()}_{uuid.uuid4()}")
            plane.leads = lambda: election.leading
            leading = [asyncio.create_task(election.run(), name="election")]
            if cluster is not None:
                writer = StatusWriter(client, election, cluster.marks, plane.problems)
                leading.append(asyncio.create_task(writer.run(), name="status"))
            following += leading
            stack.push_async_callback(_retire, leading, election)
        if security is not None:
            following.append(asyncio.create_task(security.follow(), name="authority"))
            if client is not None:
                following.append(asyncio.create_task(security.follow_secret(client), name="secret"))
        done, _ = await asyncio.wait({*following, ending}, return_when=asyncio.FIRST_COMPLETED)
        for task in done - {ending}:
            task.result()  # they never return: this raises
        log.info("ending", extra={"clients": len(plane.hub)})


async def _follow(plane: Plane, watch: Watch) -> None:
    while True:
        plane.follow(await watch.changes())


async def _follow_cluster(plane: Plane, cluster: Cluster) -> None:
    while True:
        await cluster.changes()
        plane.follow_cluster()


async def _synced(plane: Plane, following: list[asyncio.Task[None]], ending: asyncio.Task[bool]) -> bool:
    """Whether the cluster was read, before anybody is served: what is missing from half a cluster would be taken from agents."""
    while not plane.loaded:
        done, _ = await asyncio.wait({*following, ending}, timeout=SYNC_LOOK, return_when=asyncio.FIRST_COMPLETED)
        for task in done - {ending}:
            task.result()
        if ending in done:
            return False
    return True


async def _retire(leading: list[asyncio.Task[None]], election: Election) -> None:
    for task in leading:
        task.cancel()
    await asyncio.gather(*leading, return_exceptions=True)
    await election.release()


async def _cancel(following: list[asyncio.Task[None]], ending: asyncio.Task[bool]) -> None:
    for task in (*following, ending):
        task.cancel()
    await asyncio.gather(*following, ending, return_exceptions=True)
