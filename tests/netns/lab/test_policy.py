"""Policies as an operator applies them in a lab: who is let in, what a change does to an open connection, and what the commands say."""
from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.lab.place import Place
from tests.support.lab import NARROWS, Lab, lab, narrows
from tests.support.wait import until

pytestmark = pytest.mark.netns

POD = """\
---
apiVersion: v1
kind: Pod
metadata: {name: %(name)s, labels: {app: %(name)s}, annotations: {narrows.mesh/intercept: %(intercept)s}}
spec: {nodeName: n1, serviceAccountName: sa-%(name)s, containers: [{name: m, image: x, command: %(command)s}]}
"""
SERVER = """
import socketserver
class Echo(socketserver.BaseRequestHandler):
    def handle(self):
        while data := self.request.recv(100):
            self.request.sendall(data)
socketserver.ThreadingTCPServer.allow_reuse_address = True
socketserver.ThreadingTCPServer(("0.0.0.0", 7000), Echo).serve_forever()
"""
ONCE = """
import socket, sys
try:
    with socket.create_connection((sys.argv[1], 7000), timeout=10) as connection:
        connection.sendall(b"x")
        print("in" if connection.recv(1) == b"x" else "out")
except ConnectionError:
    print("out")
"""
STAYS = """
import socket, sys
with socket.create_connection((sys.argv[1], 7000), timeout=60) as connection:
    connection.sendall(b"x")
    assert connection.recv(1) == b"x"
    print("open", flush=True)
    try:
        connection.recv(1)
    except ConnectionError:
        pass
    print("cut", flush=True)
"""
POLICY = """\
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: %(name)s%(meta)s}
spec: {selector: {matchLabels: {app: server}}, action: %(action)s, rules: [{from: [{source: %(source)s}]}]}
"""
STRICT = """\
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: %s}
spec: {mtls: {mode: %s}}
"""
PYTHON = "/usr/bin/python3"


