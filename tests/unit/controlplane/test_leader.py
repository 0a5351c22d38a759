"""Who leads: taken and given up as client-go does it, never two at once on any clocks, and nobody without the API server's word."""
from __future__ import annotations

import asyncio
import random
from typing import Any

from controlplane.app.leader import LEASE_SECONDS, RENEW_SECONDS, Election
from protos.kubernetes.client import Client
from protos.kubernetes.resources import LEASES
from tests.support.kubernetes.server import ApiServer

SPACE, NAME = "kube-system", "narrows"


class Replica(Election):
    """With a clock of its own, that begins anywhere."""

    def __init__(self, client: Client, identity: str, begin: float = 0.0) -> None:
        self.now = begin
        super().__init__(client, SPACE, NAME, identity, lambda: self.now)


def lease(server: ApiServer) -> dict[str, Any]:
    found: dict[str, Any] = server.store.get(server.store.served["coordination.k8s.io", "v1", "leases"], SPACE, NAME)["spec"]
    return found


async def test_one_leads_until_it_is_silent_and_the_next_waits_its_whole_time(server: ApiServer, client: Client) -> None:
    one, two = Replica(client, "one"), Replica(client, "two", 1e6)
    await one.attempt()
    assert one.leading and lease(server)["holderIdentity"] == "one" and lease(server)["leaseDurationSeconds"] == 15
    for _ in range(20):
        await two.attempt()
        assert not two.leading and two.holder == "one"
        one.now, two.now = one.now + 2, two.now + 2
        await one.attempt()
        assert one.leading
    await two.attempt()  # sees the last change
    one.now, two.now = one.now + RENEW_SECONDS, two.now + LEASE_SECONDS - 0.1
    assert not one.leading
    await two.attempt()
    assert not two.leading
    two.now += 0.2
    await two.attempt()
    assert two.leading and lease(server)["leaseTransitions"] == 1
    await one.attempt()
    assert not one.leading and one.holder == "two"


async def test_what_clocks_of_others_say_does_not_matter(server: ApiServer, client: Client) -> None:
    for year in ("1970", "2100"):
        served = server.store.served["coordination.k8s.io", "v1", "leases"]
        server.store.apply(served, SPACE, NAME, {"kind": "Lease", "apiVersion": "coordination.k8s.io/v1", "metadata": {}, "spec": {
            "holderIdentity": "other", "leaseDurationSeconds": 15, "renewTime": f"{year}-01-01T00:00:00.000000Z"}}, "t", force=True)
        one = Replica(client, year)
        await one.attempt()
        one.now += LEASE_SECONDS - 1
        await one.attempt()
        assert not one.leading
        one.now += 1.5
        await one.attempt()
        assert one.leading


async def test_it_is_given_up_at_a_clean_end_and_only_ones_own(server: ApiServer, client: Client) -> None:
    one, two, three = (Replica(client, name) for name in ("one", "two", "three"))
    await one.attempt()
    await two.attempt()
    await two.release()  # it has nothing to give up
    assert lease(server)["holderIdentity"] == "one"
    await one.release()
    assert not one.leading and lease(server)["holderIdentity"] == ""
    await two.attempt()
    assert two.leading
    two.now += 1
    await two.attempt()
    one.now = -5.0
    one._until = 0.0  # as if it still believed
    await one.release()
    assert lease(server)["holderIdentity"] == "two"
    await three.attempt()
    assert not three.leading


async def test_of_many_who_try_at_once_one_leads(server: ApiServer, client: Client) -> None:
    for verb in ("create", "update"):
        fault = server.chaos.add(verb, "leases", seconds=0.2)  # all have read by then
        many = [Replica(client, f"{verb}-{n}", 100.0) for n in range(6)]
        await asyncio.gather(*(one.attempt() for one in many))
        if verb == "update":
            assert not any(one.leading for one in many)
            for one in many:
                one.now += LEASE_SECONDS + 1
            await asyncio.gather(*(one.attempt() for one in many))
        assert [one.leading for one in many].count(True) == 1
        server.chaos.stop(fault)


async def test_without_an_answer_it_ends_by_itself_and_a_late_answer_counts_from_the_question(server: ApiServer, client: Client) -> None:
    one = Replica(client, "one")
    await one.attempt()
    fault = server.chaos.add(None, "leases", code=503, reason="ServiceUnavailable")
    one.now += RENEW_SECONDS - 1
    await one.attempt()
    assert one.leading and "503" in one.problem
    one.now += 1.5
    assert not one.leading
    server.chaos.stop(fault)
    server.chaos.add("update", "leases", seconds=0.3, times=1)
    asking = asyncio.create_task(one.attempt())
    await asyncio.sleep(0.1)
    one.now += RENEW_SECONDS + 1
    await asking
    assert one.problem == "" and not one.leading and lease(server)["holderIdentity"] == "one"
    await one.attempt()
    assert one.leading


async def test_never_two_lead_whatever_fails_and_however_clocks_stand(server: ApiServer, client: Client) -> None:
    rng = random.Random(3)
    led = set()
    for round_ in range(4):
        many = [Replica(client, f"{round_}-{n}", rng.uniform(0, 1e6)) for n in range(3)]
        for _ in range(60):
            step = rng.choice([0.5, 2.0, 2.0, 6.0, 16.0])
            for one in many:
                one.now += step
            assert [one.leading for one in many].count(True) <= 1
            if rng.random() < 0.2:
                server.chaos.add(rng.choice(["get", "update", "create"]), "leases", code=503, reason="ServiceUnavailable", times=1)
            for one in rng.sample(many, rng.randrange(4)):
                await (one.release() if rng.random() < 0.05 else one.attempt())
                assert [each.leading for each in many].count(True) <= 1
            led |= {one.identity for one in many if one.leading}
        server.chaos.faults.clear()
        server.store.delete(server.store.served["coordination.k8s.io", "v1", "leases"], SPACE, NAME)
    assert len(led) > 4  # it went from one to another


async def test_what_is_written_is_a_lease_that_others_understand(client: Client) -> None:
    one = Replica(client, "one")
    await one.attempt()
    spec = (await client.get(LEASES, NAME, SPACE))["spec"]
    assert spec.keys() == {"holderIdentity", "leaseDurationSeconds", "renewTime", "acquireTime", "leaseTransitions"}
    assert len(spec["renewTime"]) == len("2026-01-01T00:00:00.000000Z") and spec["renewTime"].endswith("Z")
