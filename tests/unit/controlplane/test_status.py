"""What is wrong with an object stands in its status, by the leader alone, once, and beside what others have there."""
from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from controlplane.app.leader import Election
from controlplane.app.plane import Plane
from controlplane.app.status import PACE_SECONDS, StatusWriter
from controlplane.sources.cluster import Cluster
from protos.kubernetes.client import Client
from tests.support.cluster import kubeconfig, put
from tests.support.controlplane import ControlPlane
from tests.support.kubernetes.server import ApiServer
from tests.support.manifests import REVIEWS, virtual_service
from tests.support.wait import until, until_async

GOOD = "hosts: [reviews]\nhttp: [{route: [{destination: {host: reviews}}]}]"
WRONG = "hosts: [reviews]\nhttp: [{route: [{destination: {hots: reviews}}]}]"
NOWHERE = "hosts: [nobody]\nhttp: [{route: [{destination: {host: reviews}}]}]"


@pytest.fixture
def server() -> Iterator[ApiServer]:
    with ApiServer() as one:
        put(one, REVIEWS)
        yield one


@dataclass
class Desk:
    server: ApiServer
    client: Client
    plane: Plane
    election: Election
    writer: StatusWriter

    def status(self, name: str = "reviews") -> dict[str, Any]:
        found: dict[str, Any] = status_of(self.server, name)
        return found

    async def writes(self, name: str = "reviews") -> dict[str, Any]:
        """What it has after a round that had something to write."""
        before = self.status(name)

        async def look() -> None:
            while self.status(name) == before:
                await self.election.attempt()  # on a busy machine it would end meanwhile
                await self.writer.look()
                await asyncio.sleep(0.02)
        async with asyncio.timeout(30):
            await look()
        return self.status(name)

    async def settled(self) -> int:
        """How many writes were asked for, once nothing is to be written."""
        cluster = self.plane.cluster
        assert cluster is not None
        await until_async(lambda: all(mark.status.get("conditions", []) == status_of(self.server, key.name).get("conditions", [])
                                      for key, mark in cluster.marks.items() if key.kind == "VirtualService"), "the watch told", timeout=30)
        for _ in range(3):
            await self.writer.look()
        return len(self.server.asked("patch", "virtualservices"))


def status_of(server: ApiServer, name: str) -> dict[str, Any]:
    served = server.store.served["networking.istio.io", "v1", "virtualservices"]
    found: dict[str, Any] = server.store.get(served, "default", name).get("status") or {}
    return found


def accepted(status: dict[str, Any]) -> bool:
    (condition,) = status["conditions"]
    said = condition["status"], condition["reason"], condition["message"], status["validationMessages"]
    return said == ("True", "Accepted", "", [])


@asynccontextmanager
async def desk(server: ApiServer, identity: str = "one", lead: bool = True) -> AsyncIterator[Desk]:
    async with Client(server.configuration()) as client:
        plane = Plane([], cluster=Cluster(client))
        assert plane.cluster is not None
        cluster = plane.cluster

        async def follow() -> None:
            while True:
                await cluster.changes()
                plane.follow_cluster()

        tasks = [asyncio.create_task(cluster.run()), asyncio.create_task(follow())]
        try:
            await until_async(lambda: plane.loaded, "the cluster", timeout=60)
            election = Election(client, "kube-system", "narrows", identity)
            if lead:
                await election.attempt()
                assert election.leading
            yield Desk(server, client, plane, election, StatusWriter(client, election, cluster.marks, plane.problems))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_refused_object_says_so_until_it_is_right(server: ApiServer) -> None:
    put(server, virtual_service("reviews", WRONG))
    served = server.store.served["networking.istio.io", "v1", "virtualservices"]
    server.store.merge(served, "default", "reviews", {"status": {"observedGeneration": 7}}, "istiod", "status")
    async with desk(server) as one:
        found = await one.writes()
        assert found["validationMessages"] == [{"level": "ERROR", "type": {"code": "NRW0001", "name": "Refused"}}]
        (condition,) = found["conditions"]
        assert (condition["type"], condition["status"], condition["reason"]) == ("narrows.mesh/Accepted", "False", "Refused")
        assert "hots" in condition["message"] and condition["lastTransitionTime"].endswith("Z") and found["observedGeneration"] == 7
        assert await one.settled() == 1
        put(server, virtual_service("reviews", WRONG.replace("hots", "hosst")))
        changed = await one.writes()
        assert "hosst" in changed["conditions"][0]["message"]
        assert changed["conditions"][0]["lastTransitionTime"] == condition["lastTransitionTime"]  # it was refused before
        await one.settled()
        put(server, virtual_service("reviews", GOOD))
        assert accepted(await one.writes()) and one.status()["observedGeneration"] == 7
        assert await one.settled() == 3


