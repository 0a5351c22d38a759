"""A pod file is read whole or refused with file and field."""
from __future__ import annotations

import json
import os
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from agent.model.pod import LocalPod
from agent.workloads.podfile import PodFileError, parse_pod, read_pod

POD: dict[str, Any] = {
    "apiVersion": "v1", "kind": "Pod",
    "metadata": {"name": "reviews-v1-0", "namespace": "default", "uid": "4b0c", "labels": {"app": "reviews"},
                 "annotations": {"a": "b"}},
    "spec": {"nodeName": "n1", "serviceAccountName": "reviews", "hostNetwork": False},
    "status": {"podIPs": [{"ip": "10.244.1.5"}, {"ip": "fd00:10:244:1::5"}]},
    "narrows": {"netns": "/run/netns/x", "cgroup": "/sys/fs/cgroup/x", "namespaceLabels": {"l": "m"},
                "namespaceAnnotations": {"n": "o"}}}
PATH = Path("/run/pods/default.reviews-v1-0.json")


def changed(place: str, value: Any) -> bytes:
    copy = json.loads(json.dumps(POD))
    *way, last = place.split(".")
    inner = copy
    for step in way:
        inner = inner[step]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    return json.dumps(copy).encode()


def test_every_field_arrives() -> None:
    assert parse_pod(json.dumps(POD).encode(), PATH) == LocalPod(
        uid="4b0c", namespace="default", name="reviews-v1-0", service_account="reviews",
        addresses=(ip_address("10.244.1.5"), ip_address("fd00:10:244:1::5")), netns="/run/netns/x",
        cgroup="/sys/fs/cgroup/x", host_network=False, labels={"app": "reviews"}, annotations={"a": "b"},
        namespace_labels={"l": "m"}, namespace_annotations={"n": "o"})


def test_a_mapped_address_is_the_ipv4_address_it_stands_for() -> None:
    pod = parse_pod(changed("status.podIPs", [{"ip": "::ffff:10.244.1.5"}]), Path("default.reviews-v1-0.json"))
    assert pod.addresses == (ip_address("10.244.1.5"),)


def test_what_a_pod_may_leave_out_has_its_default() -> None:
    raw = {"metadata": {"name": "a", "namespace": "b", "uid": "c"}, "narrows": {"netns": "/x"}}
    pod = parse_pod(json.dumps(raw).encode(), Path("b.a.json"))
    assert (pod.service_account, pod.addresses, pod.cgroup, pod.labels, pod.host_network) == ("default", (), "", {}, False)


@pytest.mark.parametrize(("raw", "said"), [
    (b"", "Input data was truncated"),
    (b"{", "Input data was truncated"),
    (b"[]", "Expected `object`, got `array`"),
    (b"\xff{}", "JSON is malformed"),
    (changed("kind", "Node"), "kind is 'Node', expected Pod"),
    (changed("metadata", None), "missing required field `metadata`"),
    (changed("metadata.uid", None), "missing required field `uid` - at `$.metadata`"),
    (changed("metadata.uid", ""), "metadata.uid is '', expected 1 to 253 printable characters"),
    (changed("metadata.name", "../x"), "metadata.name is '../x'"),
    (changed("metadata.name", "other"), "holds pod default/other, whose file is default.other.json"),
    (changed("metadata.annotations", {"a": 1}), "Expected `str`, got `int` - at `$.metadata.annotations[...]`"),
    (changed("spec.hostNetwork", "no"), "Expected `bool`, got `str` - at `$.spec.hostNetwork`"),
    (changed("status.podIPs", [{"ip": "10.0.0"}]), "status.podIPs[0].ip is '10.0.0', expected an IP address"),
    (changed("narrows.netns", None), "narrows.netns is '', expected the absolute path"),
    (changed("narrows.netns", "run/x"), "narrows.netns is 'run/x', expected the absolute path"),
    (changed("narrows.cgroup", "x"), "narrows.cgroup is 'x', expected an absolute path or nothing"),
])
def test_what_is_wrong_is_said_with_file_and_field(raw: bytes, said: str) -> None:
    with pytest.raises(PodFileError) as error:
        parse_pod(raw, PATH)
    assert str(error.value).startswith(f"{PATH}: ") and said in str(error.value)


def test_a_pipe_a_directory_and_a_giant_are_no_pods(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.b.json")
    (tmp_path / "a.c.json").mkdir()
    (tmp_path / "a.d.json").write_bytes(b" " * (1 << 20) + b"{}")
    for name, said in (("a.b.json", "truncated"), ("a.c.json", "cannot be read"), ("a.d.json", "larger than")):
        with pytest.raises(PodFileError, match=said):
            read_pod(tmp_path / name)
