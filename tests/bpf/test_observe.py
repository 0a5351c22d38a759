"""What the kernel tells of connections that ended, held against TCP_INFO of the same sockets."""
from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from ipaddress import IPv6Address, ip_address
from pathlib import Path
from typing import Any

import pytest

from agent.capture import bpf_call, egress, loader
from agent.capture.observe import CONNECTION, PART, TALLY, Records, Watch
from agent.capture.pins import Pins, pins_of
from agent.model.telemetry import TCP_STATES, EndedConnection
from ext.core import order
from ext.sys import bpf_door
from tests.support.cgroup import Cgroup, Cgroups
from tests.support.egress import Stage
from tests.support.mesh import TCP_PORT, VIP
from tests.support.netns import Namespaces, Netns, Node
from tests.support.wait import until

pytestmark = pytest.mark.netns

PORT = 9000
# linux/tcp.h tcp_info: offsets of what is compared. A socket whose connection is over still has it.
INFO = """
import json, socket, struct, sys, time
def info(s):
    raw = s.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 232)
    (state,) = struct.unpack_from("=B", raw)
    rtt, = struct.unpack_from("=I", raw, 68)
    retransmits, = struct.unpack_from("=I", raw, 100)
    sent, received = struct.unpack_from("=QQ", raw, 120)
    min_rtt, = struct.unpack_from("=I", raw, 148)
    return {"state": state, "rtt": rtt, "retransmits": retransmits, "sent": sent, "received": received, "min_rtt": min_rtt}
def ended(s):
    while info(s)["state"] != 7:
        time.sleep(0.002)
    return info(s)
"""
# The first byte says what to do with the connection; `u` tells TCP_INFO of a connection that the client resets.
SERVER = INFO + """
import threading
listener = socket.create_server(("::", int(sys.argv[1])), family=socket.AF_INET6, dualstack_ipv6=True, backlog=512)
def serve(s):
    how = s.recv(1)
    try:
        if how == b"e":
            while data := s.recv(65536):
                s.sendall(data)
        elif how == b"r":
            s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        elif how == b"u":
            s.recv(1)
    except ConnectionResetError:
        print(json.dumps(ended(s)), flush=True)
    s.close()
print("ready", flush=True)
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
"""
# Sends, closes its side first, reads to the end, and tells what the kernel then says of the connection.
CLIENT = INFO + """
address, port, size, family = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
import threading
before = time.monotonic_ns()
s = socket.socket(socket.AF_INET6 if family == 6 else socket.AF_INET)
s.connect((address, port))
connected = time.monotonic_ns()
inner = 0
def send():
    global inner
    s.sendall(b"e" + bytes(size))
    inner = time.monotonic_ns() - connected
    s.shutdown(socket.SHUT_WR)
thread = threading.Thread(target=send)
thread.start()
while s.recv(1 << 18):
    pass
thread.join()
found = ended(s)
print(json.dumps(found | {"inner": inner, "outer": time.monotonic_ns() - before}))
"""


@dataclass
class Scene:
    """A watched client that calls a server on another machine, as far as the kernel can tell: another namespace, over a bridge."""

    watch: Watch
    records: Records
    app: Cgroup
    client: Netns
    server: Netns
    peer: Cgroup
    serving: subprocess.Popen[str]
    cookie: int = 0
    read: list[EndedConnection] = field(default_factory=list)

    def run(self, code: str, *argv: str) -> Any:
        """In the client; what it printed as JSON."""
        return json.loads(self.app.python(self.client, INFO + code, *argv) or "null")

    def take(self, count: int) -> list[EndedConnection]:
        """The next records; there must be no more of them than `count` when these have come."""
        def enough() -> bool:
            self.read += self.records.read(1000)
            return len(self.read) >= count

        until(enough, f"{count} records")
        found, self.read = self.read, []
        assert len(found) == count, found
        return found


@pytest.fixture
def observing(pins: Pins, cache: Path) -> Pins:
    own = pins_of(pins.root.parents[2], "test.observed", egress.LAYOUT, PART)
    assert loader.load(own, cache, hooks=loader.OBSERVE).hooks == {"observe": ""}
    return own


