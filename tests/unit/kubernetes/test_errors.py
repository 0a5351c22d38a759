"""What the API server refuses is told with verb, path, status, reason and what to do; what is imported costs nothing until it is used."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from protos.kubernetes import errors
from protos.kubernetes.errors import RETRY_AFTER_BOUND, ApiError, from_answer
from protos.kubernetes.resources import NODES, PODS, VIRTUAL_SERVICES


def said(code: int, reason: str, message: str = "no", **more: object) -> bytes:
    return json.dumps({"kind": "Status", "status": "Failure", "code": code, "reason": reason, "message": message, **more}).encode()


@pytest.mark.parametrize(("code", "reason", "kind"), [
    (400, "BadRequest", errors.BadRequest), (401, "Unauthorized", errors.Unauthorized), (403, "Forbidden", errors.Forbidden),
    (404, "NotFound", errors.NotFound), (409, "Conflict", errors.Conflict), (409, "AlreadyExists", errors.AlreadyExists),
    (410, "Expired", errors.Gone), (422, "Invalid", errors.BadRequest), (429, "TooManyRequests", errors.TooManyRequests),
    (500, "InternalError", errors.Unavailable), (503, "ServiceUnavailable", errors.Unavailable), (504, "Timeout", errors.Unavailable),
    (302, "", ApiError)])
def test_a_refusal_is_told_in_full(code: int, reason: str, kind: type[ApiError]) -> None:
    error = from_answer("list", "/api/v1/pods", code, said(code, reason, "the words", details={"kind": "pods", "name": "x"}), None)
    assert type(error) is kind
    for part in ("list", "/api/v1/pods", str(code), reason, "the words", error.advice):
        assert part in str(error)
    assert len(error.advice) > 10


def test_a_kind_that_is_not_served_is_told_from_an_object_that_is_not_there() -> None:
    newer = said(404, "NotFound", "the server could not find the requested resource", details={})  # another version of the group is served
    assert type(from_answer("list", "/apis/discovery.k8s.io/v1/endpointslices", 404, newer, None)) is errors.NotServed
    error = from_answer("list", VIRTUAL_SERVICES.path(), 404, b"404 page not found\n", None)
    assert isinstance(error, errors.NotFound) and isinstance(error, errors.NotServed) and "CRD" in str(error)


@pytest.mark.parametrize(("header", "details", "wait"), [
    ("5", 0, 5.0), (None, 7, 7.0), ("3", 7, 3.0), (None, 0, None), ("soon", 0, None), ("99999999", 0, RETRY_AFTER_BOUND), ("-3", 0, None)])
def test_how_long_to_wait_is_read_and_bounded(header: str | None, details: int, wait: float | None) -> None:
    body = said(429, "TooManyRequests", details={"retryAfterSeconds": details})
    assert from_answer("get", "/p", 429, body, header).retry_after == wait


def test_long_words_are_cut() -> None:
    assert len(str(from_answer("create", "/p", 422, said(422, "Invalid", "x" * 100_000), None))) < 2_000
    assert len(str(from_answer("create", "/p", 502, b"\xff" * 100_000, None))) < 2_000


def test_paths_are_the_api_servers_own() -> None:
    assert PODS.path() == "/api/v1/pods" and PODS.path("a") == "/api/v1/namespaces/a/pods"
    assert PODS.path("a", "x", "status") == "/api/v1/namespaces/a/pods/x/status"
    assert NODES.path("ignored", "n1") == "/api/v1/nodes/n1"
    assert VIRTUAL_SERVICES.path("a", "x") == "/apis/networking.istio.io/v1/namespaces/a/virtualservices/x"


@pytest.mark.parametrize(("namespace", "name"), [
    ("..", "x"), ("a", ".."), ("a", "x/y"), ("a", "x%2fy"), ("", "x"), ("a", "x\ny"), ("a", ".")])
def test_a_name_cannot_lead_to_another_path(namespace: str, name: str) -> None:
    with pytest.raises(ValueError, match=r"cannot be part of a path|needs a namespace"):
        PODS.path(namespace, name)


def test_a_query_cannot_be_smuggled_in_by_a_name() -> None:
    assert PODS.path("a", "x?watch=1#y") == "/api/v1/namespaces/a/pods/x%3Fwatch%3D1%23y"


def test_only_the_client_costs_the_memory_of_an_http_library() -> None:
    code = ("import sys, protos.kubernetes.reflector, protos.kubernetes.configuration, protos.kubernetes.resources\n"
            "print([name for name in ('aiohttp', 'yaml', 'yarl') if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3], capture_output=True, text=True, check=True,
                          timeout=60)
    assert done.stdout.strip() == "[]"
