"""`narrows config` and `narrows status` against an admin socket that answers as an agent does."""
from __future__ import annotations

import http.server
import json
import socketserver
import threading
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from agent.app import dump
from agent.cli.config import match_text, split_text
from agent.cli.doctor import within
from agent.cli.main import run
from agent.cli.status import by_what
from agent.model.routing import (
    Balancer,
    Cluster,
    Destination,
    Endpoint,
    MatchKind,
    NamedMatch,
    Route,
    RouteMatch,
    StringMatch,
    VirtualHost,
    WeightedCluster,
)
from agent.model.telemetry import TunnelRow
from agent.model.workload import Protocol, Service, ServicePort, Workload, WorkloadPort
from agent.state.store import Store

HOST = "reviews.default.svc.cluster.local"
KEY = f"default/{HOST}"
UID = "Kubernetes//Pod/default/reviews-v1-0"


TUNNEL = TunnelRow(7, "outbound", "open", "spiffe://td/ns/x/sa/b", "10.0.0.9:15008", 2, 9, 4096, 60_000_000, 1_767_225_600, 1_767_225_600)


def config_dump() -> dict[str, Any]:
    store = Store()
    store.put_service(Service("default", HOST, "reviews", (ip_address("10.96.0.1"),),
                              (ServicePort(9080, 9080, Protocol.HTTP),)))
    store.put_workload(Workload(
        UID, "reviews-v1-0", "default", (ip_address("10.244.1.5"),), "n1", "default", "cluster.local", "reviews-v1",
        "deployment", "reviews", "v1", "Kubernetes", True, (WorkloadPort(KEY, 9080, 9080, Protocol.HTTP),)))
    everyone = StringMatch(MatchKind.PREFIX, "/")
    jason = RouteMatch(everyone, (NamedMatch("end-user", StringMatch(MatchKind.EXACT, "jason")),))
    routes = (Route("jason", jason, (WeightedCluster("v2", 1),)),
              Route("rest", RouteMatch(everyone), (WeightedCluster("v1", 1), WeightedCluster("v3", 1)), timeout_ms=500))
    known = Destination("ns=default", f"{HOST}:9080", (VirtualHost("reviews", ("*",), routes),), None)
    unknown = Destination("ns=default", "nowhere:80", None, None)
    cluster = Cluster("ns=default", "v1", KEY, Balancer.LEAST_REQUEST, 10_000,
                      (Endpoint(ip_address("10.244.1.5"), 9080), Endpoint(ip_address("10.244.1.6"), 9080, healthy=False)))
    shape = dump.everything(store, [known, unknown], [cluster])
    return shape | {"listeners": [{"kind": "outbound", "where": "pod default/a", "address": "*:15001",
                                   "state": "listening"}]} | dump.tunnels(
        {1: ([TUNNEL], 3)}, {7: ("default/a", "spiffe://td/ns/default/sa/a")}, 100.0)


