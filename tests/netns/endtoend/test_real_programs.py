"""Programs that know nothing of a mesh work through capture unchanged, and the mesh counts what they do."""
from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from tests.support.lab import Lab
from tests.support.wait import until

pytestmark = pytest.mark.netns


def test_the_annotated_pods_are_captured_and_the_control_pod_is_not(servers: Lab) -> None:
    captured = {pod["name"]: pod["captured"] for pod in servers.status()}
    assert [captured.pop("outsider"), captured.pop("plain")] == [False, False]
    assert set(captured) >= {"client", "client2", "redis", "postgres", "web", "greeter", "origin", "nginx", "rpc", "secret"}
    assert all(captured.values())
    assert "disabled" in servers.pod("outsider")["reason"]


def test_curl_gets_a_page_through_a_service_name(servers: Lab) -> None:
    for name in ("web", "web.default", "web.default.svc.cluster.local"):
        assert servers.exec("client", "curl", "-sS", "-m", "5", f"http://{name}/hello.txt").stdout == "hello\n"


def test_curl_gets_four_megabytes_unharmed(servers: Lab, tmp_path: Path) -> None:
    target = tmp_path / "large.bin"
    servers.exec("client", "curl", "-sS", "-m", "20", "-o", str(target), "http://web/large.bin")
    sum_of = servers.exec("web", "sha256sum", "large.bin").stdout.split()[0]
    assert hashlib.sha256(target.read_bytes()).hexdigest() == sum_of


def test_a_python_client_keeps_its_connection_alive(servers: Lab) -> None:
    script = ("import http.client\nc = http.client.HTTPConnection('web', timeout=5)\n"
              "for _ in range(20):\n c.request('GET', '/hello.txt'); r = c.getresponse()\n"
              " assert r.read() == b'hello\\n', r.status\n"
              "print('twenty')")
    assert servers.exec("client", "/usr/bin/python3", "-c", script).stdout == "twenty\n"


def test_http_is_counted_on_both_sides(servers: Lab) -> None:
    labels = {"source_workload": "client", "destination_workload": "web", "destination_service_name": "web",
              "response_code": "200", "request_protocol": "http"}
    before = [servers.total("istio_requests_total", reporter=side, **labels) for side in ("source", "destination")]
    for _ in range(5):
        servers.exec("client", "curl", "-sS", "-m", "5", "-o", os.devnull, "http://web/hello.txt")
    until(lambda: [servers.total("istio_requests_total", reporter=side, **labels) for side in ("source", "destination")]
          == [count + 5 for count in before], "five requests more from both reporters")


def test_the_control_pod_reaches_the_same_service_and_is_not_counted_as_a_source(servers: Lab) -> None:
    assert servers.exec("outsider", "curl", "-sS", "-m", "5", "http://web/hello.txt").stdout == "hello\n"
    assert servers.total("istio_requests_total", reporter="source", source_workload="outsider") == 0


def test_redis_works_on_a_port_of_undeclared_protocol(servers: Lab) -> None:
    assert servers.exec("client", "redis-cli", "-h", "redis", "set", "key", "value").stdout == "OK\n"
    assert servers.exec("client", "redis-cli", "-h", "redis", "get", "key").stdout == "value\n"


def test_postgresql_works_with_small_and_large_answers(servers: Lab) -> None:
    query = ["psql", "-h", "postgres", "-U", "postgres", "-At", "-c"]
    assert servers.exec("client", *query, "select 6 * 7").stdout == "42\n"
    big = servers.exec("client", *query, "select repeat('x', 1000) from generate_series(1, 5000)").stdout
    assert big == ("x" * 1000 + "\n") * 5000


def test_tcp_is_counted_with_bytes_and_names(servers: Lab) -> None:
    servers.exec("client", "redis-cli", "-h", "redis", "ping")
    labels = {"source_workload": "client", "destination_workload": "redis", "request_protocol": "tcp"}
    for side in ("source", "destination"):
        until(lambda side=side: servers.total("istio_tcp_connections_closed_total", reporter=side, **labels) > 0,
              f"a closed connection counted by the {side}")
        assert servers.total("istio_tcp_sent_bytes_total", reporter=side, **labels) > 0
        assert servers.total("istio_tcp_received_bytes_total", reporter=side, **labels) > 0


def test_a_server_that_speaks_first_is_not_kept_waiting(servers: Lab) -> None:
    script = ("import socket, time\nt = time.monotonic()\ns = socket.create_connection(('greeter', 2525), 5)\n"
              "f = s.makefile('rwb', 0)\nassert f.readline() == b'220 welcome\\r\\n'\nassert time.monotonic() - t < 2\n"
              "f.write(b'hello\\n'); print(f.readline().decode().strip())")
    assert servers.exec("client", "/usr/bin/python3", "-c", script).stdout == "250 hello\n"


def test_a_server_sees_the_clients_own_address(servers: Lab) -> None:
    address = servers.pod("client")["ip"].split(",")[0]
    clients = servers.exec("client", "redis-cli", "-h", "redis", "client", "list").stdout
    assert f"addr={address}:" in clients


def test_nobody_listens_is_an_answer_not_a_hang(servers: Lab) -> None:
    done = servers.exec("client", "curl", "-sS", "-m", "5", "http://redis:6380/", check=False)
    assert done.returncode in (7, 52, 56), done  # refused, empty reply or reset: never 28, the time-out


def test_workers_hold_no_capability(servers: Lab) -> None:
    del servers
    workers = 0
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line)
            command = (status.parent / "cmdline").read_bytes()
        except OSError:
            continue
        if b"ext.proxy.worker" in command:
            workers += 1
            assert fields["CapEff"] == "0000000000000000"
            assert fields["NoNewPrivs"] == "1"
            assert fields["Uid"].split()[0] != "0"
    assert workers >= 4  # two nodes, two workers each
