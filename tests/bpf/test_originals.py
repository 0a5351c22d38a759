"""SO_ORIGINAL_DST as the hooks answer it: to the byte what conntrack says; of the right connection, however short it lived."""
from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

import pytest

from agent import netlink
from agent.capture.egress import Egress
from agent.capture.loader import FILES, HEADERS, SOURCES, load
from agent.capture.pins import Pins
from agent.capture.plan import plan
from agent.capture.reconcile import Reconciler
from agent.model.pod import CaptureSettings
from tests.support.cgroup import Cgroup, Cgroups
from tests.support.netns import Namespaces, Netns, Node
from tests.support.worker import prepared_listener

pytestmark = pytest.mark.netns

SO_ORIGINAL_DST, OUTBOUND = 80, 15001
CONNECT = "import socket, sys; s = socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=20); s.recv(1)"


@dataclass
class Bare:
    """A captured pod and a listener of the proxy's cgroup, without a worker: the test accepts itself."""

    pod: Netns
    app: Cgroup
    pins: Pins
    listener: socket.socket

    def accept(self) -> socket.socket:
        made, _ = self.listener.accept()
        return made


def listen(pod: Netns) -> socket.socket:
    made: socket.socket = netlink.in_netns(pod.path, lambda: prepared_listener(OUTBOUND))
    made.settimeout(30)
    return made


def capture(pins: Pins, pod: Netns, app: Cgroup) -> None:
    Egress(pins).capture(pod.path, app.path, (ip_address(pod.ip), ip_address(pod.ip6)), CaptureSettings())


@pytest.fixture
def bare(node: Node, cgroups: Cgroups, loaded: Pins) -> Iterator[Bare]:
    pod, app, proxy = node.pod("client"), cgroups.make("app"), cgroups.make("proxy")
    Egress(loaded).serve(proxy.path)
    capture(loaded, pod, app)
    with proxy.visited(), listen(pod) as listener:
        yield Bare(pod, app, loaded, listener)


def answer(connection: socket.socket, family: int) -> bytes:
    level, size = (socket.IPPROTO_IPV6, 28) if family == 6 else (socket.IPPROTO_IP, 16)
    return connection.getsockopt(level, SO_ORIGINAL_DST, size)


def where(connection: socket.socket) -> tuple[str, int]:
    got = answer(connection, 4)
    return socket.inet_ntoa(got[4:8]), int.from_bytes(got[2:4], "big")


@pytest.mark.parametrize(("target", "family"), [("198.18.7.7", 4), ("2001:db8::7", 6)])
def test_the_answer_is_conntracks_to_the_byte(bare: Bare, node: Node, target: str, family: int) -> None:
    other, instance = node.pod("redirected"), uuid.uuid4().hex[:8]
    asyncio.run(Reconciler(instance).apply(other.path, plan(CaptureSettings(), (4, 6), instance)))
    told = []
    with listen(other) as listener:
        for pod, take, start in ((bare.pod, bare.listener, bare.app.start), (other, listener, None)):
            argv = (sys.executable, "-c", CONNECT, target, "8443")
            client = start(pod, *argv) if start else pod.start(*argv)
            with take.accept()[0] as connection:
                told.append(answer(connection, family))
            client.wait(20)
    assert told[0] == told[1]
    assert told[0][2:4] == (8443).to_bytes(2, "big")


def test_an_ipv4_connect_of_an_ipv6_socket_has_both_forms(bare: Bare) -> None:
    client = bare.app.start(bare.pod, sys.executable, "-c", CONNECT, "::ffff:198.18.7.7", "8443")
    with bare.accept() as connection:
        assert where(connection) == ("198.18.7.7", 8443)
        six = answer(connection, 6)
    client.wait(20)
    assert socket.inet_ntop(socket.AF_INET6, six[8:24]) == "::ffff:198.18.7.7" and six[2:4] == (8443).to_bytes(2, "big")


def test_an_answer_with_too_little_room_and_a_socket_that_was_not_captured_are_errors(bare: Bare) -> None:
    client = bare.app.start(bare.pod, sys.executable, "-c", CONNECT, "198.18.7.7", "80")
    with bare.accept() as connection, pytest.raises(OSError, match=r"Bad address|Invalid argument"):
        connection.getsockopt(socket.IPPROTO_IP, SO_ORIGINAL_DST, 8)
    client.wait(20)
    with socket.create_server(("127.0.0.1", 0)) as plain, socket.create_connection(plain.getsockname()) as connection, \
            pytest.raises(OSError, match=r"No such file|Protocol not available"):
        answer(connection, 4)