ANSWERS: dict[str, tuple[int, Any]] = {
    "/config_dump": (200, config_dump()),
    "/server_info": (200, {"version": "0.1.0", "pid": 1, "keeper": {"state": "connected"},
                           "controlPlane": {"state": "connected"},
                           "capture": {"backend": "nftables", "reason": "no legacy tables",
                                       "ebpf": {"state": "failed", "reason": "connect4: no"}}}),
    "/ready": (503, {"ready": False, "missing": ["pod default/b is not captured: no namespace"]}),
    "/pods": (200, [{"namespace": "default", "name": "a", "ips": ["10.244.1.5"], "captured": True, "reason": "captured",
                     "method": "nftables"},
                    {"namespace": "default", "name": "b", "ips": [], "captured": False, "reason": "no namespace"}]),
    "/workers": (200, [{"index": 0, "state": "ready", "restarts": 2}, {"index": 1, "state": "ready", "restarts": 0}]),
}


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        status, value = ANSWERS[self.path]
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def address_string(self) -> str:
        return "unix"

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Path]:
    directory = tmp_path / "n1"
    directory.mkdir()
    with socketserver.ThreadingUnixStreamServer(str(directory / "admin.sock"), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield directory
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(("directions", "shown"), [
    (["egress", "ingress"], "ebpf"), (["egress"], "ebpf+iptables"), (["ingress"], "iptables+ebpf"), ([], "iptables")])
def test_a_node_shows_by_what_it_captures_each_direction(directions: list[str], shown: str) -> None:
    assert by_what({"backend": "iptables", "ebpf": {"state": "ready", "reason": "", "directions": directions}}) == shown


@pytest.mark.parametrize(("view", "lines"), [
    ("services", [f"n1 default {HOST} 10.96.0.1 9080->9080/http 1"]),
    ("workloads", ["n1 default reviews-v1-0 10.244.1.5 n1 reviews-v1 v1 Healthy"]),
    ("clusters", ["n1 ns=default v1 least_request 10000 ms 2 1"]),
    ("endpoints", ["n1 ns=default v1 10.244.1.5:9080 reviews-v1-0 1 Healthy",
                   "n1 ns=default v1 10.244.1.6:9080 1 Unhealthy"]),
    ("tunnels", ["n1 default/a outbound open spiffe://td/ns/default/sa/a spiffe://td/ns/x/sa/b 10.0.0.9:15008 2 40 s 4096 "
                 "2026-01-01T00:00:00Z",
                 "n1 and 2 more"]),
    ("listeners", ["n1 outbound pod default/a *:15001 listening"]),
])
def test_what_is_in_force_as_a_table(node: Path, capsys: pytest.CaptureFixture[str], view: str,
                                     lines: list[str]) -> None:
    assert run(["config", view, "--run-dir", str(node)]) == 0
    shown = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert shown[0].startswith("NODE") and shown[1:] == lines


def test_routes_show_matches_and_shares(node: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["config", "routes", "--run-dir", str(node)]) == 0
    out = capsys.readouterr().out
    assert "prefix=/ headers: end-user exact=jason" in out and "50% v1, 50% v3" in out
    assert "unknown to the control plane" in out


def test_json_holds_the_same_by_node(node: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["config", "services", "--run-dir", str(node), "-o", "json"]) == 0
    (service,) = json.loads(capsys.readouterr().out)["n1"]
    assert service["hostname"] == HOST and service["endpoints"][UID]["port"] == {"9080": 9080}


def test_endpoints_as_json_are_one_object_each(node: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["config", "endpoints", "--run-dir", str(node), "-o", "json"]) == 0
    healthy, unhealthy = json.loads(capsys.readouterr().out)["n1"]
    assert healthy == {"scope": "ns=default", "cluster": "v1", "address": "10.244.1.5", "port": 9080, "weight": 1,
                       "status": "Healthy"}
    assert unhealthy["status"] == "Unhealthy"


def test_status_shows_who_is_captured_and_ends_with_69_when_something_is_missing(
        node: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["status", "--run-dir", str(node)]) == 69
    out, err = capsys.readouterr()
    assert "2/2 (2 restarts)" in out and "no namespace" in out and "not captured" in err
    assert "n1: capture by nftables: no legacy tables" in err and "n1: no capture by eBPF, redirects do it: connect4: no" in err
    assert "yes nftables captured" in " ".join(out.split())


def test_an_agent_that_is_down_is_shown_and_not_a_crash(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["status", "--run-dir", str(tmp_path), "-o", "json"]) == 69
    (shown,) = json.loads(capsys.readouterr().out)["nodes"]
    assert shown["agent"] == "down" and "the agent is not running" in shown["reason"]


def test_an_unknown_node_is_named_with_those_that_there_are(node: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["config", "routes", "--run-dir", str(node), "--node", "n9"]) == 69
    assert "no node 'n9'; there are n1" in capsys.readouterr().err


def test_texts() -> None:
    match = {"path": {"exact": "/a", "ignoreCase": True}, "query": [{"name": "q", "present": "", "invert": True}]}
    assert match_text(match) == "exact=/a (any case) query: q !present="
    assert split_text([{"cluster": "a", "weight": 9}, {"cluster": "b", "weight": 1}]) == "90% a, 10% b"


@pytest.mark.parametrize(("there", "bounds", "holds"), [
    ("1.85.1", ">=1.74,<2", True), ("2.0", ">=1.74,<2", False), ("1.7", ">=1.74", False), ("6", ">=6.0.0", True),
    ("0.9.26", "<0.10,>=0.9.25", True), ("1.0rc1", "", True), ("3", "==3.0", True), ("3.1", "!=3.1", False)])
def test_version_bounds(there: str, bounds: str, holds: bool) -> None:
    assert within(there, bounds) is holds