@pytest.fixture(scope="module", params=[["--no-tunnels"], ["--tunnels"], ["--tunnels", "--same-node-tunnel"]], ids=" ".join)
def mesh(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    path = tmp_path_factory.mktemp("mesh") / "mesh.yaml"
    sleep = "[sleep, infinity]"
    path.write_text("".join(POD % {"name": name, "intercept": intercept, "command": command} for name, intercept, command in (
        ("server", "enabled", json.dumps([PYTHON, "-c", SERVER])), ("web", "enabled", sleep), ("db", "enabled", sleep),
        ("outsider", "disabled", sleep))))
    with lab(path, options=["--nodes", "1", *request.param]) as running:
        until(lambda: all(pod["ready"] for pod in running.status()), "pods are ready", timeout=60)
        yield running


def address(mesh: Lab) -> str:
    return str(mesh.pod("server")["ip"])


def who_is_let_in(mesh: Lab) -> set[str]:
    return {name for name in ("web", "db", "outsider") if mesh.exec(name, PYTHON, "-c", ONCE, address(mesh)).stdout == "in\n"}


def check(mesh: Lab, account: str = "", *more: str) -> subprocess.CompletedProcess[str]:
    who = ["--from", f"spiffe://cluster.local/ns/default/sa/{account}"] if account else []
    return narrows("authz", "check", "server", "--to", f"{address(mesh)}:7000", *who, "--name", mesh.name, *more, check=False)


def apply(mesh: Lab, tmp_path: Path, text: str) -> None:
    (tmp_path / "applied.yaml").write_text(text)
    mesh.apply(tmp_path / "applied.yaml")


def policies(mesh: Lab) -> dict[str, bool]:
    """As the node has them: whether they apply to a pod there."""
    told = json.loads(narrows("config", "policies", "--name", mesh.name, "-o", "json").stdout)
    return {f"{one['namespace']}/{one['name']}": one["applies"] for one in told["n1"]}


def test_a_policy_lets_in_whom_it_names_and_the_commands_say_why(mesh: Lab, tmp_path: Path) -> None:
    assert who_is_let_in(mesh) == {"web", "db", "outsider"}
    apply(mesh, tmp_path, POLICY % {"name": "only-web", "meta": "", "action": "ALLOW", "source": "{serviceAccounts: [sa-web]}"})
    until(lambda: policies(mesh) == {"default/only-web": True}, "the policy is in force", timeout=20)
    try:
        assert who_is_let_in(mesh) == {"web"}
        yes, no = check(mesh, "sa-web"), check(mesh, "sa-db")
        assert yes.returncode == 0 and yes.stdout.startswith("allowed: rule 0 of default/only-web matches\n")
        assert no.returncode == 1 and no.stdout.splitlines() == [
            "DENIED: policies that allow apply, and none of them matches", "  allow default/only-web (workload): does not match",
            "          rule 0: serviceAccounts differs"]
        assert check(mesh).returncode == 1
        assert "only-web  WorkloadSelector  Allow   1      yes" in narrows("config", "policies", "--name", mesh.name).stdout
        assert mesh.total("narrows_worker_policy_total", verdict="denied") == 2
    finally:
        mesh.run("delete", "authorizationpolicy/only-web")
    until(lambda: policies(mesh) == {}, "it is gone", timeout=20)
    assert who_is_let_in(mesh) == {"web", "db", "outsider"}


def test_a_change_cuts_what_is_open(mesh: Lab, tmp_path: Path) -> None:
    lines: list[str] = []
    pod = subprocess.Popen([NARROWS, "lab", "exec", "--name", mesh.name, "db", "--", PYTHON, "-c", STAYS, address(mesh)],
                           stdout=subprocess.PIPE, text=True)
    assert pod.stdout is not None
    reader = threading.Thread(target=lambda: lines.extend(pod.stdout), daemon=True)  # type: ignore[arg-type]
    reader.start()
    try:
        until(lambda: lines == ["open\n"], "the connection is open", timeout=20)
        apply(mesh, tmp_path, POLICY % {"name": "no-db", "meta": "", "action": "DENY", "source": "{principals: ['*/sa/sa-db']}"})
        until(lambda: lines == ["open\n", "cut\n"], "it is cut", timeout=20)
        assert who_is_let_in(mesh) == {"web", "outsider"}
        assert mesh.total("narrows_worker_policy_total", verdict="cut") == 1
    finally:
        pod.wait(timeout=20)
        reader.join(timeout=20)
        pod.stdout.close()
        mesh.run("delete", "authorizationpolicy/no-db")
        until(lambda: policies(mesh) == {}, "it is gone", timeout=20)


def test_strict_lets_in_who_has_an_identity(mesh: Lab, tmp_path: Path) -> None:
    apply(mesh, tmp_path, "---\napiVersion: v1\nkind: Namespace\nmetadata: {name: istio-system}\n" + STRICT % ("istio-system", "STRICT"))
    try:
        until(lambda: policies(mesh) == {"istio-system/istio_converted_static_strict": True}, "it is in force", timeout=20)
        until(lambda: who_is_let_in(mesh) == {"web", "db"}, "nobody without identity is let in", timeout=20)
        apply(mesh, tmp_path, STRICT % ("default", "PERMISSIVE"))
        until(lambda: who_is_let_in(mesh) == {"web", "db", "outsider"}, "the namespace says otherwise", timeout=20)
        mesh.run("delete", "peerauthentication/default")
        until(lambda: who_is_let_in(mesh) == {"web", "db"}, "and no more", timeout=20)
    finally:
        mesh.run("delete", "namespace/istio-system")
    until(lambda: who_is_let_in(mesh) == {"web", "db", "outsider"}, "everybody is let in again", timeout=20)


def test_a_policy_on_trial_is_told_in_the_access_log(mesh: Lab, tmp_path: Path) -> None:
    meta = ", annotations: {istio.io/dry-run: 'true'}"
    apply(mesh, tmp_path, POLICY % {"name": "trial", "meta": meta, "action": "DENY", "source": "{notPrincipals: ['*']}"})
    try:
        until(lambda: policies(mesh) == {"default/trial": True}, "it is in force", timeout=20)
        assert who_is_let_in(mesh) == {"web", "db", "outsider"}
        said = check(mesh)
        assert said.returncode == 0 and "would be denied if policies on trial were in force: rule 0 of default/trial" in said.stdout
        log = Place(mesh.name).node("n1") / "access.log"
        text = "rbac_dry_run_access_denied_matched_policy[ns[default]-policy[trial]-rule[0]]"
        until(lambda: [line for line in map(json.loads, log.read_text().splitlines()) if line["connection_termination_details"] == text],
              "the log says what would be", timeout=20)
    finally:
        mesh.run("delete", "authorizationpolicy/trial")
    until(lambda: policies(mesh) == {}, "it is gone", timeout=20)


def test_a_captured_pod_is_announced_as_one_that_takes_tunnels_where_that_is_asked_for(mesh: Lab, request: pytest.FixtureRequest) -> None:
    def tunnels() -> dict[str, str]:
        told = json.loads(narrows("config", "workloads", "--name", mesh.name, "-o", "json").stdout)
        return {one["name"]: one["protocol"] for one in told["n1"]}

    way = "HBONE" if request.node.callspec.params["mesh"][0] == "--tunnels" else "TCP"
    until(lambda: tunnels() == {"server": way, "web": way, "db": way, "outsider": "TCP"}, "it is told", timeout=20)
