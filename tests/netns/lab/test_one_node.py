"""Two pods of one node: joined inside a worker, by a tunnel that an operator asked for, and from one worker to the other."""
from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from agent.cli.admin_client import ask as admin
from agent.lab.place import Place
from tests.netns.lab.conftest import PODS, SERVER, TALK, Talk, dump, pod, requests
from tests.netns.lab.talk import DRIPS
from tests.support.lab import Lab, lab, narrows
from tests.support.wait import until
from tests.support.wire import Wire, captured

pytestmark = [pytest.mark.netns, pytest.mark.timeout(300)]

REQUESTS = 50
SPIFFE = "spiffe://cluster.local/ns/default/sa/"
POLICY = """\
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: by-principal}
spec: {selector: {matchLabels: {app: server}}, action: %s, rules: [{from: [{source: {principals: [%s]}}]}]}
"""


@contextmanager
def one_node(folder: Path, *options: str) -> Iterator[Lab]:
    """`a` and `server`, each with an account of its own."""
    path = folder / "mesh.yaml"
    path.write_text(PODS + pod("a", "n1", "client") + pod("server", "n1", "server", SERVER))
    with lab(path, options=["--nodes", "1", *options]) as running:
        def known() -> bool:
            return {one["name"]: one["protocol"] for one in dump(running, "n1").get("workloads", [])} == {"a": "HBONE", "server": "HBONE"}

        until(known, "both are known to take tunnels", 60, 0.1)
        yield running


def ask(mesh: Lab, *words: str) -> list[str]:
    return mesh.exec("a", *TALK, "ask", "server", *words, timeout=120).stdout.splitlines()


def on_the_wire(mesh: Lab, tmp_path: Path) -> tuple[Wire, str]:
    """What leaves and enters the server's namespace while `a` asks it, with a marker in each request and answer."""
    marker = f"marker-{uuid.uuid4().hex}"
    with captured(Place(mesh.name).pod_netns("default", "server"), "eth0", tmp_path / "wire.pcapng", mesh.pod("a")["ip"]) as wire:
        assert ask(mesh, "/echo", marker, str(REQUESTS)) == [marker] * REQUESTS
    return wire, marker


def tunnels(mesh: Lab) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(narrows("config", "tunnels", "--name", mesh.name, "-o", "json").stdout)["n1"]
    return found


def security(mesh: Lab) -> set[tuple[str, str]]:
    """(reporter, connection_security_policy) of the requests that were answered."""
    return {(dict(labels)["reporter"], dict(labels)["connection_security_policy"]) for labels in requests(mesh, "n1")
            if ("response_code", "200") in labels}


def test_a_tunnel_that_was_asked_for_is_taken_by_two_pods_of_one_worker(tmp_path: Path) -> None:
    with one_node(tmp_path, "--workers", "1", "--same-node-tunnel") as mesh:
        wire, marker = on_the_wire(mesh, tmp_path)
        assert wire.count(marker) == 0
        frames = wire.fields("tcp.len > 0", "tcp.srcport", "tcp.dstport")
        assert frames and all("15008" in source + destination for source, destination in frames)
        listed = until(lambda: [one for one in tunnels(mesh) if one["state"] == "open" and one["bytes"]], "the tunnel is listed", 30)
        assert {(one["direction"], one["peer"]) for one in listed} == {
            ("outbound", f"{SPIFFE}server"), ("inbound", f"{SPIFFE}client")}
        assert security(mesh) == {("source", "mutual_tls"), ("destination", "mutual_tls")}


def test_two_pods_of_one_worker_are_joined_and_who_opts_out_finishes_what_is_open(tmp_path: Path) -> None:
    with one_node(tmp_path, "--workers", "1") as mesh:
        wire, marker = on_the_wire(mesh, tmp_path)
        assert wire.fields("tcp.len > 0", "tcp.len") == [] and wire.count(marker) == 0, "nothing crosses a link"
        assert tunnels(mesh) == []

        def annotate(text: str) -> None:
            (tmp_path / "server.yaml").write_text(pod("server", "n1", "server", SERVER, text))
            mesh.apply(tmp_path / "server.yaml")

        def state() -> Any:
            return admin(Place(mesh.name).node("n1") / "admin.sock", "/pods/default/server")["state"]

        with Talk(mesh, "a", "server", "/echo", "-", "0", "fresh") as fresh, Talk(mesh, "a", "server", "/echo", "-", "0") as kept:
            fresh.goes_on()
            kept.goes_on()
            with Talk(mesh, "a", "server", "/drip") as long:
                fresh.goes_on()  # meanwhile the long answer begins
                annotate("narrows.mesh/intercept: disabled")
                until(lambda: state() == "leaving", "it leaves", 30)
                for one in (fresh, kept):
                    one.goes_on()
            assert long.lines == ["." * DRIPS], "a joined connection that was open ended as its application liked"
            # what is joined and idle keeps it only while its last hop is used: its pool was emptied once, when peers were told to go
            assert state() in ("leaving", "out")
            for one in (fresh, kept):
                one.goes_on()
            annotate("")
            until(lambda: state() == "captured", "it is back", 60)
            for one in (fresh, kept):
                one.goes_on()
        assert fresh.failures == kept.failures == []


def test_two_pods_of_two_workers_need_no_tunnel_and_are_known_by_their_principals(tmp_path: Path) -> None:
    def refused() -> bool:
        return ask(mesh, "/who")[0].startswith("failed ")

    def let_in(yes: bool) -> Callable[[], bool]:
        return lambda: refused() is not yes

    with one_node(tmp_path, "--workers", "2") as mesh:
        wire, marker = on_the_wire(mesh, tmp_path)
        assert wire.count(marker) >= 2 * REQUESTS, "each has a worker of its own, and no tunnel between them"
        assert tunnels(mesh) == []
        assert security(mesh) == {("source", "unknown"), ("destination", "none")}, "as Istio writes no mutual TLS at either end"
        address = mesh.pod("a")["ip"]
        assert ask(mesh, "/who") == [address]
        path = tmp_path / "policy.yaml"
        for action, who, yes in (("ALLOW", "client", True), ("ALLOW", "other", False), ("DENY", "client", False), ("DENY", "other", True)):
            path.write_text(POLICY % (action, f"cluster.local/ns/default/sa/{who}"))
            mesh.apply(path)
            until(let_in(yes), f"{action} of {who}: {'let in' if yes else 'refused'}", 30)
            mesh.run("delete", "authorizationpolicy/by-principal")
            until(let_in(True), "without the policy it is let in", 30)
