"""Who is captured: precedence, reasons, and values that are refused."""
from __future__ import annotations

from ipaddress import ip_network
from typing import Any

import pytest

from agent.model.pod import CaptureSettings, LocalPod
from agent.workloads.enrol import (
    DATAPLANE_MODE,
    DNS_CAPTURE,
    EXCLUDE_INBOUND_PORTS,
    EXCLUDE_OUTBOUND_PORTS,
    EXCLUDE_OUTBOUND_RANGES,
    INCLUDE_OUTBOUND_RANGES,
    INTERCEPT,
    Policy,
    enrol,
)

ON, OFF = {INTERCEPT: "enabled"}, {INTERCEPT: "disabled"}
AMBIENT, NONE = {DATAPLANE_MODE: "ambient"}, {DATAPLANE_MODE: "none"}


def pod(**more: Any) -> LocalPod:
    return LocalPod(**{"uid": "u", "namespace": "shop", "name": "cart-0", "service_account": "default", "addresses": (),
                       "netns": "/run/netns/x", "cgroup": "", "host_network": False, **more})


@pytest.mark.parametrize(("annotations", "labels", "namespace_annotations", "namespace_labels", "captured", "reason"), [
    ({}, {}, {}, {}, False, "neither"),
    (ON, {}, {}, {}, True, "annotation narrows.mesh/intercept=enabled of the pod"),
    (OFF, {}, {}, {}, False, "annotation narrows.mesh/intercept=disabled of the pod"),
    ({}, AMBIENT, {}, {}, True, "label istio.io/dataplane-mode=ambient of the pod"),
    ({}, NONE, {}, {}, False, "label istio.io/dataplane-mode=none of the pod"),
    ({}, {}, ON, {}, True, "annotation narrows.mesh/intercept=enabled of the namespace"),
    ({}, {}, OFF, {}, False, "annotation narrows.mesh/intercept=disabled of the namespace"),
    ({}, {}, {}, AMBIENT, True, "label istio.io/dataplane-mode=ambient of the namespace"),
    ({}, {}, {}, NONE, False, "label istio.io/dataplane-mode=none of the namespace"),
    (ON, NONE, OFF, NONE, True, "annotation narrows.mesh/intercept=enabled of the pod"),
    (OFF, AMBIENT, ON, AMBIENT, False, "annotation narrows.mesh/intercept=disabled of the pod"),
    ({}, AMBIENT, OFF, NONE, True, "label istio.io/dataplane-mode=ambient of the pod"),
    ({}, NONE, ON, AMBIENT, False, "label istio.io/dataplane-mode=none of the pod"),
    ({}, {}, ON, NONE, True, "annotation narrows.mesh/intercept=enabled of the namespace"),
    ({}, {}, OFF, AMBIENT, False, "annotation narrows.mesh/intercept=disabled of the namespace"),
    ({DATAPLANE_MODE: "ambient"}, {INTERCEPT: "enabled"}, {}, {}, False, "neither"),
])
def test_the_first_that_is_set_decides(annotations: dict[str, str], labels: dict[str, str],
                                       namespace_annotations: dict[str, str], namespace_labels: dict[str, str],
                                       captured: bool, reason: str) -> None:
    found = enrol(pod(annotations=annotations, labels=labels, namespace_annotations=namespace_annotations,
                      namespace_labels=namespace_labels))
    assert (found.settings is not None) == captured and found.reason.startswith(reason) and found.refused == ()


@pytest.mark.parametrize(("more", "refusal"), [
    ({"annotations": {INTERCEPT: "yes"}, "namespace_labels": AMBIENT},
     "pod shop/cart-0: annotation narrows.mesh/intercept is 'yes', expected enabled or disabled"),
    ({"annotations": {INTERCEPT: "Enabled"}}, "annotation narrows.mesh/intercept is 'Enabled', expected enabled or disabled"),
    ({"annotations": {INTERCEPT: ""}}, "is '', expected enabled or disabled"),
    ({"labels": {DATAPLANE_MODE: "sidecar"}}, "label istio.io/dataplane-mode is 'sidecar', expected ambient or none"),
    ({"namespace_annotations": {INTERCEPT: "true"}},
     "annotation narrows.mesh/intercept of namespace shop is 'true', expected enabled or disabled"),
])
def test_a_word_that_is_none_is_refused_with_pod_place_and_value(more: dict[str, Any], refusal: str) -> None:
    found = enrol(pod(**more))
    assert found.settings is None and len(found.refused) == 1 and refusal in found.refused[0]
    assert found.reason == "refused: " + found.refused[0]


def test_a_malformed_word_that_does_not_decide_does_not_matter() -> None:
    assert enrol(pod(annotations=ON, namespace_annotations={INTERCEPT: "maybe"})).settings == CaptureSettings()


def test_a_pod_on_the_nodes_network_is_never_captured() -> None:
    found = enrol(pod(annotations={**ON, EXCLUDE_OUTBOUND_PORTS: "x"}, host_network=True))
    assert found.settings is None and "hostNetwork" in found.reason and found.refused == ()


def test_a_pod_with_a_sidecar_is_skipped_with_the_reason() -> None:
    found = enrol(pod(annotations={**ON, "sidecar.istio.io/status": "{}"}))
    assert found.settings is None and "has a sidecar of its own" in found.reason and found.refused == ()


