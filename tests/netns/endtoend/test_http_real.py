"""HTTP/1 of every shape through the whole mesh: client, worker out, worker in, server; what both sides count and log of it."""
from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

import pytest

from tests.netns.endtoend.malformed import MALFORMED
from tests.netns.endtoend.origin import BLOCK
from tests.netns.endtoend.real import Log, counted, curl, descriptors, memory, more, play, play_lines, soft_bound
from tests.support.lab import Lab
from tests.support.wait import until

pytestmark = pytest.mark.netns
BIG = 64 << 20
SIDES = ("source", "destination")
RESET = "upstream_reset_before_response_started"


# ---- connections -----------------------------------------------------------------------------------------------

def test_requests_of_one_pod_share_a_connection_and_two_pods_never_do(servers: Lab) -> None:
    mine, theirs = (set(play(servers, "fresh", "origin", 80, 20, pod=pod)) for pod in ("client", "client2"))
    assert len(mine) < 5  # of twenty: the mesh keeps connections that the client does not
    assert not mine & theirs
    assert not set(play(servers, "kept", "origin", 80, 20)["connections"]) & theirs


def test_a_request_costs_little_and_nothing_waits_for_an_acknowledgement(servers: Lab) -> None:
    for name in ("kept", "posts"):
        found = play(servers, name, "origin", 80, 100)
        assert found["p50"] < 20, (name, found)  # 40 ms is what a delayed acknowledgement costs; about 1 ms is usual


def test_pipelined_requests_are_answered_in_order(servers: Lab) -> None:
    requests = [f"GET /{i} HTTP/1.1\r\nHost: origin\r\n{'Connection: close' if i == 49 else 'X: y'}\r\n\r\n" for i in range(50)]
    answers = play(servers, "raw", "origin", 80, "".join(requests).encode().hex()).split("HTTP/1.1 200 OK")[1:]
    assert [json.loads(answer.split("\r\n\r\n", 1)[1])["path"] for answer in answers] == [f"/{i}" for i in range(50)]


