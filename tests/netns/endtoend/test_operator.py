"""What an operator sees of a running mesh: metrics, readiness, admin, logs and the command line."""
from __future__ import annotations

import json
import os
import re
import stat
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as plain

from tests.support.lab import NARROWS, Lab, lab, narrows
from tests.support.logs import whole_lines
from tests.support.wait import until

pytestmark = pytest.mark.netns

# Istio's standard metrics reference, written down here a second time
WORKLOAD = ("workload", "workload_namespace", "principal", "app", "version", "canonical_service", "canonical_revision",
            "cluster", "region", "zone")
COMMON = ({"reporter", "destination_service", "destination_service_name", "destination_service_namespace", "request_protocol",
           "response_flags", "connection_security_policy"} | {f"{side}_{name}" for side in ("source", "destination") for name in WORKLOAD})
TCP = ("istio_tcp_connections_opened_total", "istio_tcp_connections_closed_total", "istio_tcp_sent_bytes_total",
       "istio_tcp_received_bytes_total")
HTTP = ("istio_requests_total", "istio_request_duration_milliseconds_count", "istio_request_bytes_count", "istio_response_bytes_count")
CLIENT = {"source_workload": "client", "source_workload_namespace": "default", "source_app": "client",
          "source_principal": "spiffe://cluster.local/ns/default/sa/default"}


def run_dir(mesh: Lab, node: str = "") -> Path:
    return Path("/run/narrows/lab", mesh.name, *(("nodes", node) if node else ()))


def fetch(mesh: Lab, node: str, port: int, path: str, *options: str) -> subprocess.CompletedProcess[str]:
    """curl, asked from inside the node."""
    return subprocess.run(["ip", "netns", "exec", f"narrows.{mesh.name}.node.{node}", "curl", "-sS", "-m", "10", *options,
                           f"http://127.0.0.1:{port}{path}"], capture_output=True, text=True, check=True, timeout=20)


def admin(mesh: Lab, node: str, path: str) -> Any:
    done = subprocess.run(["curl", "-sS", "-m", "10", "--unix-socket", str(run_dir(mesh, node) / "admin.sock"), f"http://admin{path}"],
                          capture_output=True, text=True, check=True, timeout=20)
    return json.loads(done.stdout)


def by_reporter(mesh: Lab, name: str, **labels: str) -> dict[str, tuple[dict[str, str], float]]:
    return {have["reporter"]: (have, value) for sample, have, value in mesh.samples()
            if sample == name and all(have.get(key) == want for key, want in labels.items())}


def records(mesh: Lab, node: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in whole_lines(run_dir(mesh, node) / "access.log")]


@pytest.fixture(scope="module", autouse=True)
def traffic(servers: Lab) -> None:
    """One HTTP request and one TCP session, counted by both reporters."""
    servers.exec("client", "curl", "-sS", "-m", "5", "-A", "operator-test", "http://web/hello.txt")
    servers.exec("client", "redis-cli", "-h", "redis", "ping")
    for name, workload in (("istio_requests_total", "web"), ("istio_tcp_connections_closed_total", "redis")):
        until(lambda name=name, workload=workload: len(by_reporter(servers, name, destination_workload=workload)) == 2,
              f"{name} from both reporters")


@pytest.mark.parametrize(("names", "workload", "special"), [(HTTP, "web", {"response_code", "grpc_response_status"}),
                                                             (TCP, "redis", set())])
def test_both_reporters_have_every_label_of_istio(servers: Lab, names: tuple[str, ...], workload: str, special: set[str]) -> None:
    for name in names:
        seen = by_reporter(servers, name, destination_workload=workload, **CLIENT)
        assert set(seen) == {"source", "destination"}, name
        for labels, value in seen.values():
            assert set(labels) == COMMON | special, name
            assert value > 0
            assert labels["destination_service"] == f"{workload}.default.svc.cluster.local"
            assert labels["destination_service_name"] == workload
            empty = {label for label, text in labels.items() if not text}
            assert empty <= {"grpc_response_status"}, "what is missing is `unknown`, never empty"


def test_sent_bytes_are_the_servers_for_both_reporters(servers: Lab) -> None:
    """Redis answers `+PONG`: its seven bytes count as sent, the longer command as received."""
    for have, sent in by_reporter(servers, "istio_tcp_sent_bytes_total", destination_workload="redis").values():
        received = by_reporter(servers, "istio_tcp_received_bytes_total", destination_workload="redis")[have["reporter"]][1]
        assert 0 < sent < received


