"""What IPv6 has and IPv4 has not: link-local addresses, mapped addresses, neighbour discovery. The rest is parametrised over the family
in the other files (docs/ipv6.md)."""
from __future__ import annotations

import socket
import struct

import pytest

from agent import netlink
from tests.support.mesh import HTTP_PORT, TCP_PORT, VIP, Mesh, Web, echo, everything, read_message, receive, request
from tests.support.netns import Netns
from tests.support.wait import until

pytestmark = pytest.mark.netns


def link_local(pod: Netns) -> str:
    """Usable, that is: no longer looked for in duplicate (RFC 4862 5.4)."""
    def found() -> str:
        return next((one["local"] for link in pod.ip_json("-6", "address", "show", "dev", "eth0", "scope", "link")
                     for one in link.get("addr_info", []) if "local" in one and not one.get("tentative")), "")

    return until(found, "a link-local address")


def dial_scoped(mesh: Mesh, source: Netns, address: str, port: int, bound: str = "") -> socket.socket:
    def dial() -> socket.socket:
        made = socket.socket(socket.AF_INET6)
        made.settimeout(5)
        link = socket.if_nametoindex("eth0")
        if bound:
            made.bind((bound, 0, 0, link))
        made.connect((address, port, 0, link))
        return made

    made = netlink.in_netns(source.path, dial)
    mesh.sockets.append(made)
    return made


@pytest.mark.parametrize("port", [8080, 8081])
def test_a_link_local_server_is_reached_past_its_clients_proxy_and_through_its_own(mesh: Mesh, port: int) -> None:
    """8080 is declared HTTP, 8081 is not declared. One client is captured, the other is not."""
    mesh.configure(*everything(mesh))
    mesh.origin(port, Web())
    server, sources = link_local(mesh.pods.server), [(client, link_local(client)) for client in (mesh.pods.client, mesh.pods.other)]
    for client, address in sources:
        accepted = mesh.worker.header["accepted"]
        connection = dial_scoped(mesh, client, server, port, address)
        for _ in range(2):
            connection.sendall(request())
            assert read_message(connection).status == 200
        assert mesh.worker.header["accepted"] == accepted + 1, "by the server's inbound listener alone"
        connection.close()
    records: list[dict[str, object]] = []
    until(lambda: records.extend(mesh.worker.records()) or len(records) >= len(sources) * (2 if port == 8080 else 1),
          "each request, and each connection of a port that is not HTTP")
    assert {record["reporter"] for record in records} == {"destination"}
    assert {str(record["downstream_local"]) for record in records} == {f"[{server}]:{port}"}
    assert {str(record["downstream_remote"]).rpartition(":")[0] for record in records} == {f"[{address}]" for _, address in sources}


def test_from_a_global_to_a_link_local_address_is_refused_and_told_since_the_kernel_keeps_no_link(mesh: Mesh) -> None:
    """SO_ORIGINAL_DST gives the link of a socket that is tied to one, which only a link-local client's is. No choice of source addresses
    (RFC 6724) makes such a connection by itself."""
    mesh.configure(*everything(mesh))
    mesh.origin(8080, Web())
    connection = dial_scoped(mesh, mesh.pods.other, link_local(mesh.pods.server), 8080, mesh.pods.other.ip6)
    connection.sendall(request())
    assert read_message(connection).status == 503
    assert mesh.worker.record()["flag"] == "UF"


def test_a_captured_pod_reaches_link_local_servers_that_are_not_captured(mesh: Mesh) -> None:
    mesh.configure(*everything(mesh))
    mesh.origin(8080, echo, mesh.pods.other)
    connection = dial_scoped(mesh, mesh.pods.client, link_local(mesh.pods.other), 8080)
    connection.sendall(b"hello")
    assert receive(connection, 5) == b"hello"
    assert mesh.worker.header["accepted"] == 0


@pytest.mark.parametrize("port", [HTTP_PORT, TCP_PORT])
def test_an_ipv4_service_dialled_through_a_mapped_address_is_an_ipv4_service(mesh: Mesh, port: int) -> None:
    """As Java and Go do on dual-stack sockets: ::ffff:10.96.0.10 leaves the pod as IPv4, and is routed, logged and served as such."""
    mesh.configure(*everything(mesh))
    origin = mesh.origin(8080, Web())

    def dial() -> socket.socket:
        made = socket.socket(socket.AF_INET6)
        made.settimeout(5)
        made.connect((f"::ffff:{VIP}", port))
        return made

    connection = netlink.in_netns(mesh.pods.client.path, dial)
    mesh.sockets.append(connection)
    connection.sendall(request())
    assert read_message(connection).status == 200
    connection.close()
    assert origin.peers == [mesh.pods.client.ip]
    records: list[dict[str, object]] = []
    until(lambda: records.extend(mesh.worker.records()) or len(records) >= 2, "both hops are logged")
    source = next(record for record in records if record["reporter"] == "source")
    assert source["downstream_local"] == f"{VIP}:{port}"
    assert str(source["downstream_remote"]).startswith(f"{mesh.pods.client.ip}:")


def test_icmpv6_and_neighbour_discovery_are_not_touched(mesh: Mesh) -> None:
    """A captured pod finds and is found by its neighbours, and answers an echo request (RFC 4443), with nothing for the proxy."""
    mesh.configure(*everything(mesh))
    client, server = mesh.pods.client, mesh.pods.server
    for pod in (client, server):
        pod.run("ip", "-6", "neighbour", "flush", "dev", "eth0")

    def echoed() -> bytes:
        with socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6) as raw:
            raw.settimeout(5)
            only_replies = struct.pack("=8I", *[0xFFFFFFFF] * 4, 0xFFFFFFFD, *[0xFFFFFFFF] * 3)  # ICMP6_FILTER: all blocked but 129
            raw.setsockopt(socket.IPPROTO_ICMPV6, 1, only_replies)
            raw.sendto(struct.pack(">BBHHH", 128, 0, 0, 7, 1) + b"narrows", (server.ip6, 0))
            return raw.recv(1500)

    answer = netlink.in_netns(client.path, echoed)
    assert (answer[:2], answer[4:]) == (bytes([129, 0]), struct.pack(">HH", 7, 1) + b"narrows")
    neighbours = {one["dst"]: one["state"] for one in client.ip_json("-6", "neighbour", "show", "dev", "eth0")}
    assert "REACHABLE" in neighbours[server.ip6]
    assert mesh.worker.header["accepted"] == 0