# ---- bodies ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("how", ["length", "chunked", "close"])
def test_a_large_answer_arrives_whole(servers: Lab, how: str) -> None:
    before = memory(servers)
    found = play(servers, "get", "origin", 80, f"/{how}?n={BIG}")
    assert found == {"length": BIG, "sha256": hashlib.sha256(BLOCK * (BIG // len(BLOCK))).hexdigest()}
    after = memory(servers)
    assert all(after[pid] - before[pid] < 8192 for pid in before), (before, after)


@pytest.mark.parametrize("how", ["length", "chunked"])
def test_a_large_upload_arrives_whole(servers: Lab, how: str) -> None:
    found = play(servers, "upload", "origin", 80, BIG, how)
    assert (found["length"], found["sha256"]) == (BIG, found["ours"])


def test_trailers_pass_both_ways(servers: Lab) -> None:
    asked = (b"POST /who HTTP/1.1\r\nHost: origin\r\nConnection: close\r\nTransfer-Encoding: chunked\r\nTrailer: X-A\r\n\r\n"
             b"2\r\nhi\r\n0\r\nX-A: b\r\n\r\n")
    answer = play(servers, "raw", "origin", 80, asked.hex())
    assert json.loads(answer.split("\r\n\r\n", 1)[1])["trailers"] == ["X-A: b"]
    asked = b"GET /chunked?n=3 HTTP/1.1\r\nHost: origin\r\nConnection: close\r\nTE: trailers\r\n\r\n"
    assert play(servers, "raw", "origin", 80, asked.hex()).endswith("0\r\nX-Sum: done\r\n\r\n")


def test_expect_100_continue_with_curl(servers: Lab, tmp_path: Path) -> None:
    body = tmp_path / "body"
    body.write_bytes(bytes(200_000))
    tmp_path.chmod(0o755)
    done = servers.exec("client", "curl", "-sS", "-v", "-m", "10", "-H", "Expect: 100-continue", "--data-binary", f"@{body}",
                        "http://origin/who")
    assert "100 Continue" in done.stderr
    assert json.loads(done.stdout)["length"] == 200_000
    assert curl(servers, "-H", "Expect: 100-continue", "--data-binary", f"@{body}", "http://origin/refuse") == "417 1.1"


def test_answers_without_a_body(servers: Lab) -> None:
    for path in ("/status?code=204", "/status?code=304"):
        assert curl(servers, f"http://origin{path}", "http://origin/who").split("\n") == [f"{path[-3:]} 1.1", "200 1.1"]
    head = servers.exec("client", "curl", "-sS", "-m", "5", "-I", "http://origin/who").stdout.lower()
    assert head.startswith("http/1.1 200")
    assert "content-length: " in head


def test_a_client_of_http_1_0(servers: Lab) -> None:
    for url in ("http://origin/who", "http://origin:82/who", "http://origin/close?n=100000", "http://nginx/large.bin"):
        assert curl(servers, "-0", url) == "200 1.1"


def test_an_upgraded_connection_is_a_tunnel(servers: Lab) -> None:
    for port in (80, 82):
        assert play(servers, "tunnel", "origin", port) == {"status": "101", "echoed": 3, "rest": ""}


def test_nginx_behind_capture(servers: Lab) -> None:
    assert curl(servers, "http://nginx/hello.txt", "http://nginx/large.bin").split("\n") == ["200 1.1", "200 1.1"]
    assert curl(servers, "-r", "0-99", "http://nginx/large.bin") == "206 1.1"
    assert curl(servers, "http://nginx/none") == "404 1.1"


# ---- protocol and route ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("port", "protocol"), [(80, "HTTP/1.1"), (82, "HTTP/1.1"), (83, "HTTP/1.1"), (84, None)])
def test_the_protocol_comes_from_name_app_protocol_or_the_first_bytes(servers: Lab, port: int, protocol: str | None) -> None:
    log = Log(servers)
    assert curl(servers, f"http://origin:{port}/who") == "200 1.1"
    line = log.one("source", downstream_local_address=f"{line_address(servers)}:{port}")
    assert line["protocol"] == protocol
    assert log.one("destination")["protocol"] == "HTTP/1.1"  # a port of the pod is HTTP when a service declares it so


def line_address(servers: Lab) -> str:
    return servers.exec("client", "getent", "ahostsv4", "origin").stdout.split()[0]


@pytest.mark.parametrize(("args", "route"), [
    (["/exact"], "exact"), (["/exact/not"], None), (["/prefix/x"], "prefix"), (["/regex/12"], "regex"), (["/regex/12x"], None),
    (["/m"], None), (["/m?q=1"], "query"), (["/m?q=12"], None),
    (["/m", "-X", "DELETE"], "method"), (["/m", "-H", "X-Kind: special"], "header"),
])
def test_each_kind_of_match_decides_alone(servers: Lab, args: list[str], route: str | None) -> None:
    done = servers.exec("client", "curl", "-sS", "-i", "-m", "5", f"http://origin{args[0]}", *args[1:])
    head, body = done.stdout.split("\n\n", 1)
    seen = json.loads(body)["headers"]
    assert seen.get("x-route") == route
    assert "x-kind" not in seen
    assert ("x-answer: yes" in head.lower()) == (route == "header")


# ---- faults -----------------------------------------------------------------------------------------------------

def test_malformed_requests_get_their_answer_and_reach_nobody(servers: Lab) -> None:
    log = Log(servers)
    answers = play_lines(servers, [raw.hex() for raw, _ in MALFORMED], "raws", "origin", 80)
    for (raw, code), answer in zip(MALFORMED, answers, strict=True):
        assert answer.startswith(f"HTTP/1.1 {code} "), (raw[:100], answer[:100])
        assert answer.count("HTTP/1.1 ") == 1, raw[:100]
    until(lambda: len(log.lines("source", response_flags="DPE")) == len(MALFORMED), "a line with DPE for each")
    seen = json.loads(servers.exec("client", "curl", "-sS", "-m", "5", "http://origin/seen").stdout)
    assert not [one for one in seen if "bad" in one]


@pytest.mark.parametrize(("url", "code", "source", "destination"), [
    ("http://nobody/x-uh", "503", (503, "UH", "no_healthy_upstream"), None),
    ("http://plain:9999/x-uf", "503", (503, "UF", f"{RESET}{{remote_connection_failure}}"), None),
    ("http://plain:9002/x-to", "503", (503, "UF", f"{RESET}{{connection_timeout}}"), None),
    ("http://origin:81/slow?s=3", "504", (504, "UT", "upstream_response_timeout"), (0, "DC", "downstream_remote_disconnect")),
    ("http://origin/die", "503", (503, "-", "via_upstream"), (503, "UC", f"{RESET}{{connection_termination}}")),
    ("http://origin/half", "200", *[(200, "UC", "upstream_reset_after_response_started{connection_termination}")] * 2),
    ("http://origin/garbage", "502", (502, "-", "via_upstream"), (502, "UPE", f"{RESET}{{protocol_error}}")),
])
def test_each_fault_has_its_code_and_flag_in_log_and_metrics(
        servers: Lab, url: str, code: str, source: tuple[int, str, str], destination: tuple[int, str, str] | None) -> None:
    log, path = Log(servers), "/" + url.split("/", 3)[3]
    before = counted(servers, source_workload="client")
    start = time.monotonic()
    assert curl(servers, url).split()[0] == code
    assert time.monotonic() - start < 8
    assert log.outcome("source", path=path) == source
    refused = "delayed_connect_error:_Connection_refused" if source[2].endswith("{remote_connection_failure}") else None
    assert log.one("source", path=path)["upstream_transport_failure_reason"] == refused
    expected = {("source", str(source[0]), source[1]): 1}
    if destination is not None:
        assert log.outcome("destination", path=path) == destination
        expected["destination", str(destination[0]), destination[1]] = 1
    until(lambda: more(before, counted(servers, source_workload="client")) == expected, f"counted as {expected}")


def test_an_application_that_refuses_behind_a_tunnel_is_told_by_both_sides(servers: Lab) -> None:
    """Without a tunnel the request gets to the destination's proxy, which answers it. By a tunnel it never leaves the source's: CONNECT
    is answered 503 before, so the source has the failure (UF) and the destination a connection, not a request."""
    log, before = Log(servers), counted(servers, source_workload="client")
    assert curl(servers, "http://origin:9999/x-in").split()[0] == "503"
    line = log.one("source", path="/x-in")
    assert (line["response_code"], line["response_flags"], line["response_code_details"]) == (
        503, "UF", f"{RESET}{{remote_connection_failure}}")
    assert line["upstream_transport_failure_reason"] == (
        "the destination's proxy answered 503: it could not connect to the application")
    there = log.one("destination")
    assert (there["protocol"], there["response_flags"], there["upstream_transport_failure_reason"]) == (
        None, "UF", "delayed_connect_error:_Connection_refused")
    assert there["upstream_host"].endswith(":9999")
    expected = {("source", "503", "UF"): 1}
    until(lambda: more(before, counted(servers, source_workload="client")) == expected, "one request, of the source alone")


@pytest.mark.parametrize(("path", "after", "code"), [("/slow?s=1.5", "request", 0), ("/length?n=60000000", "100000", 200)])
def test_a_client_that_leaves_is_dc_on_both_sides(servers: Lab, path: str, after: str, code: int) -> None:
    log = Log(servers)
    play(servers, "leave", "origin", 80, path, after)
    for side in SIDES:
        line = log.one(side, path=path)
        assert (line["response_code"], line["response_flags"]) == (code, "DC"), line


def test_when_descriptors_run_out_the_mesh_answers_or_waits_and_serves_again_afterwards(servers: Lab) -> None:
    workers = servers.processes("ext.proxy.worker")
    bounds = {pid: soft_bound(pid) for pid in workers}
    try:
        for pid in workers:
            descriptors(pid, len(list(Path(f"/proc/{pid}/fd").iterdir())) + 6)
        codes = play(servers, "burst", "origin", 80, 400, 3)  # more than a worker has free when all that was in use before has ended
        assert set(codes) <= {"200", "503", "closed", "waited"}, codes
        assert codes.get("200", 0) < 400, codes  # it was short indeed
    finally:
        for pid, bound in bounds.items():
            descriptors(pid, bound)
    until(lambda: play(servers, "burst", "origin", 80, 60, 10) == {"200": 60}, "every request served again", timeout=30)
    assert servers.processes("ext.proxy.worker") == workers  # none died of it


# ---- counts ----------------------------------------------------------------------------------------------------------

def test_a_known_mix_is_counted_exactly_by_both_sides_and_costs_no_memory(servers: Lab) -> None:
    labels = {"source_workload": "client2", "destination_workload": "origin", "request_protocol": "http"}
    mix = {"200": 700, "204": 100, "404": 100, "500": 100}
    play(servers, "mix", "origin", 80, json.dumps(mix), pod="client2")  # buffers and pages that are taken once
    before, resident = counted(servers, **labels), memory(servers)
    sums = {name: [servers.total(f"istio_{name}", reporter=side, **labels) for side in SIDES]
            for name in ("request_bytes_sum", "response_bytes_sum", "request_duration_milliseconds_sum",
                         "request_duration_milliseconds_count")}
    found = play(servers, "mix", "origin", 80, json.dumps({code: count * 5 for code, count in mix.items()}), pod="client2")
    expected = {(side, code, "-"): count * 5 for side in SIDES for code, count in mix.items()}
    until(lambda: more(before, counted(servers, **labels)) == expected, f"{expected}")
    grown = {name: [servers.total(f"istio_{name}", reporter=side, **labels) - was for side, was in zip(SIDES, values, strict=True)]
             for name, values in sums.items()}
    assert grown["request_duration_milliseconds_count"] == [5000, 5000]
    out, into = grown["request_duration_milliseconds_sum"]
    assert 0 < into < out < found["milliseconds"]  # each hop lies within the one before it
    assert grown["request_bytes_sum"][0] == found["sent"]  # what the client sent, to the byte
    assert grown["response_bytes_sum"][0] == pytest.approx(found["received"], rel=0.05)
    after = memory(servers)
    assert all(after[pid] - resident[pid] < 512 for pid in resident), (resident, after)
