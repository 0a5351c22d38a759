"""Two nodes with tunnels, under load, and something breaks or is replaced: certificates, the root, the authority, agents, a node's link.

Certificates last 20 s, which stands for their 24 h: an authority that is away for longer than half of that is away for an hour of a mesh
whose certificates are about to end.
"""
from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from agent.lab.place import Place
from tests.netns.lab.conftest import Talk, dump, requests, told, two_nodes
from tests.support.lab import Lab, narrows
from tests.support.wait import until

pytestmark = [pytest.mark.netns, pytest.mark.timeout(300)]

LIFETIME = 20.0  # s
SPIFFE = "spiffe://cluster.local/ns/default/sa/"
PEER_GONE = 90.0  # s within which a silent peer is given up: PING after 10, no answer for 20, and as much again for a machine that is busy


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with two_nodes(tmp_path_factory.mktemp("mesh") / "mesh.yaml", ["--certificate-lifetime", str(LIFETIME / 3600)]) as running:
        told(running, "HBONE", "a", "b", "server")
        yield running


@pytest.fixture(autouse=True)
def nobody_is_mistaken(mesh: Lab) -> Iterator[None]:
    """Whatever happens: nobody is taken for somebody else, and nothing is passed in plain text."""
    yield
    ends = ("source_principal", "destination_principal", "connection_security_policy")
    seen = {tuple(dict(labels)[key] for key in ends) for labels in requests(mesh, "n2") if ("reporter", "destination") in labels}
    assert seen == {(f"{SPIFFE}client", f"{SPIFFE}server", "mutual_tls")}


def certificates(mesh: Lab) -> dict[str, dict[str, Any]]:
    """By node; each has one identity. Waits for agents that are away."""
    return {node: until(lambda node=node: dump(mesh, node).get("certificates"), f"the agent of {node} answers", 30)[0]
            for node in ("n1", "n2")}


def serials(mesh: Lab) -> dict[str, str]:
    return {node: one["certChain"][0]["serialNumber"] for node, one in certificates(mesh).items()}


def renewed(mesh: Lab) -> None:
    """Waits until both nodes have another certificate than now."""
    before = serials(mesh)
    until(lambda: all(serials(mesh)[node] != serial for node, serial in before.items()), "both certificates are renewed", 4 * LIFETIME, 0.1)


def trusted(mesh: Lab, count: int) -> None:
    until(lambda: all(len(one["rootCerts"]) == count for one in certificates(mesh).values()), f"{count} roots are trusted", 4 * LIFETIME)


def states(mesh: Lab) -> list[str]:
    return [one["state"] for one in certificates(mesh).values()]


def cable(mesh: Lab, state: str) -> None:
    """Of the second node, at the other end: the node itself loses its carrier, and keeps its addresses and routes."""
    subprocess.run(["ip", "-n", f"narrows.{mesh.name}.fabric", "link", "set", "node2", state], check=True)


def test_certificates_are_renewed_under_load_and_no_request_fails(mesh: Lab) -> None:
    with Talk(mesh, "a", "server", "/echo", "-", "0", "fresh") as fresh, Talk(mesh, "b", "server", "/echo", "-", "0") as kept:
        fresh.goes_on()
        renewed(mesh)
        for one in (fresh, kept):
            one.goes_on()
    assert fresh.failures == kept.failures == []


def test_the_root_is_replaced_under_load_and_no_request_fails(mesh: Lab) -> None:
    folder = str(Place(mesh.name).authority)
    with Talk(mesh, "a", "server", "/echo", "-", "0", "fresh") as fresh, Talk(mesh, "b", "server", "/echo", "-", "0") as kept:
        fresh.goes_on()
        narrows("ca", "prepare", folder)
        trusted(mesh, 2)
        narrows("ca", "switch", folder, "--now")
        renewed(mesh)
        renewed(mesh)  # the first may have been on its way when the root was switched
        for one in (fresh, kept):
            one.goes_on()
        narrows("ca", "finish", folder, "--now")
        trusted(mesh, 1)
        for one in (fresh, kept):
            one.goes_on()
    assert fresh.failures == kept.failures == []


def test_killed_agents_are_missed_by_no_request(mesh: Lab) -> None:
    agents = mesh.processes("narrows agent")
    with Talk(mesh, "a", "server", "/echo", "-", "0", "fresh") as fresh:
        fresh.goes_on()
        for pid in agents:
            os.kill(pid, signal.SIGKILL)
        until(lambda: len(set(mesh.processes("narrows agent")) - set(agents)) == len(agents), "the agents are back", 30)
        told(mesh, "HBONE", "a", "b", "server")
        fresh.goes_on()
    assert fresh.failures == []


def test_without_authority_certificates_serve_until_they_end_then_connections_fail_cleanly_until_it_is_back(mesh: Lab) -> None:
    plane, = mesh.processes("narrows control-plane")
    renewed(mesh)
    with Talk(mesh, "a", "server", "/echo", "-", "0", "fresh") as fresh:
        os.kill(plane, signal.SIGSTOP)  # gone for everybody, and not restarted
        try:
            fresh.goes_on()
            assert fresh.failures == []
            until(lambda: states(mesh) == ["expired"] * 2, "they have ended", 4 * LIFETIME)
            before = len(fresh.failures)
            until(lambda: len(fresh.failures) > before + 10, "new connections fail, soon and each for itself", 60)
        finally:
            os.kill(plane, signal.SIGCONT)
        until(lambda: states(mesh) == ["valid"] * 2, "they are signed again", 120)
        fresh.goes_on()
    assert {line.split()[1] for line in fresh.failures} == {"503"}


def test_a_transfer_from_a_node_that_vanishes_ends_with_an_error_in_time_and_its_return_is_noticed(mesh: Lab) -> None:
    try:
        with Talk(mesh, "a", "server", "/bulk") as bulk, Talk(mesh, "b", "server", "/echo", "-", "0", "fresh") as fresh:
            fresh.goes_on()
            cable(mesh, "down")
            until(lambda: bulk.lines, "the transfer ends", PEER_GONE)
            until(lambda: fresh.failures, "so do new connections", PEER_GONE)
            cable(mesh, "up")
            fresh.goes_on()
        assert bulk.lines[0].startswith("failed "), bulk.lines
    finally:
        cable(mesh, "up")
