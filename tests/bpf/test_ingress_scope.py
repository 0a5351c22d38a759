"""What ingress capture takes and what it leaves, and how it lives: settings, probes, the agent's end, other programs, other ways."""
from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from ipaddress import ip_address
from pathlib import Path

import pytest

from agent import netlink
from agent.capture import bpf_call
from agent.capture import ingress as ingress_room
from agent.capture.egress import NETNS_KEY, Egress, netns_cookie
from agent.capture.ingress import FWMARK_ACCEPT, FWMARK_REFLECT, Ingress, IngressError
from agent.capture.loader import FILES, HEADERS, INGRESS, SOURCES, load
from agent.capture.plan import PROBE_SOURCES
from agent.capture.unhook import unhook
from agent.model.pod import CaptureSettings
from tests.support import conntrack
from tests.support.egress import TALK
from tests.support.hooks import connecting
from tests.support.ingress import Inward
from tests.support.mesh import echo, receive
from tests.support.wait import until

pytestmark = pytest.mark.netns


def links(inward: Inward) -> dict[str, int]:
    """By attach type how many, of the namespace; bpftool's word."""
    number = os.stat(inward.server.path).st_ino
    shown = json.loads(subprocess.run(["bpftool", "-j", "link", "show"], capture_output=True, text=True, check=True, timeout=20).stdout)
    found: dict[str, int] = {}
    for one in shown:
        if one.get("netns_ino") == number:
            found[one["attach_type"]] = found.get(one["attach_type"], 0) + 1
    return found


def test_excluded_ports_are_reached_directly_and_change_while_the_pod_lives(inward: Inward) -> None:
    inward.mesh.origin(9001, echo, inward.server)
    for excluded in (8080, 9001):
        inward.capture(exclude_inbound_ports=(excluded,))
        for address in (inward.server.ip, inward.server.ip6):
            assert [inward.via_proxy(address, port) for port in (8080, 9001)] == [excluded != 8080, excluded != 9001]
    inward.capture()
    assert inward.via_proxy(inward.server.ip, 9001)


@pytest.mark.parametrize("known", [4, 6])
def test_a_family_of_which_no_address_is_known_is_captured_too(inward: Inward, known: int) -> None:
    own, other = (inward.server.ip, inward.server.ip6) if known == 4 else (inward.server.ip6, inward.server.ip)
    cookie = inward.ingress.capture(inward.server.path, (ip_address(own),), CaptureSettings(exclude_inbound_ports=(9001,)))
    inward.mesh.origin(9001, echo, inward.server)
    for address in (own, other):
        assert inward.via_proxy(address, 8080)
        assert not inward.via_proxy(address, 9001)
        assert not inward.via_proxy(address, 8080, inward.server), "what it dials at itself"
        for port in (15001, 15006):
            assert inward.attempt(address, port) == "ECONNREFUSED"
    before = len(inward.own.peers)
    with bpf_call.opened(inward.pins.maps / "listeners") as listeners:
        bpf_call.delete(listeners, NETNS_KEY.pack(cookie))
    assert [inward.attempt(address, 8080) for address in (own, other)] == ["ECONNREFUSED"] * 2
    assert len(inward.own.peers) == before


@pytest.mark.parametrize("known", [(4, 6), (4,), (6,)])
@pytest.mark.parametrize("family", [4, 6])
def test_probes_reach_the_application_directly(inward: Inward, family: int, known: tuple[int, ...]) -> None:
    own = [ip_address(text) for text in (inward.server.ip, inward.server.ip6)]
    inward.ingress.capture(inward.server.path, [one for one in own if one.version in known], CaptureSettings())
    place = inward.server.ip6 if family == 6 else inward.server.ip
    source = PROBE_SOURCES[family].partition("/")[0]
    netlink.add_address(inward.client.path, "eth0", PROBE_SOURCES[family])
    gateway = inward.client.ip6 if family == 6 else inward.client.ip
    netlink.add_route(inward.server.path, PROBE_SOURCES[family], gateway=gateway)
    with netlink.in_netns(inward.client.path, lambda: socket.create_connection(
            (place, 8080), timeout=20, source_address=(source, 0))) as probe:
        probe.sendall(b"x")
        assert receive(probe, 1) == b"x"
    assert inward.own.peers == [source]
    assert inward.taken_in() == 0


def test_capture_stays_when_whoever_captured_has_gone(inward: Inward, cache: Path) -> None:
    code = """if True:
        import sys
        from ipaddress import ip_address
        from pathlib import Path
        from agent.capture.ingress import Ingress
        from agent.capture.loader import INGRESS, load
        from agent.capture.pins import Pins
        from agent.model.pod import CaptureSettings
        pins = Pins(Path(sys.argv[1]))
        own = Ingress(pins, load(pins, Path(sys.argv[2]), hooks=INGRESS).lookup)
        print(own.capture(sys.argv[3], [ip_address(text) for text in sys.argv[4:]], CaptureSettings()))"""
    done = subprocess.run([sys.executable, "-c", code, str(inward.pins.root), str(cache), inward.server.path, inward.server.ip,
                           inward.server.ip6], capture_output=True, text=True, timeout=100, check=False, cwd=SOURCES.parent)
    assert done.returncode == 0, done.stderr
    assert inward.ingress.captured() == [int(done.stdout)] == [netns_cookie(inward.server.path)]
    assert inward.via_proxy(inward.server.ip, 8080)
    assert links(inward) == {"sk_lookup": 1}
    inward.capture()  # the next one adopts it
    assert links(inward) == {"sk_lookup": 1}