@pytest.fixture
def scene(namespaces: Namespaces, cgroups: Cgroups, observing: Pins) -> Iterator[Scene]:
    node = Node(namespaces)
    client, server = node.pod("client"), node.pod("server")
    app, peer = cgroups.make("app"), cgroups.make("peer")
    watch, records = Watch(observing), Records(observing, order)
    serving = peer.start(server, sys.executable, "-c", SERVER, str(PORT), stdout=subprocess.PIPE, text=True)
    assert serving.stdout is not None
    try:
        assert serving.stdout.readline() == "ready\n"
        made = Scene(watch, records, app, client, server, peer, serving)
        made.cookie = watch.add(client.path, (ip_address(client.ip), ip_address(client.ip6)), app.path)
        yield made
    finally:
        serving.kill()
        serving.wait(timeout=10)
        serving.stdout.close()
        records.close()


def packed(address: str) -> bytes:
    one = ip_address(address)
    return one.packed if isinstance(one, IPv6Address) else bytes(10) + b"\xff\xff" + one.packed


def figures(record: EndedConnection) -> dict[str, int]:
    return {name: getattr(record, name) for name in ("rtt", "min_rtt", "retransmits", "sent", "received")}


def test_only_what_observation_needs_is_loaded(observing: Pins) -> None:
    shapes = {}
    for path in observing.maps.iterdir():
        fd = bpf_call.pinned(path)
        shapes[path.name] = bpf_call.map_shape(fd)
        os.close(fd)
    sizes = bpf_door.sizes()
    assert {name: (shape.key, shape.value) for name, shape in shapes.items()} == {
        "watched": (8, sizes["pod"]), "began": (4, 8), "ended": (0, 0), "tally": (4, sizes["tally"])}
    assert shapes["ended"].entries == 1 << 20
    assert (CONNECTION.size, TALLY.size) == (sizes["connection"], sizes["tally"])
    assert [path.name for path in observing.programs.iterdir()] == ["observe"]


@pytest.mark.parametrize("family", ["4", "6", "mapped"])
def test_a_record_says_what_the_kernel_says_of_the_socket(scene: Scene, family: str) -> None:
    address = {"4": scene.server.ip, "6": scene.server.ip6, "mapped": f"::ffff:{scene.server.ip}"}[family]
    said = json.loads(scene.app.python(scene.client, CLIENT, address, str(PORT), "300000", "4" if family == "4" else "6"))
    (record,) = scene.take(1)
    assert figures(record) == {name: said[name] for name in figures(record)}
    assert said["sent"] >= 300_001 and said["received"] >= 300_000 and said["rtt"] > 0
    assert record.netns == scene.cookie
    assert record.local == packed(scene.client.ip6 if family == "6" else scene.client.ip)
    assert (record.remote, record.remote_port, record.accepted) == (packed(address), PORT, 0)
    assert TCP_STATES[record.before] == "fin_wait2"  # we closed first
    assert said["inner"] <= record.duration <= said["outer"]
    assert scene.records.counted() == (1, 0)


def test_lost_segments_are_told(scene: Scene) -> None:
    """Every tenth segment with data does not arrive."""
    scene.server.run("iptables-legacy", "-A", "INPUT", "-p", "tcp", "--dport", str(PORT), "-m", "length", "--length", "500:65535",
                     "-m", "statistic", "--mode", "nth", "--every", "10", "--packet", "0", "-j", "DROP")
    said = json.loads(scene.app.python(scene.client, CLIENT, scene.server.ip, str(PORT), "2000000", "4"))
    (record,) = scene.take(1)
    assert record.retransmits > 0
    assert figures(record) == {name: said[name] for name in figures(record)}


