"""Which address of a pod's own hooks know it by."""
from __future__ import annotations

from ipaddress import ip_address

import pytest

from agent.app.own import Own, incomplete, own_of, told
from agent.model.pod import LocalPod
from agent.model.workload import IPAddress

FOUR, SIX, OTHER = ip_address("10.0.0.1"), ip_address("fd00::1"), ip_address("fd00::2")


def pod(*addresses: IPAddress) -> LocalPod:
    return LocalPod("u", "default", "a", "default", addresses, "/run/netns/a", "/sys/fs/cgroup/a", False)


@pytest.mark.parametrize(("named", "there", "before", "chosen"), [
    ((FOUR, SIX), (OTHER,), (), (FOUR, SIX)),
    ((FOUR,), (), (), (FOUR,)),
    ((FOUR,), (FOUR, SIX, OTHER), (), (FOUR, SIX)),
    ((SIX,), (FOUR, SIX, OTHER), (), (SIX, FOUR)),
    ((FOUR,), (SIX, OTHER), (OTHER,), (FOUR, OTHER)),
    ((FOUR,), (SIX,), (OTHER,), (FOUR, SIX)),
    ((FOUR,), (), (OTHER,), (FOUR,)),
    ((FOUR, SIX), (OTHER,), (OTHER,), (FOUR, SIX)),
])
def test_the_runtimes_word_goes_first_and_what_was_chosen_stays_while_it_is_there(
        named: tuple[IPAddress, ...], there: tuple[IPAddress, ...], before: tuple[IPAddress, ...], chosen: tuple[IPAddress, ...]) -> None:
    assert own_of(pod(*named), there, Own(named, before)).addresses == chosen


def test_a_pod_says_where_each_family_goes_or_why_it_is_refused() -> None:
    assert [incomplete(pod(*named)) for named in ((FOUR, SIX), (FOUR,), (SIX,))] == [False, True, True]
    assert [(one["address"], one["source"], bool(one["refused"])) for one in Own((FOUR,), (SIX,)).shown()] == [
        ("10.0.0.1", "podIPs", False), ("fd00::1", "namespace", False)]
    assert [(one["address"], one["source"], bool(one["refused"])) for one in Own((SIX,)).shown()] == [
        (None, None, True), ("fd00::1", "podIPs", False)]
    assert told(Own((FOUR,), (SIX,))) == "what it connects to by IPv6 goes to fd00::1 of its namespace"
    assert told(Own((SIX,))) == "connects by IPv4 are refused: it has no address"
