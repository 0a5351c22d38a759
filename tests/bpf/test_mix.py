"""eBPF out and iptables or nftables in: one pod, both hooks; and a pod that changes from one way to the other while it works."""
from __future__ import annotations

import asyncio
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from agent.capture.egress import netns_cookie
from agent.capture.plan import plan
from agent.capture.reconcile import Reconciler
from agent.model.pod import CaptureSettings
from tests.support.egress import Stage
from tests.support.mesh import TCP_PORT, VIP, VIP6
from tests.support.wait import until

pytestmark = pytest.mark.netns


def rules(stage: Stage, backend: str, instance: str, *, redirect: bool, hooks: bool) -> None:
    made = plan(CaptureSettings(), (4, 6), instance, redirect=redirect, hooks=hooks)
    reconciler = Reconciler(instance, backend=backend)
    asyncio.run(reconciler.apply(stage.client.path, made))
    assert asyncio.run(Reconciler(instance, backend=backend).verify(stage.client.path, made)) == ()


def taken_in(stage: Stage) -> int:
    """Connections that the worker took at an inbound listener."""
    return sum(values["opened"] for key, values in stage.mesh.worker.series() if key["reporter"] == "destination")


@pytest.mark.parametrize("backend", ["iptables", "nftables"])
def test_what_goes_out_and_what_comes_in_are_each_captured_once(stage: Stage, backend: str) -> None:
    rules(stage, backend, uuid.uuid4().hex[:8], redirect=False, hooks=True)
    stage.capture()
    own = stage.mesh.origin(9100, stage.outside.behaviour, stage.client)
    for vip, address, ours in ((VIP, stage.client.ip, stage.client.ip), (VIP6, stage.client.ip6, stage.client.ip6)):
        out, into = stage.captured(), taken_in(stage)
        assert stage.talk(vip, size=100_000) == {"peer": [vip, TCP_PORT], "own": ours}
        assert (stage.captured(), taken_in(stage)) == (out + 1, into + 1)  # the second is the server's own
        peers = len(own.peers)
        stage.talk(address, 9100, netns=stage.other)
        assert (stage.captured(), taken_in(stage)) == (out + 1, into + 2)
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
    code = """if True:
        import socket, sys
        from pathlib import Path
        kept = socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=30)
        done = 0
        while not Path(sys.argv[3]).exists():
            for s in (kept, socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=30)):
                s.sendall(b"x")
                assert s.recv(1) == b"x"
            s.close()
            done += 1
            Path(sys.argv[4]).write_text(str(done))
        print(done)"""
    stop, told = tmp_path / "stop", tmp_path / "told"
    client = stage.app.start(stage.client, sys.executable, "-c", code, VIP, str(TCP_PORT), str(stop), str(told), stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True)

    def more() -> None:
        """Ten connections have been made since."""
        def count() -> int:
            assert client.poll() is None
            return int(told.read_text() or 0) if told.exists() else 0

        before = count()
        until(lambda: count() >= before + 10, "connects go on", timeout=30)

    try:
        more()
        for _ in range(3):
            rules(stage, "iptables", instance, redirect=True, hooks=True)
            stage.capture()
            more()
            rules(stage, "iptables", instance, redirect=False, hooks=True)
            more()
            rules(stage, "iptables", instance, redirect=True, hooks=True)
            stage.egress.release(netns_cookie(stage.client.path), stage.app.id)
            more()
            rules(stage, "iptables", instance, redirect=True, hooks=False)
            more()
    finally:
        stop.touch()
        out, err = client.communicate(timeout=60)
    assert client.returncode == 0, err
    assert stage.captured() == int(out) + 1