def test_a_pod_that_is_released_is_reached_directly_and_nothing_is_left(inward: Inward) -> None:
    for _ in range(2):
        cookie = inward.capture(exclude_inbound_ports=(9001,))
        assert inward.via_proxy(inward.server.ip, 8080)
        inward.ingress.release(cookie, inward.server.path)
        assert not inward.via_proxy(inward.server.ip, 8080)
    until(lambda: links(inward) == {}, "the link is off, a moment after its pin")
    assert inward.ingress.captured() == []
    assert {netlink.read_sysctl(inward.server.path, name) for name in (FWMARK_ACCEPT, *FWMARK_REFLECT)} == {"0"}
    inward.ingress.release(cookie, inward.server.path)  # again: nothing to do


@pytest.mark.parametrize("name", [FWMARK_ACCEPT, *FWMARK_REFLECT])
def test_a_sysctl_that_was_set_before_us_stays_set(inward: Inward, name: str) -> None:
    netlink.write_sysctl(inward.server.path, name, 1)
    inward.capture()
    inward.ingress.release(inward.capture(), inward.server.path)
    assert {one for one in (FWMARK_ACCEPT, *FWMARK_REFLECT) if netlink.read_sysctl(inward.server.path, one) == "1"} == {name}


def test_a_kernel_without_the_sysctl_is_said_and_nothing_is_captured(inward: Inward, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingress_room, "_SYSCTLS", {"net.ipv4.tcp_no_such_thing": ingress_room.ACCEPT_KEPT})
    with pytest.raises(IngressError, match=r"tcp_no_such_thing: .*does not find the proxy"):
        inward.capture()
    assert not inward.via_proxy(inward.server.ip, 8080)


def test_a_pod_whose_listener_is_not_known_is_not_captured_until_it_is_adopted(inward: Inward, cache: Path) -> None:
    """A keeper that was there before its cgroup was served."""
    (inward.pins.maps / "listeners").unlink()
    found = load(inward.pins, cache, hooks=INGRESS)  # as with an instance that is loaded for the first time
    assert found.lookup is not None
    fresh = Ingress(inward.pins, found.lookup)
    addresses = (ip_address(inward.server.ip), ip_address(inward.server.ip6))
    with pytest.raises(IngressError, match="no listener on port 15006 is known"):
        fresh.capture(inward.server.path, addresses, CaptureSettings())
    assert not inward.via_proxy(inward.server.ip, 8080)
    assert fresh.adopt(inward.mesh.worker.pid) == sorted(netns_cookie(pod.path) for pod in (inward.client, inward.server))
    fresh.capture(inward.server.path, addresses, CaptureSettings())
    assert inward.via_proxy(inward.server.ip, 8080) and inward.via_proxy(inward.server.ip6, 8080)
    with pytest.raises(IngressError, match="keeper 4194304"):
        fresh.adopt(4_194_304)  # beyond pid_max's bound


def test_a_pod_is_cleaned_by_its_namespace_alone_and_an_instance_by_its_pins(inward: Inward) -> None:
    inward.capture(exclude_inbound_ports=(9001,))
    assert unhook(inward.server.path, [inward.pins]) == [f"the pod in {inward.pins.maps / 'inbound'}"]
    until(lambda: links(inward) == {}, "the link is off, a moment after its pin")
    assert not inward.via_proxy(inward.server.ip, 8080)
    assert unhook(inward.server.path, [inward.pins]) == []
    inward.capture()
    inward.pins.remove()
    until(lambda: links(inward) == {}, "the link is off, a moment after its pin")
    assert not inward.via_proxy(inward.server.ip, 8080)


def test_hooks_of_both_directions_have_pins_side_by_side(inward: Inward, cache: Path) -> None:
    assert load(inward.pins, cache).problem == ""
    egress = Egress(inward.pins)
    egress.serve(inward.proxy.path)
    addresses = ip_address(inward.server.ip), ip_address(inward.server.ip6)
    taken = egress.capture(inward.server.path, inward.app.path, addresses, CaptureSettings())
    cookie = inward.capture()
    assert egress.linked() == {inward.proxy.id, inward.app.id}
    inward.mesh.origin(9000, echo, inward.other)
    for place, outside in ((inward.server.ip, inward.other.ip), (inward.server.ip6, inward.other.ip6)):
        assert inward.via_proxy(place, 8080)
        out = inward.taken_out()
        inward.app.python(inward.server, TALK, outside, "9000", "1000", str(ip_address(outside).version), "")
        assert inward.taken_out() == out + 1
    assert conntrack.count(inward.server) == 0
    egress.release(taken.cookie, taken.cgroup)
    assert inward.via_proxy(inward.server.ip, 8080)
    inward.ingress.release(cookie)
    assert not inward.via_proxy(inward.server.ip, 8080)


