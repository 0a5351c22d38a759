"""Two nodes with tunnels between them: what is on the wire, who is who at the other end, and what annotations and killed workers change."""
from __future__ import annotations

import json
import os
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.cli.admin_client import ask as admin
from agent.lab.place import NodeAddresses, Place
from tests.netns.lab.conftest import SERVER, TALK, Talk, pod, requests, told, two_nodes
from tests.netns.lab.talk import DRIPS
from tests.support.lab import Lab, narrows
from tests.support.wait import until
from tests.support.wire import captured

pytestmark = pytest.mark.netns

REQUESTS = 1000
SPIFFE = "spiffe://cluster.local/ns/default/sa/"
DENY = """\
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: not-from-a}
spec: {selector: {matchLabels: {app: server}}, action: DENY, rules: [{from: [{source: {ipBlocks: [%s]}}]}]}
"""
COUNTERS = ("_total", "_bucket", "_count", "_sum")


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with two_nodes(tmp_path_factory.mktemp("mesh") / "mesh.yaml") as running:
        told(running, "HBONE", "a", "b", "server")
        yield running


def ask(mesh: Lab, who: str, path: str, *words: str) -> list[str]:
    return mesh.exec(who, *TALK, "ask", "server", path, *words, timeout=120).stdout.splitlines()


def served(mesh: Lab, *sources: str) -> float:
    """Requests by mutual TLS, as the server's side counted them."""
    wanted = {("reporter", "destination"), ("destination_workload", "server"), ("connection_security_policy", "mutual_tls")}
    return sum(value for labels, value in requests(mesh, "n2").items()
               if wanted <= set(labels) and (not sources or dict(labels)["source_workload"] in sources))


@pytest.mark.timeout(300)
def test_a_thousand_requests_between_two_nodes_are_tls_and_nothing_else_on_the_wire(mesh: Lab, tmp_path: Path) -> None:
    marker = f"marker-{uuid.uuid4().hex}"
    with captured(f"narrows.{mesh.name}.node.n1", "eth0", tmp_path / "wire.pcapng", NodeAddresses(2).fabric_4) as wire:
        assert ask(mesh, "a", "/echo", marker, str(REQUESTS)) == [marker] * REQUESTS
    assert wire.count(marker) == 0
    frames = wire.fields("tcp.len > 0 && !tcp.analysis.retransmission", "tcp.srcport", "tcp.dstport", "tcp.len",
                         "tls.record.content_type", "tls.record.opaque_type", "tls.record.length")
    assert all("15008" in source + destination for source, destination, *_ in frames)
    kinds = [kind for frame in frames for kind in frame[3] + frame[4]]  # the second once it is encrypted (RFC 8446 5.2)
    assert set(kinds) <= {"20", "21", "22", "23"}
    assert kinds.count("23") >= 2 * REQUESTS, "a record of application data at least for each request and each answer"
    bytes_of_records = sum(5 + int(length) for frame in frames for length in frame[5])
    assert bytes_of_records == sum(int(frame[2][0]) for frame in frames), "every byte is part of a record"


@pytest.mark.timeout(300)
def test_without_tunnels_the_same_capture_finds_every_request(tmp_path: Path) -> None:
    marker = f"marker-{uuid.uuid4().hex}"
    with two_nodes(tmp_path / "mesh.yaml", ["--no-tunnels"]) as mesh:
        with captured(f"narrows.{mesh.name}.node.n1", "eth0", tmp_path / "wire.pcapng", NodeAddresses(2).fabric_4) as wire:
            assert ask(mesh, "a", "/echo", marker, str(REQUESTS)) == [marker] * REQUESTS
        told(mesh, "TCP", "server")
    assert wire.count(marker) >= 2 * REQUESTS, "in each request and in each answer"
    assert wire.fields("tls", "tls.record.length") == []


def test_two_pods_of_one_account_are_seen_with_their_own_addresses_and_a_block_of_addresses_stops_one(mesh: Lab, tmp_path: Path) -> None:
    addresses = {name: mesh.pod(name)["ip"] for name in ("a", "b")}
    with Talk(mesh, "a", "server", "/who", "-", "200", "fresh") as a, Talk(mesh, "b", "server", "/who", "-", "200") as b:
        pass
    assert (set(a.lines), set(b.lines)) == ({addresses["a"]}, {addresses["b"]})
    ends = ("source_workload", "source_principal", "connection_security_policy")
    seen = {tuple(dict(labels)[key] for key in ends) for labels in requests(mesh, "n2") if ("reporter", "destination") in labels}
    assert seen == {(name, f"{SPIFFE}client", "mutual_tls") for name in ("a", "b")}
    (tmp_path / "deny.yaml").write_text(DENY % f"{addresses['a']}/32")
    mesh.apply(tmp_path / "deny.yaml")
    try:
        until(lambda: ask(mesh, "a", "/who")[0].startswith("failed "), "a is stopped", 30)
        with Talk(mesh, "a", "server", "/who", "-", "50", "fresh") as a, Talk(mesh, "b", "server", "/who", "-", "50", "fresh") as b:
            pass
        assert len(a.failures) == 50 and b.lines == [addresses["b"]] * 50
    finally:
        mesh.run("delete", "authorizationpolicy/not-from-a")
    until(lambda: ask(mesh, "a", "/who") == [addresses["a"]], "a is let in again", 30)


