"""The life of certificates with a clock of the test's own: an authority and a keeper that do what a test says, real certificates."""
from __future__ import annotations

import asyncio
import datetime
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from agent.identity.authority import Signed, SignError, check
from agent.identity.identities import Identities
from agent.model.identity import Certificate, Trust
from tests.support.pki import SPIFFE, Authority

WEB, API = SPIFFE + "web", SPIFFE + "api"
DAY = 86_400


class Clock:
    """Time passes only when everybody waits; then it goes to the next moment that somebody waits for."""

    def __init__(self) -> None:
        self.now = datetime.datetime.now(datetime.UTC).timestamp()
        self._waits: list[tuple[float, asyncio.Event]] = []

    def __call__(self) -> float:
        return self.now

    async def wait(self, event: asyncio.Event, seconds: float) -> None:
        wake = asyncio.Event()
        self._waits.append((self.now + seconds, wake))
        either = [asyncio.ensure_future(event.wait()), asyncio.ensure_future(wake.wait())]
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for one in either:
                one.cancel()
            self._waits = [(due, other) for due, other in self._waits if other is not wake]

    async def run(self, until: Callable[[], bool], seconds: float = 40 * DAY) -> float:
        """Lets time pass until something is so; how long that took. Fails when it is not within `seconds`."""
        began = self.now
        while True:
            for _ in range(50):
                await asyncio.sleep(0)
            if until():
                return self.now - began
            assert self._waits, "everybody waits for ever"
            due = min(due for due, _ in self._waits)
            assert due - began <= seconds, f"not within {seconds} s"
            self.now = max(self.now, due)
            for at, wake in self._waits:
                if at <= self.now:
                    wake.set()


@dataclass
class Keeper:
    """Keys in the test's process."""

    keys: dict[int, str] = field(default_factory=dict)
    forgotten: list[int] = field(default_factory=list)
    made: int = 0
    away: bool = False

    async def make_key(self, identity: str) -> tuple[int, bytes]:
        if self.away:
            raise ConnectionError("away")
        assert list(self.keys.values()).count(identity) < 2, "two keys are the most"
        self.made += 1
        self.keys[self.made] = identity
        request = (x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
                   .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(identity)]), critical=True)
                   .sign(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256()))
        return self.made, request.public_bytes(serialization.Encoding.DER)

    async def forget_key(self, key: int) -> None:
        if self.away:
            raise ConnectionError("away")
        self.keys.pop(key, None)
        self.forgotten.append(key)


@dataclass
class InForce:
    certificates: dict[str, Certificate] = field(default_factory=dict)
    trust: Trust | None = None
    refuse: str | None = None

    def put_trust(self, trust: Trust) -> None:
        self.trust = trust

    def put_certificate(self, certificate: Certificate) -> None:
        self.certificates[certificate.identity] = certificate

    def remove_certificate(self, identity: str) -> None:
        self.certificates.pop(identity, None)

    async def in_force(self, _identity: str) -> str | None:
        await asyncio.sleep(0)
        return self.refuse


