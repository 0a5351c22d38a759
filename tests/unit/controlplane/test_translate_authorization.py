"""Policies as they are written and as they go over the wire, how strict a pod is, and what is refused or warned of."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf import json_format

from controlplane.model.mesh import Mesh
from controlplane.sources.folder import parse
from controlplane.translate.address import tunnel
from controlplane.translate.authorization import authorization
from controlplane.translate.catalog import Catalog
from protos.gen.istio import workload_pb2
from tests.support.manifests import good, mesh_of, pod

ROOT = "istio-system"
STRICT = f"{ROOT}/istio_converted_static_strict"
NOBODY = {"notPrincipals": [{"presence": {}}]}


def policy(spec: str, name: str = "p", namespace: str = "default", meta: str = "", kind: str = "AuthorizationPolicy") -> str:
    return f"""
---
apiVersion: security.istio.io/v1
kind: {kind}
metadata: {{name: {name}, namespace: {namespace}{meta}}}
spec: {spec}
"""


def peers(spec: str, name: str = "default", namespace: str = "default", meta: str = "") -> str:
    return policy(spec, name, namespace, meta, "PeerAuthentication")


def sent(text: str, name: str = "default/p") -> dict[str, Any] | None:
    found = authorization(mesh_of(text), name)
    return None if found is None else json_format.MessageToDict(found)


def rules(spec: str) -> Any:
    """Each rule as its clauses, each clause as its matches."""
    found = sent(policy(spec))
    assert found is not None
    return [[clause.get("matches", []) for clause in rule.get("clauses", [])] for rule in found.get("rules", [])]


@pytest.mark.parametrize(("spec", "made"), [
    ("{}", []),
    ("{rules: [{}]}", [[]]),
    ("{rules: [{from: [{source: {principals: ['*']}}]}]}", [[[{"principals": [{"presence": {}}]}]]]),
    ("{rules: [{from: [{source: {principals: [cluster.local/ns/a/*, '*/sa/b', cluster.local/ns/a/sa/b]}}]}]}",
     [[[{"principals": [{"prefix": "cluster.local/ns/a/"}, {"suffix": "/sa/b"}, {"exact": "cluster.local/ns/a/sa/b"}]}]]]),
    ("{rules: [{from: [{source: {notPrincipals: ['*'], namespaces: [a], notNamespaces: [b*]}}]}]}",
     [[[{"notPrincipals": [{"presence": {}}], "namespaces": [{"exact": "a"}], "notNamespaces": [{"prefix": "b"}]}]]]),
    ("{rules: [{from: [{source: {serviceAccounts: [web, other/api], notServiceAccounts: [x]}}]}]}",
     [[[{"serviceAccounts": [{"namespace": "default", "serviceAccount": "web"}, {"namespace": "other", "serviceAccount": "api"}],
         "notServiceAccounts": [{"namespace": "default", "serviceAccount": "x"}]}]]]),
    ("{rules: [{from: [{source: {ipBlocks: [10.0.0.0/8, 10.1.2.3], notIpBlocks: ['fd00::1/64']}}]}]}",
     [[[{"sourceIps": [{"address": "CgAAAA==", "length": 8}, {"address": "CgECAw==", "length": 32}],
         "notSourceIps": [{"address": "/QAAAAAAAAAAAAAAAAAAAA==", "length": 64}]}]]]),
    ("{rules: [{to: [{operation: {ports: ['80', '8080'], notPorts: ['9090']}}]}]}",
     [[[{"destinationPorts": [80, 8080], "notDestinationPorts": [9090]}]]]),
    ("{rules: [{from: [{source: {namespaces: [a]}}, {source: {namespaces: [b]}}], to: [{operation: {ports: ['80']}}]}]}",
     [[[{"destinationPorts": [80]}], [{"namespaces": [{"exact": "a"}]}, {"namespaces": [{"exact": "b"}]}]]]),
    ("{rules: [{when: [{key: source.ip, values: [10.0.0.1]}, {key: destination.port, notValues: ['1']}]}]}",
     [[[{"sourceIps": [{"address": "CgAAAQ==", "length": 32}]}], [{"notDestinationPorts": [1]}]]]),
    ("{rules: [{when: [{key: source.namespace, values: [a], notValues: [b]}, {key: source.principal, values: ['*']}]}]}",
     [[[{"namespaces": [{"exact": "a"}], "notNamespaces": [{"exact": "b"}]}], [{"principals": [{"presence": {}}]}]]]),
    ("{rules: [{when: [{key: destination.ip, values: [10.0.0.0/24]}]}]}",
     [[[{"destinationIps": [{"address": "CgAAAA==", "length": 24}]}]]]),
    # layer 7 in what allows: the rule never does
    ("{rules: [{to: [{operation: {methods: [GET], ports: ['80']}}]}, {to: [{operation: {ports: ['81']}}]}]}",
     [[[{"destinationPorts": [81]}]]]),
    ("{rules: [{from: [{source: {requestPrincipals: ['*']}}]}]}", []),
    ("{rules: [{when: [{key: 'request.headers[x]', values: [y]}]}]}", []),
    # and in what denies: that is left out, so that more is denied
    ("{action: DENY, rules: [{to: [{operation: {methods: [GET], ports: ['80']}}]}]}", [[[{"destinationPorts": [80]}]]]),
    ("{action: DENY, rules: [{from: [{source: {namespaces: [a]}}], to: [{operation: {paths: [/admin]}}]}]}",
     [[[{"namespaces": [{"exact": "a"}]}]]]),
    ("{action: DENY, rules: [{from: [{source: {namespaces: [a]}}], to: [{operation: {hosts: [h]}}, {operation: {ports: ['80']}}]}]}",
     [[[{"namespaces": [{"exact": "a"}]}]]]),
    ("{action: DENY, rules: [{to: [{operation: {hosts: [h]}}, {operation: {ports: ['80']}}]}]}", [[[{"destinationPorts": [80]}]]]),
    ("{action: DENY, rules: [{to: [{operation: {ports: ['80']}}], when: [{key: remote.ip, values: [10.0.0.1]}]}]}",
     [[[{"destinationPorts": [80]}]]]),
    # nothing is left: it denies nothing
    ("{action: DENY, rules: [{to: [{operation: {methods: [GET]}}]}]}", []),
    ("{action: DENY, rules: [{from: [{source: {requestPrincipals: [x]}}], to: [{operation: {methods: [GET]}}]}]}", []),
])  # fmt: skip
def test_rules_go_over_the_wire_as_istiod_sends_them(spec: str, made: Any) -> None:
    assert rules(spec) == made


@pytest.mark.parametrize(("text", "expected"), [
    (policy("{}"), {"scope": "NAMESPACE"}),
    (policy("{selector: {matchLabels: {app: a}}}"), {"scope": "WORKLOAD_SELECTOR"}),
    (policy("{selector: {}}"), {"scope": "WORKLOAD_SELECTOR"}),
    (policy("{action: DENY, rules: [{}]}"), {"scope": "NAMESPACE", "action": "DENY"}),
    (policy("{}", meta=", annotations: {istio.io/dry-run: 'true'}"), {"scope": "NAMESPACE", "dryRun": True}),
    (policy("{}", meta=", annotations: {istio.io/dry-run: 'false'}"), {"scope": "NAMESPACE"}),
    (policy("{action: AUDIT, rules: [{}]}"), None),
    (policy("{action: CUSTOM, provider: {name: x}, rules: [{}]}"), None),
    (policy("{targetRefs: [{kind: Gateway, name: waypoint}]}"), None),
])  # fmt: skip
def test_scope_action_and_trial_follow_from_where_and_how_it_is_written(text: str, expected: dict[str, Any] | None) -> None:
    found = sent(text)
    if found is not None:
        found.pop("rules", None)
    assert found == (None if expected is None else {"name": "p", "namespace": "default", **expected})


def test_a_policy_of_the_root_namespace_is_for_the_whole_mesh() -> None:
    found = authorization(mesh_of(policy("{}", namespace=ROOT)), f"{ROOT}/p")
    assert found is not None and json_format.MessageToDict(found) == {"name": "p", "namespace": ROOT}  # GLOBAL is 0
    mesh = Mesh("other-root")
    mesh.apply(good(policy("{}", namespace="other-root") + policy("{}", namespace=ROOT)).objects.values())
    scopes = [authorization(mesh, f"{where}/p").scope for where in ("other-root", ROOT)]  # type: ignore[union-attr]
    assert scopes == [0, 1]


POD = pod("web-0", "10.244.1.5", "web", labels=", tier: front", namespace="default")


@pytest.mark.parametrize(("texts", "named"), [
    ([policy("{}")], []),
    ([policy("{selector: {matchLabels: {app: web}}}")], ["default/p"]),
    ([policy("{selector: {matchLabels: {app: web, tier: back}}}")], []),
    ([policy("{selector: {matchLabels: {app: web}}}", namespace="other")], []),
    ([policy("{selector: {matchLabels: {app: web}}}", namespace=ROOT)], [f"{ROOT}/p"]),
    ([policy("{selector: {}}")], ["default/p"]),
    ([policy("{selector: {matchLabels: {app: web}}, action: AUDIT}")], []),
    ([policy("{selector: {matchLabels: {app: web}}}", "b"), policy("{selector: {matchLabels: {tier: front}}}", "a")],
     ["default/a", "default/b"]),
])  # fmt: skip
def test_a_workload_names_the_policies_that_select_it(texts: list[str], named: list[str]) -> None:
    mesh = mesh_of(POD, *texts)
    assert mesh.policies.of(next(mesh.pods())) == named


def mode(word: str) -> str:
    return f"mtls: {{mode: {word}}}" if word else ""


@pytest.mark.parametrize(("mesh_wide", "namespace", "workload", "named"), [
    ("", "", None, []),
    ("STRICT", "", None, [STRICT]),
    ("PERMISSIVE", "", None, []),
    ("STRICT", "PERMISSIVE", None, []),
    ("STRICT", "UNSET", None, [STRICT]),
    ("PERMISSIVE", "STRICT", None, [STRICT]),
    ("STRICT", "DISABLE", None, []),
    ("STRICT", "", "mtls: {mode: PERMISSIVE}", []),
    ("STRICT", "", "mtls: {mode: DISABLE}", []),
    ("STRICT", "", "mtls: {mode: UNSET}", [STRICT]),
    ("", "", "mtls: {mode: STRICT}", [STRICT]),
    ("", "PERMISSIVE", "mtls: {mode: STRICT}", [STRICT]),
    ("", "", "mtls: {mode: STRICT}, portLevelMtls: {8080: {mode: PERMISSIVE}}", ["default/converted_peer_authentication_own"]),
    ("", "", "mtls: {mode: STRICT}, portLevelMtls: {8080: {mode: STRICT}}", [STRICT]),
    ("", "", "mtls: {mode: STRICT}, portLevelMtls: {8080: {mode: UNSET}}", [STRICT]),
    ("STRICT", "", "portLevelMtls: {8080: {mode: DISABLE}}", ["default/converted_peer_authentication_own"]),
    ("STRICT", "", "portLevelMtls: {8080: {mode: STRICT}}", [STRICT]),
    ("", "", "portLevelMtls: {8080: {mode: STRICT}}", ["default/converted_peer_authentication_own"]),
    ("", "", "portLevelMtls: {8080: {mode: PERMISSIVE}}", []),
    ("STRICT", "", "mtls: {mode: PERMISSIVE}, portLevelMtls: {8080: {mode: STRICT}}", ["default/converted_peer_authentication_own"]),
])  # fmt: skip
def test_strictness_is_that_of_the_narrowest_that_says_one(mesh_wide: str, namespace: str, workload: str | None, named: list[str]) -> None:
    texts = [POD]
    if mesh_wide:
        texts.append(peers(f"{{{mode(mesh_wide)}}}", namespace=ROOT))
    if namespace:
        texts.append(peers(f"{{{mode(namespace)}}}"))
    if workload is not None:
        texts.append(peers(f"{{selector: {{matchLabels: {{app: web}}}}, {workload}}}", "own"))
    mesh = mesh_of(*texts)
    assert mesh.policies.of(next(mesh.pods())) == named
    # what a workload names is there to be had, and what nobody may name is not
    assert all(authorization(mesh, name) is not None for name in named)
    converted = authorization(mesh, "default/converted_peer_authentication_own")
    assert (converted is not None) == any("converted_peer" in name for name in named)


def test_exceptions_by_port_deny_nobody_elsewhere() -> None:
    own = ("{{selector: {{matchLabels: {{app: web}}}}, mtls: {{mode: {0}}}, "
           "portLevelMtls: {{80: {{mode: {1}}}, 81: {{mode: {1}}}, 82: {{mode: {0}}}}}}}")
    name = "default/converted_peer_authentication_own"
    strict = sent(peers(own.format("STRICT", "PERMISSIVE"), "own"), name)
    assert strict is not None and strict["action"] == "DENY" and strict["scope"] == "WORKLOAD_SELECTOR"
    assert strict["rules"] == [{"clauses": [{"matches": [NOBODY]}, {"matches": [{"notDestinationPorts": [80, 81]}]}]}]
    permissive = sent(peers(own.format("PERMISSIVE", "STRICT"), "own"), name)
    assert permissive is not None
    assert permissive["rules"] == [{"clauses": [{"matches": [NOBODY]}, {"matches": [{"destinationPorts": [80, 81]}]}]}]


def test_the_oldest_of_several_counts() -> None:
    young, old = ", creationTimestamp: '2026-01-02T00:00:00Z'", ", creationTimestamp: '2026-01-01T00:00:00Z'"
    own = "{{selector: {{matchLabels: {{app: web}}}}, mtls: {{mode: {}}}}}"
    for kind, name in (("{{mtls: {{mode: {}}}}}", ROOT), ("{{mtls: {{mode: {}}}}}", "default"), (own, "default")):
        mesh = mesh_of(POD, peers(kind.format("PERMISSIVE"), "a", name, young), peers(kind.format("STRICT"), "b", name, old))
        assert mesh.policies.of(next(mesh.pods())) == [STRICT]


def test_a_selector_in_the_root_namespace_has_no_effect() -> None:
    mesh = mesh_of(POD, peers("{selector: {matchLabels: {app: web}}, mtls: {mode: STRICT}}", namespace=ROOT))
    assert mesh.policies.of(next(mesh.pods())) == []
    assert "in the root namespace" in str(mesh.problems()[0])


@pytest.mark.parametrize(("annotations", "strictness", "expected"), [
    ("", "", workload_pb2.NONE),
    ("{ambient.istio.io/redirection: enabled}", "", workload_pb2.HBONE),
    ("{ambient.istio.io/redirection: disabled}", "", workload_pb2.NONE),
    ("{ambient.istio.io/redirection: enabled}", "STRICT", workload_pb2.HBONE),
    ("{ambient.istio.io/redirection: enabled}", "PERMISSIVE", workload_pb2.HBONE),
    ("{ambient.istio.io/redirection: enabled}", "DISABLE", workload_pb2.NONE),
])  # fmt: skip
def test_a_captured_pod_is_reached_by_hbone_unless_mtls_is_disabled(annotations: str, strictness: str, expected: int) -> None:
    texts = [pod("web-0", "10.244.1.5", "web", meta=f", annotations: {annotations}" if annotations else "")]
    if strictness:
        texts.append(peers(f"{{{mode(strictness)}}}"))
    mesh = mesh_of(*texts)
    assert tunnel(next(mesh.pods()), mesh) == expected


def test_a_change_touches_those_whom_it_concerns() -> None:
    mesh = mesh_of(POD, pod("web-0", "10.244.2.5", "web", namespace="other"))
    catalog = Catalog(mesh)
    touched = mesh.apply(good(policy("{selector: {matchLabels: {app: web}}}")).objects.values())
    assert (touched.policies, touched.addresses, touched.hosts) == ({"default/p"}, {"Kubernetes//Pod/default/web-0"}, set())
    catalog.update(touched)
    assert list(catalog.policies()) == ["default/p"]
    touched = mesh.apply(good(peers("{mtls: {mode: STRICT}}", namespace=ROOT)).objects.values())
    assert len(touched.addresses) == 2 and STRICT in touched.policies
    catalog.update(touched)
    before = catalog.policy("default/p")
    touched = mesh.apply(good(policy("{action: DENY, rules: [{}], selector: {matchLabels: {app: web}}}")).objects.values())
    catalog.update(touched)
    assert touched.policies == {"default/p"} and catalog.policy("default/p") != before
    catalog.update(mesh.apply([], [one.meta.key for one in mesh.objects() if one.meta.key.kind != "Pod"]))
    assert list(catalog.policies()) == []


@pytest.mark.parametrize(("text", "said"), [
    (policy("{rulez: []}"), "unknown field spec.rulez"),
    (policy("{action: REFUSE}"), "spec.action is 'REFUSE'"),
    (policy("{action: DENY}"), "DENY without rules, which never denies"),
    (policy("{rules: [{frm: []}]}"), "unknown field spec.rules[0].frm"),
    (policy("{rules: [{from: []}]}"), "spec.rules[0].from is empty"),
    (policy("{rules: [{from: [{source: {}}]}]}"), "source is empty"),
    (policy("{rules: [{from: [{source: {principal: [a]}}]}]}"), "unknown field spec.rules[0].from[0].source.principal"),
    (policy("{rules: [{from: [{source: {principals: [a*b]}}]}]}"), "has 'a*b'"),
    (policy("{rules: [{from: [{source: {principals: ['*a*']}}]}]}"), "has '*a*'"),
    (policy("{rules: [{from: [{source: {namespaces: ['']}}]}]}"), "has ''"),
    (policy("{rules: [{from: [{source: {ipBlocks: [10.0.0.0/33]}}]}]}"), "neither an address nor a block"),
    (policy("{rules: [{from: [{source: {serviceAccounts: [a/b/c]}}]}]}"), "has 'a/b/c'"),
    (policy("{rules: [{to: [{operation: {ports: [80]}}]}]}"), "ports[0] is 80, a text is expected"),
    (policy("{rules: [{to: [{operation: {ports: ['0']}}]}]}"), "no port between"),
    (policy("{rules: [{to: [{operation: {ports: ['65536']}}]}]}"), "no port between"),
    (policy("{rules: [{to: [{operation: {}}]}]}"), "operation is empty"),
    (policy("{rules: [{when: [{key: source.mac, values: [a]}]}]}"), "no key of a condition"),
    (policy("{rules: [{when: [{key: source.ip}]}]}"), "values is missing"),
    (policy("{rules: [{when: [{key: source.ip, values: [x]}]}]}"), "neither an address nor a block"),
    (policy("{selector: {matchLabel: {a: b}}}"), "unknown field spec.selector.matchLabel"),
    (policy("{}", meta=", annotations: {istio.io/dry-run: 'yes'}"), "istio.io/dry-run"),
    (peers("{mtls: {mode: STRICKT}}"), "spec.mtls.mode is 'STRICKT'"),
    (peers("{mtls: {mod: STRICT}}"), "unknown field spec.mtls.mod"),
    (peers("{mtl: {mode: STRICT}}"), "unknown field spec.mtl"),
    (peers("{portLevelMtls: {80: {mode: STRICT}}}"), "without selector"),
    (peers("{selector: {matchLabels: {a: b}}, portLevelMtls: {70000: {mode: STRICT}}}"), "is no port"),
])  # fmt: skip
def test_what_cannot_be_meant_is_refused_by_name(text: str, said: str) -> None:
    parsed = parse("test.yaml", text)
    assert any(said in str(problem) for problem in parsed.problems if problem.severity == "error"), [str(one) for one in parsed.problems]
    assert not parsed.objects


@pytest.mark.parametrize(("text", "said"), [
    (policy("{rules: [{to: [{operation: {methods: [GET]}}]}]}"), "names methods, which layer 4 does not know; the rule never allows"),
    (policy("{action: DENY, rules: [{to: [{operation: {paths: [/]}}]}]}"), "names paths, which layer 4 does not know; the rule denies"),
    (policy("{rules: [{from: [{source: {principals: ['spiffe://td/ns/a/sa/b']}}]}]}"), "without spiffe://"),
    (policy("{action: AUDIT, rules: [{}]}"), "the action AUDIT is not done at layer 4"),
    (policy("{targetRef: {kind: Service, name: a}}"), "it has targetRefs"),
    (peers("{}", "a") + peers("{}", "b"), "has no effect: PeerAuthentication default/a"),
    (peers("{selector: {matchLabels: {app: none}}}"), "selects no pod"),
    (peers("{selector: {matchLabels: {a: b}}, portLevelMtls: {80: {mode: DISABLE}}}"), "done as PERMISSIVE"),
])  # fmt: skip
def test_what_has_not_the_effect_that_it_seems_to_have_is_warned_of(text: str, said: str) -> None:
    parsed = parse("test.yaml", text)
    mesh = Mesh()
    mesh.apply(parsed.objects.values())
    assert any(said in str(problem) for problem in [*parsed.problems, *mesh.problems()])
