"""Kubernetes as a source: the same objects as from files, kept when they are refused or the API server is away."""
from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from controlplane.cli import command
from controlplane.model.objects import Metadata, Service
from controlplane.model.problems import ObjectKey, Place
from controlplane.sources.cluster import Together
from controlplane.sources.folder import Changes
from tests.support.cluster import followed, kubeconfig, put, remove
from tests.support.controlplane import START, ControlPlane, control_plane
from tests.support.kubernetes.server import ApiServer
from tests.support.manifests import REVIEWS, good, service, virtual_service
from tests.support.wait import until, until_async

ROUTE = "hosts: [reviews]\nhttp: [{route: [{destination: {host: reviews, subset: v1}}]}]"
WRONG = "hosts: [reviews]\nhttp: [{route: [{destination: {hots: reviews}}]}]"
RULE = ObjectKey("VirtualService", "default", "reviews")


def nowhere(value: Any) -> Any:
    """Without what only a file or only a server tells."""
    if isinstance(value, Place):
        return Place()
    if isinstance(value, Metadata):
        return replace(value, place=Place(), created="", uid="")
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(nowhere(one) for one in value)
    if hasattr(value, "__dataclass_fields__"):
        return replace(value, **{name: nowhere(getattr(value, name)) for name, one in value.__dataclass_fields__.items() if one.init})
    return value


async def test_a_cluster_gives_the_objects_that_files_give(server: ApiServer) -> None:
    text = REVIEWS + virtual_service("reviews", ROUTE)
    put(server, text)
    async with followed(server) as one:
        await until_async(lambda: one.objects, "the first state")
        expected = good(text).objects
        assert {key: nowhere(value) for key, value in one.objects.items() if key in expected} == {
            key: nowhere(value) for key, value in expected.items()}
        assert {key.name for key in one.objects.keys() - expected.keys()} == {"default", "kube-system"}
        assert len(one.changes) == 1 and one.said == ""


async def test_nothing_is_given_before_every_kind_was_listed(server: ApiServer) -> None:
    put(server, REVIEWS)
    fault = server.chaos.add("list", "pods", code=403, reason="Forbidden", message="pods is forbidden")
    async with followed(server) as one:
        await until_async(lambda: "Pod: is not followed" in one.said, "the reason")
        assert not one.objects and not one.cluster.synced
        server.chaos.stop(fault)
        await until_async(lambda: len(one.objects) == 6, "the first state", timeout=60)
        await until_async(lambda: one.said == "", "well", timeout=60)


async def test_a_refused_object_keeps_its_last_good_version(server: ApiServer) -> None:
    put(server, REVIEWS + virtual_service("reviews", ROUTE))
    async with followed(server) as one:
        await until_async(lambda: RULE in one.objects, "the rule")
        before = one.objects[RULE]
        put(server, virtual_service("reviews", WRONG))
        await until_async(lambda: "the last good version stays in force" in one.said, "the problem")
        assert one.objects[RULE] == before and "VirtualService default/reviews" in one.said and "hots" in one.said
        put(server, virtual_service("reviews", ROUTE.replace("v1", "v2")))
        await until_async(lambda: one.objects[RULE] != before, "the new version")
        assert one.said == ""
        put(server, virtual_service("reviews", WRONG))
        remove(server, "VirtualService", "reviews")
        await until_async(lambda: RULE not in one.objects, "it went")
        assert one.said == ""


async def test_what_changes_nothing_for_the_mesh_is_no_change(server: ApiServer) -> None:
    put(server, REVIEWS + virtual_service("reviews", ROUTE))
    async with followed(server) as one:
        await until_async(lambda: RULE in one.objects, "the rule")
        (served,) = [each for each in server.store.served.values() if each.resource.kind == "VirtualService"]
        server.store.merge(served, "default", "reviews", {"status": {"observedGeneration": 1}}, "istiod", "status")
        server.store.merge(served, "default", "reviews", {"metadata": {"annotations": {"a": "b"}}}, "kubectl")
        put(server, service("ratings", ip="10.96.0.11"))
        await until_async(lambda: ObjectKey("Service", "default", "ratings") in one.objects, "what came after")
        assert {each.meta.key.name for changes in one.changes[1:] for each in changes.puts} == {"ratings"} and one.said == ""


async def test_a_kind_that_is_not_served_yet_is_none(server: ApiServer) -> None:
    server.store.served.pop(("networking.istio.io", "v1", "virtualservices"))
    put(server, REVIEWS)
    async with followed(server) as one:
        await until_async(lambda: len(one.objects) == 6, "the others")


