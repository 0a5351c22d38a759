"""The benchmark's own ground: every proxy comes up with its configuration and carries work. No figure is looked at."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.bench.cases import HTTP_PORT, start_origin
from tests.bench.proxies import NAMES, start
from tests.bench.topology import PROXY_CORE, BenchError, Site, Topology, check_congestion, cpu_ns, settle, wait_listening

pytestmark = pytest.mark.netns


@dataclass
class Ground:
    origin: str
    sites: dict[str, Site]
    folder: Path


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    folder = tmp_path_factory.mktemp("bench")
    made = Topology()
    try:
        start_origin(made.origin.start, folder)
        wait_listening(made.origin, HTTP_PORT, None, folder / "origin.out")
        yield Ground(made.origin.path, {name: made.site(name, captured=name != "direct") for name in NAMES}, folder)
    finally:
        made.close()


@pytest.mark.parametrize("name", NAMES)
def test_a_request_passes_through_each_proxy_of_the_benchmark(ground: Ground, name: str) -> None:
    site = ground.sites[name]
    proxy = start(name, "http", site, HTTP_PORT, ground.folder)
    try:
        url = f"http://{site.target(HTTP_PORT)}"
        said = site.netns.run("curl", "-sS", "--max-time", "10", "-o", str(ground.folder / "body"), "-w", "%{http_code} %{size_download}",
                              "-H", "Host: origin.default.svc.cluster.local:8080", f"{url}/1k").stdout
        assert said == "200 1024"
        pids = proxy.pids()
        assert (cpu_ns(pids) > 0) == (name != "direct")
        for pid in pids:
            allowed = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("Cpus_allowed_list"))
            assert allowed.split()[1] == str(PROXY_CORE)
        check_congestion(site.netns)
    finally:
        proxy.stop()


def test_a_congestion_control_that_the_kernel_does_not_have_stops_the_run(ground: Ground) -> None:
    with pytest.raises(BenchError, match="tcp_congestion_control"):
        settle(ground.origin, {"net.ipv4.tcp_congestion_control": "nosuch"})