def test_both_paths_and_both_formats_are_what_a_scraper_reads(servers: Lab) -> None:
    for path in ("/metrics", "/stats/prometheus"):
        families = {family.name for family in plain(fetch(servers, "n1", 15020, path).stdout)}
        assert {"istio_requests", "istio_request_duration_milliseconds", "istio_tcp_sent_bytes", "istio_build"} <= families
    text = fetch(servers, "n1", 15020, "/metrics", "-H", "Accept: application/openmetrics-text; version=1.0.0").stdout
    assert text.endswith("# EOF\n")
    assert {"istio_requests", "istio_tcp_connections_opened"} <= {family.name for family in openmetrics(text)}
    packed = fetch(servers, "n1", 15020, "/metrics", "-H", "Accept-Encoding: gzip", "-o", os.devnull, "-w", "%header{content-encoding}")
    assert packed.stdout == "gzip"


def test_the_processes_of_a_node_are_measured(servers: Lab) -> None:
    figures: dict[str, dict[str, float]] = {}
    for family in plain(fetch(servers, "n2", 15020, "/metrics").stdout):
        for sample in family.samples:
            if sample.name == "narrows_process_resident_memory_bytes":
                figures[sample.labels["role"]] = {"pid": int(sample.labels["pid"]), "bytes": sample.value}
    assert {"agent", "keeper"} < set(figures) and any(role.startswith("worker") for role in figures)
    for role, one in figures.items():
        assert psutil.Process(int(one["pid"])).is_running(), role
        assert 1 << 20 < one["bytes"] < 1 << 30, role


def test_readiness_is_on_its_own_port(servers: Lab) -> None:
    for node in servers.nodes():
        assert fetch(servers, node, 15021, "/healthz/ready", "-w", "%{http_code}").stdout == "ready\n200"


def test_only_the_owner_may_open_the_admin_socket_and_it_tells_what_is_in_force(servers: Lab) -> None:
    for node in servers.nodes():
        path = run_dir(servers, node)
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
        assert stat.S_IMODE((path / "admin.sock").stat().st_mode) == 0o600
        dump = admin(servers, node, "/config_dump")
        assert {"workloads", "services", "policies", "certificates", "destinations", "clusters", "listeners"} <= set(dump)
        assert {"client", "redis", "web"} <= {one["name"] for one in dump["workloads"]}


def test_the_access_log_tells_of_each_request_on_both_sides_with_one_id(servers: Lab) -> None:
    servers.exec("client", "curl", "-sS", "-m", "5", "-H", "x-request-id: operator-1", "http://web/missing.txt?q=1")
    until(lambda: all(any(one["request_id"] == "operator-1" for one in records(servers, node)) for node in ("n1", "n2")),
          "both nodes logged it")
    source, destination = (next(one for one in records(servers, node) if one["request_id"] == "operator-1") for node in ("n1", "n2"))
    for one in (source, destination):
        assert (one["method"], one["path"], one["protocol"]) == ("GET", "/missing.txt?q=1", "HTTP/1.1")
        assert (one["response_code"], one["response_flags"], one["response_code_details"]) == (404, "-", "via_upstream")
        assert one["authority"] == "web" and one["duration"] >= 0 and one["bytes_sent"] > 0
    assert (source["reporter"], destination["reporter"]) == ("source", "destination")
    assert source["upstream_cluster"] == "outbound|80||web.default.svc.cluster.local"
    assert source["route_name"] == "default"
    (address,) = (pod["ip"] for pod in servers.status() if pod["name"] == "client")
    assert destination["downstream_remote_address"].startswith(f"{address}:"), "the client's own address"


def test_a_tcp_session_is_logged_without_what_only_requests_have(servers: Lab) -> None:
    seen = [one for one in records(servers, "n1") if one["upstream_cluster"] == "outbound|6379||redis.default.svc.cluster.local"]
    assert seen and all(one["method"] is None and one["protocol"] is None and one["response_code"] == 0 for one in seen)
    assert seen[0]["response_flags"] == "-" and seen[0]["bytes_sent"] > 0 < seen[0]["bytes_received"]


def test_a_lab_logs_in_istios_text_format_when_told(tmp_path: Path) -> None:
    """The line as Istio's documentation gives it; a service without an endpoint has Envoy's flag UH."""
    manifest = tmp_path / "text.yaml"
    manifest.write_text("apiVersion: v1\nkind: Namespace\nmetadata: {name: default, annotations: {narrows.mesh/intercept: enabled}}\n---\n"
                        "apiVersion: v1\nkind: Service\nmetadata: {name: empty}\n"
                        "spec: {selector: {app: nobody}, ports: [{name: http, port: 80}]}\n---\n"
                        "apiVersion: v1\nkind: Pod\nmetadata: {name: client}\n"
                        "spec: {containers: [{name: main, image: none, command: [sleep, infinity]}]}\n")
    with lab(manifest, options=("--access-log", "text")) as running:
        (node,) = running.nodes()
        done = running.exec("client", "curl", "-sS", "-m", "8", "-w", "%{http_code}", "-o", os.devnull, "http://empty/a?b=c")
        assert done.stdout == "503"
        log = run_dir(running, node) / "access.log"
        line = until(lambda: whole_lines(log), "a line")[-1]
    number, word, text = r"\d+", r"[^\s\"]+", r"\"[^\"]*\""
    assert re.fullmatch(rf'\[{word}\] "GET /a\?b=c HTTP/1\.1" 503 UH {word} - {text} {number} {number} {number} - {text} "curl/{word}" '
                        rf'{text} "empty" {text} {word} {word} {word} {word} - {word}', line), line


