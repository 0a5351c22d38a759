"""Access log lines as Istio writes them, and what a hostile client cannot do to them."""
from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from agent.model.telemetry import AccessRecord, Leg
from agent.telemetry.accesslog import AccessLog, json_line, json_tcp_line, text_line, text_tcp_line

RECORD = AccessRecord(
    reporter="source", protocol="http", flag="-", version_minor=1, start_us=1_767_225_600_123_000, duration_us=4_200,
    upstream_us=3_900, received=0, sent=178, source=1, destination=2, service=3, code=200, details="via_upstream",
    downstream_remote="10.244.1.5:40000", downstream_local="10.96.0.10:9080", upstream_remote="10.244.2.7:9080",
    upstream_local="10.244.1.5:40001", method="GET", path="/reviews/0", authority="reviews:9080", user_agent="curl/7.88",
    request_id="b7e1", route="default", cluster="outbound|9080||reviews.default.svc.cluster.local")


def test_the_text_line_is_istios() -> None:
    assert text_line(RECORD) == (
        '[2026-01-01T00:00:00.123Z] "GET /reviews/0 HTTP/1.1" 200 - via_upstream - "-" 0 178 4 3 "-" "curl/7.88" "b7e1" '
        '"reviews:9080" "10.244.2.7:9080" outbound|9080||reviews.default.svc.cluster.local 10.244.1.5:40001 '
        "10.96.0.10:9080 10.244.1.5:40000 - default")


def test_the_json_line_has_istios_keys() -> None:
    line = json.loads(json_line(RECORD))
    assert len(line) == 25  # Istio's 24 and our reporter
    assert line["response_code"] == 200
    assert line["upstream_service_time"] == 3
    assert line["requested_server_name"] is None


def test_a_quote_or_line_break_in_a_request_forges_nothing() -> None:
    hostile = replace(RECORD, user_agent='x" 200 -\n[2026-01-01T00:00:00.000Z] "GET /admin')
    assert "\n" not in text_line(hostile)
    assert '\\" 200 -\\x0a[' in text_line(hostile)
    assert json.loads(json_line(hostile))["user_agent"] == hostile.user_agent


def test_a_tcp_connection_has_no_request() -> None:
    line = text_line(replace(RECORD, protocol="tcp", method="", path="", code=0, details=""))
    assert '"- - -" 0 - - -' in line
    assert json.loads(json_line(replace(RECORD, protocol="tcp")))["upstream_service_time"] is None


def test_tcp_figures_stand_behind_what_the_line_has_without_them() -> None:
    record = replace(RECORD, downstream_leg=Leg("socket", 41, 20, 0), upstream_leg=Leg("tunnel", 12_345, 9_000, 3))
    assert text_tcp_line(record) == text_line(RECORD) + " socket 41 20 0 tunnel 12345 9000 3"
    plain, line = json.loads(json_line(record)), json.loads(json_tcp_line(record))
    assert list(line)[:len(plain)] == list(plain)
    assert {key: value for key, value in line.items() if key not in plain} == {
        "downstream_leg": "socket", "downstream_rtt_us": 41, "downstream_min_rtt_us": 20, "downstream_retransmits": 0,
        "upstream_leg": "tunnel", "upstream_rtt_us": 12_345, "upstream_min_rtt_us": 9_000, "upstream_retransmits": 3}


def test_what_was_not_measured_is_null_and_no_zero() -> None:
    record = replace(RECORD, downstream_leg=Leg("socket", 0, 0, 2), upstream_leg=Leg("node", 0, 0, 0))
    assert text_tcp_line(record).endswith(" default socket - - 2 node - - -")
    line = json.loads(json_tcp_line(record))
    assert (line["downstream_rtt_us"], line["downstream_min_rtt_us"], line["downstream_retransmits"]) == (None, None, 2)
    assert (line["upstream_leg"], line["upstream_rtt_us"], line["upstream_retransmits"]) == ("node", None, None)


def test_a_worker_that_cannot_tell_and_a_server_that_was_not_reached_have_no_leg() -> None:
    assert text_tcp_line(RECORD).endswith(" default - - - - - - - -")
    line = json.loads(json_tcp_line(replace(RECORD, downstream_leg=Leg("socket", 41, 20, 0), upstream_leg=Leg(None, 0, 0, 0))))
    assert [line[f"upstream_{key}"] for key in ("leg", "rtt_us", "min_rtt_us", "retransmits")] == [None] * 4


def test_reopen_follows_a_rotation(tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    log = AccessLog(str(path), "json")
    log.write([RECORD])
    path.rename(tmp_path / "access.log.1")
    log.reopen()
    log.write([RECORD, RECORD])
    log.close()
    assert len(path.read_text().splitlines()) == 2
    assert len((tmp_path / "access.log.1").read_text().splitlines()) == 1
