"""Where connections of captured pods go, in both families."""
from __future__ import annotations

import errno
import socket
from ipaddress import ip_network

import pytest

from agent import netlink
from agent.capture.plan import PROBE_SOURCES
from agent.capture.reconcile import Reconciler
from agent.model.pod import CaptureSettings
from tests.netns.capture.conftest import VIRTUAL, Pod, World, dial, echo, planned, reported, talk
from tests.support.netns import Namespaces, Node
from tests.support.wait import until

pytestmark = [pytest.mark.netns, pytest.mark.parametrize("backend", ["iptables", "nftables"], indirect=True)]
FAMILIES = pytest.mark.parametrize("family", [4, 6])


@FAMILIES
async def test_an_outbound_connection_meets_the_proxy_and_its_destination_sees_the_pod(
        world: World, reconciler: Reconciler, family: int) -> None:
    await reconciler.apply(world.a.netns.path, planned())
    source, destination = world.a.address(family), world.b.address(family)
    with world.a.dial(destination, 8080) as connection:
        assert talk(connection) == source
        assert connection.getpeername()[:2] == (destination, 8080)
    reported(world.a, "outbound", source, f"{destination} 8080")
    assert world.b.seen == []


@FAMILIES
async def test_an_inbound_connection_meets_the_proxy_and_the_application_sees_the_client(
        world: World, reconciler: Reconciler, family: int) -> None:
    await reconciler.apply(world.b.netns.path, planned())
    source, destination = world.a.address(family), world.b.address(family)
    with world.a.dial(destination, 8080) as connection:
        assert talk(connection) == source
    reported(world.b, "inbound", source, f"{destination} 8080")
    assert world.a.seen == []


@FAMILIES
async def test_two_captured_pods_meet_through_both_proxies_once_each(
        world: World, reconciler: Reconciler, family: int) -> None:
    for pod in (world.a, world.b):
        await reconciler.apply(pod.netns.path, planned())
    source, destination = world.a.address(family), world.b.address(family)
    connections = [world.a.dial(destination, 8080) for _ in range(5)]
    assert [talk(connection) for connection in connections] == [source] * 5
    for connection in connections:
        connection.close()
    until(lambda: world.a.seen == [{"side": "outbound", "peer": source, "to": f"{destination} 8080"}] * 5, "that is reported")
    until(lambda: world.b.seen == [{"side": "inbound", "peer": source, "to": f"{destination} 8080"}] * 5, "that is reported")


@FAMILIES
async def test_a_pod_that_calls_itself_through_its_service_reaches_itself_once(
        world: World, reconciler: Reconciler, family: int) -> None:
    await reconciler.apply(world.a.netns.path, planned())
    with world.a.dial(VIRTUAL[family], 80) as connection:
        assert talk(connection) == world.a.address(family)
    until(lambda: world.a.seen == [{"side": "outbound", "peer": world.a.address(family), "to": f"{VIRTUAL[family]} 80"}], "reported")


@FAMILIES
async def test_a_pod_that_calls_its_own_address_or_localhost_is_left_alone(
        world: World, reconciler: Reconciler, family: int) -> None:
    await reconciler.apply(world.a.netns.path, planned())
    for address in (world.a.address(family), "::1" if family == 6 else "127.0.0.1"):
        with world.a.dial(address, 8080) as connection:
            assert talk(connection) == address
    assert world.a.seen == []


@FAMILIES
async def test_probes_pass(world: World, reconciler: Reconciler, family: int) -> None:
    probe = PROBE_SOURCES[family].partition("/")[0]
    netlink.add_address(world.node.path, "br0", PROBE_SOURCES[family])
    try:
        await reconciler.apply(world.b.netns.path, planned())
        with dial(world.node, world.b.address(family), 8080, source=probe) as connection:
            assert talk(connection) == probe
        assert world.b.seen == []
    finally:
        netlink.delete_address(world.node.path, "br0", PROBE_SOURCES[family])