def test_both_nodes_list_the_tunnel_between_them(mesh: Lab) -> None:
    def listed() -> list[dict[str, Any]]:
        shown = json.loads(narrows("config", "tunnels", "--name", mesh.name, "-o", "json").stdout)
        dialled = [one for one in shown["n1"] if one["pod"].startswith("default/a")
                   and (one["direction"], one["state"]) == ("outbound", "open")]
        taken = [one for one in shown["n2"] if one["pod"].startswith("default/server") and one["direction"] == "inbound"
                 and one["address"].startswith(f"{mesh.pod('a')['ip']}:") and one["bytes"]]
        return [dialled[0], taken[0]] if dialled and taken and dialled[0]["bytes"] else []

    with Talk(mesh, "a", "server", "/echo", "-", "0") as a:
        a.goes_on()
        ours, theirs = until(listed, "both nodes list it", 60)
    assert (ours["identity"], ours["peer"]) == (theirs["peer"], theirs["identity"]) and ours["identity"] == f"{SPIFFE}client"
    assert ours["address"] == f"{mesh.pod('server')['ip']}:15008"
    assert ours["peerCertificateExpiration"] and theirs["peerCertificateExpiration"]
    table = narrows("config", "tunnels", "--name", mesh.name).stdout
    assert table.startswith("NODE") and f"{SPIFFE}client" in table


def test_no_counter_goes_back_when_workers_are_killed(mesh: Lab) -> None:
    def counters() -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        return {(name, tuple(sorted(labels.items()))): value for name, labels, value in mesh.samples()
                if name.startswith("istio_") and name.endswith(COUNTERS)}

    began = served(mesh, "a", "b")
    with Talk(mesh, "a", "server", "/echo", "-", "0", "fresh") as a, Talk(mesh, "b", "server", "/echo", "-", "0") as b:
        a.goes_on()
        for _ in range(2):
            before, workers = counters(), mesh.processes("ext.proxy.worker")
            for pid in workers:
                os.kill(pid, signal.SIGKILL)
            until(lambda workers=workers: len(set(mesh.processes("ext.proxy.worker")) - set(workers)) == len(workers), "new workers", 30)
            after = counters()
            assert [key for key, value in before.items() if after.get(key, 0) < value] == []
            for one in (a, b):
                one.goes_on()
    # who was asking when a worker died, on its side or on the other, failed; nobody else
    assert max(len(a.failures), len(b.failures)) <= 2 * 2, (a.failures, b.failures)
    until(lambda: served(mesh, "a", "b") >= began + a.good + b.good, "every answer is counted", 30)


def test_an_excluded_port_is_reached_through_the_tunnel_by_pods_of_the_mesh(mesh: Lab, tmp_path: Path) -> None:
    path = tmp_path / "server.yaml"
    path.write_text(pod("server", "n2", "server", SERVER, "traffic.sidecar.istio.io/excludeInboundPorts: '8080'"))
    before = served(mesh)
    mesh.apply(path)
    try:
        assert ask(mesh, "a", "/who", "-", "5", "fresh") == [mesh.pod("a")["ip"]] * 5
        until(lambda: served(mesh) == before + 5, "counted, with both identities", 20)
    finally:
        path.write_text(pod("server", "n2", "server", SERVER))
        mesh.apply(path)


@pytest.mark.timeout(300)
def test_who_opts_out_finishes_what_is_open_and_no_request_fails_on_the_way_out_and_back(mesh: Lab, tmp_path: Path) -> None:
    def annotate(text: str) -> None:
        (tmp_path / "server.yaml").write_text(pod("server", "n2", "server", SERVER, text))
        mesh.apply(tmp_path / "server.yaml")

    agent = Place(mesh.name).node("n2") / "admin.sock"
    with Talk(mesh, "a", "server", "/echo", "-", "0", "fresh") as fresh, Talk(mesh, "b", "server", "/echo", "-", "0") as kept:
        fresh.goes_on()
        with Talk(mesh, "b", "server", "/drip") as long:
            fresh.goes_on()  # meanwhile the long answer begins
            annotate("narrows.mesh/intercept: disabled")
            told(mesh, "TCP", "server")
            assert admin(agent, "/pods/default/server")["state"] == "leaving", "for as long as streams live"
        assert long.lines == ["." * DRIPS]
        for one in (fresh, kept):
            one.goes_on()
        # its tunnels said GOAWAY: nobody keeps a stream for a request to come (for a minute, pool_idle_timeout_ms)
        until(lambda: admin(agent, "/pods/default/server")["state"] == "out", "nothing is left of it while others go on asking", 40)
        for one in (fresh, kept):
            one.goes_on()
        annotate("")
        told(mesh, "HBONE", "server")
        for one in (fresh, kept):
            one.goes_on()
    assert fresh.failures == kept.failures == []
