"""What 10,000 idle kept-alive connections cost a node: `python -m tests.bench.held`.

Four pods on two workers, 2,500 connections each, every one answered once. `idle` of `make bench` holds those of one pod on one worker,
of which a machine whose processes may open 20,000 files allows 4,800 (ext/proxy/budget.pxd). VmRSS of keeper and workers, before and after.
"""
from __future__ import annotations

import asyncio
import os
import shutil
import sys
import tempfile
from contextlib import ExitStack
from ipaddress import ip_address
from pathlib import Path

from agent import netlink
from agent.dataplane import blobs
from agent.dataplane.client import connect
from tests.bench import ends
from tests.bench.cases import request, resident
from tests.bench.proxies import SCOPE, entries
from tests.bench.tools import HTTP_PORT, Held, load, start_origin
from tests.bench.topology import BenchError, Site, Topology, family, wait_listening
from tests.support.keeper import Keeper
from tests.support.wait import until

PODS, EACH, WORKERS = 4, 2_500, 2


async def configure(keeper: Keeper, sites: list[Site]) -> None:
    client = await connect(keeper.path)
    try:
        pods = [blobs.put_pod(f"pod-{i}", i, "w-client", SCOPE, (ip_address(site.netns.ip),)) for i, site in enumerate(sites, 1)]
        await client.commit([*entries("http", sites[0], HTTP_PORT), *pods])
        for handle, site in enumerate(sites, 1):
            fd = netlink.open_namespace(site.netns.path)
            try:
                await client.add_pod(handle, f"pod-{handle}", (4,), fd)
            finally:
                os.close(fd)
    finally:
        await client.close()


def run(folder: Path) -> None:
    with ExitStack() as stack:
        topology = Topology()
        stack.callback(topology.close)
        start_origin(topology.origin, folder / "origin.log")
        wait_listening(topology.origin, HTTP_PORT, topology.origin.started[0], folder / "origin.log")
        sites = [topology.site(f"held{i}", captured=True) for i in range(PODS)]
        keeper = Keeper(folder / "run", "--workers", str(WORKERS)).wait()
        stack.callback(keeper.stop)
        until(lambda: keeper.text.count("is ready") == WORKERS, "the workers are ready", timeout=15)
        asyncio.run(configure(keeper, sites))
        for site in sites:
            load(site, HTTP_PORT, 0.5, do="exchange", connections=64, request=request("/1k"))
        before = resident(family(keeper.pid))
        for site in sites:
            stack.callback(Held(site, HTTP_PORT, EACH, request("/1k")).close)
        grown = resident(family(keeper.pid)) - before
        held = PODS * EACH
        print(f"{held:,} connections of {PODS} pods on {WORKERS} workers: {grown / 1024 / held:.2f} KiB each "
              f"(keeper and workers {before / (1 << 20):.1f} -> {(before + grown) / (1 << 20):.1f} MiB)")


def main() -> int:
    shm = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="narrows-bench-", dir=shm if shm.is_dir() else None))
    try:
        run(folder)
    except BenchError as error:
        print(f"held: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(ends.run(main))
