"""deploy/daemonset/crds: made from the readers, current, and no stricter than `narrows validate`."""
from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from controlplane.sources.kinds import KINDS, read
from controlplane.sources.text import Map, documents
from tests.support.structural import admitted, faults_of_schema
from tools.crds import FOLDER, READERS, files

ROOT = Path(__file__).parents[3]
WRITTEN = {path: path.read_text() for folder in ("examples", "tests") for path in sorted((ROOT / folder).rglob("*.yaml"))}


def schemas(kind: str) -> dict[str, dict[str, Any]]:
    body = yaml.safe_load((FOLDER / f"{kind.lower()}.yaml").read_text())
    return {version["name"]: version["schema"]["openAPIV3Schema"] for version in body["spec"]["versions"]}


def of_mesh() -> list[Any]:
    found = []
    for path, text in WRITTEN.items():
        for number, body in enumerate(documents(text)):
            if isinstance(body, Map) and body.get("kind") in READERS and read("", copy.deepcopy(body)).object is not None:
                found.append(pytest.param(body, id=f"{path.relative_to(ROOT)}:{number}"))
    assert found
    return found


def plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list) else value


def test_committed_files_are_what_would_be_written_now() -> None:
    have = {path.name: path.read_text() for path in FOLDER.iterdir()}
    assert have == files(), "run .venv/bin/python -m tools.crds and read the difference"


def test_every_kind_of_istio_that_is_read_has_one() -> None:
    assert {kind for kind, one in KINDS.items() if one.group.endswith(".istio.io")} == set(READERS)


@pytest.mark.parametrize("kind", READERS)
def test_every_version_has_a_structural_schema_and_one_is_stored(kind: str) -> None:
    body = yaml.safe_load((FOLDER / f"{kind.lower()}.yaml").read_text())
    versions = body["spec"]["versions"]
    assert [version["name"] for version in versions] == list(KINDS[kind].versions)
    assert [version["name"] for version in versions if version["storage"]] == ["v1"]
    for name, schema in schemas(kind).items():
        assert not faults_of_schema(schema), name


@pytest.mark.parametrize("body", of_mesh())
def test_what_is_valid_is_stored_as_it_was_written(body: Map) -> None:
    wanted = plain(body)
    for version, schema in schemas(body["kind"]).items():
        stored, faults = admitted(schema | {"x-kubernetes-preserve-unknown-fields": True}, wanted)
        assert not faults and stored == wanted, version


HEADER = """
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: any}
spec:
  hosts: [reviews]
  http:
  - match:
    - headers: {end-user: {exact: jason}, x-there: {}, x-null: }
      queryParams: {page: {regex: "[0-9]+"}}
      uri: {prefix: /api}
      port: 80
    timeout: 1.5s
    headers: {request: {set: {x-a: b}, remove: [x-c]}}
    route:
    - {destination: {host: reviews, subset: v1, port: {number: 80}}, weight: 90}
    - {destination: {host: reviews, subset: v2}, weight: 10}
  - timeout: 0
    route: [{destination: {host: reviews}}]
"""
RULE = """
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: any}
spec:
  host: reviews
  trafficPolicy: {loadBalancer: {simple: ROUND_ROBIN}, connectionPool: {tcp: {connectTimeout: 2s}}}
  subsets: [{name: v1, labels: {version: v1}, trafficPolicy: {loadBalancer: {simple: RANDOM}}}]
"""
POLICY = """
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: any}
spec:
  selector: {matchLabels: {app: web}}
  action: DENY
  rules:
  - from: [{source: {principals: ["*/sa/a"], notIpBlocks: [10.0.0.0/8]}}]
    to: [{operation: {ports: ["80"], methods: [GET]}}]
    when: [{key: source.namespace, values: [a]}]
  - {}
"""
NOTHING = """
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: allow-nothing}
"""
PEER = """
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: any}
spec: {selector: {matchLabels: {app: web}}, mtls: {mode: STRICT}, portLevelMtls: {"8080": {mode: PERMISSIVE}}}
"""


@pytest.mark.parametrize("text", [HEADER, RULE, POLICY, NOTHING, PEER], ids=["routes", "rule", "policy", "nothing", "peer"])
def test_every_field_that_is_read_is_taken(text: str) -> None:
    (body,) = documents(text)
    assert isinstance(body, Map)
    found = read("", body)
    assert found.object is not None, found.problems
    for schema in schemas(body["kind"]).values():
        stored, faults = admitted(schema | {"x-kubernetes-preserve-unknown-fields": True}, plain(body))
        assert not faults and stored == plain(body)


FAULTS = {
    "hosts is a text": (HEADER, ["spec", "hosts"], "reviews", ".spec.hosts"),
    "a port out of bounds": (HEADER, ["spec", "http", 0, "match", 0, "port"], 65536, ".spec.http[0].match[0].port"),
    "a weight below 0": (HEADER, ["spec", "http", 0, "route", 0, "weight"], -1, ".spec.http[0].route[0].weight"),
    "a match that is no map": (HEADER, ["spec", "http", 0, "match", 0, "uri"], "/api", ".spec.http[0].match[0].uri"),
    "no host": (RULE, ["spec", "host"], None, ".spec: host is missing"),
    "a subset without name": (RULE, ["spec", "subsets", 0, "name"], None, ".spec.subsets[0]: name is missing"),
    "an unknown action": (POLICY, ["spec", "action"], "REFUSE", ".spec.action"),
    "a condition without key": (POLICY, ["spec", "rules", 0, "when", 0, "key"], None, "key is missing"),
    "an unknown mode": (PEER, ["spec", "mtls", "mode"], "STRIKT", ".spec.mtls.mode"),
    "an unknown mode of a port": (PEER, ["spec", "portLevelMtls", "8080", "mode"], "STRIKT", ".spec.portLevelMtls.8080.mode"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_schema_can_see_is_refused_by_both(fault: str) -> None:
    text, path, value, said = FAULTS[fault]
    (body,) = documents(text)
    assert isinstance(body, Map)
    place: Any = body
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    _, faults = admitted(schemas(body["kind"])["v1"], plain(body))
    assert len(faults) == 1 and said in faults[0], faults
    assert read("", body).object is None


def test_a_field_that_nobody_knows_reaches_the_control_plane() -> None:
    (body,) = documents(HEADER)
    assert isinstance(body, Map)
    body["spec"]["http"][0]["timeuot"] = "1s"
    body["spec"]["http"][0]["mirror"] = {"host": "reviews"}
    stored, faults = admitted(schemas("VirtualService")["v1"], plain(body))
    assert not faults and stored["spec"]["http"][0]["timeuot"] == "1s" and stored["spec"]["http"][0]["mirror"] == {"host": "reviews"}
    assert len(read("", body).problems) >= 2