async def test_an_object_in_force_with_a_warning_is_accepted_with_words(server: ApiServer) -> None:
    put(server, virtual_service("reviews", NOWHERE) + virtual_service("fine", GOOD))
    async with desk(server) as one:
        found = await one.writes()
        assert found["validationMessages"] == [{"level": "WARNING", "type": {"code": "NRW0002", "name": "Warned"}}]
        assert found["conditions"][0]["status"] == "True" and "no service is called so" in found["conditions"][0]["message"]
        assert one.status("fine") == {} and await one.settled() == 1


async def test_only_the_leader_writes_and_the_next_goes_on_where_it_was(server: ApiServer) -> None:
    put(server, virtual_service("reviews", WRONG))
    async with desk(server) as one, desk(server, "two", lead=False) as two:
        await two.election.attempt()
        await two.writer.look()
        assert not two.election.leading and one.status() == {}
        before = await one.writes()
        await one.election.release()
        await two.election.attempt()
        assert two.election.leading and await two.settled() == 1 and one.status() == before
        put(server, virtual_service("reviews", GOOD))
        await one.writer.look()
        assert one.status() == before
        assert accepted(await two.writes())


async def test_what_somebody_else_has_there_stays_and_is_told_once(server: ApiServer, caplog: pytest.LogCaptureFixture) -> None:
    put(server, virtual_service("reviews", WRONG))
    theirs = {"validationMessages": [{"level": "ERROR", "type": {"code": "IST0101"}}]}
    served = server.store.served["networking.istio.io", "v1", "virtualservices"]
    server.store.merge(served, "default", "reviews", {"status": theirs}, "istiod", "status")
    with caplog.at_level(logging.WARNING, "narrows.controlplane"):
        async with desk(server) as one:
            await until_async(lambda: one.plane.problems(), "the problem", timeout=30)
            for _ in range(3):
                await one.writer.look()
            assert one.writer.refused == 1 and one.status() == theirs
    assert [each.message for each in caplog.records].count("the status of an object cannot be written") == 1


async def test_writes_keep_a_pace_and_end_with_the_lead(server: ApiServer) -> None:
    for n in range(5):
        put(server, virtual_service(f"v{n}", WRONG))
    async with desk(server) as one:
        await until_async(lambda: len(one.plane.problems()) >= 5, "the problems", timeout=30)
        begin = time.monotonic()
        looking = asyncio.create_task(one.writer.look())
        await until_async(lambda: one.writer.written >= 2, "some are written", timeout=30)
        await one.election.release()
        await looking
        assert one.writer.written < 5 and time.monotonic() - begin >= PACE_SECONDS


def leads(plane: ControlPlane) -> bool:
    return "\nnarrows_leader 1.0\n" in plane.get("/metrics")[1]


def test_of_two_control_planes_one_writes_and_the_other_takes_over_when_it_ends(server: ApiServer, tmp_path: Path) -> None:
    planes = []
    try:
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            planes.append(ControlPlane(tmp_path / name, more=["--kubeconfig", str(kubeconfig(server, tmp_path / name)), "--leader-lease",
                                                              "kube-system/narrows"]))
            planes[-1].start()
        until(lambda: [leads(one) for one in planes].count(True) == 1, "one leads", timeout=60)
        put(server, virtual_service("reviews", WRONG))
        until(lambda: status_of(server, "reviews").get("conditions"), "the status", timeout=60)
        first, second = sorted(planes, key=leads, reverse=True)
        assert first.end() == 0
        until(lambda: leads(second), "the other leads", timeout=60)
        put(server, virtual_service("reviews", GOOD))
        until(lambda: accepted(status_of(server, "reviews")), "the status says so", timeout=60)
        assert second.end() == 0
        lease = server.store.get(server.store.served["coordination.k8s.io", "v1", "leases"], "kube-system", "narrows")
        assert lease["spec"]["holderIdentity"] == "" and lease["spec"]["leaseTransitions"] >= 1
    finally:
        for one in planes:
            if one.process is not None and one.process.poll() is None:
                one.process.kill()
                one.process.wait(10)