class World:
    """Identities with everything around them. `fails`: what the authority says instead of a certificate."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.keeper = Keeper()
        self.sink = InForce()
        self.root = Authority()
        self.roots = [self.root]
        self.fails: str | None = None
        self.unanswered = False
        self.life = float(DAY)
        self.asked: list[tuple[float, str]] = []
        self.running = self.most = 0
        self.gate: asyncio.Event | None = None
        self.identities = self.fresh()

    def fresh(self) -> Identities:
        return Identities(trust_domain="cluster.local", sign=self.sign, sink=self.sink, now=self.clock, wait=self.clock.wait)

    def attach(self) -> None:
        self.identities.attach(self.keeper, dict(self.keeper.keys), [], [])

    async def sign(self, identity: str, request: bytes, now: float) -> Signed:
        self.asked.append((now, identity))
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await (self.gate.wait() if self.gate else asyncio.sleep(0))
            if self.fails is not None:
                raise SignError(self.fails, self.unanswered)
            asked = x509.load_der_x509_csr(request)
            begin = datetime.datetime.fromtimestamp(now, datetime.UTC)
            leaf = (x509.CertificateBuilder().subject_name(x509.Name([])).issuer_name(self.root.name).public_key(asked.public_key())
                    .serial_number(x509.random_serial_number()).not_valid_before(begin)
                    .not_valid_after(begin + datetime.timedelta(seconds=self.life))
                    .add_extension(asked.extensions.get_extension_for_class(x509.SubjectAlternativeName).value, critical=True)
                    .sign(self.root.private, hashes.SHA256()))
            texts = [leaf.public_bytes(serialization.Encoding.PEM).decode(),
                     "".join(one.certificate.public_bytes(serialization.Encoding.PEM).decode() for one in self.roots)]
            return check(identity, request, texts, now)
        finally:
            self.running -= 1


@pytest.fixture
async def world() -> AsyncIterator[World]:
    one = World()
    yield one
    await one.identities.close()


async def have(world: World, *identities: str) -> float:
    return await world.clock.run(lambda: set(world.sink.certificates) == set(identities))


async def test_a_pods_identity_gets_a_certificate_and_its_roots(world: World) -> None:
    world.attach()
    world.identities.hold("pod-1", WEB)
    assert await have(world, WEB) == 0
    made = world.sink.certificates[WEB]
    assert made.key in world.keeper.keys
    assert world.sink.trust == Trust("cluster.local", (world.root.der,))
    assert (world.identities.requests, world.identities.failures) == (1, 0)


async def test_it_is_asked_for_once_however_many_pods_have_it(world: World) -> None:
    world.attach()
    for number in range(20):
        world.identities.hold(f"pod-{number}", WEB)
    world.identities.hold("pod-3", WEB)
    await have(world, WEB)
    world.identities.hold("late", WEB)
    await world.clock.run(lambda: True)
    assert len(world.asked) == 1


async def test_it_is_renewed_near_half_of_its_life_with_a_new_key_and_the_old_one_goes(world: World) -> None:
    world.attach()
    world.identities.hold("pod", WEB)
    await have(world, WEB)
    for _ in range(5):
        before = world.sink.certificates[WEB]
        passed = await world.clock.run(lambda before=before: world.sink.certificates[WEB] is not before)
        assert 0.45 * DAY - 2 <= passed <= 0.55 * DAY + 2
        await world.clock.run(lambda: len(world.keeper.keys) == 1)
        assert set(world.keeper.keys) == {world.sink.certificates[WEB].key}
        assert before.key in world.keeper.forgotten


async def test_renewals_of_many_identities_do_not_come_at_once(world: World) -> None:
    world.attach()
    names = [SPIFFE + f"sa-{number}" for number in range(30)]
    for name in names:
        world.identities.hold(name, name)
    await have(world, *names)
    dues = sorted(one.due for one in world.identities.entries)
    assert dues[-1] - dues[0] > 0.02 * DAY


async def test_at_most_eight_requests_are_on_their_way(world: World) -> None:
    world.gate = asyncio.Event()
    world.attach()
    names = [SPIFFE + f"sa-{number}" for number in range(40)]
    for name in names:
        world.identities.hold(name, name)
    await world.clock.run(lambda: len(world.asked) == 8)
    for _ in range(200):
        await asyncio.sleep(0)
    assert (len(world.asked), world.running) == (8, 8)
    world.gate.set()
    await have(world, *names)
    assert world.most == 8


async def test_failures_are_tried_again_ever_later_and_at_most_150_s_apart(world: World) -> None:
    world.fails = "no"
    world.attach()
    world.identities.hold("pod", WEB)
    await world.clock.run(lambda: len(world.asked) == 14)
    gaps = [later - earlier for (earlier, _), (later, _) in pairwise(world.asked)]
    for number, gap in enumerate(gaps):
        nominal = min(2.0**number, 150.0)
        assert 0.8 * nominal - 0.01 <= gap <= 1.2 * nominal + 0.01, gaps
    assert len({round(gap, 3) for gap in gaps[8:]}) > 1
    assert world.keeper.made == 1, "the key that was not signed is asked for again"
    assert world.identities.problems() == [f"{WEB} has no certificate: no"]
    world.fails = None
    await have(world, WEB)
    assert world.identities.problems() == []


async def test_the_last_good_one_stays_until_it_ends_and_is_told_of_before(world: World) -> None:
    world.attach()
    world.identities.hold("pod", WEB)
    await have(world, WEB)
    good, world.fails = world.sink.certificates[WEB], "the authority is away"
    assert world.identities.problems() == []
    await world.clock.run(lambda: bool(world.identities.problems()))
    left = good.not_after - world.clock.now
    assert 0.2 * DAY < left <= 0.25 * DAY, "three quarters of its life are over"
    assert "ends in" in world.identities.problems()[0] and "the authority is away" in world.identities.problems()[0]
    await world.clock.run(lambda: world.clock.now >= good.not_after)
    assert world.asked[-1][0] <= good.not_after + 1
    assert any(good.not_after - 1 <= at <= good.not_after + 1 for at, _ in world.asked), "asked at its end, not past it"
    assert "has expired" in world.identities.problems()[0]
    assert world.sink.certificates[WEB] is good
    world.fails = None
    await world.clock.run(lambda: world.sink.certificates[WEB] is not good)
    assert world.identities.problems() == []


async def test_an_authority_that_does_not_answer_is_no_problem_of_a_node_until_a_certificate_ends(world: World) -> None:
    world.fails, world.unanswered = "UNAVAILABLE", True
    world.attach()
    world.identities.hold("pod", WEB)
    await world.clock.run(lambda: world.identities.failures == 5)
    assert world.identities.problems() == []
    assert world.identities.entries[0].state(world.clock.now) == "failed"
    world.fails = None
    await have(world, WEB)
    world.fails = "UNAVAILABLE"
    await world.clock.run(lambda: bool(world.identities.problems()))
    assert "ends in" in world.identities.problems()[0]


async def test_an_identity_goes_with_its_last_pod_and_comes_again(world: World) -> None:
    world.attach()
    world.identities.hold("a", WEB)
    world.identities.hold("b", WEB)
    world.identities.hold("c", API)
    await have(world, WEB, API)
    world.identities.release("a")
    await world.clock.run(lambda: True)
    assert WEB in world.sink.certificates
    world.identities.release("b")
    world.identities.release("b")
    await have(world, API)
    await world.clock.run(lambda: set(world.keeper.keys.values()) == {API})
    world.identities.hold("d", WEB)
    world.identities.release("d")
    world.identities.hold("e", WEB)
    await have(world, WEB, API)
    assert sorted(world.keeper.keys.values()) == [API, WEB]


async def test_a_pod_that_changes_its_identity_lets_the_first_go(world: World) -> None:
    world.attach()
    world.identities.hold("a", WEB)
    await have(world, WEB)
    world.identities.hold("a", API)
    await have(world, API)


async def test_an_identity_that_goes_while_it_is_asked_for_leaves_no_key(world: World) -> None:
    world.gate = asyncio.Event()
    world.attach()
    world.identities.hold("a", WEB)
    await world.clock.run(lambda: len(world.asked) == 1)
    assert world.keeper.keys
    world.identities.release("a")
    await world.clock.run(lambda: not world.keeper.keys)
    world.gate.set()
    await world.clock.run(lambda: True)
    assert world.sink.certificates == {}


async def test_the_next_agent_takes_over_and_asks_for_nothing(world: World) -> None:
    world.attach()
    world.identities.hold("a", WEB)
    world.identities.hold("b", API)
    await have(world, WEB, API)
    certificates, trust = dict(world.sink.certificates), world.sink.trust
    assert trust is not None
    await world.identities.close()
    world.sink.certificates, world.sink.trust, world.asked = {}, None, []
    world.identities = world.fresh()
    world.identities.attach(world.keeper, dict(world.keeper.keys), certificates.values(), [trust])
    assert (world.sink.certificates, world.sink.trust) == (certificates, trust)
    world.identities.hold("a", WEB)
    await world.clock.run(lambda: True)
    assert world.asked == []
    world.identities.settle()
    await have(world, WEB)
    await world.clock.run(lambda: list(world.keeper.keys.values()) == [WEB])
    assert 0.4 * DAY < await world.clock.run(lambda: bool(world.asked)) < 0.6 * DAY


async def test_a_key_that_an_earlier_agent_left_unsigned_is_forgotten(world: World) -> None:
    world.keeper.keys = {101: WEB, 102: WEB, 103: API}
    world.attach()
    world.identities.hold("a", WEB)
    await have(world, WEB)
    world.identities.settle()
    await world.clock.run(lambda: len(world.keeper.keys) == 1)
    assert {101, 102, 103} <= set(world.keeper.forgotten)


async def test_a_new_keeper_has_no_keys_and_every_certificate_is_asked_for_again(world: World) -> None:
    world.attach()
    world.identities.hold("a", WEB)
    await have(world, WEB)
    before = world.sink.certificates[WEB]
    world.identities.detach()
    world.keeper = Keeper(made=1000)
    world.attach()
    assert world.sink.certificates == {}, "a certificate without its key must not reach a worker"
    await have(world, WEB)
    assert world.sink.certificates[WEB].key == 1001 != before.key
    assert len(world.asked) == 2


async def test_nothing_is_asked_while_the_keeper_is_away_and_nothing_counts_as_failure(world: World) -> None:
    world.identities.hold("a", WEB)
    await world.clock.run(lambda: True)
    assert world.asked == []
    world.keeper.away = True
    world.attach()
    await world.clock.run(lambda: True)
    assert (world.asked, world.identities.failures) == ([], 0)
    world.keeper.away = False
    world.attach()
    await have(world, WEB)


async def test_what_the_data_path_refuses_is_not_kept(world: World) -> None:
    world.attach()
    world.identities.hold("a", WEB)
    await have(world, WEB)
    good, world.sink.refuse = world.sink.certificates[WEB], "no DER"
    await world.clock.run(lambda: world.identities.failures > 1)
    assert world.sink.certificates[WEB] == good
    assert "the data path refuses" in world.identities.entries[0].error
    world.sink.refuse = None
    await world.clock.run(lambda: world.sink.certificates[WEB].key != good.key and len(world.keeper.keys) == 1)


async def test_several_roots_and_revocation_lists_are_in_force_together(world: World) -> None:
    world.attach()
    world.identities.revoke((b"0\x00",))
    assert world.sink.trust is None
    world.roots.append(following := Authority("next"))
    world.identities.hold("a", WEB)
    await have(world, WEB)
    assert world.sink.trust == Trust("cluster.local", (world.root.der, following.der), (b"0\x00",))
    world.identities.revoke(())
    assert world.sink.trust.lists == ()
    world.identities.revoke((b"0\x00", b"0\x01\x05"))
    world.roots = [following]
    world.root = following
    await world.clock.run(lambda: world.sink.trust is not None and world.sink.trust.roots == (following.der,))
    assert world.sink.trust.lists == (b"0\x00", b"0\x01\x05")
