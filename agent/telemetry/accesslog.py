"""Access log lines: Istio's JSON and text formats (Istio's default access log format; Envoy's command operators).

`json-tcp` and `text-tcp` are the same with what the kernel measured of the TCP connection on either side. Envoy has no operators for
that (ROUNDTRIP_DURATION and the retransmission counts are of QUIC alone, and 0 for TCP), so the names are ours.
"""
from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import TextIO

from agent.model.telemetry import AccessRecord, Leg

Line = Callable[[AccessRecord], str]
LEG_KEYS = ("leg", "rtt_us", "min_rtt_us", "retransmits")


def start_time(record: AccessRecord) -> str:
    """`2026-01-31T12:00:00.123Z` (Envoy's %START_TIME%)."""
    at = datetime.fromtimestamp(record.start_us / 1_000_000, UTC)
    return at.strftime("%Y-%m-%dT%H:%M:%S.") + f"{at.microsecond // 1000:03d}Z"


def protocol(record: AccessRecord) -> str | None:
    return None if record.protocol == "tcp" else f"HTTP/1.{record.version_minor}"


def service_ms(record: AccessRecord) -> int | None:
    """Until the response began: a notion of HTTP, which a TCP connection has not."""
    return record.upstream_us // 1000 if record.upstream_us and record.protocol != "tcp" else None


def judged(record: AccessRecord) -> str:
    """What policies said of the connection; it shares a text with the reason why the server was not reached."""
    return record.failure if record.failure.startswith("rbac_") else ""


def json_fields(record: AccessRecord) -> dict[str, str | int | None]:
    upstream_ms = service_ms(record)
    return {
        "start_time": start_time(record),
        "method": record.method or None,
        "path": record.path or None,
        "protocol": protocol(record),
        "response_code": record.code,
        "response_flags": record.flag,
        "response_code_details": record.details or None,
        "connection_termination_details": judged(record) or None,
        "upstream_transport_failure_reason": None if judged(record) else record.failure or None,
        "bytes_received": record.received,
        "bytes_sent": record.sent,
        "duration": record.duration_us // 1000,
        "upstream_service_time": upstream_ms,
        "x_forwarded_for": record.forwarded_for or None,
        "user_agent": record.user_agent or None,
        "request_id": record.request_id or None,
        "authority": record.authority or None,
        "upstream_host": record.upstream_remote or None,
        "upstream_cluster": record.cluster or None,
        "upstream_local_address": record.upstream_local or None,
        "downstream_local_address": record.downstream_local or None,
        "downstream_remote_address": record.downstream_remote or None,
        "requested_server_name": record.sni or None,
        "route_name": record.route or None,
        "reporter": record.reporter,
    }


def json_line(record: AccessRecord) -> str:
    """One JSON object with Istio's keys; what does not apply is null. `reporter` is ours: a node logs both sides."""
    return json.dumps(json_fields(record), ensure_ascii=False, separators=(",", ":"))


def measured(leg: Leg | None) -> tuple[str | None, int | None, int | None, int | None]:
    """Kind, smoothed and least round trip in us, retransmitted segments; None for what was not measured."""
    if leg is None or leg.kind is None:
        return None, None, None, None
    return leg.kind, leg.rtt_us or None, leg.min_rtt_us or None, None if leg.kind == "node" else leg.retransmits


def json_tcp_line(record: AccessRecord) -> str:
    """And of both sides LEG_KEYS."""
    fields = json_fields(record)
    for side, leg in (("downstream", record.downstream_leg), ("upstream", record.upstream_leg)):
        fields.update(zip((f"{side}_{key}" for key in LEG_KEYS), measured(leg), strict=True))
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":"))


def quoted(text: str) -> str:
    """A client chose this text: a quote or a line break in it must not forge a field or a line."""
    return '"' + (text.replace("\\", "\\\\").replace('"', '\\"') or "-") + '"'


def text_line(record: AccessRecord) -> str:
    """Istio's default text format; `-` for what does not apply."""
    request = f"{record.method or '-'} {record.path or '-'} {protocol(record) or '-'}"
    upstream_ms = service_ms(record)
    parts = (
        f"[{start_time(record)}]", quoted(request), record.code, record.flag, record.details or "-", judged(record) or "-",
        quoted("" if judged(record) else record.failure), record.received, record.sent, record.duration_us // 1000,
        "-" if upstream_ms is None else upstream_ms,
        quoted(record.forwarded_for), quoted(record.user_agent), quoted(record.request_id), quoted(record.authority),
        quoted(record.upstream_remote), record.cluster or "-", record.upstream_local or "-",
        record.downstream_local or "-", record.downstream_remote or "-", record.sni or "-", record.route or "-",
    )
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in " ".join(map(str, parts)))


def text_tcp_line(record: AccessRecord) -> str:
    """And behind it the LEG_KEYS of downstream, then of upstream."""
    figures = (*measured(record.downstream_leg), *measured(record.upstream_leg))
    return " ".join((text_line(record), *("-" if one is None else str(one) for one in figures)))


FORMATS: dict[str, Line] = {"json": json_line, "text": text_line, "json-tcp": json_tcp_line, "text-tcp": text_tcp_line}


class AccessLog:
    """Appends lines to a file, or to stderr for `-`. `reopen` after a rotation; a failing disk loses lines, not service.

    lost: lines that could not be written since the start.
    """

    def __init__(self, path: str, form: str) -> None:
        self._path = path
        self._line = FORMATS[form]
        self.lost = 0
        self._file: TextIO | None = None
        self.reopen()

    def reopen(self) -> None:
        self.close()
        if self._path == "-":
            self._file = sys.stderr
            return
        handle = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
        self._file = os.fdopen(handle, "a", encoding="utf-8", errors="backslashreplace")

    def write(self, records: Iterable[AccessRecord]) -> None:
        lines = [self._line(record) for record in records]
        if not lines or self._file is None:
            return
        try:
            self._file.write("\n".join(lines) + "\n")
            self._file.flush()
        except OSError:
            self.lost += len(lines)

    def close(self) -> None:
        if self._file is not None and self._file is not sys.stderr:
            self._file.close()
        self._file = None