@pytest.mark.parametrize("family", [4, 6])
def test_who_accepts_is_told_the_same_of_its_side_and_that_it_was_reset(scene: Scene, family: int) -> None:
    cookie = scene.watch.add(scene.server.path, (ip_address(scene.server.ip), ip_address(scene.server.ip6)), scene.peer.path)
    address = scene.server.ip6 if family == 6 else scene.server.ip
    port = scene.run("""if True:
        s = socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=30)
        s.sendall(b"e" + bytes(5000))
        left = 5000
        while left:
            left -= len(s.recv(left))
        s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        print(s.getsockname()[1])
        s.close()""", address, str(PORT))
    ours, theirs = sorted(scene.take(2), key=lambda record: record.accepted)
    assert scene.serving.stdout is not None
    said = json.loads(scene.serving.stdout.readline())
    assert figures(theirs) == {name: said[name] for name in figures(theirs)}
    own = scene.client.ip6 if family == 6 else scene.client.ip
    assert (theirs.netns, theirs.accepted, theirs.local_port, theirs.remote, theirs.remote_port) == (cookie, 1, PORT, packed(own), port)
    assert (ours.netns, ours.local, ours.local_port, ours.remote_port) == (scene.cookie, packed(own), port, PORT)
    assert TCP_STATES[ours.before] == TCP_STATES[theirs.before] == "established"


def test_a_connect_that_is_refused_is_told_as_one_that_never_stood(scene: Scene) -> None:
    error = scene.run("""if True:
        s = socket.socket()
        print(s.connect_ex((sys.argv[1], 1)))""", scene.server.ip)
    assert error == 111
    (record,) = scene.take(1)
    assert (TCP_STATES[record.before], record.rtt, record.min_rtt, record.sent) == ("syn_sent", 0, 0xFFFFFFFF, 0)
    assert (record.remote, record.remote_port, record.accepted) == (packed(scene.server.ip), 1, 0)


@pytest.mark.parametrize("how", ["r", "c"])
def test_whether_the_other_side_reset_or_closed_is_told(scene: Scene, how: str) -> None:
    scene.run("""if True:
        s = socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=30)
        s.sendall(sys.argv[3].encode())
        try:
            assert s.recv(1) == b"" and sys.argv[3] == "c"
        except ConnectionResetError:
            assert sys.argv[3] == "r"
        s.close()""", scene.server.ip, str(PORT), how)
    (record,) = scene.take(1)
    assert TCP_STATES[record.before] == {"r": "established", "c": "last_ack"}[how]


def test_a_port_that_is_used_again_and_a_socket_that_connects_again_are_connections_of_their_own(scene: Scene) -> None:
    """The server closes first, so that the port is free at once; AF_UNSPEC disconnects."""
    scene.run("""if True:
        import ctypes
        libc = ctypes.CDLL(None, use_errno=True)
        def once(s):
            s.connect((sys.argv[1], int(sys.argv[2])))
            s.sendall(b"c")
            assert s.recv(1) == b""
        for _ in range(2):
            s = socket.socket()
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            s.bind((sys.argv[3], 45678))
            once(s)
            s.close()
            while True:         # until the kernel has the answer to our FIN
                t = socket.socket()
                try:
                    t.bind((sys.argv[3], 45678))
                    break
                except OSError:
                    time.sleep(0.01)
                finally:
                    t.close()
        s = socket.socket()
        for _ in range(3):
            once(s)
            assert libc.connect(s.fileno(), struct.pack("=HHIQ", 0, 0, 0, 0), 16) == 0""", scene.server.ip, str(PORT), scene.client.ip)
    found = scene.take(5)
    assert [record.local_port for record in found[:2]] == [45678, 45678]
    assert all(record.sent in (2, 3) and record.rtt > 0 for record in found)  # each its own: a SYN, a byte, and perhaps a FIN


