"""eBPF out and iptables or nftables in: one pod, both hooks; and a pod that changes from one way to the other while it works."""
from __future__ import annotations

import asyncio
import uuid
from functools import partial
from pathlib import Path

import pytest

from agent.capture.egress import netns_cookie
from agent.capture.plan import plan
from agent.capture.reconcile import Reconciler
from agent.model.pod import CaptureSettings
from tests.support.egress import Stage
from tests.support.hooks import connecting
from tests.support.mesh import TCP_PORT, VIP, VIP6

pytestmark = pytest.mark.netns


def rules(stage: Stage, backend: str, instance: str, *, redirect: bool, hooks: bool) -> None:
    made = plan(CaptureSettings(), (4, 6), instance, redirect=redirect, hooks=hooks)
    reconciler = Reconciler(instance, backend=backend)
    asyncio.run(reconciler.apply(stage.client.path, made))
    assert asyncio.run(Reconciler(instance, backend=backend).verify(stage.client.path, made)) == ()


@pytest.mark.parametrize("backend", ["iptables", "nftables"])
def test_what_goes_out_and_what_comes_in_are_each_captured_once(stage: Stage, backend: str) -> None:
    rules(stage, backend, uuid.uuid4().hex[:8], redirect=False, hooks=True)
    stage.capture()
    own = stage.mesh.origin(9100, stage.outside.behaviour, stage.client)
    for vip, address, ours in ((VIP, stage.client.ip, stage.client.ip), (VIP6, stage.client.ip6, stage.client.ip6)):
        out, into = stage.taken_out(), stage.taken_in()
        assert stage.talk(vip, size=100_000) == {"peer": [vip, TCP_PORT], "own": ours}
        assert (stage.taken_out(), stage.taken_in()) == (out + 1, into + 1)  # the second is the server's own
        peers = len(own.peers)
        stage.talk(address, 9100, netns=stage.other)
        assert (stage.taken_out(), stage.taken_in()) == (out + 1, into + 2)
        assert own.peers[peers:] == [stage.other.ip6 if ":" in vip else stage.other.ip]


@pytest.mark.parametrize("backend", ["iptables", "nftables"])
def test_nobody_reaches_the_proxys_ports_from_outside(stage: Stage, backend: str) -> None:
    rules(stage, backend, uuid.uuid4().hex[:8], redirect=False, hooks=True)
    stage.capture()
    code = """if True:
        import socket, sys
        for port in (15001, 15006):
            try:
                print(socket.create_connection((sys.argv[1], port), timeout=10).recv(1))
            except (ConnectionResetError, ConnectionRefusedError):
                print("refused")"""
    for address in (stage.client.ip, stage.client.ip6):
        assert stage.other.python(code, address).stdout.split() == ["refused", "refused"]


def test_a_pod_changes_between_the_two_ways_and_no_connect_fails_or_escapes(stage: Stage, tmp_path: Path) -> None:
    """Only the mesh answers at the address. The order: rules let 15001 pass, hooks are
    linked, the redirect goes; and back."""
    instance = uuid.uuid4().hex[:8]
    rules(stage, "iptables", instance, redirect=True, hooks=False)
    with connecting(partial(stage.app.start, stage.client), tmp_path, TCP_PORT, VIP) as client:
        client.more()
        for _ in range(3):
            rules(stage, "iptables", instance, redirect=True, hooks=True)
            stage.capture()
            client.more()
            rules(stage, "iptables", instance, redirect=False, hooks=True)
            client.more()
            rules(stage, "iptables", instance, redirect=True, hooks=True)
            stage.egress.release(netns_cookie(stage.client.path), stage.app.id)
            client.more()
            rules(stage, "iptables", instance, redirect=True, hooks=False)
            client.more()
    assert stage.taken_out() == client.done + 1
