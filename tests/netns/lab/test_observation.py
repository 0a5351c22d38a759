"""Two nodes whose agents observe, with capture by eBPF: a tunnel is told by both ends when it is over, the legs inside pods by none."""
from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from agent.cli.admin_client import ask
from agent.lab.place import Place
from tests.netns.lab.conftest import TALK, told, two_nodes
from tests.support.wait import until

pytestmark = [pytest.mark.netns, pytest.mark.redirects("asks for eBPF itself")]

COUNT = "narrows_tcp_duration_seconds_count"


@pytest.mark.timeout(300)
def test_the_tunnel_between_two_nodes_is_told_by_both_when_it_ends(tmp_path: Path) -> None:
    with two_nodes(tmp_path / "mesh.yaml", ["--observe", "captured", "--capture", "ebpf", "--workers", "1"]) as mesh:
        told(mesh, "HBONE", "a", "b", "server")

        def observed(node: str) -> int:
            found: int = ask(Place(mesh.name).node(node) / "admin.sock", "/server_info")["observation"]["pods"]
            return found

        until(lambda: (observed("n1"), observed("n2")) == (2, 1), "both nodes observe their pods", 60)
        assert mesh.exec("a", *TALK, "ask", "server", "/echo", "hello", "100", timeout=120).stdout.splitlines() == ["hello"] * 100
        pair = {"source_workload": "a", "destination_workload": "server", "connection_security_policy": "mutual_tls"}
        assert mesh.total(COUNT) == 0  # the tunnel lives, and nothing else left a pod
        for pid in mesh.processes("ext.proxy.worker"):
            os.kill(pid, signal.SIGKILL)
        for reporter in ("source", "destination"):
            until(lambda: mesh.total(COUNT, reporter=reporter, **pair) >= 1, f"the {reporter}'s agent shows the tunnel", 60)  # noqa: B023
            assert mesh.total("narrows_tcp_rtt_seconds_count", reporter=reporter, **pair) >= 1
            assert mesh.total("narrows_tcp_received_bytes_sum", reporter=reporter, **pair) > 500  # a hundred requests
        services = {have["destination_service"] for name, have, value in mesh.samples() if name == COUNT and value}
        assert services == {"server.default.svc.cluster.local"}