def made(name: str, address: str) -> Service:
    (found,) = good(service(name, ip=address)).objects.values()
    assert isinstance(found, Service)
    return found


def test_of_two_sources_the_first_counts_until_it_gives_an_object_up() -> None:
    both, files, cluster = Together(), made("x", "10.0.0.1"), made("x", "10.0.0.2")
    key = files.meta.key
    assert both.take(1, Changes([cluster])).puts == [cluster]
    assert both.take(0, Changes([files])).puts == [files]
    assert [str(one.about) for one in both.problems(("--config", "the cluster"))] == ["Service default/x"]
    assert not both.take(1, Changes([made("x", "10.0.0.3")])) and not both.take(1, Changes([cluster]))
    assert both.take(0, Changes(deletes=[key])).puts == [cluster] and both.problems(("a", "b")) == []
    assert both.take(1, Changes(deletes=[key])).deletes == [key]


def services(plane: ControlPlane) -> dict[str, list[str]]:
    return {one["hostname"].partition(".")[0]: one["addresses"] for one in plane.debug("registryz")["services"]}


def test_the_control_plane_serves_a_cluster_and_goes_on_when_it_is_away(server: ApiServer, tmp_path: Path) -> None:
    put(server, REVIEWS)
    with control_plane(tmp_path, service("mine", ip="10.96.0.9"), more=["--kubeconfig", str(kubeconfig(server, tmp_path))]) as plane:
        assert services(plane) == {"mine": ["10.96.0.9"], "reviews": ["10.96.0.10"]} and plane.get("/ready")[0] == 200
        put(server, service("ratings", ip="10.96.0.11"))
        until(lambda: "ratings" in services(plane), "a service that was made")
        plane.apply("more.yaml", service("ratings", ip="10.96.0.99"))
        until(lambda: services(plane)["ratings"] == ["10.96.0.99"], "that of the files counts")
        assert any("is also in --config" in one["message"] for one in plane.debug("problems")["problems"])
        (plane.config / "more.yaml").unlink()
        until(lambda: services(plane)["ratings"] == ["10.96.0.11"], "that of the cluster is back")
        server.stop()
        until(lambda: plane.get("/debug/problems")[1].count("is not followed") == 10, "every kind says that it is stale", timeout=60)
        assert services(plane) == {"mine": ["10.96.0.9"], "ratings": ["10.96.0.11"], "reviews": ["10.96.0.10"]}
        metrics = plane.get("/metrics")[1]
        assert 'narrows_kubernetes_objects{kind="Pod"} 2.0' in metrics
        stale = re.search(r'narrows_kubernetes_stale_seconds\{kind="Pod"\} (\S+)', metrics)
        assert stale and float(stale[1]) > 0
        assert plane.end() == 0


def test_it_serves_nobody_before_it_knows_the_cluster_and_can_be_ended(server: ApiServer, tmp_path: Path) -> None:
    server.chaos.add("list", "pods", code=403, reason="Forbidden", message="pods is forbidden")
    plane = ControlPlane(tmp_path, more=["--kubeconfig", str(kubeconfig(server, tmp_path))])
    with plane.log.open("wb") as log:  # `start` would wait until it serves
        plane.process = subprocess.Popen([*START, "control-plane", *plane.options()], stderr=log, stdout=log)

    def said() -> str:
        try:
            return plane.get("/debug/problems")[1]
        except OSError:
            return ""  # not there yet, or bound and not listening yet

    try:
        until(lambda: "pods is forbidden" in said(), "the reason", timeout=60)
        assert plane.get("/ready")[0] == 503 and not plane.socket.exists()
        assert plane.end() == 0
    finally:
        if plane.process.poll() is None:
            plane.process.kill()
            plane.process.wait(5)


@pytest.mark.parametrize(("options", "word"), [
    ([], "nothing to serve"), (["--kubernetes", "--kubeconfig", "x"], "two API servers"), (["--kube-context", "x"], "is of a --kubeconfig"),
    (["--kubernetes"], "KUBERNETES_SERVICE_HOST"), (["--kubeconfig", "/none"], "cannot be read")])
def test_what_cannot_be_followed_is_told(options: list[str], word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    done = CliRunner().invoke(command, ["--listen", "unix:/none", *options])
    assert done.exit_code in (2, 69) and word in done.output