def test_a_namespace_that_is_gone_leaves_pins_that_can_be_taken_away(inward: Inward) -> None:
    inward.mesh.worker.attach(3, inward.other)
    cookie = inward.ingress.capture(inward.other.path, (ip_address(inward.other.ip),), CaptureSettings())
    inward.mesh.worker.detach(3)
    netlink.delete_namespace(inward.other.name)
    inward.ingress.release(cookie)
    assert not list(inward.pins.links.glob(f"in-{cookie}-*"))
    netlink.create_namespace(inward.other.name)  # for who deletes it


def test_what_is_no_cgroup_is_refused_and_said(inward: Inward) -> None:
    with pytest.raises(IngressError, match=r"cgroup /tmp: .*only cgroup v2 has these hooks"):
        inward.ingress.serve("/tmp")
    with pytest.raises(IngressError, match=r"cgroup /none: No such file.*must be a directory of cgroup v2"):
        inward.ingress.serve("/none")


def test_programs_are_replaced_during_connects_and_none_fails_or_escapes(inward: Inward, tmp_path: Path) -> None:
    cookie = inward.capture()
    folder = tmp_path / "sources"
    folder.mkdir()
    for name in (*HEADERS, *FILES):
        text = (SOURCES / name).read_text()
        if name.endswith(".c"):  # programs of another tag that do the same
            text = text.replace("\n{\n\tstruct", "\n{\n\tasm volatile(\"r0 = 0\");\n\tstruct")
        (folder / name).write_text(text)
    code = """if True:
        import socket, sys
        from pathlib import Path
        done = 0
        while not Path(sys.argv[3]).exists() or done < 500:
            with socket.create_connection((sys.argv[1 + done % 2], 8080), timeout=30) as s:
                s.sendall(b"x")
                assert s.recv(1) == b"x"
            done += 1
        print(done)"""
    stop = tmp_path / "stop"
    client = inward.client.start(sys.executable, "-c", code, inward.server.ip, inward.server.ip6, str(stop), stdout=subprocess.PIPE,
                                 stderr=subprocess.PIPE, text=True)
    tags = set()
    for turn in range(6):
        load(inward.pins, tmp_path / f"cache{turn % 2}", sources=folder if turn % 2 == 0 else SOURCES, hooks=INGRESS)
        tags.add(json.loads(subprocess.run(["bpftool", "-j", "link", "show", "pinned", str(inward.pins.links / f"in-{cookie}-sk-lookup")],
                                           capture_output=True, text=True, check=True, timeout=20).stdout)["prog_id"])
    stop.touch()
    out, err = client.communicate(timeout=100)
    assert client.returncode == 0, err
    assert len(tags) == 6
    assert inward.taken_in() == int(out)


@pytest.mark.parametrize("backend", ["iptables", "nftables"])
def test_what_goes_out_by_rules_and_what_comes_in_by_sk_lookup_are_each_captured_once(inward: Inward, backend: str) -> None:
    inward.rules(backend=backend, redirect=True, inbound=False)
    inward.capture()
    outside = inward.mesh.origin(9000, echo, inward.other)
    for place, own in ((inward.server.ip, inward.other.ip), (inward.server.ip6, inward.other.ip6)):
        before = inward.taken_in()
        inward.talk(place, size=100_000, netns=inward.other)
        assert inward.own.peers[-1] == own
        assert inward.taken_in() == before + 1
        out = inward.taken_out()
        inward.talk(own, 9000, netns=inward.server)
        assert inward.taken_out() == out + 1
        assert inward.taken_in() == before + 1
        for port in (15001, 15006):
            assert inward.attempt(place, port) == "ECONNREFUSED"
    assert len(outside.peers) == 2


def test_a_pod_changes_between_the_two_ways_and_no_connect_fails_or_escapes(inward: Inward, tmp_path: Path) -> None:
    """The order: sk_lookup lets 15006 pass and takes the rest, the redirect goes, 15006 is closed; and back."""
    inward.rules(redirect=False, hooks=True)
    with connecting(inward.client.start, tmp_path, 8080, inward.server.ip, inward.server.ip6) as client:
        client.more()
        for _ in range(2):
            cookie = inward.capture(redirected=True)
            client.more()
            inward.no_redirects()
            inward.capture()
            client.more()
            inward.capture(redirected=True)
            inward.rules(redirect=False, hooks=True)
            client.more()
            inward.ingress.release(cookie, inward.server.path)
            client.more()
    assert inward.taken_in() == client.done + 1
    assert conntrack.count(inward.server) > 0  # by rules again
