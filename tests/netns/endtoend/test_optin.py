"""What annotations and labels do to running pods: seen in what the mesh counts, while live connections go on."""
from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.lab import CAPTURE, NARROWS, Lab, more
from tests.support.wait import until

pytestmark = pytest.mark.netns

INTERCEPT, MODE = "narrows.mesh/intercept", "istio.io/dataplane-mode"
TRAFFIC = "traffic.sidecar.istio.io/"
ON, OFF = {INTERCEPT: "enabled"}, {INTERCEPT: "disabled"}
BOTH = {("tcp", "source"): 1.0, ("tcp", "destination"): 1.0}
LABELS = {"source_workload": "caller", "destination_workload": "callee"}

# One line of stdin, one question and its answer on a connection that stays; without stdin one.
TALK = """
import socket, sys
family = socket.AF_INET6 if sys.argv[2:] == ["6"] else socket.AF_INET
plug = socket.create_connection(socket.getaddrinfo(sys.argv[1], 9000, family)[0][4][:2], 5)
file = plug.makefile("rw")
def say():
    plug.sendall(b"who\\n"); print(file.readline().split()[2], flush=True)
say()
for _ in sys.stdin: say()
"""


class Talk:
    """A connection from `caller` to `callee` that is held open."""

    def __init__(self, lab: Lab, family: int) -> None:
        self._process = subprocess.Popen(
            [NARROWS, "lab", "exec", "--name", lab.name, "choice/caller", "--", "/usr/bin/python3", "-c", TALK, "callee", str(family)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.seen = self._process.stdout.readline().strip()
        assert self.seen

    def goes_on(self) -> bool:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().strip() == self.seen

    def end(self) -> None:
        self._process.communicate(timeout=60)
        assert self._process.returncode == 0


class Choice:
    """The namespace `choice` with its two pods, and what is changed of them."""

    def __init__(self, lab: Lab, folder: Path, *, tunnels: bool) -> None:
        self.lab, self.tunnels, self._folder = lab, tunnels, folder
        self._talks: list[Talk] = []

    def set(self, kind: str, name: str, annotations: dict[str, str], labels: dict[str, str] | None = None) -> None:
        body = self.lab.manifest(kind, name, "choice")
        body["metadata"] |= {"annotations": annotations, "labels": body["metadata"].get("labels", {}) | (labels or {})}
        path = self._folder / f"{kind}.{name}.yaml"
        path.write_text(json.dumps(body))
        self.lab.apply(path)

    def state(self, name: str) -> tuple[bool, str]:
        pod = self.lab.pod(name)
        assert bool(pod["method"]) is pod["captured"]
        return pod["captured"], pod["reason"]

    def call(self, family: int = 4) -> dict[tuple[str, str], float]:
        """What is counted for one connection that is answered."""
        before = self.lab.counts(**LABELS)
        done = self.lab.exec("choice/caller", "sh", "-c", f"/usr/bin/python3 -c '{TALK}' callee {family} < /dev/null")
        assert done.stdout.strip() in self.lab.pod("caller")["ips"]
        return more(before, self.lab.counts(**LABELS))

    def talk(self, family: int = 4) -> Talk:
        self._talks.append(Talk(self.lab, family))
        return self._talks[-1]

    def reset(self) -> None:
        self.set("Namespace", "choice", ON)
        for name in ("caller", "callee"):
            self.set("Pod", name, {})
        for name in ("caller", "callee"):
            until(lambda name=name: self.state(name)[0], f"{name} captured")
        for talk in self._talks:
            talk.end()


@pytest.fixture(params=["iptables", pytest.param("nftables", marks=pytest.mark.redirects("the same as the other one, with hooks"))])
def choice(request: pytest.FixtureRequest, servers: Lab, nft_only: Lab, tmp_path: Path) -> Iterator[Choice]:
    """On nodes of both kinds; the second ones have no legacy tables, and no tunnels. Both stand before the leak check of a test looks."""
    this = Choice({"iptables": servers, "nftables": nft_only}[request.param], tmp_path, tunnels=request.param == "iptables")
    assert this.lab.pod("caller")["method"] == (CAPTURE or request.param)
    yield this
    this.reset()


@pytest.mark.parametrize(("pod", "annotation", "value", "counted"), [
    ("caller", "excludeOutboundPorts", "1, 9000", {("tcp", "destination"): 1}),
    ("caller", "excludeOutboundIPRanges", "10.96.0.0/16, fd00:10:96::/112", {("tcp", "destination"): 1}),
    ("caller", "includeOutboundIPRanges", "192.0.2.0/24", {("tcp", "destination"): 1}),
    ("callee", "excludeInboundPorts", "9000", {("tcp", "source"): 1}),
    ("caller", "excludeOutboundPorts", "9001", BOTH),
    ("caller", "includeOutboundIPRanges", "192.0.2.0/24, 10.96.0.0/16, fd00:10:96::/112", BOTH),
])
@pytest.mark.timeout(300)  # both families, before, while and after: eight clients and twice a pod's change
def test_an_exclusion_holds_for_new_connections_and_live_ones_go_on_both_ways(
        choice: Choice, pod: str, annotation: str, value: str, counted: dict[tuple[str, str], float]) -> None:
    if annotation == "excludeInboundPorts" and choice.tunnels:
        counted = BOTH  # who takes tunnels is dialled by tunnel at any port, and its proxy forwards: HBONE cannot say otherwise of one port
    captured = [choice.talk(family) for family in (4, 6)]
    choice.set("Pod", pod, {TRAFFIC + annotation: value})
    assert [choice.call(family) for family in (4, 6)] == [counted, counted]
    excluded = [choice.talk(family) for family in (4, 6)]
    assert all(talk.goes_on() for talk in captured)
    choice.set("Pod", pod, {})
    assert [choice.call(family) for family in (4, 6)] == [BOTH, BOTH]
    assert all(talk.goes_on() for talk in captured + excluded)


@pytest.mark.parametrize("pod", ["caller", "callee"])
def test_opting_out_and_in_again_changes_new_connections_alone(choice: Choice, pod: str) -> None:
    captured = choice.talk()
    choice.set("Pod", pod, OFF)
    assert choice.state(pod) == (False, f"annotation {INTERCEPT}=disabled of the pod")
    assert choice.call() == {("tcp", "destination" if pod == "caller" else "source"): 1}
    passing = choice.talk()
    assert captured.goes_on()
    choice.set("Pod", pod, {})
    assert choice.state(pod)[0]
    assert choice.call() == BOTH
    assert captured.goes_on()
    assert passing.goes_on()


def test_the_namespaces_annotation_moves_all_its_pods_while_they_run(choice: Choice) -> None:
    talk = choice.talk()
    choice.set("Namespace", "choice", OFF)
    for name in ("caller", "callee"):
        assert choice.state(name) == (False, f"annotation {INTERCEPT}=disabled of the namespace")
    assert choice.call() == {}
    assert talk.goes_on()
    choice.set("Namespace", "choice", {}, {MODE: "ambient"})
    assert choice.state("caller")[0] and choice.state("callee")[0]
    assert choice.call() == BOTH
    assert talk.goes_on()
    choice.set("Namespace", "choice", {}, {MODE: "none"})
    assert choice.state("caller") == (False, f"label {MODE}=none of the namespace")
    choice.set("Namespace", "choice", {}, {MODE: "none"} | {"x": "y"})
    choice.set("Pod", "caller", {}, {MODE: "ambient"})
    assert choice.state("caller")[0]
    assert not choice.state("callee")[0]


def test_pod_annotation_beats_pod_label_beats_namespace_annotation_beats_namespace_label(choice: Choice) -> None:
    choice.set("Namespace", "choice", OFF, {MODE: "ambient"})
    assert choice.state("callee") == (False, f"annotation {INTERCEPT}=disabled of the namespace")
    choice.set("Pod", "callee", {}, {MODE: "ambient"})
    assert choice.state("callee")[0]
    choice.set("Pod", "callee", OFF, {MODE: "ambient"})
    assert choice.state("callee") == (False, f"annotation {INTERCEPT}=disabled of the pod")
    choice.set("Pod", "callee", ON, {MODE: "none"})
    assert choice.state("callee")[0]
    choice.set("Pod", "callee", {}, {MODE: "none"})
    assert choice.state("callee") == (False, f"label {MODE}=none of the pod")


@pytest.mark.parametrize(("annotation", "value"), [
    (INTERCEPT, "yes"), (TRAFFIC + "excludeInboundPorts", "9000,x"), (TRAFFIC + "excludeOutboundIPRanges", "10.0.0.1")])
def test_a_malformed_value_is_refused_by_name_and_nothing_changes(choice: Choice, annotation: str, value: str) -> None:
    choice.set("Pod", "callee", {annotation: value})
    words = f"pod choice/callee: annotation {annotation} is {value!r}"
    captured, reason = until(lambda: said if words in (said := choice.state("callee"))[1] else None, "the reason")
    assert captured
    assert [line for line in choice.lab.run("events").stdout.splitlines() if words in line], reason
    node = f"/run/narrows/lab/{choice.lab.name}/nodes/n2/admin.sock"
    told = json.loads(subprocess.run(["curl", "-sS", "--unix-socket", node, "http://node/events"], capture_output=True,
                                     text=True, check=True).stdout)
    assert [event for event in told if event["kind"] == "AnnotationRefused" and words in event["message"]]
    assert choice.call() == BOTH


def test_a_new_pod_with_a_malformed_value_runs_without_the_mesh_and_says_why(choice: Choice, tmp_path: Path) -> None:
    body = choice.lab.manifest("Pod", "callee", "choice")
    body["metadata"] |= {"name": "odd", "annotations": {TRAFFIC + "excludeInboundPorts": "-1"}}
    path = tmp_path / "odd.yaml"
    path.write_text(json.dumps(body))
    try:
        choice.lab.apply(path)
        pod = choice.lab.pod("odd")
        assert (pod["ready"], pod["captured"]) == (True, False)
        assert "pod choice/odd: annotation traffic.sidecar.istio.io/excludeInboundPorts is '-1'" in pod["reason"]
        rules = subprocess.run(["ip", "netns", "exec", f"narrows.{choice.lab.name}.pod.choice.odd", "iptables-legacy-save"],
                               capture_output=True, text=True, check=True).stdout
        assert "NARROWS" not in rules
    finally:
        choice.lab.run("delete", "-n", "choice", "pod/odd")
