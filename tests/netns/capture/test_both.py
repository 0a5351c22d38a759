"""What holds of capture whichever way it gets into the kernel. test_reconcile.py (iptables) and test_nftables.py have what is their own."""
from __future__ import annotations

import asyncio

import pytest

from agent.capture.plan import plan
from agent.capture.reconcile import Reconciler
from agent.model.pod import CaptureSettings
from tests.netns.capture.conftest import planned, state
from tests.support.netns import Namespaces, Netns

pytestmark = [pytest.mark.netns, pytest.mark.parametrize("backend", ["iptables", "nftables"], indirect=True)]


async def test_twice_is_a_no_op(pod: Netns, reconciler: Reconciler) -> None:
    first = await reconciler.apply(pod.path, planned())
    then = state(pod)
    assert len(first.changed) == 12  # eight tables, two rules, two routes
    again = await reconciler.apply(pod.path, planned())
    assert again.changed == () and state(pod) == then and await reconciler.verify(pod.path, planned()) == ()


async def test_release_removes_the_redirects_alone(pod: Netns, reconciler: Reconciler) -> None:
    await reconciler.apply(pod.path, planned())
    assert redirects(pod)
    assert (await reconciler.release(pod.path)).changed == ("IPv4 nat", "IPv6 nat")
    found = "".join(state(pod))
    assert not redirects(pod) and "1337" in found  # the zone of connections, which other tables set
    assert len(pod.ip_json("rule")) == 4
    assert (await reconciler.apply(pod.path, planned())).changed == ("IPv4 nat", "IPv6 nat")
    assert redirects(pod)


async def test_two_instances_do_not_touch_each_other(pod: Netns, reconciler: Reconciler) -> None:
    other = Reconciler("other")
    await reconciler.apply(pod.path, planned())
    alone = state(pod)
    await other.apply(pod.path, plan(CaptureSettings(exclude_outbound_ports=(1,)), (4, 6), "other"))
    assert await reconciler.verify(pod.path, planned()) == ()
    await other.remove(pod.path)
    assert state(pod) == alone


async def test_many_pods_at_once_and_one_pod_many_times(namespaces: Namespaces, reconciler: Reconciler) -> None:
    pods = [namespaces.make(f"pod{number}") for number in range(8)]
    outcomes = await asyncio.gather(*(reconciler.apply(pod.path, planned()) for pod in pods for _ in range(2)))
    assert sorted(len(outcome.changed) for outcome in outcomes) == [0] * 8 + [12] * 8
    assert len({tuple(state(pod)) for pod in pods}) == 1


def redirects(pod: Netns) -> bool:
    return "redirect" in "".join(state(pod)).lower()
