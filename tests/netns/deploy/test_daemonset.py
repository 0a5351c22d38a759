"""The containers of deploy/daemonset as processes: with their capabilities alone, on a read-only root; an upgrade; an uninstall."""
from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.netns.agent.conftest import CAPTURED, NARROWS, Connection, Instance
from tests.support.cgroup import entering
from tests.support.netns import Namespaces
from tests.support.wait import until

pytestmark = pytest.mark.netns

ROOT = Path(__file__).parents[3]
DEPLOY = ROOT / "deploy/daemonset"
# what a container has: nothing to be written but run directory and /tmp. The extension of a checkout is rebuilt on import, so build/ stays
CONTAINER = ('mount --bind "$1" "$1" && mount --bind "$2" "$2" && mount -t tmpfs none /tmp && mount -o remount,bind,ro / && shift 2 && '
             'exec "$@"')


def containers(path: Path, kind: str = "DaemonSet") -> dict[str, dict[str, Any]]:
    body = next(body for body in yaml.safe_load_all(path.read_text()) if body["kind"] == kind)
    return {one["name"]: one for one in body["spec"]["template"]["spec"]["containers"]}


def confined(container: dict[str, Any], folder: Path, *argv: str) -> list[str]:
    """A command as the container would run it, which may write in `folder`."""
    context = container["securityContext"]
    assert context["readOnlyRootFilesystem"] and not context["allowPrivilegeEscalation"] and context["capabilities"]["drop"] == ["ALL"]
    wanted = ",".join(f"+{name.lower()}" for name in context["capabilities"]["add"])
    return ["unshare", "--mount", "sh", "-c", CONTAINER, "sh", str(folder), str(ROOT / "build"), "setpriv",
            f"--bounding-set=-all,{wanted}", "--inh-caps=-all", "--no-new-privs", *argv]


class Pods(Instance):
    """Keeper and agent as the containers of a DaemonSet's pod, of which there may be two."""

    shape = containers(DEPLOY / "daemonset.yaml")

    def start(self, name: str, *arguments: str) -> None:
        if name == "plane":
            super().start(name, *arguments)
        else:
            self.launch(name, name, *arguments)

    def launch(self, role: str, name: str, *arguments: str) -> None:
        standby = ["env", f"STANDBY={self.run_dir}/{name}.standby", str(DEPLOY / "standby"), f"{self.run_dir}/{role}.lock"]
        argv = ["nsenter", f"--net={self.node.netns.path}", "--", *confined(self.shape[role], self.run_dir, *standby, *NARROWS, *arguments)]
        with open(self.run_dir / f"{name}.log", "ab") as log:
            self.processes[name] = subprocess.Popen(entering(self.proxy, *argv) if role == "keeper" else argv, stderr=log, stdout=log)

    def served(self) -> bool:
        return self.get() == f"served / to {self.client.ip} 200"


@pytest.fixture
def pods(namespaces: Namespaces) -> Iterator[Pods]:
    made = Pods(namespaces)
    try:
        yield made
    finally:
        for name in [name for name in made.processes if name.startswith("new-")]:
            made.kill(name, signal.SIGTERM)
        made.close()


def capabilities(pid: int) -> set[int]:
    field = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("CapBnd"))
    mask = int(field.split()[1], 16)
    return {number for number in range(64) if mask >> number & 1}


def test_the_named_capabilities_are_enough(pods: Pods) -> None:
    pods.up()
    until(pods.served, "a request goes through the mesh")
    assert pods.turned(pods.client) == CAPTURED
    for name in ("keeper", "agent"):
        assert len(capabilities(pods.processes[name].pid)) == len(pods.shape[name]["securityContext"]["capabilities"]["add"])
    worker = pods.ask("/workers")[0]["pid"]
    os.kill(worker, signal.SIGKILL)
    until(lambda: worker not in [one["pid"] for one in pods.ask("/workers")] and pods.served(), "another worker serves", 30)
    assert pods.kill("agent", signal.SIGTERM) == 0
    assert pods.kill("keeper", signal.SIGTERM) == 0


def test_the_next_pod_of_a_node_stands_by_until_the_one_before_has_ended(pods: Pods) -> None:
    pods.up()
    until(pods.served, "a request goes through the mesh")
    live = Connection(pods)
    live.get()
    first = pods.ask("/workers")
    pods.launch("keeper", "new-keeper", "keeper", "--run-dir", str(pods.run_dir), "--drain", "0")
    pods.launch("agent", "new-agent", "agent", "--run-dir", str(pods.run_dir), "--node", "n1", "--xds", f"unix:{pods.run_dir}/xds.sock")
    for role in ("keeper", "agent"):
        until((pods.run_dir / f"new-{role}.standby").exists, f"the new {role} waits", 20)
    live.get()
    assert pods.served() and pods.ask("/workers") == first, "who waits changes nothing"
    assert pods.kill("keeper", signal.SIGTERM) == 0
    assert pods.kill("agent", signal.SIGTERM) == 0
    live.close()
    assert pods.turned(pods.client) == CAPTURED, "meanwhile nothing passes the mesh by"
    pods.ready()
    until(pods.served, "the new pod serves")
    for role in ("keeper", "agent"):
        assert not (pods.run_dir / f"new-{role}.standby").exists()
    assert {one["pid"] for one in pods.ask("/workers")}.isdisjoint(one["pid"] for one in first)


def sweep(pods: Pods, *command: str) -> subprocess.CompletedProcess[str]:
    """The uninstall container's command where it sees processes of these two pods alone: other tests' are none of its business."""
    (container,) = containers(DEPLOY / "uninstall/uninstall.yaml").values()
    program = Path(sys.executable).parent  # has `narrows`
    inside = "".join(f"nsenter --net={netns.path} sleep 300 & " for netns in (pods.client, pods.server)) + '"$@"'
    argv = confined(container, pods.run_dir.parent, "env", f"PATH={program}:{os.environ['PATH']}", "sh", "-c", inside, "sh", *command)
    return subprocess.run(["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", *argv], capture_output=True, text=True, timeout=90,
                          check=False)


def test_an_uninstall_leaves_nothing_in_pods(pods: Pods) -> None:
    pods.up()
    until(pods.served, "a request goes through the mesh")
    (pods.run_dir / "node").mkdir()
    held = pods.run_dir / "node/keeper.lock"
    held.touch()
    clean = str(DEPLOY / "uninstall/clean")
    refused = sweep(pods, "flock", str(held), clean, str(pods.run_dir))
    assert refused.returncode == 75 and "still runs on this node" in refused.stderr
    assert pods.traces(pods.client) and pods.traces(pods.server)
    for name in ("agent", "keeper"):
        pods.kill(name)
    done = sweep(pods, clean, str(pods.run_dir))
    assert done.returncode == 0, done.stdout + done.stderr
    assert pods.traces(pods.client) == [] and pods.traces(pods.server) == []
    assert not (pods.run_dir / "node").exists()
    assert pods.get(where=f"http://{pods.server.ip}:8080/") == f"served / to {pods.client.ip} 200", "the pods reach each other without us"
    again = sweep(pods, clean, str(pods.run_dir))
    assert again.returncode == 0 and "removed" not in again.stdout
