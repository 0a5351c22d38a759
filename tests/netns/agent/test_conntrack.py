"""A pod's table of tracked connections is full: what its users see, what the operator is told, and that it passes."""
from __future__ import annotations

import socket
import subprocess
from collections.abc import Callable, Iterator

import pytest

from agent import netlink
from agent.cli import doctor
from tests.netns.agent.conftest import PORT, VIRTUAL, Connection, Instance
from tests.support import conntrack
from tests.support.logs import whole_lines
from tests.support.netns import Netns
from tests.support.wait import until

pytestmark = pytest.mark.netns

TIMED_OUT = "000"
TRACKED = "the table is full of what redirects need; the kernel tracks nothing in pods that hooks capture"


def code(instance: Instance, where: str, seconds: int) -> str:
    """The status of a new connection's request as the client sees it; 000: none came."""
    return instance.client.run("curl", "-s", "-o", "/dev/null", "-m", str(seconds), "-w", "%{http_code}", where, check=False).stdout


@pytest.fixture
def arrivals(instance: Instance) -> Iterator[Callable[[], int]]:
    """How many SYNs came to the server's pod from the client's address: seen on the wire, before any table."""
    sniffer = netlink.in_netns(instance.server.path, lambda: socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0800)))
    sniffer.setblocking(False)

    def count() -> int:
        found = 0
        while True:
            try:
                packet, address = sniffer.recvfrom(2048)
            except BlockingIOError:
                return found
            incoming = address[2] != socket.PACKET_OUTGOING
            found += incoming and packet[9] == socket.IPPROTO_TCP and packet[12:16] == socket.inet_aton(instance.client.ip) \
                and packet[(packet[0] & 15) * 4 + 13] & 0x12 == 0x02
    with sniffer:
        yield count


def full(netns: Netns) -> None:
    conntrack.fill(netns)
    assert conntrack.count(netns) >= conntrack.limit()


def told(instance: Instance, pod: str, netns: Netns) -> None:
    """Event, metrics and doctor name the pod, the cause and what to do."""
    event = until(lambda: instance.events("ConntrackFull"), "the operator is told", 20)[0]
    assert event["warning"] and event["about"] == f"pod default/{pod}"
    for word in (str(conntrack.limit()), "net.netfilter.nf_conntrack_max", "dropped", "none passes by the proxy"):
        assert word in event["message"]
    until(lambda: instance.metric("narrows_conntrack_dropped_packets_total") > 0, "dropped SYNs are counted")
    assert instance.metric("narrows_conntrack_entries") >= instance.metric("narrows_conntrack_limit") == conntrack.limit()
    check = next(check for check in doctor.conntrack() if check.name == "conntrack use")
    assert check.status == "warn" and netns.path in check.found and "nf_conntrack_max=" in check.todo


def over(instance: Instance, pod: str, netns: Netns) -> None:
    conntrack.empty(netns)
    until(lambda: code(instance, f"http://{VIRTUAL}:{PORT}/", 5) == "200", "new connections are served again", 20)
    assert until(lambda: instance.events("ConntrackFree"), "told", 20)[0]["about"] == f"pod default/{pod}"
    (use,) = [check for check in doctor.conntrack() if check.name == "conntrack use"]
    assert netns.path not in use.found or use.status == "ok"


@pytest.mark.redirects(TRACKED)
def test_new_connections_of_a_pod_whose_table_is_full_wait_and_pass_nothing_by(instance: Instance, arrivals: Callable[[], int]) -> None:
    instance.up()
    live = Connection(instance)
    live.get()
    served = instance.requests("destination")
    assert arrivals() > 0, "the oracle sees connections"
    full(instance.client)
    for where in (f"http://{VIRTUAL}:{PORT}/", f"http://{instance.server.ip}:8080/"):
        assert code(instance, where, 2) == TIMED_OUT
    assert arrivals() == 0, "no packet of a new connection leaves the pod"
    live.get()
    told(instance, "client", instance.client)
    assert instance.shown("client")["captured"]
    # one that waits meanwhile is served as soon as there is room: its SYN is sent again
    waiting = instance.client.start("curl", "-s", "-m", "30", f"http://{VIRTUAL}:{PORT}/waiting", stdout=subprocess.PIPE, text=True)
    dropped = instance.metric("narrows_conntrack_dropped_packets_total")
    until(lambda: instance.metric("narrows_conntrack_dropped_packets_total") > dropped, "its SYN is dropped")
    over(instance, "client", instance.client)
    assert waiting.communicate(timeout=30)[0].startswith("served /waiting")
    live.get()
    live.close()
    until(lambda: instance.requests("source") == instance.requests("destination") >= served + 3, "every request was counted on both sides")


RULE = """
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: web, namespace: default}
spec: {host: web, trafficPolicy: {connectionPool: {tcp: {connectTimeout: 2s}}}}
"""


@pytest.mark.redirects(TRACKED)
def test_a_server_whose_table_is_full_answers_on_pooled_connections_and_is_503_for_new_ones(instance: Instance) -> None:
    (instance.config / "rule.yaml").write_text(RULE)
    instance.up("--same-node-tunnel")   # by the network in any case, also where one worker got both pods and would join them
    live = Connection(instance)
    live.get()
    full(instance.server)
    url = f"http://{VIRTUAL}:{PORT}/"
    assert [code(instance, url, 10) for _ in range(3)] == ["200"] * 3, "by the connection that is pooled"
    live.ask("/hold")       # before the next one is even started: it is what takes the pooled connection
    until(lambda: code(instance, url, 10) == "503", "the pooled connection is busy, and a new one cannot be made", 30)
    record = until(lambda: [line for line in whole_lines(instance.run_dir / "access.log") if '"response_code":503' in line], "logged")[0]
    assert '"response_flags":"UF"' in record and "upstream" in record
    told(instance, "web-0", instance.server)
    over(instance, "web-0", instance.server)
    instance.get(where=f"{url}go")
    live.answer("/hold")
    live.get()
    live.close()


def test_a_pod_that_hooks_capture_is_served_with_a_full_table(instance: Instance) -> None:
    instance.up("--capture", "ebpf")
    full(instance.client)
    assert [code(instance, f"http://{VIRTUAL}:{PORT}/{turn}", 10) for turn in range(5)] == ["200"] * 5
    until(lambda: instance.requests("source") == instance.requests("destination") == 5, "every request was counted on both sides")
    assert instance.metric("narrows_conntrack_dropped_packets_total") == 0
