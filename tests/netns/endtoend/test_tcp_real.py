"""TCP of every kind through the whole mesh: client, worker out, worker in, server."""
from __future__ import annotations

import sys

import pytest

from tests.netns.endtoend.real import HERE, Log, curl, memory, play
from tests.support.lab import Lab
from tests.support.wait import until

pytestmark = pytest.mark.netns


@pytest.mark.parametrize("size", [0, 1, 3_000_000])
def test_a_client_that_closed_its_side_gets_the_whole_answer(servers: Lab, size: int) -> None:
    log = Log(servers)
    found = play(servers, "half_close", "origin", 9000, size)
    assert found["answer"] == found["ours"]
    for side in ("source", "destination"):
        line = log.one(side)
        assert (line["response_code"], line["response_flags"], line["bytes_received"]) == (0, "-", size)
        assert line["bytes_sent"] == len(found["answer"])


def test_a_server_that_reads_nothing_stalls_its_client_and_costs_the_workers_little(servers: Lab) -> None:
    before = memory(servers)
    assert play(servers, "stall", "origin", 9001) < 64 << 20  # the kernel's buffers of six sockets and little of ours
    after = memory(servers)
    assert all(after[pid] - before[pid] < 8192 for pid in before), (before, after)


def test_grpc_passes_on_ports_named_grpc_http2_and_on_an_undeclared_one(servers: Lab) -> None:
    for port in (50051, 50052, 50053):
        assert servers.exec("client", sys.executable, str(HERE / "rpc.py"), "call", f"rpc:{port}", "hello").stdout == "olleh\n100\n"


def test_grpc_on_a_port_named_http_is_told_what_is_wrong(servers: Lab) -> None:
    log = Log(servers)
    done = servers.exec("client", sys.executable, str(HERE / "rpc.py"), "call", "rpc:50054", "hello", check=False)
    assert done.returncode != 0
    assert "HTTP status 505" in done.stderr
    until(lambda: log.lines("source", response_code=505, response_flags="DPE"), "a 505 in the log")


def test_http_2_with_prior_knowledge_passes_an_undeclared_port_as_tcp(servers: Lab) -> None:
    log = Log(servers)
    curl(servers, "--http2-prior-knowledge", "http://rpc:50053/test.Echo/Say")
    line = log.one("source")
    assert (line["protocol"], line["response_flags"]) == (None, "-")
    assert line["bytes_sent"] > 0  # the server's SETTINGS came back


@pytest.mark.parametrize("port", [4433, 443, 444])
def test_tls_passes_untouched_on_undeclared_tls_and_tcp_ports(servers: Lab, port: int) -> None:
    assert curl(servers, "-k", f"https://secret:{port}/").startswith("200 ")
    chain = servers.exec("client", "sh", "-c", f"openssl s_client -connect secret:{port} -servername secret </dev/null")
    assert "CN = secret" in chain.stdout


def test_the_original_destination_decides_not_the_name_in_the_request(servers: Lab) -> None:
    """A client cannot choose another service's endpoints, or routes, by what it writes into its request."""
    address = servers.pod("origin")["ip"].split(",")[0]
    log = Log(servers)
    assert curl(servers, "-H", "Host: web", "http://origin/stranger") == "200 1.1"
    assert log.one("source", path="/stranger")["upstream_cluster"] == "outbound|80||origin.default.svc.cluster.local"
    assert curl(servers, f"http://{address}:8000/direct") == "200 1.1"
    assert log.one("source", path="/direct")["downstream_local_address"] == f"{address}:8000"
    assert log.one("destination", path="/direct")["upstream_host"] == f"{address}:8000"


def test_an_address_that_the_mesh_does_not_know_passes_untouched(servers: Lab) -> None:
    gateway = servers.exec("client", "sh", "-c", "ip -4 route show default | cut -d' ' -f3").stdout.strip()
    log = Log(servers)
    done = servers.exec("client", "curl", "-sS", "-m", "5", f"http://{gateway}:15021/healthz/ready", "-o", "/dev/null",
                        "-w", "%{http_code}", check=False)
    assert done.stdout == "200"
    line = log.one("source")
    assert (line["upstream_cluster"], line["protocol"]) == ("PassthroughCluster", None)


@pytest.mark.parametrize(("service", "port", "flag", "reason"), [
    ("nobody", 90, "UH", None), ("plain", 9998, "UF", "delayed_connect_error:_Connection_refused")])
def test_a_connection_that_reaches_no_server_ends_with_its_flag(
        servers: Lab, service: str, port: int, flag: str, reason: str | None) -> None:
    log = Log(servers)
    assert play(servers, "raw", service, port, b"hello".hex()) in ("", "<reset>")
    line = log.one("source")
    assert (line["response_flags"], line["upstream_transport_failure_reason"]) == (flag, reason)
    assert (line["upstream_cluster"], line["upstream_service_time"]) == (f"outbound|{port}||{service}.default.svc.cluster.local", None)


