"""Random policies and connections: what the workers' code decides is what Envoy's RBAC filter does, with real certificates."""
from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from agent import netlink
from agent.model.policy import Policy
from tests.support.backends import program
from tests.support.netns import Namespaces
from tests.support.policies import POD, Asked, allowed, some_policy, some_question, tables
from tests.support.rbac import PORTS, Certificates, at, configuration, lets_in, port_of
from tests.support.wait import until

pytestmark = pytest.mark.netns

SETS, QUESTIONS = 60, 12


def sets_of_policies(random: Random) -> list[list[Policy]]:
    return [at(number, [some_policy(random, one, wire=True) for one in range(random.randrange(1, 4))]) for number in range(SETS)]


def test_hundreds_of_connections_end_as_envoys_rbac_filter_ends_them(namespaces: Namespaces, tmp_path: Path) -> None:
    random = Random(20261121)
    sets = sets_of_policies(random)
    certificates = Certificates.make(tmp_path)
    netns = namespaces.make("rbac")
    netlink.set_link(netns.path, "lo", up=True)
    for host in range(8):
        netlink.add_address(netns.path, "lo", f"10.0.0.{host + 1}/32")
    (tmp_path / "envoy.json").write_text(configuration(sets, certificates))
    with (tmp_path / "envoy.log").open("w") as log:
        netns.start(program("envoy"), "-c", str(tmp_path / "envoy.json"), "--concurrency", "1", "--log-level", "warn",
                    "--use-dynamic-base-id", stdout=log, stderr=log)
    contexts = {}
    questions: list[tuple[int, Asked]] = []
    for number in range(SETS):
        for _ in range(QUESTIONS):
            asked = some_question(random, wire=True)
            if asked.who is not None and asked.who not in contexts:
                certificates.issue(asked.who, name := f"client-{len(contexts)}")
                contexts[asked.who] = certificates.context(name)
            questions.append((number, Asked(asked.who, asked.source, asked.destination, port_of(number, asked.port))))

    def answers() -> list[bool]:
        return [lets_in(asked, contexts[asked.who] if asked.who is not None else None) for _, asked in questions]

    def listens() -> bool:
        last = Asked(None, "127.0.0.1", "127.0.0.1", port_of(SETS - 1, PORTS))
        try:
            netlink.in_netns(netns.path, lambda: lets_in(last, None))
        except OSError:
            return False
        return True

    until(listens, f"Envoy listens ({tmp_path}/envoy.log)", timeout=30)
    envoys = netlink.in_netns(netns.path, answers)
    ours = []
    known = [tables(policies) for policies in sets]
    for number, asked in questions:
        ours.append(known[number].authorize(POD, asked.who, asked.source, asked.destination, asked.port)["allowed"])
    wrong = [(sets[number], asked, envoy) for (number, asked), envoy, mine in zip(questions, envoys, ours, strict=True)
             if envoy is not mine]
    assert wrong == []
    assert [allowed(sets[number], asked) for number, asked in questions] == ours
    # it would say nothing if one answer were all there is
    assert min(ours.count(True), ours.count(False)) > len(ours) // 8 and len({asked.who for _, asked in questions}) > 4