@pytest.mark.parametrize("how", ["closed", "reset"])
def test_a_client_that_has_gone_before_it_was_accepted_is_still_known(bare: Bare, how: str) -> None:
    """And the next connection from the same port is not taken for it."""
    code = """if True:
        import socket, struct, sys
        for number in range(20):
            s = socket.socket()
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if sys.argv[1] == "reset":
                s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 0))
                s.bind((sys.argv[2], 45000))
            s.connect(("198.18.7.7", 1000 + number))
            s.sendall(b"%d" % number)
            s.close()"""
    bare.app.python(bare.pod, code, how, bare.pod.ip)
    for number in range(20):
        with bare.accept() as connection:
            assert where(connection) == ("198.18.7.7", 1000 + number)
            if how == "closed":
                assert connection.recv(10) == b"%d" % number


@pytest.fixture
def elsewhere() -> Iterator[Node]:
    """Another node, whose addresses are the first one's."""
    made = Namespaces()
    try:
        yield Node(made)
    finally:
        made.close()


def test_two_pods_of_one_address_are_told_apart(bare: Bare, elsewhere: Node, cgroups: Cgroups) -> None:
    """Only the cookie of the namespace differs."""
    twin, app = elsewhere.pod("twin"), cgroups.make("twin")
    assert (twin.ip, twin.ip6) == (bare.pod.ip, bare.pod.ip6)
    capture(bare.pins, twin, app)
    bind = ("import socket, sys; s = socket.socket(); s.bind((sys.argv[1], 45001)); s.connect(('198.18.7.7', int(sys.argv[2]))); s.recv(1)")
    with listen(twin) as listener:
        clients = [bare.app.start(bare.pod, sys.executable, "-c", bind, bare.pod.ip, "1111"),
                   app.start(twin, sys.executable, "-c", bind, twin.ip, "2222")]
        with bare.accept() as one, listener.accept()[0] as two:
            assert (where(one), where(two)) == (("198.18.7.7", 1111), ("198.18.7.7", 2222))
        for client in clients:
            client.wait(20)


def test_programs_are_replaced_during_connects_and_none_fails_or_escapes(bare: Bare, cache: Path, tmp_path: Path) -> None:
    """Nothing but the proxy answers at the address, and every connection must know it."""
    folder = tmp_path / "sources"
    folder.mkdir()
    for name in (*HEADERS, *FILES):
        text = (SOURCES / name).read_text()
        # programs of another tag that do the same
        (folder / name).write_text(text.replace("{\n\tstruct", "{\n\tasm volatile(\"r0 = 0\");\n\tstruct") if name.endswith(".c") else text)
    other = tmp_path / "cache"
    code = """if True:
        import socket, sys
        from pathlib import Path
        done = 0
        while not Path(sys.argv[1]).exists() or done < 1000:
            socket.create_connection(("198.18.7.7", 1000 + done % 1000), timeout=20).close()
            done += 1
        print(done)"""
    stop, wrong, taken = tmp_path / "stop", [], 0
    client = bare.app.start(bare.pod, sys.executable, "-c", code, str(stop), stdout=subprocess.PIPE, text=True)

    def take() -> None:
        nonlocal taken
        while True:
            with bare.accept() as connection:
                if connection.getpeername()[1] == 1:
                    return
                try:
                    found = where(connection)
                except OSError as error:
                    found = (str(error), 0)
                if found != ("198.18.7.7", 1000 + taken % 1000):
                    wrong.append((taken, found))
                taken += 1

    thread = threading.Thread(target=take, daemon=True)
    thread.start()
    tags = set()
    for turn in range(6):
        load(bare.pins, other if turn % 2 == 0 else cache, sources=folder if turn % 2 == 0 else SOURCES)
        shown = subprocess.run(["bpftool", "cgroup", "show", bare.app.path], capture_output=True, text=True, check=True, timeout=20)
        tags.add(shown.stdout)
    stop.touch()
    out, _ = client.communicate(timeout=60)
    with bare.app.start(bare.pod, sys.executable, "-c",
                        "import socket, sys; s = socket.socket(); s.bind((sys.argv[1], 1)); s.connect(('198.18.7.7', 1))", bare.pod.ip):
        thread.join(30)
    assert not thread.is_alive()
    assert (wrong, taken) == ([], int(out))
    assert client.returncode == 0
    assert len(tags) == 6
