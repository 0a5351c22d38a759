"""Pods of one family, and IPv6 that comes and goes while a pod is captured."""
from __future__ import annotations

import json
import socket
import subprocess
import time
from typing import Any

import pytest

from agent import netlink
from agent.app.pods import WATCH_SECONDS
from tests.netns.agent.conftest import NARROWS, PORT, VIRTUAL, Instance
from tests.support.egress import TRY
from tests.support.lab import CAPTURE
from tests.support.logs import whole_lines
from tests.support.mesh import Origin
from tests.support.netns import Netns
from tests.support.wait import until

pytestmark = pytest.mark.netns

VIRTUAL6 = "fd00:10:96::10"


def switch(pod: Netns, off: bool) -> None:
    for where in ("all", "default", "lo", "eth0"):
        pod.run("sh", "-c", f"echo {int(off)} > /proc/sys/net/ipv6/conf/{where}/disable_ipv6")
    if not off:  # the addresses went with the switch
        pod.run("ip", "-6", "address", "add", f"{pod.ip6}/64", "dev", "eth0", "nodad")
        pod.run("ip", "-6", "route", "add", "default", "via", "fd00:244:1::1")


def shown(instance: Instance, view: str) -> str:
    """What `narrows config` prints."""
    done = subprocess.run([*NARROWS, "config", view, "--run-dir", str(instance.run_dir)], capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.parametrize("family", [4, 6])
def test_pods_that_have_one_family_alone_are_served_by_it(instance: Instance, family: int) -> None:
    """From the pod file and the service's address to what is counted, logged and shown, nothing has an address of the other family."""
    pods = {"client": instance.client, "web-0": instance.server}
    for name, pod in pods.items():
        if family == 6:
            pod.run("ip", "-4", "address", "flush", "dev", "eth0")
            pod.ip = pod.ip6
        else:
            switch(pod, off=True)
        instance.pod(name, pod)
    virtual = VIRTUAL6 if family == 6 else VIRTUAL
    if family == 6:
        rule = instance.config / "web.yaml"
        rule.write_text(rule.read_text().replace(f"clusterIP: {VIRTUAL}", f"clusterIP: '{VIRTUAL6}'\n  ipFamilies: [IPv6]"))
    instance.up()
    assert [pod["captured"] for pod in instance.ask("/pods")] == [True, True]
    host = f"[{virtual}]" if family == 6 else virtual
    for _ in range(3):
        assert instance.get(where=f"http://{host}:{PORT}/") == f"served / to {instance.client.ip} 200"
    until(lambda: instance.requests("source") == instance.requests("destination") == 3, "counted on both sides")
    records = [json.loads(line) for line in until(lambda: whole_lines(instance.run_dir / "access.log"), "an access log")]
    source, server = (f"[{pod.ip}]" if family == 6 else pod.ip for pod in (instance.client, instance.server))
    assert {one["upstream_host"] for one in records} == {f"{server}:8080"}
    assert {one["downstream_remote_address"].rpartition(":")[0] for one in records} == {source}
    assert virtual in shown(instance, "services")
    for view in ("workloads", "endpoints"):
        assert instance.server.ip in shown(instance, view)
    if CAPTURE != "ebpf":
        assert ("REDIRECT" in instance.client.iptables_save(6)) is (family == 6)
        assert "REDIRECT" in instance.client.iptables_save(4), "an address may come later"


def test_ipv6_that_is_switched_on_and_off_while_a_pod_is_captured_is_captured_when_it_is_on(instance: Instance) -> None:
    """Neither is a pod left half captured, nor does one without IPv6 count as one whose rules cannot be repaired."""
    switch(instance.client, off=True)
    instance.up()
    assert "REDIRECT" not in instance.client.iptables_save(6)
    direct = f"http://[{instance.server.ip6}]:8080/"
    for times in (1, 2):
        switch(instance.client, off=False)
        until(lambda: "local default dev lo" in ways(instance.client), "the way back is there")
        until(lambda: CAPTURE == "ebpf" or "REDIRECT" in instance.client.iptables_save(6), "IPv6 is captured")
        assert instance.shown("client")["captured"]
        until(lambda: instance.get(where=direct) == f"served / to {instance.client.ip6} 200", "the server is reached by IPv6")
        until(lambda times=times: len(outbound(instance)) >= times, "by the client's proxy")
        instance.ready()
        switch(instance.client, off=True)
        enough = time.monotonic() + 2 * WATCH_SECONDS  # two looks at the pod fall into this time, and find nothing that cannot be repaired
        while time.monotonic() < enough:
            assert instance.get() == f"served / to {instance.client.ip} 200"
            assert not [text for text in instance.ask("/ready")["missing"] if "cannot" in text]
        instance.ready()
    assert not instance.events("CaptureFailed")


@pytest.mark.parametrize("capture", ["ebpf", "auto"])
def test_a_family_that_the_runtime_does_not_name_never_passes_by_the_proxy(instance: Instance, capture: str) -> None:
    """The pod files name IPv4 alone. Whoever reached the other side and is not in the access log went past the proxy."""
    client, server, outside = instance.client, instance.server, instance.node.pod("outside")
    canary = Origin(outside, 9000, answer)
    there = f"http://[{outside.ip6}]:9000/"
    netlink.delete_address(client.path, "eth0", f"{client.ip6}/64")
    try:
        instance.up("--capture", capture)
        if capture == "ebpf":
            assert families(instance) == [
                {"family": "IPv4", "address": client.ip, "source": "podIPs", "refused": ""},
                {"family": "IPv6", "address": None, "source": None,
                 "refused": "its runtime (podIPs) names no address and its namespace has none"}]
        instance.kill("agent")  # nobody sees the address that comes now
        come(client)
        if capture == "ebpf":
            assert client.python(TRY, outside.ip6, "9000").stdout.strip() == "EPERM"
            assert canary.peers == []
        else:
            assert instance.get(where=there) == "canary 200"

        instance.start_agent("--capture", capture)
        instance.ready()
        until(lambda: instance.get(where=there) == "canary 200", "the canary is reached")
        if capture == "ebpf":
            assert families(instance)[1] == {"family": "IPv6", "address": client.ip6, "source": "namespace", "refused": ""}
        until(lambda: len(to(instance, outside.ip6)) == len(canary.peers), "through the proxy")

        before = taken(instance)
        assert instance.get(outside, f"http://[{server.ip6}]:8080/") == f"served / to {outside.ip6} 200"
        until(lambda: taken(instance) == before + 1, "what comes in goes through the proxy")
        if capture == "ebpf":
            netlink.delete_address(client.path, "eth0", f"{client.ip6}/64")
            until(lambda: families(instance)[1]["refused"], "the address has gone", 30)
            come(client, f"{client.ip6}2")
            until(lambda: families(instance)[1]["address"] == f"{client.ip6}2", "the next one is found", 30)
            until(lambda: instance.get(where=there) == "canary 200", "the canary is reached")
            until(lambda: len(to(instance, outside.ip6)) == len(canary.peers), "through the proxy")
            assert len(instance.events("OwnAddress")) == 2
    finally:
        canary.close()


def answer(connection: socket.socket) -> None:
    while b"\r\n\r\n" not in connection.recv(4096):
        pass
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\nConnection: close\r\n\r\ncanary")


def come(pod: Netns, address: str = "") -> None:
    """The route goes with the last address of its kind."""
    netlink.add_address(pod.path, "eth0", f"{address or pod.ip6}/64")
    netlink.add_route(pod.path, "::/0", gateway="fd00:244:1::1")


def families(instance: Instance) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = instance.shown("client")["families"]
    return found


def taken(instance: Instance) -> float:
    """Requests that the server's proxy reported."""
    return sum(float(line.rpartition(" ")[2]) for line in instance.metrics()
               if line.startswith("istio_requests_total{") and 'reporter="destination"' in line)


def ways(pod: Netns) -> str:
    """The kernel has no table 100 before its first route."""
    return pod.run("ip", "-6", "route", "show", "table", "100", check=False).stdout


def outbound(instance: Instance) -> list[dict[str, Any]]:
    """Requests of the client to the server's IPv6 address."""
    return to(instance, instance.server.ip6, 8080)


def to(instance: Instance, address: str, port: int = 9000) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in whole_lines(instance.run_dir / "access.log")]
    return [one for one in records if one["reporter"] == "source" and one["upstream_host"] == f"[{address}]:{port}"]
