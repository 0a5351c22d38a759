"""Resolvers that answer late, wrongly or not at all; answers that are kept; DNS of a living pod switched off and on."""
from __future__ import annotations

import signal
import sys
from collections.abc import Iterator

import dnslib
import pytest

from tests.netns.agent.conftest import CAPTURED
from tests.netns.dns.conftest import CAPTURE, Scene, answered, plain, staged
from tests.support.dns import addresses, ask, question, reply, resolver, udp
from tests.support.wait import until

pytestmark = pytest.mark.netns


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    """One for all: each test leaves the agent up and the client captured with its DNS."""
    with staged() as one:
        yield one


def test_answers_are_kept_by_their_ttl_whether_there_is_something_or_not(scene: Scene) -> None:
    with resolver(scene.upstream, plain) as upstream:
        for name, kind in (("kept.example.test", "A"), ("kept.example.test", "AAAA"), ("no.example.test", "A")):
            first, second = (ask(scene.client, scene.upstream.ip, name, kind) for _ in range(2))
            assert (addresses(first), first.header.rcode) == (addresses(second), second.header.rcode)
        assert upstream.heard == ["kept.example.test", "kept.example.test", "no.example.test"]
        assert len(set(upstream.ports)) > 1  # each from a port of its own, by chance the same


def test_one_resolver_is_not_told_another_ones_answers(scene: Scene) -> None:
    with resolver(scene.upstream, lambda asked: reply(asked, f"{asked.q.qname} 60 A 192.0.2.1")):
        assert addresses(ask(scene.client, scene.upstream.ip, "differs.example.test")) == ["192.0.2.1"]
    with resolver(scene.instance.node.netns, lambda asked: reply(asked, f"{asked.q.qname} 60 A 192.0.2.2")):
        assert addresses(ask(scene.client, scene.instance.node.netns.ip, "differs.example.test")) == ["192.0.2.2"]


def test_only_the_resolvers_answer_to_this_question_is_one(scene: Scene) -> None:
    def forged(asked: dnslib.DNSRecord) -> list[bytes]:
        other_id = bytearray(reply(asked, f"{asked.q.qname} 60 A 203.0.113.1"))
        other_id[0] ^= 1
        other_question = bytearray(reply(question("forged.example.test"), "forged.example.test 60 A 203.0.113.2"))
        other_question[:2] = asked.header.id.to_bytes(2, "big")
        return [bytes(other_id), bytes(other_question), b"", b"\0", reply(asked, f"{asked.q.qname} 60 A 192.0.2.5")]

    before = scene.metric("narrows_dns_dropped_total")
    with resolver(scene.upstream, forged):
        assert addresses(ask(scene.client, scene.upstream.ip, "true.example.test")) == ["192.0.2.5"]
    assert scene.metric("narrows_dns_dropped_total") >= before + 3


def test_a_question_that_was_lost_upstream_is_sent_again_when_the_client_asks_again(scene: Scene) -> None:
    lost: list[str] = []

    def late(asked: dnslib.DNSRecord) -> bytes | None:
        lost.append("once")
        return None if len(lost) == 1 else plain(asked)

    with resolver(scene.upstream, late) as upstream, udp(scene.client) as client:
        client.connect((scene.upstream.ip, 53))
        packed = question("lost.example.test").pack()
        client.send(packed)
        until(lambda: upstream.heard, "the first question comes")
        client.settimeout(10)
        client.send(packed)
        assert addresses(dnslib.DNSRecord.parse(client.recv(4096))) == ["192.0.2.5"]


