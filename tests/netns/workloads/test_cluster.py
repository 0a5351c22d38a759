"""The Kubernetes source before an API server on loopback, with real processes, cgroups and namespaces for its pods."""
from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import time
from collections.abc import AsyncIterator, Iterator

import pytest

from agent.model.pod import LocalPod
from agent.workloads.cluster import ClusterSource
from agent.workloads.enrol import enrol
from agent.workloads.files import Delete, Event, Malformed, Synced, Upsert
from protos.kubernetes.client import Client
from tests.support.kubelet import ON, Board
from tests.support.kubepods import KubePods, cgroupfs, systemd
from tests.support.kubernetes.server import ApiServer
from tests.support.netns import Node
from tests.support.wait import until_async

pytestmark = pytest.mark.netns
ID = "3f" * 32


class Watched:
    """A source that is read, and what its events add up to: pods by name."""

    def __init__(self, client: Client) -> None:
        self.source = ClusterSource(client, "n1")
        self.pods: dict[str, LocalPod] = {}
        self.history: list[str] = []
        self.task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async with contextlib.aclosing(self.source.events()) as events:  # type: ignore[type-var]
            async for event in events:
                self._take(event)
                del event

    def _take(self, event: Event) -> None:
        match event:
            case Upsert(pod):
                self.pods[pod.name] = pod
                self.history.append(f"put {pod.name}")
            case Delete(pod):
                assert self.pods.pop(pod.name).uid == pod.uid
                self.history.append(f"delete {pod.name}")
            case Malformed(text, _):
                self.history.append(text)
            case Synced():
                self.history.append("synced")

    async def until(self, name: str, condition: str = "netns") -> LocalPod:
        """The pod, as soon as its `condition` (a field) is not empty."""
        def look() -> LocalPod | None:
            if self.task.done():
                self.task.result()
            pod = self.pods.get(name)
            return pod if pod is not None and getattr(pod, condition) else None
        found = await until_async(look, f"pod {name} has {condition}", timeout=30)
        assert found is not None
        return found

    async def synced(self) -> None:
        await until_async(lambda: "synced" in self.history, "synced", timeout=30)

    async def end(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


@pytest.fixture
def board() -> Iterator[Board]:
    with ApiServer() as server:
        yield Board(server)


@pytest.fixture
async def watched(board: Board) -> AsyncIterator[Watched]:
    async with Client(board.server.configuration()) as client:
        one = Watched(client)
        yield one
        await one.end()


async def test_a_pod_of_this_node_is_told_with_its_network(board: Board, watched: Watched, kubepods: KubePods, node: Node) -> None:
    board.namespace("default", labels={"istio.io/dataplane-mode": "ambient"}, annotations={"a": "b"})
    netns = node.pod("web")
    uid = board.pod("web", annotations=ON, labels={"app": "web"})
    board.pod("elsewhere", node="n2")
    path = systemd(uid, ID)
    kubepods.start(path, netns)
    board.status("web", "Running", netns.ip, netns.ip6)
    pod = await watched.until("web")
    assert os.stat(pod.netns).st_ino == os.stat(netns.path).st_ino and pod.cgroup == str(kubepods.directory(path).parent)
    assert (pod.uid, pod.ref, pod.service_account, pod.waits, pod.ended) == (uid, "default/web", "default", "", "")
    assert [str(one) for one in pod.addresses] == [netns.ip, netns.ip6]
    assert (pod.labels, pod.namespace_labels, pod.namespace_annotations) == (
        {"app": "web"}, {"istio.io/dataplane-mode": "ambient"}, {"a": "b"})
    assert enrol(pod).settings is not None and list(watched.pods) == ["web"]


async def test_a_pod_is_told_before_kubelet_says_its_address(board: Board, watched: Watched, kubepods: KubePods, node: Node) -> None:
    """Its sandbox is there while images are still pulled: so it is captured before its containers run."""
    netns = node.pod("web")
    kubepods.start(cgroupfs(board.pod("web"), ID), netns)
    assert {str(one) for one in (await watched.until("web")).addresses} == {netns.ip, netns.ip6}


async def test_a_pod_without_a_network_waits_and_says_so(board: Board, watched: Watched, kubepods: KubePods, node: Node) -> None:
    uid = board.pod("web", annotations=ON)
    pod = await watched.until("web", "waits")
    assert pod.netns == ""
    await until_async(lambda: "none of its processes runs" in watched.pods["web"].waits, "looked for")
    netns = node.pod("web")
    kubepods.start(cgroupfs(uid, ID), netns)
    assert (await watched.until("web")).waits == ""


async def test_looks_for_a_network_become_rare(board: Board, watched: Watched) -> None:
    board.pod("web")
    await watched.until("web", "waits")
    await until_async(lambda: watched.source.looks >= 4, "looked four times")  # 0.1 + 0.2 + 0.4 + 0.8 s
    before, began = watched.source.looks, time.monotonic()
    await asyncio.sleep(0.5)
    assert watched.source.looks <= before + 1 + (time.monotonic() - began) / 0.8


async def test_who_is_not_captured_says_why(board: Board, watched: Watched, kubepods: KubePods, node: Node) -> None:
    board.pod("host", host_network=True, annotations=ON)
    for name, containers in (("sidecar", ("istio-proxy", "c")), ("plain", ("c",))):
        kubepods.start(cgroupfs(board.pod(name, containers=containers, annotations=ON), ID), node.pod(name))
    board.pod("injected", annotations=ON | {"sidecar.istio.io/status": "{}"})
    await watched.until("host", "host_network")
    assert "hostNetwork" in enrol(watched.pods["host"]).reason
    assert "container istio-proxy" in enrol(await watched.until("sidecar")).reason
    assert "sidecar.istio.io/status" in enrol(await watched.until("injected", "waits")).reason
    assert enrol(await watched.until("plain")).settings is not None


async def test_a_sandbox_that_is_made_again_is_told_as_a_change(board: Board, watched: Watched, kubepods: KubePods, node: Node) -> None:
    first, second = node.pod("first"), node.pod("second")
    uid = board.pod("web")
    process = kubepods.start(cgroupfs(uid, ID), first)
    before = await watched.until("web")
    kubepods.end(process)
    kubepods.start(cgroupfs(uid, "1" * 64), second)
    await until_async(lambda: watched.pods["web"].netns != before.netns, "another namespace", timeout=30)
    after = watched.pods["web"]
    assert after.uid == before.uid and os.stat(after.netns).st_ino == os.stat(second.path).st_ino
    assert os.stat(before.netns).st_ino == os.stat(first.path).st_ino  # for who still works in it
    # a container that restarts in the same one is none
    count = len(watched.history)
    looks = watched.source.looks
    kubepods.start(cgroupfs(uid, "2" * 64), second)
    kubepods.end(kubepods._processes[1])
    await until_async(lambda: watched.source.looks > looks, "looked again", timeout=30)
    await asyncio.sleep(0.2)
    assert watched.pods["web"].netns == after.netns and watched.history[count:] == []


async def test_an_address_of_another_is_a_wrong_namespace(board: Board, watched: Watched, kubepods: KubePods, node: Node) -> None:
    """As for one that says it is a static pod, with another's hash."""
    victim = board.pod("victim")
    netns = node.pod("victim")
    kubepods.start(cgroupfs(victim, ID), netns)
    board.pod("evil", annotations={"kubernetes.io/config.mirror": "x", "kubernetes.io/config.hash": victim})
    await watched.until("victim")
    await until_async(lambda: "static pod" in watched.pods["evil"].waits, "not taken without an address")
    board.status("evil", "Running", "10.244.9.9")
    await until_async(lambda: "10.244.9.9" in watched.pods["evil"].waits, "not taken for its address")
    assert watched.pods["evil"].netns == ""


async def test_who_has_ended_lets_go_of_the_namespace(board: Board, watched: Watched, kubepods: KubePods, node: Node) -> None:
    uid = board.pod("job", annotations=ON)
    process = kubepods.start(cgroupfs(uid, ID), node.pod("job"))
    running = await watched.until("job")
    kubepods.end(process)
    board.status("job", "Succeeded")
    pod = await watched.until("job", "ended")
    assert pod.ended == "it has ended (phase Succeeded)" and pod.netns == running.netns  # to take what is there away
    path = pod.netns
    del pod, running
    watched.pods.clear()
    gc.collect()
    await until_async(lambda: not os.path.exists(path), "nobody holds it")


async def test_a_pod_made_again_under_its_name_is_another(board: Board, watched: Watched, kubepods: KubePods, node: Node) -> None:
    first = board.pod("web-0")
    kubepods.start(cgroupfs(first, ID), node.pod("a"))
    await watched.until("web-0")
    board.delete("web-0")
    second = board.pod("web-0")
    kubepods.start(cgroupfs(second, ID), node.pod("b"))
    await until_async(lambda: watched.pods.get("web-0") is not None and watched.pods["web-0"].uid == second, "the second")
    assert (await watched.until("web-0")).uid == second != first and watched.history.count("delete web-0") == 1
    board.delete("web-0")
    await until_async(lambda: not watched.pods, "gone")


async def test_while_the_api_server_is_away_everything_stays(board: Board, watched: Watched, kubepods: KubePods, node: Node) -> None:
    kubepods.start(cgroupfs(board.pod("web", annotations=ON), ID), node.pod("web"))
    pod = await watched.until("web")
    await watched.synced()
    assert watched.source.stale() is None
    count = len(watched.history)
    board.server.stop()
    await until_async(lambda: watched.source.stale() is not None, "stale", timeout=30)
    stale = watched.source.stale()
    assert stale is not None and stale[1].startswith(("Pod: ", "Namespace: "))
    assert watched.pods["web"] == pod and watched.history[count:] == [] and os.path.exists(pod.netns)


async def test_our_own_annotations_are_no_change(board: Board, watched: Watched, kubepods: KubePods, node: Node) -> None:
    uid = board.pod("web", annotations=ON)
    kubepods.start(cgroupfs(uid, ID), node.pod("web"))
    await watched.until("web")
    await watched.synced()
    count = len(watched.history)
    board.annotate("web", **{"narrows.mesh/status": "{}", "ambient.istio.io/redirection": "enabled"})
    await until_async(lambda: watched.source.written().get(uid) == {"narrows.mesh/status": "{}", "ambient.istio.io/redirection": "enabled"},
                      "seen")
    board.annotate("web", other="1")
    await until_async(lambda: watched.pods["web"].annotations == ON | {"other": "1"}, "a change of others")
    assert watched.history[count:] == ["put web"]


async def test_what_is_no_pod_is_told_once_and_changes_nothing(board: Board, watched: Watched, kubepods: KubePods, node: Node) -> None:
    kubepods.start(cgroupfs(board.pod("web"), ID), node.pod("web"))
    pod = await watched.until("web")
    board.server.store.merge(board.served("pods"), "default", "web", {"spec": {"hostNetwork": "yes"}}, "test")
    await until_async(lambda: any("hostNetwork" in text for text in watched.history), "told")
    board.server.store.merge(board.served("pods"), "default", "web", {"spec": {"hostNetwork": False}}, "test")
    board.pod("other")
    await watched.until("other", "waits")
    assert watched.pods["web"] == pod and sum("hostNetwork" in text for text in watched.history) == 1