def test_every_line_of_every_log_is_json_with_time_and_level(servers: Lab) -> None:
    logs = [run_dir(servers) / "logs" / "control-plane.log",
            *(run_dir(servers, node) / f"{role}.log" for node in servers.nodes() for role in ("agent", "keeper"))]
    for path in logs:
        lines = whole_lines(path)
        assert lines, path
        for line in lines:
            assert {"time", "level", "logger", "message"} <= set(json.loads(line)), f"{path}: {line}"


@pytest.mark.parametrize(("view", "keys"), [
    ("services", {"hostname", "namespace", "vips", "ports", "appProtocols", "endpoints"}),
    ("workloads", {"uid", "name", "namespace", "workloadIps", "node", "workloadName", "canonicalName", "canonicalRevision", "status"}),
    ("routes", {"scope", "authority", "known"}),
    ("clusters", {"scope", "name", "balancer", "connectTimeoutMs", "endpoints"}),
    ("endpoints", {"scope", "cluster", "address", "port", "weight", "status"}),
    ("listeners", {"kind", "where", "address", "state"}),
])
def test_what_is_in_force_is_shown_as_table_and_as_json_with_keys_that_stay(servers: Lab, view: str, keys: set[str]) -> None:
    shown = json.loads(narrows("config", view, "--name", servers.name, "--node", "n1", "-o", "json").stdout)
    assert list(shown) == ["n1"] and shown["n1"]
    assert all(keys <= set(one) for one in shown["n1"])
    table = narrows("config", view, "--name", servers.name, "--node", "n1").stdout
    assert table.startswith("NODE") and len(table.splitlines()) > 1 and "\x1b" not in table


def test_status_counts_workers_and_captured_pods(servers: Lab) -> None:
    shown = json.loads(narrows("status", "--name", servers.name, "-o", "json").stdout)
    assert {one["node"] for one in shown["nodes"]} == set(servers.nodes())
    for one in shown["nodes"]:
        assert one["agent"] == "ready" and one["keeper"]["state"] == one["controlPlane"]["state"] == "connected"
        assert one["workers"] and all(worker["state"] == "ready" for worker in one["workers"])
    captured = {pod["name"]: pod["captured"] for one in shown["nodes"] for pod in one["pods"]}
    assert captured == {pod["name"]: pod["captured"] for pod in servers.status()}


@pytest.mark.parametrize(("arguments", "code", "said"), [
    (("status", "--name", "no-such-lab"), 69, "narrows lab up"),
    (("config", "routes", "--name", "no-such-lab"), 69, "narrows lab up"),
    (("lab", "status", "--name", "no-such-lab"), 69, "narrows lab up"),
    (("config", "secrets"), 64, "No such command"),
])
def test_a_failure_is_said_on_stderr_with_its_exit_code(arguments: tuple[str, ...], code: int, said: str) -> None:
    done = narrows(*arguments, check=False)
    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [("status",), ("config", "workloads", "-o", "json"), ("lab", "status"), ("lab", "metrics")])
def test_a_reader_that_leaves_early_is_no_error_message(servers: Lab, arguments: tuple[str, ...]) -> None:
    """As `narrows status | head -1`, and as a reader that takes nothing at all."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([NARROWS, *arguments, "--name", servers.name], stdout=write, stderr=subprocess.PIPE, text=True, timeout=60,
                          check=False)
    os.close(write)
    assert done.stderr == ""


def test_the_doctor_finds_nothing_that_the_mesh_cannot_do_without(servers: Lab) -> None:
    done = narrows("doctor", "-o", "json")
    checks = json.loads(done.stdout)["checks"]
    assert {"kernel", "cgroup v2", "BPF tool chain", "extension"} <= {one["name"] for one in checks}
    assert all(set(one) == {"name", "status", "found", "means", "todo"} for one in checks)
    assert all(one["means"] and one["todo"] for one in checks if one["status"] != "ok")
    assert not [one for one in checks if one["status"] == "fail"]
