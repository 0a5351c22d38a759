"""What a worker does for its keeper: transactions, pods, sockets, the end; and what it gave up."""
from __future__ import annotations

import os
import socket
import struct
import threading
from dataclasses import replace
from ipaddress import ip_address

import pytest

from agent import netlink
from agent.dataplane import blobs
from agent.model.routing import Balancer, Cluster, Endpoint, WeightedCluster
from agent.model.settings import ProxySettings
from agent.model.workload import Protocol
from tests.support.hbone import KEY
from tests.support.mesh import (
    HTTP_PORT,
    SCOPE,
    SERVER,
    SERVICE,
    SERVICE_INDEX,
    TCP_PORT,
    Mesh,
    Pods,
    Web,
    any_path,
    cluster,
    destination,
    echo,
    everything,
    read_message,
    receive,
    receive_all,
    request,
    response,
    workload,
)
from tests.support.wait import until
from tests.support.worker import APPLIED, ATTACH, DRAINED, FAILED, READY, UID, Worker

pytestmark = pytest.mark.netns


def test_a_worker_has_no_privilege_left(mesh: Mesh) -> None:
    until(lambda: mesh.worker.events == [READY], "READY")
    for name in ("CapEff", "CapPrm", "CapInh", "CapBnd", "CapAmb"):
        assert int(mesh.worker.status_field(name), 16) == 0, name
    assert mesh.worker.status_field("NoNewPrivs") == "1"
    assert set(mesh.worker.status_field("Uid").split()) == {str(UID)}
    assert mesh.worker.status_field("Groups") == ""
    assert mesh.worker.status_field("Threads") == "1"


def test_a_bad_transaction_is_refused_with_a_text_and_changes_nothing(mesh: Mesh) -> None:
    mesh.configure(*everything(mesh))
    mesh.origin(8080, Web())
    broken = blobs.Put(blobs.Kind.CLUSTER, f"{SCOPE}|all", b"\x01")
    for sequence in (mesh.worker.offer(destination(HTTP_PORT), broken), mesh.worker.offer_raw(b"no transaction")):
        until(lambda at=sequence: at in mesh.worker.answers, "an answer")
        kind, payload = mesh.worker.answers[sequence]
        assert kind == FAILED
        assert len(payload[12:]) > 10
    connection = mesh.dial()
    connection.sendall(request())
    assert read_message(connection).status == 200


def test_a_worker_without_a_free_descriptor_says_that_it_could_not_take_what_it_was_given(pods: Pods) -> None:
    def lost(sequence: int) -> bool:
        kind, payload = until(lambda: worker.answers.get(sequence), "an answer", timeout=10)
        return kind == FAILED and payload[:8] == bytes(8) and payload[12:].decode().startswith("no descriptor came with it")

    def attach(handle: int) -> int:
        with netlink.in_netns(pods.other.path, lambda: socket.create_server(("127.0.0.1", 0))) as listener:
            return worker.send(ATTACH, struct.pack("<II", handle, 1) + b"\x01", [listener.fileno()])

    def commit() -> int:
        return worker.offer(blobs.put_settings(ProxySettings()))

    with Worker(rlimit=64, stock=False) as worker:
        worker.commit(blobs.put_settings(ProxySettings()))
        sent = [attach(handle) for handle in range(1, 70)]
        until(lambda: sent[-1] in worker.answers, "an answer to the last listener that had no room", timeout=10)
        assert sent[0] not in worker.answers, "there was room for the first"
        assert lost(sent[-1]) and lost(commit()) and lost(worker.send(KEY, struct.pack("<II", 9, 1) + b"x", [0]))
        for handle in range(1, 70):
            worker.detach(handle)
        worker.commit(blobs.put_settings(ProxySettings()))
        assert not worker.ended()


def test_commits_under_traffic_lose_no_request(mesh: Mesh) -> None:
    mesh.configure(*everything(mesh))
    mesh.origin(8080, Web(response(b"a")))
    mesh.origin(8081, Web(response(b"b")))
    stop = threading.Event()
    asked: list[bytes] = []

    def drive() -> None:
        connection = mesh.dial()
        while not stop.is_set():
            connection.sendall(request())
            asked.append(read_message(connection).body)

    threads = [threading.Thread(target=drive) for _ in range(2)]
    for thread in threads:
        thread.start()
    for turn in range(200):
        mesh.worker.commit(cluster("all", mesh.endpoint(8080 + turn % 2)),
                           destination(HTTP_PORT, http=(any_path(WeightedCluster("all", 1)),)))
    stop.set()
    for thread in threads:
        thread.join(10)
    assert set(asked) == {b"a", b"b"}
    codes = {record["code"] for record in mesh.worker.records()}
    assert codes == {200}


