"""The benchmark's own ground: every proxy comes up with its configuration and carries work. No figure is looked at."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.bench import pairs
from tests.bench.cases import ALL, TCP, request
from tests.bench.proxies import start
from tests.bench.tools import ECHO_PORT, HTTP_PORT, SOURCE_PORT, Held, load, shake, start_origin
from tests.bench.topology import PROXY_CORE, BenchError, Site, Topology, check_congestion, cpu_ns, settle, wait_listening

pytestmark = pytest.mark.netns


@dataclass
class Ground:
    topology: Topology
    sites: dict[str, Site]
    pair: tuple[Site, Site]
    folder: Path


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    folder = tmp_path_factory.mktemp("bench")
    made = Topology()
    try:
        start_origin(made.origin, folder / "log")
        for port in (HTTP_PORT, ECHO_PORT, SOURCE_PORT):
            wait_listening(made.origin, port, made.origin.started[0], folder / "log")
        yield Ground(made, {name: made.site(name, captured=name != "direct") for name in ALL}, pairs.sites(made, "pair", folder), folder)
    finally:
        made.close()


@pytest.mark.parametrize("name", ALL)
def test_a_request_passes_through_each_proxy_on_its_own_core(ground: Ground, name: str) -> None:
    site = ground.sites[name]
    proxy = start(name, "http", site, HTTP_PORT, ground.folder)
    try:
        said = site.netns.run("curl", "-sS", "--max-time", "10", "-o", str(ground.folder / "body"), "-w", "%{http_code} %{size_download}",
                              "-H", "Host: origin.default.svc.cluster.local:8080", f"http://{site.target(HTTP_PORT)}/1k").stdout
        assert said == "200 1024"
        pids = proxy.pids()
        assert (cpu_ns(pids) > 0) == (name != "direct")
        for pid in pids:
            allowed = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("Cpus_allowed_list"))
            assert allowed.split()[1] == str(PROXY_CORE)
        held = Held(site, HTTP_PORT, 100, request("/64k"))
        try:
            assert check_congestion(site.netns) >= 100
            assert check_congestion(ground.topology.origin) > 0
        finally:
            held.close()
    finally:
        proxy.stop()


@pytest.mark.parametrize("name", TCP)
def test_bytes_pass_through_each_proxy_of_the_tcp_cases(ground: Ground, name: str) -> None:
    site, word = ground.sites[name], "x" * 64
    proxy = start(name, "tcp", site, ECHO_PORT, ground.folder)
    try:
        assert load(site, ECHO_PORT, 0.05, do="exchange", connections=4, request=word, fixed=64)["work"] > 0
        assert load(site, ECHO_PORT, 0.05, do="exchange", connections=4, request=word, fixed=64, after=2)["work"] > 0
    finally:
        proxy.stop()


@pytest.mark.parametrize("mode", ["tunnel", "tunnel-http"])
def test_our_pair_carries_requests_and_bulk_in_one_tunnel(ground: Ground, mode: str) -> None:
    site, server = ground.pair
    pair = pairs.start("narrows", mode, site, server, HTTP_PORT, ground.folder)
    try:
        assert load(site, HTTP_PORT, 0.05, do="exchange", connections=4, request=request("/1k"))["work"] > 0
        if mode == "tunnel":
            assert load(site, SOURCE_PORT, 0.05, do="bulk", streams=1)["work"] > 0
        assert "15008" in server.netns.run("ss", "-Htn", "state", "established", "sport = :15008").stdout, "through a tunnel"
        assert len(pair.pids()) == 4 and shake(site, pair.home, 0.2) > 0
    finally:
        pair.stop()


def test_the_load_generator_counts_what_the_origin_answered(ground: Ground) -> None:
    site = ground.sites["direct"]
    kept = load(site, HTTP_PORT, 0.1, do="exchange", connections=2, request=request("/64k"))
    closed = load(site, HTTP_PORT, 0.1, do="exchange", connections=2, request=request("/1k", "Connection: close"), after=1)
    timed = load(site, HTTP_PORT, 0.5, do="exchange", connections=2, request=request("/1k"), rate=100)
    assert kept["work"] > 0 < closed["work"]
    assert 0 < timed["work"] < 200 and 0 < timed["p50_us"] <= timed["p99_us"]
    assert load(site, SOURCE_PORT, 0.1, do="bulk", streams=2)["work"] > 1 << 20
    with pytest.raises(BenchError, match="failed"):
        load(site, HTTP_PORT, 0.05, do="exchange", connections=1, request="not http\r\n\r\n", fixed=7)


def test_a_congestion_control_that_the_kernel_does_not_have_stops_the_run(ground: Ground) -> None:
    with pytest.raises(BenchError, match="tcp_congestion_control"):
        settle(ground.topology.origin.path, {"net.ipv4.tcp_congestion_control": "nosuch"})