@FAMILIES
@pytest.mark.parametrize("port", [15001, 15006])
async def test_the_proxys_ports_are_refused_from_outside_and_from_inside(
        world: World, reconciler: Reconciler, family: int, port: int) -> None:
    for pod in (world.a, world.b):
        await reconciler.apply(pod.netns.path, planned(CaptureSettings(exclude_inbound_ports=(port,))))
    local = "::1" if family == 6 else "127.0.0.1"
    for source, address in ((world.node, world.b.address(family)), (world.a.netns, world.b.address(family)),
                            (world.b.netns, world.b.address(family)), (world.b.netns, local)):
        with pytest.raises(OSError) as refused:
            dial(source, address, port).close()
        assert refused.value.errno == errno.ECONNREFUSED, f"{source.name} to {address}: {refused.value}"
    assert world.a.seen == world.b.seen == []


@FAMILIES
async def test_a_tunnel_comes_to_its_own_listener(world: World, reconciler: Reconciler, family: int) -> None:
    """What comes to 15008 is not redirected to 15006."""
    await reconciler.apply(world.b.netns.path, planned())
    with netlink.in_netns(world.b.netns.path, lambda: socket.create_server(
            ("::", 15008), family=socket.AF_INET6, dualstack_ipv6=True)) as listener:
        listener.settimeout(5)
        with world.a.dial(world.b.address(family), 15008):
            listener.accept()[0].close()
    assert world.b.seen == []


@FAMILIES
@pytest.mark.parametrize(("settings", "captured", "passed"), [
    (CaptureSettings(exclude_outbound_ports=(9090, 9091)), [8080], [9090]),
    (CaptureSettings(exclude_outbound_ranges=(ip_network("10.244.1.0/24"), ip_network("fd00:244:1::/64"))), [], [8080]),
    (CaptureSettings(exclude_outbound_ranges=(ip_network("10.9.0.0/16"),)), [8080], []),
    (CaptureSettings(include_outbound_ranges=()), [], [8080]),
    (CaptureSettings(include_outbound_ranges=(ip_network("10.244.0.0/16"), ip_network("fd00:244::/32"))), [8080], []),
    (CaptureSettings(include_outbound_ranges=(ip_network("0.0.0.0/0"), ip_network("::/0"))), [8080], []),
    (CaptureSettings(include_outbound_ranges=(ip_network("10.9.0.0/16"), ip_network("fd09::/16"))), [], [8080]),
], ids=["port", "range", "other range", "include nothing", "include range", "include all", "include other range"])
async def test_outbound_exclusions_and_inclusions_hold(world: World, reconciler: Reconciler, settings: CaptureSettings,
                                                       captured: list[int], passed: list[int], family: int) -> None:
    await reconciler.apply(world.a.netns.path, planned(settings))
    for port in captured + passed:
        with world.a.dial(world.b.address(family), port) as connection:
            assert talk(connection) == world.a.address(family)
    until(lambda: [seen["to"] for seen in world.a.seen] == [f"{world.b.address(family)} {port}" for port in captured], "that is reported")
    with world.a.dial("::1" if family == 6 else "127.0.0.1", 8080) as connection:
        talk(connection)
    until(lambda: len(world.a.seen) == len(captured), "that is reported")


@FAMILIES
async def test_inbound_exclusions_hold(world: World, reconciler: Reconciler, family: int) -> None:
    await reconciler.apply(world.b.netns.path, planned(CaptureSettings(exclude_inbound_ports=(9090,))))
    for port in (8080, 9090):
        with world.a.dial(world.b.address(family), port) as connection:
            assert talk(connection) == world.a.address(family)
    until(lambda: [seen["to"] for seen in world.b.seen] == [f"{world.b.address(family)} 8080"], "that is reported")


@FAMILIES
async def test_live_connections_outlive_release_and_new_ones_go_past(
        world: World, reconciler: Reconciler, family: int) -> None:
    for pod in (world.a, world.b):
        await reconciler.apply(pod.netns.path, planned())
    live = world.a.dial(world.b.address(family), 8080)
    with live:
        talk(live)
        for pod in (world.a, world.b):
            await reconciler.release(pod.netns.path)
        echo(live)
        with world.a.dial(world.b.address(family), 8080) as fresh:
            assert talk(fresh) == world.a.address(family)
        echo(live)
        live.shutdown(socket.SHUT_WR)
        assert live.recv(1) == b""
    until(lambda: len(world.a.seen) == len(world.b.seen) == 1, "that is reported")