def test_a_detached_pod_takes_no_new_connections_and_keeps_the_live_ones(mesh: Mesh) -> None:
    mesh.configure(*everything(mesh), protocol=Protocol.TCP)
    mesh.origin(8080, echo)
    live = mesh.dial(port=TCP_PORT)
    live.sendall(b"1")
    assert receive(live, 1) == b"1"
    mesh.worker.detach(1)
    until(lambda: mesh.worker.header["sockets_ready"] < 16, "the stock is closed")

    def refused() -> bool:
        try:
            mesh.dial(port=TCP_PORT)
        except ConnectionRefusedError:
            return True
        return False

    until(refused, "new connections are refused")
    live.sendall(b"2")
    assert receive(live, 1) == b"2"
    mesh.worker.attach(1, mesh.pods.client)
    again = mesh.dial(port=TCP_PORT)
    again.sendall(b"3")
    assert receive(again, 1) == b"3"


def test_without_sockets_a_request_is_answered_503_after_five_seconds(mesh: Mesh) -> None:
    mesh.configure(*everything(mesh))
    mesh.origin(8080, Web())
    mesh.worker.detach(1)
    mesh.worker.detach(2)
    mesh.worker.stock = False
    mesh.attach()
    http, tcp = mesh.dial(), mesh.dial(port=TCP_PORT)
    http.sendall(request())
    http.settimeout(8)
    tcp.settimeout(8)
    answer = read_message(http)
    assert answer.status == 503
    with pytest.raises(ConnectionResetError):
        tcp.recv(1)
    assert {record["flag"] for record in mesh.worker.records()} == {"OM"}
    mesh.worker.stock = True  # it asks again by itself
    connection = mesh.dial()
    connection.sendall(request())
    assert read_message(connection).status == 200


def test_a_pod_has_a_bound_of_connections_and_the_others_wait_in_the_backlog(mesh: Mesh) -> None:
    mesh.configure(*everything(mesh), protocol=Protocol.TCP)
    mesh.settings(connections_per_pod=3)
    mesh.origin(8080, echo)
    connections = [mesh.dial(port=TCP_PORT) for _ in range(6)]
    for connection in connections:
        connection.sendall(b"x")
    served = connections[:3]
    for connection in served:
        assert receive(connection, 1) == b"x"
    assert mesh.worker.header["accepted"] == 6  # three by each of the two pods
    for connection in served:
        connection.close()
    for connection in connections[3:]:
        assert receive(connection, 1) == b"x"


@pytest.mark.parametrize(("gone", "side"), [(blobs.Delete(blobs.Kind.WORKLOAD, "w-server"), ("destination", SERVER)),
                                            (blobs.Delete(blobs.Kind.SERVICE, SERVICE), ("service", SERVICE_INDEX))])
def test_series_of_who_is_gone_stay_for_who_reads_them_until_a_thousand_others_are_gone_too(
        mesh: Mesh, gone: blobs.Delete, side: tuple[str, int]) -> None:
    mesh.configure(*everything(mesh))
    mesh.origin(8080, Web())
    with mesh.dial() as connection:
        connection.sendall(request())
        assert read_message(connection).status == 200

    def known() -> bool:
        return any(key[side[0]] == side[1] for key, _ in mesh.worker.series())

    until(known, "the request is counted")
    mesh.quiet()
    others = [replace(workload(f"gone-{number}", mesh.pods.other), addresses=(ip_address(0x0AC80000 + number),)) for number in range(1024)]
    mesh.worker.commit(*(blobs.put_workload(1000 + number, other, lambda _: SERVICE_INDEX) for number, other in enumerate(others)))
    mesh.worker.commit(gone)
    mesh.worker.commit(*(blobs.Delete(blobs.Kind.WORKLOAD, other.uid) for other in others[:-1]))
    assert known()
    mesh.worker.commit(blobs.Delete(blobs.Kind.WORKLOAD, others[-1].uid))
    until(lambda: not known(), "its series are free")


def test_when_descriptors_run_out_connections_wait_and_nothing_spins(mesh: Mesh) -> None:
    with Worker(rlimit=48) as poor:
        mine = Mesh(mesh.pods, poor)
        try:
            mesh.worker.detach(1)
            mesh.worker.detach(2)
            until(lambda: mesh.worker.header["sockets_ready"] == 0, "detached")
            poor.commit(blobs.put_settings(ProxySettings(hold_timeout_ms=60_000)))  # who waits longer is refused: not while we dial
            mine.configure(*everything(mine), protocol=Protocol.TCP)  # before sockets take the descriptors that commits come with
            mine.attach()
            origin = mine.origin(8080, echo)
            connections = [mine.dial(port=TCP_PORT) for _ in range(40)]
            until(lambda: poor.header["downstream_open"] >= 6, "it serves what it can")
            turns = poor.header["loop_turns"]
            threading.Event().wait(0.5)
            assert poor.header["loop_turns"] - turns < 200
            assert poor.header["downstream_open"] < 48 / 2, "a connection is taken when its server's can be had too"
            assert poor.header["accept_errors"] == 0, "the kernel never had to say no"
            for connection in connections:
                connection.close()
            until(lambda: origin.open == 0, "all ended", timeout=10)

            def works() -> bool:
                try:
                    connection = mine.dial(port=TCP_PORT)
                    connection.sendall(b"y")
                    return connection.recv(1) == b"y"
                except OSError:
                    return False

            until(works, "it serves again", timeout=10)
            assert not poor.ended()
        finally:
            for one in mine.sockets:
                one.close()
            for one in mine.origins:
                one.close()


