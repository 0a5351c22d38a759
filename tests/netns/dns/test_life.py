"""Agents and keepers that come and go while a pod asks."""
from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

from tests.netns.dns.conftest import CAPTURE, Scene, answered, plain
from tests.support.dns import addresses, ask, resolver, udp
from tests.support.wait import PATIENCE, until

pytestmark = pytest.mark.netns


def test_an_agent_that_is_killed_costs_a_steady_client_no_answer(scene: Scene, tmp_path: Path) -> None:
    """What waits in the sockets is answered by the next agent; a client asks again only what the killed one had in its hands."""
    code = """
import socket, sys, time, dnslib
server, until_file = sys.argv[1], sys.argv[2]
import os
asked = retries = 0
while not os.path.exists(until_file):
    name = ("web", f"n{asked}.example.test")[asked % 2]
    record = dnslib.DNSRecord.question(name)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.settimeout(float(sys.argv[3]))
        s.connect((server, 53))
        for attempt in range(3):
            s.send(record.pack())
            try:
                answer = dnslib.DNSRecord.parse(s.recv(4096))
            except TimeoutError:
                continue
            break
        else:
            sys.exit(f"no answer to {name}")
    if answer.header.rcode or not answer.rr:
        sys.exit(f"a wrong answer to {name}: {answer}")
    retries = max(retries, attempt)
    asked += 1
    print(asked, attempt, flush=True)
    time.sleep(0.02)
print("most retries", retries)
"""
    scene.up()
    stop = tmp_path / "stop"
    with resolver(scene.upstream, plain), open(tmp_path / "out", "wb") as out:
        client = scene.client.start(sys.executable, "-c", code, scene.upstream.ip, str(stop), str(15 * PATIENCE), stdout=out)
        lines = (tmp_path / "out").read_text
        until(lambda: len(lines().splitlines()) > 20, "the client asks", 30)
        for _ in range(2):
            scene.instance.kill("agent")
            scene.instance.start_agent("--dns-capture")
            scene.instance.ready()
            scene.captured()
            before = len(lines().splitlines())
            until(lambda was=before: len(lines().splitlines()) > was + 20 or client.poll() is not None, "and is answered again", 60)
        stop.touch()
        assert client.wait(30) == 0, lines()
    said = lines().splitlines()
    assert said[-1] in ("most retries 0", "most retries 1"), said[-1]


def test_a_new_keeper_makes_new_sockets_and_dns_goes_on(scene: Scene) -> None:
    scene.up()
    scene.instance.kill("keeper")
    scene.instance.start_keeper()
    until(lambda: answered(scene), "the mesh's names are answered", 30)
    scene.instance.ready()


def test_without_dns_capture_nothing_is_redirected_and_a_pod_may_ask_for_it(scene: Scene) -> None:
    scene.up()
    scene.instance.kill("agent", signal.SIGTERM)
    scene.instance.start_agent()
    scene.instance.ready()
    until(lambda: "--to-ports 15053" not in scene.client.iptables_save(), "the rules are gone")
    assert scene.instance.shown("client")["dns"] is None
    scene.instance.pod("client", scene.client, **{CAPTURE: "true"})
    scene.captured()
    assert addresses(ask(scene.client, "192.0.2.99", "web")) == ["10.96.0.10"]


def test_a_pod_whose_port_is_taken_is_captured_without_its_dns_until_it_is_free(scene: Scene) -> None:
    """So it is with a keeper of a build that has no such sockets: it refuses, and the event says what it said."""
    instance = scene.instance
    with udp(scene.client) as other:
        other.bind(("127.0.0.1", 15053))
        instance.up("--dns-capture")
        shown = instance.shown("client")
        assert shown["captured"] and shown["dns"] is None
        said = [event["message"] for event in instance.events("DnsUnavailable")]
        assert said and "Address already in use" in said[0] and "asks its own resolver" in said[0]
        assert "--to-ports 15053" not in scene.client.iptables_save()
        with resolver(scene.upstream, plain):
            assert addresses(ask(scene.client, scene.upstream.ip, "web")) == ["192.0.2.5"]
    instance.processes["agent"].send_signal(signal.SIGHUP)
    scene.captured()
    assert addresses(ask(scene.client, scene.upstream.ip, "web")) == ["10.96.0.10"]
