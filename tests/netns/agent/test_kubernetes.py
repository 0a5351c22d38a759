"""An agent that has its pods from Kubernetes: processes in cgroups of kubelet's forms, and an API server on the node's loopback."""
from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from agent.cli.main import CommandError
from tests.netns.agent.conftest import CAPTURED, Instance
from tests.support.bpftool import lookups
from tests.support.kubelet import ON, Board
from tests.support.kubepods import KubePods, systemd
from tests.support.kubernetes.server import ApiServer
from tests.support.netns import Netns
from tests.support.wait import until

pytestmark = pytest.mark.netns
ID = "3f" * 32
KUBECONFIG = """
apiVersion: v1
kind: Config
current-context: it
contexts: [{{name: it, context: {{cluster: it, user: it}}}}]
clusters: [{{name: it, cluster: {{server: "http://127.0.0.1:{port}"}}}}]
users: [{{name: it, user: {{}}}}]
"""


def redirected(netns: Netns) -> bool:
    """By redirects or, where the suite captures by hooks, by sk_lookup."""
    return "NARROWS" in netns.iptables_save(4) or bool(lookups(netns))


class NodeApiServer(ApiServer):
    """Listens on the loopback of a namespace: its thread is in it."""

    def __init__(self, netns: str) -> None:
        super().__init__()
        self._netns = netns

    def _run(self) -> None:
        fd = os.open(self._netns, os.O_RDONLY | os.O_CLOEXEC)
        try:
            assert ctypes.CDLL(None, use_errno=True).setns(fd, 0x40000000) == 0, os.strerror(ctypes.get_errno())
        finally:
            os.close(fd)
        super()._run()


class Cluster:
    """An instance whose agent follows an API server, and which has the pods `client` and `web-0` there."""

    def __init__(self, instance: Instance, server: ApiServer, kubepods: KubePods) -> None:
        self.instance, self.board, self.kubepods = instance, Board(server), kubepods
        self.kubeconfig = instance.run_dir / "kubeconfig"
        self.kubeconfig.write_text(KUBECONFIG.format(port=server.port))
        self.uids: dict[str, str] = {}
        self.paths: dict[str, Path] = {}
        for name, netns in (("client", instance.client), ("web-0", instance.server)):
            (instance.run_dir / "pods" / f"default.{name}.json").unlink()
            uid = self.uids[name] = self.board.pod(name, annotations=ON, labels={"app": name.partition("-")[0]})
            kubepods.start(systemd(uid, ID), netns)
            self.paths[name] = kubepods.directory(systemd(uid, ID)).parent
            netns.cgroup = str(self.paths[name])  # of what the test runs in it, and where hooks are attached
            self.board.status(name, "Running", netns.ip)

    def up(self) -> None:
        self.instance.up("--kubeconfig", str(self.kubeconfig))

    def agent(self) -> None:
        self.instance.start_agent("--kubeconfig", str(self.kubeconfig))

    def shown(self, name: str) -> dict[str, object]:
        return next((one for one in self.instance.ask("/pods") if one["name"] == name), {})

    def told(self) -> list[str]:
        """Events, by the API server's word."""
        served = self.board.served("events")
        items = self.board.server.store.page(served, "", lambda _: True, 0, "", None)["items"]
        return sorted(f"{one['regarding']['name']} {one['reason']}" for one in items)

    def reason(self, name: str, word: str) -> None:
        until(lambda: word in str(self.shown(name).get("reason")), f"{name}: {word}", timeout=30)


@pytest.fixture
def cluster(instance: Instance, kubepods: KubePods) -> Iterator[Cluster]:
    with NodeApiServer(instance.node.netns.path) as server:
        made = Cluster(instance, server, kubepods)
        yield made
        with suppress(CommandError):
            print(*((one["name"], one["state"], one["reason"], one["events"]) for one in instance.ask("/pods")), instance.logs(), sep="\n")
        for name in list(instance.processes):
            instance.kill(name, 15)