def test_what_stays_in_the_pod_or_is_not_watched_is_not_told(scene: Scene) -> None:
    code = """if True:
        listener = socket.create_server(("::", 9100), family=socket.AF_INET6, dualstack_ipv6=True)
        for address in sys.argv[2:]:
            with socket.create_connection((address, 9100), timeout=30) as s:
                listener.accept()[0].close()
        with socket.create_connection((sys.argv[1], 9000), timeout=30) as s:
            s.sendall(b"c")
            s.recv(1)"""
    scene.run(code, scene.server.ip, "127.0.0.1", "::1", scene.client.ip, scene.client.ip6)
    (record,) = scene.take(1)
    assert record.remote == packed(scene.server.ip)
    scene.watch.remove(scene.cookie)
    scene.run(code, scene.server.ip)
    assert scene.watch.watched() == []
    scene.watch.add(scene.client.path, (ip_address(scene.client.ip),), scene.app.path)
    scene.run(code, scene.server.ip)
    scene.take(1)


def test_a_ring_that_is_full_loses_records_counts_them_and_goes_on(scene: Scene) -> None:
    """Refused connects, since nothing else is as quick. Nobody reads meanwhile; the descriptor says that many wait."""
    poll = select.poll()
    poll.register(scene.records.fileno(), select.POLLIN)
    code = """if True:
        for _ in range(int(sys.argv[2])):
            s = socket.socket()
            s.connect_ex((sys.argv[1], 1))
            s.close()"""
    assert poll.poll(0) == []
    scene.run(code, scene.server.ip, "12000")
    assert poll.poll(10_000)
    written, lost = scene.records.counted()
    assert written + lost == 12_000
    assert lost > 0
    assert 10_900 < written < 10_930  # 1 MiB of 96 bytes each
    assert len(scene.records.read(7)) == 7
    assert len(scene.records.read(1 << 20)) == written - 7
    assert poll.poll(0) == []
    scene.run(code, scene.server.ip, "3000")  # past the end of the ring, where a record lies over it
    assert len(scene.take(3000)) == 3000
    assert scene.records.counted() == (written + 3000, lost)


def test_a_reader_that_comes_later_goes_on_where_the_last_one_stopped(scene: Scene, observing: Pins) -> None:
    code = """if True:
        for _ in range(int(sys.argv[2])):
            socket.socket().connect_ex((sys.argv[1], 1))"""
    scene.run(code, scene.server.ip, "3")
    until(lambda: scene.records.counted() == (3, 0), "three records")
    assert len(scene.records.read(2)) == 2
    after = Records(observing, order)
    try:
        assert len(after.read(100)) == 1
        assert after.read(100) == []
    finally:
        after.close()


def attached(cgroup: Cgroup) -> list[str]:
    """sockops programs, by bpftool's word."""
    done = subprocess.run(["bpftool", "-j", "cgroup", "show", cgroup.path], capture_output=True, text=True, timeout=20, check=True)
    return sorted(one["name"] for one in json.loads(done.stdout) if one["attach_type"] == "cgroup_sock_ops")


def test_of_a_captured_pod_the_proxys_leg_is_told_and_nothing_that_stays_in_the_pod(stage: Stage, observing: Pins) -> None:
    """Capture and observation have a program each on the proxy's cgroup; either goes on when the other is taken off."""
    watch, records = Watch(observing), Records(observing, order)
    try:
        stage.capture()
        watch.serve(stage.proxy.path)
        cookie = watch.add(stage.client.path, (ip_address(stage.client.ip), ip_address(stage.client.ip6)))
        stage.talk(VIP)
        found: list[EndedConnection] = []
        until(lambda: found.extend(records.read(100)) or found, "a record")
        (record,) = found
        assert (record.netns, record.local, record.accepted) == (cookie, packed(stage.client.ip), 0)
        assert record.remote == packed(stage.server.ip)
        assert record.sent >= 1000 and record.received >= 1000
        assert attached(stage.proxy) == ["nw_observe", "nw_sockops"]
        watch.unlink(stage.proxy.id)
        until(lambda: attached(stage.proxy) == ["nw_sockops"], "the link is gone, a moment after its pin")
        assert stage.talk(VIP)["peer"] == [VIP, TCP_PORT]
        assert stage.taken_out() == 2
        assert records.read(100) == []
    finally:
        records.close()