def test_a_question_that_may_not_leave_the_pod_is_silent_and_asked_anew_when_it_may(scene: Scene) -> None:
    """A network policy inside the pod's namespace holds for our question as it would for the pod's."""
    forbid = ["OUTPUT", "-d", scene.upstream.ip, "-p", "udp", "--dport", "53", "-j", "DROP"]
    packed = question("forbidden.example.test").pack()
    with resolver(scene.upstream, plain) as upstream, udp(scene.client) as client:
        client.connect((scene.upstream.ip, 53))
        scene.client.run("iptables-legacy", "-A", *forbid)
        before = scene.metric("istio_dns_upstream_failures_total")
        for number in (1, 2):
            client.send(packed)
            until(lambda: scene.metric("istio_dns_upstream_failures_total") >= before + number, "it is told")  # noqa: B023
        scene.client.run("iptables-legacy", "-D", *forbid)
        assert upstream.heard == []
        client.settimeout(10)
        client.send(packed)
        assert addresses(dnslib.DNSRecord.parse(client.recv(4096))) == ["192.0.2.5"]


def test_the_same_question_of_many_at_once_is_asked_once(scene: Scene) -> None:
    asked: list[dnslib.DNSRecord] = []

    def held(one: dnslib.DNSRecord) -> None:
        asked.append(one)

    clients = [udp(scene.client) for _ in range(10)]
    try:
        with resolver(scene.upstream, held):
            for number, client in enumerate(clients):
                client.settimeout(10)
                record = question("many.example.test")
                record.header.id = number
                client.connect((scene.upstream.ip, 53))
                client.send(record.pack())
            until(lambda: scene.metric("narrows_dns_waiting") == 1 and asked, "they wait for one answer")
            until(lambda: scene.instance.shown("client")["dns"]["waiting"] == 1, "in one exchange")
            assert len(asked) == 1
    finally:
        for client in clients:
            client.close()


def test_opting_out_and_in_again_takes_effect_on_the_living_pod(scene: Scene) -> None:
    """Who answers tells which: the resolver does not know `web`."""
    def theirs(asked: dnslib.DNSRecord) -> bytes:
        return reply(asked, f"{asked.q.qname} 0 A 192.0.2.5")

    with resolver(scene.upstream, theirs):
        def answer() -> list[str]:
            return addresses(ask(scene.client, scene.upstream.ip, "web"))

        assert answer() == ["10.96.0.10"]
        for said, expected in (("false", ["192.0.2.5"]), ("true", ["10.96.0.10"]), ("false", ["192.0.2.5"])):
            scene.instance.pod("client", scene.client, **{CAPTURE: said})
            until(lambda: answer() == expected, f"{CAPTURE}={said} is in force")  # noqa: B023
            assert scene.instance.get().endswith("200"), "TCP stays captured"
            assert ("--to-ports 15053" in scene.client.iptables_save()) == (said == "true")
            assert scene.instance.turned(scene.client)["egress"] == CAPTURED["egress"]
        scene.instance.pod("client", scene.client)
        scene.captured()


def test_rules_of_dns_that_somebody_removes_are_put_back(scene: Scene) -> None:
    scene.client.run("iptables-legacy", "-t", "nat", "-F")
    until(lambda: "--to-ports 15053" in scene.client.iptables_save(), "they are back")
    assert addresses(ask(scene.client, "192.0.2.99", "web")) == ["10.96.0.10"]


def test_who_asks_too_much_gets_his_share_and_others_are_answered(scene: Scene) -> None:
    scene.instance.pod("web-0", scene.instance.server)
    scene.captured("web-0")
    flood = scene.client.start(sys.executable, "-c", """
import socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.connect((sys.argv[1], 53))
number = 0
while True:
    number += 1
    try:
        s.send(number.to_bytes(2, "big")[-2:] + bytes.fromhex(sys.argv[2])) if number < 65536 else None
    except OSError:
        pass
    number %= 65535
""", "192.0.2.99", question("web").pack()[2:].hex())
    until(lambda: scene.metric("narrows_dns_dropped_total") > 0 and 'reason="pod_share"' in "".join(scene.instance.metrics()), "it is cut")
    for _ in range(20):
        assert addresses(ask(scene.instance.server, "192.0.2.99", "web")) == ["10.96.0.10"]
    flood.send_signal(signal.SIGKILL)
    flood.wait(10)
    until(lambda: answered(scene), "and who flooded is answered when he stopped")