def test_pods_of_the_api_server_are_captured_and_served(cluster: Cluster) -> None:
    instance = cluster.instance
    cluster.up()
    assert instance.get() == f"served / to {instance.client.ip} 200"
    assert instance.turned(instance.client).keys() == instance.turned(instance.server).keys() == CAPTURED.keys()
    assert instance.ask("/server_info")["podSource"]["stale"] is None
    assert any(line.startswith('narrows_kubernetes_objects{kind="Pod"} 2') for line in instance.metrics())
    # the outcome is on the pods and in events, once
    until(lambda: cluster.board.annotations("client").get("ambient.istio.io/redirection") == "enabled", "it says so", timeout=30)
    assert json.loads(cluster.board.annotations("client")["narrows.mesh/status"])["captured"] is True
    until(lambda: cluster.told() == ["client Captured", "web-0 Captured"], "events", timeout=30)
    # a user changes their mind
    cluster.board.annotate("client", **{"narrows.mesh/intercept": "disabled"})
    until(lambda: not instance.turned(instance.client), "the client is left alone", timeout=30)
    until(lambda: cluster.board.annotations("client") == {"narrows.mesh/intercept": "disabled"}, "nothing is said of it", timeout=30)
    cluster.board.annotate("client", **{"narrows.mesh/intercept": "enabled"})
    until(lambda: instance.turned(instance.client), "and captured again", timeout=30)
    # the agent is replaced: pods stay as they are
    instance.kill("agent")
    assert instance.get() == f"served / to {instance.client.ip} 200"
    cluster.agent()
    instance.ready()
    assert instance.get() == f"served / to {instance.client.ip} 200"


def test_while_the_api_server_is_away_pods_stay_captured_and_the_status_says_so(cluster: Cluster) -> None:
    instance = cluster.instance
    cluster.up()
    cluster.board.server.stop()
    until(lambda: instance.ask("/server_info")["podSource"]["stale"], "stale", timeout=30)
    until(lambda: instance.events("PodsStale"), "an event", timeout=30)
    assert instance.get() == f"served / to {instance.client.ip} 200" and instance.ask("/ready")["ready"]
    stale = [float(line.rpartition(" ")[2]) for line in instance.metrics() if line.startswith("narrows_kubernetes_stale_seconds")]
    assert len(stale) == 2 and max(stale) > 0
    # an agent that starts now has no list: what the keeper holds stays
    instance.kill("agent")
    cluster.agent()

    def unread() -> bool:
        with suppress(CommandError):  # on its way up
            return "the list of this node's pods has not been read yet" in instance.ask("/ready")["missing"]
        return False

    until(unread, "the agent runs and has no list", timeout=60)
    assert instance.get() == f"served / to {instance.client.ip} 200" and instance.turned(instance.client)


def test_a_pod_that_has_ended_is_let_go(cluster: Cluster) -> None:
    instance = cluster.instance
    cluster.up()
    cluster.board.status("client", "Succeeded", instance.client.ip)
    cluster.reason("client", "it has ended (phase Succeeded)")
    until(lambda: not instance.turned(instance.client), "its rules are gone", timeout=30)
    cluster.board.delete("client")
    until(lambda: not cluster.shown("client"), "it is gone", timeout=30)


def test_a_pod_is_captured_when_its_network_comes_and_again_when_that_is_made_anew(cluster: Cluster) -> None:
    instance = cluster.instance
    cluster.up()
    uid = cluster.board.pod("late", annotations=ON)
    cluster.reason("late", "none of its processes runs")
    assert instance.ask("/ready")["ready"]  # nobody runs in it who could pass by
    first, second = instance.node.pod("late"), instance.node.pod("later")
    process = cluster.kubepods.start(systemd(uid, ID), first)
    until(lambda: redirected(first), "captured", timeout=30)
    cluster.kubepods.end(process)
    cluster.kubepods.start(systemd(uid, "1" * 64), second)
    until(lambda: redirected(second), "the new sandbox is captured", timeout=30)
    until(lambda: cluster.shown("late").get("captured"), "told", timeout=30)


@pytest.mark.parametrize(("arguments", "said"), [
    (["--kubernetes"], "KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT are not set: this is no pod; name a kubeconfig (--kubeconfig)"),
    (["--kubeconfig", "/nowhere/config"], "the kubeconfig /nowhere/config cannot be read"),
])
def test_without_an_api_server_to_follow_it_says_what_to_do(instance: Instance, arguments: list[str], said: str) -> None:
    instance.start_agent(*arguments)
    assert instance.processes.pop("agent").wait(timeout=60) == 78
    assert said in (instance.run_dir / "agent.log").read_text()
