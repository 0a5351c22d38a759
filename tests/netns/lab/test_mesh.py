"""The lab around the mesh: who waits for whom, what is refused, and what is started again."""
from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.lab import Lab, lab
from tests.support.wait import until

pytestmark = pytest.mark.netns

MESH = """\
apiVersion: v1
kind: Namespace
metadata: {name: default, annotations: {narrows.mesh/intercept: enabled}}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {selector: {app: web}, ports: [{name: http, port: 80, targetPort: 8080}]}
---
"""
POD = """\
apiVersion: v1
kind: Pod
metadata: {name: %s, labels: {app: %s}%s}
spec: {containers: [{name: m, image: x, command: [python3, -m, http.server, "8080"], workingDir: /tmp}]}
"""
ROUTE = """\
# a comment, so that lines count
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: web}
spec:
  hosts: [web]
  http:
  - route:
    - destination: {host: web}
      weight: %s
"""


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    path = tmp_path_factory.mktemp("mesh") / "mesh.yaml"
    path.write_text(MESH + POD % ("web", "web", "") + "---\n" + POD % ("client", "client", ""))
    with lab(path) as running:
        yield running


def code(mesh: Lab, pod: str = "client") -> str:
    return mesh.exec(pod, "curl", "-sS", "-m", "5", "-o", os.devnull, "-w", "%{http_code}", "http://web/", check=False).stdout


def events(mesh: Lab) -> str:
    return mesh.run("events").stdout


def test_a_pod_that_asks_for_the_mesh_starts_nothing_while_its_agent_is_away(mesh: Lab, tmp_path: Path) -> None:
    agent, = mesh.processes("narrows agent")
    manifest = tmp_path / "late.yaml"
    manifest.write_text(POD % ("late", "late", ""))
    os.kill(agent, signal.SIGSTOP)
    try:
        mesh.run("apply", "--no-wait", str(manifest))
        until(lambda: "pod default/late: not started, for it asks for the mesh" in events(mesh), "the event", timeout=20)
        done = mesh.exec("late", "true", check=False)
        assert done.returncode == 69
        assert "does not run" in done.stderr
    finally:
        os.kill(agent, signal.SIGCONT)
    until(lambda: mesh.pod("late")["ready"] and mesh.pod("late")["captured"], "the pod started, captured", timeout=20)
    assert code(mesh, "late") == "200"
    mesh.run("delete", "pod/late")


def test_a_pod_that_does_not_ask_starts_without_its_agent(mesh: Lab, tmp_path: Path) -> None:
    agent, = mesh.processes("narrows agent")
    manifest = tmp_path / "plain.yaml"
    manifest.write_text(POD % ("plain", "plain", ", annotations: {narrows.mesh/intercept: disabled}"))
    os.kill(agent, signal.SIGSTOP)
    try:
        mesh.run("apply", "--no-wait", str(manifest))
        until(lambda: mesh.exec("plain", "true", check=False).returncode == 0, "the pod started", timeout=30)
        assert "started without the mesh, which it did not ask for" in events(mesh)
    finally:
        os.kill(agent, signal.SIGCONT)
    mesh.run("delete", "pod/plain")


def test_a_malformed_annotation_is_an_event_with_pod_annotation_and_value(mesh: Lab, tmp_path: Path) -> None:
    manifest = tmp_path / "odd.yaml"
    manifest.write_text(POD % ("odd", "odd", ", annotations: {narrows.mesh/intercept: perhaps}"))
    mesh.run("apply", "--no-wait", str(manifest))
    until(lambda: mesh.pod("odd")["ready"], "the pod started")
    pod = mesh.pod("odd")
    assert pod["captured"] is False
    told = [line for line in events(mesh).splitlines() if "default/odd" in line and "perhaps" in line]
    assert told and "narrows.mesh/intercept" in told[0]
    mesh.run("delete", "pod/odd")


@pytest.mark.parametrize(("weight", "line", "words"), [("-1", 10, "weight is -1"), ("many", 10, "weight")])
def test_a_bad_route_is_refused_with_file_and_line_and_nothing_of_the_file_is_applied(
        mesh: Lab, tmp_path: Path, weight: str, line: int, words: str) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text(ROUTE % weight + "---\n" + POD % ("never", "never", ""))
    done = mesh.run("apply", str(bad), check=False)
    assert done.returncode == 65
    assert f"{bad}:{line}: " in done.stderr
    assert words in done.stderr
    assert not [pod for pod in mesh.status() if pod["name"] == "never"]
    assert code(mesh) == "200"


def test_a_route_that_names_no_service_is_a_warning_with_file_and_line(mesh: Lab, tmp_path: Path) -> None:
    odd = tmp_path / "odd.yaml"
    odd.write_text((ROUTE % "100").replace("web", "nobody"))
    done = mesh.run("apply", str(odd))
    assert f"{odd}:6: warning: " in done.stderr
    assert "no service is called so" in done.stderr
    mesh.run("delete", "virtualservice/nobody")


def test_agent_keeper_and_control_plane_are_started_again_each_alone(mesh: Lab) -> None:
    roles = {"narrows agent": "agent", "ext.keeper": "keeper", "narrows control-plane": "control plane"}
    for role, label in roles.items():
        before = {other: mesh.processes(other) for other in roles}
        pid, = before[role]
        os.kill(pid, signal.SIGKILL)
        until(lambda role=role, pid=pid: [new for new in mesh.processes(role) if new != pid], f"a new {label}", timeout=20)
        assert {other: mesh.processes(other) for other in roles if other != role} == {
            other: pids for other, pids in before.items() if other != role}
        until(lambda: code(mesh) == "200", f"the service answers after the {label} came back", timeout=20)
        until(lambda: mesh.pod("client")["captured"], "captured still", timeout=20)
    text = events(mesh)
    assert all(f"{name}: ended with 137" in text for name in ("agent n1", "keeper n1", "control plane"))


def test_a_namespace_that_leaves_the_mesh_takes_its_pods_along_without_a_restart(mesh: Lab, tmp_path: Path) -> None:
    path = tmp_path / "namespace.yaml"
    path.write_text("apiVersion: v1\nkind: Namespace\nmetadata: {name: default}\n")
    before = mesh.pod("client")["restarts"]
    mesh.apply(path)
    until(lambda: not mesh.pod("client")["captured"], "not captured")
    assert code(mesh) == "200"
    path.write_text(MESH.split("---", maxsplit=1)[0])
    mesh.apply(path)
    until(lambda: mesh.pod("client")["captured"], "captured")
    assert code(mesh) == "200"
    assert mesh.pod("client")["restarts"] == before
