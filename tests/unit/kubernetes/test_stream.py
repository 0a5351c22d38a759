"""A watch's bytes become events, however they are cut; what cannot be read costs nothing else."""
from __future__ import annotations

import json
from typing import Any

import pytest

from protos.kubernetes.errors import Gone, Malformed, TooManyRequests
from protos.kubernetes.objects import Head, Key, Metadata, Struct, item, page
from protos.kubernetes.stream import Bookmark, Changed, Event, Failed, Skipped, Stream


class Pod(Struct, frozen=True):
    metadata: Metadata
    spec: dict[str, str]


def line(event: str, /, **body: Any) -> bytes:
    return json.dumps({"type": event, "object": body}).encode() + b"\n"


def pod(name: str, version: int, **spec: Any) -> dict[str, Any]:
    meta = {"name": name, "namespace": "a", "uid": f"u-{name}", "resourceVersion": str(version)}
    return {"kind": "Pod", "apiVersion": "v1", "metadata": meta, "spec": spec}


STREAM = (line("ADDED", **pod("é", 5, nodeName="n1")) + line("MODIFIED", **pod("y", 6)) + b"\n" + line("DELETED", **pod("y", 7))
          + line("BOOKMARK", kind="Pod", metadata={"resourceVersion": "9", "creationTimestamp": None})
          + line("ERROR", kind="Status", status="Failure", reason="Expired", code=410, message="too old resource version: 5 (8)"))


def words(events: list[Event[Pod]]) -> list[object]:
    found: list[object] = []
    for event in events:
        if isinstance(event, Changed):
            found.append((event.item.key, event.item.resource_version, event.deleted))
        elif isinstance(event, Failed):
            found.append(type(event.error))
        else:
            found.append(event)
    return found


WORDS = [(Key("a", "é"), "5", False), (Key("a", "y"), "6", False), (Key("a", "y"), "7", True), Bookmark("9"), Gone]


def test_a_stream_is_read_the_same_at_every_split() -> None:
    for cut in range(len(STREAM) + 1):
        stream = Stream("/api/v1/pods", Pod)
        assert words(stream.feed(STREAM[:cut]) + stream.feed(STREAM[cut:])) == WORDS, cut
    stream = Stream("/api/v1/pods", Pod)
    assert words([event for byte in STREAM for event in stream.feed(bytes([byte]))]) == WORDS


def test_a_line_that_is_cut_is_no_event() -> None:
    stream = Stream("/api/v1/pods", Pod)
    assert words(stream.feed(STREAM[:-1])) == WORDS[:-1]


@pytest.mark.parametrize("cut", [1, 7, 300, 301, 1_000])
def test_a_line_beyond_the_bound_is_left_out_alone(cut: int) -> None:
    data = line("ADDED", **pod("x", 5)) + line("ADDED", **pod("large", 6, text="x" * 900)) + line("ADDED", **pod("y", 7))
    stream = Stream("/api/v1/pods", Pod, bound=300)
    events = stream.feed(data[:cut]) + stream.feed(data[cut:])
    assert [type(event) for event in events] == [Changed, Skipped, Changed]
    assert isinstance(events[1], Skipped) and events[1].size > 900


def test_a_malformed_object_is_named_and_the_next_is_read() -> None:
    stream = Stream("/api/v1/pods", Pod)
    first, second, third = stream.feed(line("ADDED", **{**pod("x", 5), "spec": 7}) + line("ADDED", **pod("y", 6)) + line("ADDED", spec={}))
    assert isinstance(first, Changed) and first.item.key == Key("a", "x") and first.item.value is None
    assert "object" in first.item.problem and "$.spec" in first.item.problem
    assert isinstance(second, Changed) and second.item.value is not None
    assert isinstance(third, Changed) and third.item.key is None and "metadata" in third.item.problem


@pytest.mark.parametrize("data", [b"<html>\n", b"{}\n", b"\xff\xfe\n", line("UNKNOWN", **pod("x", 5)), b'{"type":"ERROR","object":7}\n'])
def test_what_is_no_event_ends_the_watch_with_the_reason(data: bytes) -> None:
    (event,) = Stream("/api/v1/pods", Pod).feed(data)
    assert isinstance(event, Failed) and isinstance(event.error, Malformed) and "/api/v1/pods" in str(event.error)


def test_an_error_says_when_to_come_again() -> None:
    (event,) = Stream("/p", Pod).feed(line("ERROR", status="Failure", code=429, reason="TooManyRequests", details={"retryAfterSeconds": 7}))
    assert isinstance(event, Failed) and isinstance(event.error, TooManyRequests) and event.error.retry_after == 7


def test_a_list_with_a_malformed_item_keeps_the_others_and_drops_unknown_fields() -> None:
    body = {"kind": "PodList", "metadata": {"resourceVersion": "12", "continue": "c", "remainingItemCount": 3},
            "items": [pod("x", 5, nodeName="n"), {"metadata": {"name": "y"}, "spec": {"a": 1}}, {**pod("z", 6), "status": {"new": [1]}}, 7]}
    found = page(json.dumps(body).encode(), Pod)
    assert (found.resource_version, found.continue_) == ("12", "c")
    assert [(one.key, one.value is not None) for one in found.items] == [
        (Key("a", "x"), True), (Key("", "y"), False), (Key("a", "z"), True), (None, False)]


def test_an_empty_list_may_have_null_for_its_items() -> None:
    assert page(b'{"metadata":{"resourceVersion":"3"},"items":null}', Pod).items == []


def test_objects_without_labels_are_read() -> None:
    found = item(b'{"metadata":{"name":"n","labels":null,"creationTimestamp":null}}', Head)
    assert found.value is not None and found.value.metadata.labels is None
