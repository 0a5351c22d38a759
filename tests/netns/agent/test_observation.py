"""Observation with a real keeper and agent: what a scrape shows of connections, whose are told, and what is left when it is off."""
from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from agent.capture import pins
from tests.netns.agent.conftest import Instance
from tests.support.bpftool import programs
from tests.support.netns import Netns
from tests.support.wait import until

pytestmark = pytest.mark.netns

# TCP, since the proxy keeps connections of HTTP for the next request. Each says what it heard.
SERVER = """if True:
    import socket
    listener = socket.create_server(("::", 9000), family=socket.AF_INET6, dualstack_ipv6=True)
    print("listening", flush=True)
    while True:
        with listener.accept()[0] as s:
            while data := s.recv(65536):
                s.sendall(data)"""
CLIENT = """if True:
    import socket, sys
    with socket.create_connection((sys.argv[1], 9000), timeout=30) as s:
        s.sendall(b"\\x01" + bytes(999))
        s.shutdown(socket.SHUT_WR)
        heard = b""
        while data := s.recv(65536):
            heard += data
    assert len(heard) == 1000"""


@dataclass
class Watched:
    """A captured client, and a pod without capture (`db`) that serves; both on the same node, each side with a cgroup of its own."""

    instance: Instance
    proxy: str  # cgroup
    db: Netns

    @property
    def app(self) -> str:
        return self.db.cgroup

    def call(self, where: Netns | None = None) -> None:
        """A connection of its own: 1,000 bytes there and back."""
        (where or self.instance.client).python(CLIENT, self.db.ip, timeout=60)

    def total(self, name: str, **labels: str) -> float:
        text = self.instance.node.netns.run("curl", "-s", "http://127.0.0.1:15020/metrics").stdout
        return sum(sample.value for family in text_string_to_metric_families(text) for sample in family.samples
                   if sample.name == name and all(sample.labels.get(key) == value for key, value in labels.items()))

    def counted(self, count: int, name: str = "narrows_tcp_duration_seconds_count", **labels: str) -> None:
        until(lambda: self.total(name, **labels) >= count, f"{name} of {labels} is {count}", 30)
        assert self.total(name, **labels) == count

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = self.instance.ask("/server_info")["observation"]
        return found

    def watches(self, cgroup: str) -> bool:
        """Whether observation's program runs there, by bpftool's word; capture's may, too."""
        return "observe" in programs(cgroup)

    def pins(self) -> list[Path]:
        return [one.root for one in pins.found(str(self.instance.run_dir)) if one.root.name.endswith("-observe")]


@pytest.fixture
def watched(instance: Instance) -> Iterator[Watched]:
    db = instance.node.pod("db")
    instance.pod("db-0", db, intercept=None)
    serving = db.start(sys.executable, "-c", SERVER, stdout=subprocess.PIPE)
    assert serving.stdout is not None and serving.stdout.readline() == b"listening\n"
    instance.start_keeper()
    instance.start_plane()
    yield Watched(instance, instance.proxy, db)


def begin(watched: Watched, choice: str, pods: int) -> None:
    watched.instance.start_agent("--observe", choice)
    watched.instance.ready()
    until(lambda: watched.status()["pods"] == pods, f"{pods} pods are observed: {watched.status()}", 30)


def test_a_scrape_shows_the_proxys_leg_and_the_uncaptured_servers_own_end(watched: Watched) -> None:
    """The client's own socket, which ends at the proxy, is neither."""
    begin(watched, "all", 3)  # both captured pods, and db
    for _ in range(3):
        watched.call()
    pair = {"source_workload": "client", "source_workload_namespace": "default", "destination_workload": "db-0",
            "destination_workload_namespace": "default"}
    for reporter in ("source", "destination"):
        watched.counted(3, reporter=reporter, **pair)
        assert watched.total("narrows_tcp_rtt_seconds_count", reporter=reporter) == 3
        assert 0 < watched.total("narrows_tcp_min_rtt_seconds_sum", reporter=reporter) < 3
        assert watched.total("narrows_tcp_received_bytes_sum", reporter=reporter, **pair) >= 3000
        assert watched.total("narrows_tcp_sent_bytes_sum", reporter=reporter, **pair) >= 3000
        assert watched.total("narrows_tcp_connections_ended_total", reporter=reporter, how="failed") == 0
    watched.counted(6)
    assert watched.status() == {"choice": "all", "state": "ready", "reason": "", "pods": 3, "told": 6, "lost": 0}


def test_a_segment_that_was_lost_is_in_the_metrics(watched: Watched) -> None:
    begin(watched, "captured", 2)
    watched.call()
    watched.counted(1)
    assert watched.total("narrows_tcp_retransmits_sum") == 0
    watched.db.run("iptables-legacy", "-A", "INPUT", "-p", "tcp", "--dport", "9000", "-m", "statistic", "--mode", "nth", "--every", "1000",
                   "--packet", "0", "-j", "DROP")
    watched.call()
    watched.counted(2)
    assert watched.total("narrows_tcp_retransmits_sum", reporter="source", destination_workload="db-0") >= 1


def test_of_captured_pods_alone_nothing_of_others_is_told(watched: Watched) -> None:
    begin(watched, "captured", 2)
    assert (watched.watches(watched.proxy), watched.watches(watched.app)) == (True, False)
    watched.call(watched.instance.node.netns)  # from the node to a pod without capture
    watched.call()
    watched.counted(1)


def test_the_kernel_goes_on_while_the_agent_is_away_and_the_next_one_reads_it(watched: Watched) -> None:
    begin(watched, "captured", 2)
    watched.call()
    watched.counted(1)
    watched.instance.kill("agent")
    for _ in range(4):
        watched.call()
    begin(watched, "captured", 2)
    watched.counted(4)
    assert watched.status()["told"] == 5  # since the maps were made


def test_a_pod_that_comes_goes_or_is_captured_is_followed(watched: Watched) -> None:
    begin(watched, "all", 3)
    assert watched.watches(watched.app)
    watched.instance.pod("db-0", watched.db)
    until(lambda: not watched.watches(watched.app), "its own sockets are not told any more", 30)
    until(lambda: watched.status()["pods"] == 3, "but its proxy's", 30)
    watched.instance.remove_pod("db-0")
    until(lambda: watched.status()["pods"] == 2, "it is forgotten", 30)


def test_switched_off_it_leaves_nothing(watched: Watched) -> None:
    begin(watched, "all", 3)
    assert watched.pins()
    watched.instance.kill("agent")
    watched.instance.start_agent()
    watched.instance.ready()
    until(lambda: not watched.pins(), "the pins are gone", 30)
    until(lambda: not (watched.watches(watched.proxy) or watched.watches(watched.app)), "and with them the links", 30)
    assert watched.status() == {"choice": "off", "state": "off", "reason": "", "pods": 0, "told": 0, "lost": 0}
    assert "narrows_tcp_rtt" not in "".join(watched.instance.metrics())


def test_a_keeper_in_the_root_of_cgroups_is_told_and_other_pods_are_observed(watched: Watched) -> None:
    until((watched.instance.run_dir / "keeper.sock").exists, "the keeper has come where it was started")
    root = Path(watched.proxy).parent / "cgroup.procs"
    root.write_text(str(watched.instance.processes["keeper"].pid))
    begin(watched, "all", 3)
    until(lambda: "root of cgroup v2" in watched.status()["reason"], "the reason is told", 30)
    watched.call()
    watched.counted(1, reporter="destination")
    assert watched.total("narrows_tcp_duration_seconds_count", reporter="source") == 0