def test_drain_lets_live_connections_end_and_then_the_worker_ends(mesh: Mesh) -> None:
    mesh.configure(*everything(mesh))
    mesh.origin(8080, Web())
    with Worker() as leaving:
        mine = Mesh(mesh.pods, leaving)
        mesh.worker.detach(1)
        mesh.worker.detach(2)
        until(lambda: mesh.worker.header["sockets_ready"] == 0, "detached")
        mine.attach()
        mine.configure(*everything(mine))
        connection, idle = mine.dial(), mine.dial()
        connection.sendall(request()[:-2])
        idle.sendall(request())
        assert read_message(idle).status == 200
        until(lambda: leaving.header["downstream_open"] >= 3, "accepted")
        sequence = leaving.drain(5000)
        assert receive_all(idle) == b""
        connection.sendall(b"\r\n")
        answer = read_message(connection)
        assert (answer.status, answer.one("connection")) == (503, "close") or answer.status == 200
        until(lambda: leaving.ended(), "the worker ended", timeout=6)
        assert os.waitstatus_to_exitcode(leaving.status or 0) == 0
        until(lambda: sequence in leaving.answers, "the worker said that it was drained")
        assert leaving.answers[sequence][0] == DRAINED
        for one in mine.sockets:
            one.close()


def test_drain_is_bounded_in_time(mesh: Mesh) -> None:
    mesh.configure(*everything(mesh), protocol=Protocol.TCP)
    mesh.origin(8080, echo)
    with Worker() as leaving:
        mine = Mesh(mesh.pods, leaving)
        mesh.worker.detach(1)
        mesh.worker.detach(2)
        until(lambda: mesh.worker.header["sockets_ready"] == 0, "detached")
        mine.attach()
        mine.configure(*everything(mine), protocol=Protocol.TCP)
        connection = mine.dial(port=TCP_PORT)
        connection.sendall(b"x")
        assert receive(connection, 1) == b"x"
        leaving.drain(300)
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
        until(lambda: leaving.ended(), "the worker ended")
        connection.close()


def test_a_worker_whose_keeper_is_gone_finishes_and_ends(mesh: Mesh) -> None:
    mesh.configure(*everything(mesh), protocol=Protocol.TCP)
    mesh.origin(8080, echo)
    with Worker() as orphan:
        mine = Mesh(mesh.pods, orphan)
        mesh.worker.detach(1)
        mesh.worker.detach(2)
        until(lambda: mesh.worker.header["sockets_ready"] == 0, "detached")
        mine.attach()
        mine.configure(*everything(mine), protocol=Protocol.TCP)
        connection = mine.dial(port=TCP_PORT)
        connection.sendall(b"x")
        assert receive(connection, 1) == b"x"
        orphan.control.shutdown(socket.SHUT_RDWR)
        connection.sendall(b"y")
        assert receive(connection, 1) == b"y"
        connection.close()
        until(lambda: orphan.ended(), "the worker ended", timeout=6)
        assert os.waitstatus_to_exitcode(orphan.status or 0) == 0


def test_a_workload_dialled_by_its_own_address_is_counted_as_http(mesh: Mesh) -> None:
    mesh.configure(*everything(mesh))
    mesh.origin(8080, Web())
    connection = mesh.dial(mesh.pods.server.ip, 8080)
    connection.sendall(request())
    assert read_message(connection).status == 200
    until(lambda: {key["reporter"] for key, _ in mesh.worker.series() if key["protocol"] == "http"} ==
          {"source", "destination"}, "both sides count HTTP")


def test_an_endpoint_elsewhere_is_dialled_plainly(mesh: Mesh) -> None:
    there = Cluster(SCOPE, "all", SERVICE, Balancer.ROUND_ROBIN, 1000, (Endpoint(ip_address(mesh.pods.other.ip), 8090),))
    mesh.configure(blobs.put_cluster(there, lambda _: 7), destination(HTTP_PORT, http=(any_path(WeightedCluster("all", 1)),)))
    origin = mesh.origin(8090, Web(), netns=mesh.pods.other)
    connection = mesh.dial()
    connection.sendall(request())
    assert read_message(connection).status == 200
    assert origin.peers == [mesh.pods.client.ip]


def test_the_first_transaction_makes_the_worker_ready(mesh: Mesh) -> None:
    assert mesh.worker.events == [READY]
    assert [kind for kind, _ in mesh.worker.answers.values()] == [APPLIED]


def test_what_is_missing_is_asked_for_again_each_second_and_once_for_all_who_wait(mesh: Mesh) -> None:
    mesh.configure()
    connections = [mesh.dial(port=TCP_PORT) for _ in range(5)]
    until(lambda: mesh.worker.header["held"] == len(connections), "all are held")
    until(lambda: len(mesh.worker.misses) == 2, "asked again", timeout=3)
    assert len(set(mesh.worker.misses)) == 1