@pytest.mark.parametrize(("annotations", "settings"), [
    ({EXCLUDE_OUTBOUND_PORTS: "3306, 25,3306", EXCLUDE_INBOUND_PORTS: "9090"},
     CaptureSettings(exclude_outbound_ports=(25, 3306), exclude_inbound_ports=(9090,))),
    ({EXCLUDE_OUTBOUND_PORTS: "", EXCLUDE_INBOUND_PORTS: " ", EXCLUDE_OUTBOUND_RANGES: ""}, CaptureSettings()),
    ({EXCLUDE_OUTBOUND_PORTS: "1,65535"}, CaptureSettings(exclude_outbound_ports=(1, 65535))),
    ({EXCLUDE_OUTBOUND_RANGES: "fd00::/8,10.1.2.3/8 , 10.0.0.0/8"},
     CaptureSettings(exclude_outbound_ranges=(ip_network("10.0.0.0/8"), ip_network("fd00::/8")))),
    ({INCLUDE_OUTBOUND_RANGES: "*"}, CaptureSettings()),
    ({INCLUDE_OUTBOUND_RANGES: ""}, CaptureSettings(include_outbound_ranges=())),
    ({INCLUDE_OUTBOUND_RANGES: "10.96.0.0/12"}, CaptureSettings(include_outbound_ranges=(ip_network("10.96.0.0/12"),))),
    ({DNS_CAPTURE: "true"}, CaptureSettings(dns=True)),
    ({DNS_CAPTURE: "false"}, CaptureSettings(dns=False)),
    ({INCLUDE_OUTBOUND_RANGES: "0.0.0.0/0"}, CaptureSettings(include_outbound_ranges=(ip_network("0.0.0.0/0"),))),
])
def test_refinements_are_read_as_istio_reads_them(annotations: dict[str, str], settings: CaptureSettings) -> None:
    found = enrol(pod(annotations={**ON, **annotations}))
    assert found.settings == settings and found.refused == ()


PORTS, RANGES = "expected a comma list of ports", "expected a comma list of networks like 10.0.0.0/8"


@pytest.mark.parametrize(("key", "value", "expected"), [
    (EXCLUDE_OUTBOUND_PORTS, "80,,443", PORTS + ", and one item is empty"),
    (EXCLUDE_OUTBOUND_PORTS, "80,", PORTS + ", and one item is empty"),
    (EXCLUDE_OUTBOUND_PORTS, "http", PORTS + " from 1 to 65535, and 'http' is none"),
    (EXCLUDE_OUTBOUND_PORTS, "*", PORTS),
    (EXCLUDE_OUTBOUND_PORTS, "0", PORTS),
    (EXCLUDE_OUTBOUND_PORTS, "65536", PORTS),
    (EXCLUDE_INBOUND_PORTS, "-1", PORTS),
    (EXCLUDE_INBOUND_PORTS, "+80", PORTS),
    (EXCLUDE_INBOUND_PORTS, "80-90", PORTS),
    (EXCLUDE_INBOUND_PORTS, "80;443", PORTS),
    (EXCLUDE_INBOUND_PORTS, "８０", PORTS),
    (EXCLUDE_INBOUND_PORTS, "1" * 5000, PORTS),
    (EXCLUDE_INBOUND_PORTS, ",".join(map(str, range(1, 300))), "expected at most 256 items, and it has 299"),
    (EXCLUDE_OUTBOUND_RANGES, "10.0.0.1", RANGES),
    (EXCLUDE_OUTBOUND_RANGES, "10.0.0.0/33", RANGES),
    (EXCLUDE_OUTBOUND_RANGES, "10.0.0.0/255.0.0.0", RANGES),
    (EXCLUDE_OUTBOUND_RANGES, "10.0.0/8", RANGES),
    (EXCLUDE_OUTBOUND_RANGES, "fe80::1%eth0/64", RANGES),
    (EXCLUDE_OUTBOUND_RANGES, "*", RANGES),
    (EXCLUDE_OUTBOUND_RANGES, "10.0.0.0/8,", RANGES + ", and one item is empty"),
    (INCLUDE_OUTBOUND_RANGES, "*,10.0.0.0/8", "expected `*` or a comma list of networks"),
    (DNS_CAPTURE, "no", "expected `true` or `false`"),
    (INCLUDE_OUTBOUND_RANGES, "all", "expected `*` or a comma list of networks"),
    ("traffic.sidecar.istio.io/includeOutboundPorts", "80", "expected one that is supported: excludeOutboundPorts, "),
])
def test_a_refinement_that_cannot_be_read_refuses_the_pod(key: str, value: str, expected: str) -> None:
    found = enrol(pod(annotations={**ON, key: value}))
    assert found.settings is None and len(found.refused) == 1
    shown = value if len(value) <= 80 else value[:77] + "..."
    assert found.refused[0].startswith(f"pod shop/cart-0: annotation {key} is {shown!r}, ")
    assert expected in found.refused[0]


def test_every_malformed_annotation_is_named() -> None:
    found = enrol(pod(annotations={**ON, EXCLUDE_OUTBOUND_PORTS: "x", INCLUDE_OUTBOUND_RANGES: "y"}))
    assert len(found.refused) == 2


def test_refinements_of_a_pod_that_is_not_captured_are_not_judged() -> None:
    assert enrol(pod(annotations={**OFF, EXCLUDE_OUTBOUND_PORTS: "x"})).refused == ()


def test_a_mesh_may_forbid_opting_out_and_excluding() -> None:
    found = enrol(pod(annotations=OFF, namespace_labels=AMBIENT), Policy(opt_out=False))
    assert found.settings == CaptureSettings()
    assert found.reason.endswith("the mesh forbids the pod's annotation narrows.mesh/intercept=disabled")
    assert enrol(pod(annotations=OFF), Policy(opt_out=False)).settings is None
    assert enrol(pod(namespace_annotations=OFF), Policy(opt_out=False)).settings is None
    found = enrol(pod(annotations={**ON, EXCLUDE_OUTBOUND_PORTS: "80"}), Policy(exclusions=False))
    assert found.settings == CaptureSettings() and EXCLUDE_OUTBOUND_PORTS in found.reason