async def test_a_changed_setting_acts_on_new_connections_and_live_ones_finish(
        world: World, reconciler: Reconciler) -> None:
    await reconciler.apply(world.a.netns.path, planned())
    with world.a.dial(world.b.netns.ip, 8080) as live:
        talk(live)
        outcome = await reconciler.apply(world.a.netns.path, planned(CaptureSettings(exclude_outbound_ports=(8080,))))
        assert outcome.changed == ("IPv4 nat", "IPv6 nat")
        with world.a.dial(world.b.netns.ip, 8080) as fresh:
            talk(fresh)
        echo(live)
    until(lambda: len(world.a.seen) == 1, "that is reported")


@FAMILIES
async def test_datagrams_are_not_captured(world: World, reconciler: Reconciler, family: int) -> None:
    for pod in (world.a, world.b):
        await reconciler.apply(pod.netns.path, planned())
    kind = socket.AF_INET6 if family == 6 else socket.AF_INET
    server = netlink.in_netns(world.b.netns.path, lambda: socket.socket(kind, socket.SOCK_DGRAM))
    client = netlink.in_netns(world.a.netns.path, lambda: socket.socket(kind, socket.SOCK_DGRAM))
    with server, client:
        server.bind((world.b.address(family), 5353))
        server.settimeout(3)
        client.sendto(b"question", (world.b.address(family), 5353))
        said, peer = server.recvfrom(100)
        assert (said, peer[0]) == (b"question", world.a.address(family))


@FAMILIES
async def test_connections_made_before_a_pod_is_enrolled_go_on(reconciler: Reconciler, namespaces: Namespaces,
                                                               family: int) -> None:
    """In a namespace without any rule nothing is tracked: the next packet of a live connection looks like a new one."""
    node = Node(namespaces)
    world = World(node.netns, Pod(node.pod("a")), Pod(node.pod("b")))
    for pod in (world.a, world.b):
        pod.start()
    idle, busy = (world.a.dial(world.b.address(family), 8080) for _ in range(2))
    with idle, busy:
        talk(busy)
        for pod in (world.a, world.b):
            await reconciler.apply(pod.netns.path, planned())
        for connection in (busy, idle, busy):
            if connection is idle:
                talk(connection)
            else:
                echo(connection)
        with world.a.dial(world.b.address(family), 8080) as fresh:
            assert talk(fresh) == world.a.address(family)
    until(lambda: len(world.a.seen) == len(world.b.seen) == 1, "that is reported")


@FAMILIES
async def test_the_last_hop_may_get_the_port_of_a_live_connection_of_its_client(
        world: World, reconciler: Reconciler, family: int) -> None:
    """The kernel chooses that port among 28,000: with a hundred connections of one client it happens every 300th time."""
    await reconciler.apply(world.b.netns.path, planned())
    client, server = world.node.ip6 if family == 6 else world.node.ip, world.b.address(family)
    kind, level, transparent = (socket.AF_INET6, 41, 75) if family == 6 else (socket.AF_INET, 0, 19)

    def first() -> socket.socket:
        made = socket.socket(kind)
        made.settimeout(3)
        made.bind((client, 40000))
        made.connect((server, 8080))
        return made

    def last_hop() -> socket.socket:
        made = socket.socket(kind)
        made.settimeout(3)
        made.setsockopt(socket.SOL_SOCKET, 36, 0x539)
        made.setsockopt(level, transparent, 1)
        made.bind((client, 40000))
        made.connect((server, 8080))
        return made

    with netlink.in_netns(world.node.path, first) as live:
        assert talk(live) == client
        with netlink.in_netns(world.b.netns.path, last_hop) as hop:
            assert talk(hop) == client
            echo(live)
            echo(hop)
        echo(live)
    until(lambda: len(world.b.seen) == 1, "that is reported")
