"""Capture by eBPF in the agent: chosen and told, kept while nobody looks, and redirects where it cannot be."""
from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agent import netlink
from agent.capture.egress import netns_cookie
from agent.capture.ingress import FWMARK_ACCEPT
from agent.capture.loader import HOOKS, INGRESS, POD, PROXY
from tests.netns.agent.conftest import NARROWS, PORT, VIRTUAL, Connection, Instance
from tests.support import conntrack
from tests.support.bpftool import lookups, programs
from tests.support.cgroup import cgroup2
from tests.support.netns import Netns
from tests.support.wait import until

pytestmark = [pytest.mark.netns, pytest.mark.redirects("asks for eBPF itself")]

WAY = "narrows.mesh/capture"
ON_POD = {hook.name for hook in HOOKS if POD in hook.on}
ON_PROXY = {hook.name for hook in (*HOOKS, *INGRESS) if PROXY in hook.on}


def served(instance: Instance) -> bool:
    """The service's address is routed to nowhere: nobody who escapes capture has an answer."""
    return instance.get() == f"served / to {instance.client.ip} 200"


@pytest.fixture
def outside(instance: Instance) -> Netns:
    """A pod that is not in the mesh. (What captured pods of one node say to each other passes by 15006, inside a worker.)"""
    return instance.node.pod("outside")


def taken(instance: Instance) -> float:
    """Requests that destinations reported."""
    return sum(float(line.rpartition(" ")[2]) for line in instance.metrics()
               if line.startswith("istio_requests_total{") and 'reporter="destination"' in line)


def comes_in(instance: Instance, outside: Netns) -> None:
    """Who is outside is served through the proxy, and the server sees its address."""
    before = taken(instance)
    assert instance.get(outside, f"http://{instance.server.ip}:8080/") == f"served / to {outside.ip} 200"
    until(lambda: taken(instance) == before + 1, "the destination reports it")


def bare(instance: Instance, cgroup: str) -> None:
    """Nothing runs on it, or a moment after the pins of its links went nothing does."""
    until(lambda: programs(cgroup) == set(), f"no program on {cgroup}")


def redirects(netns: Netns) -> bool:
    return "REDIRECT" in netns.iptables_save(4) + netns.iptables_save(6)


def redirects_out(netns: Netns) -> bool:
    return "--to-ports 15001" in netns.iptables_save()


def hooked(instance: Instance, name: str, netns: Netns) -> bool:
    """All three say so: the agent, bpftool and the rules."""
    shown = instance.shown(name)
    return bool((shown["method"], shown["egress"], shown["ingress"], shown["reason"]) == ("ebpf", "ebpf", "ebpf", "captured")
                and programs(netns.cgroup) == ON_POD and lookups(netns) == 1 and not redirects(netns))


def redirected(instance: Instance, name: str, netns: Netns) -> dict[str, Any]:
    shown = instance.shown(name)
    assert shown["captured"] and shown["method"] == shown["egress"] == shown["ingress"] == "iptables", shown
    if netns.cgroup:
        bare(instance, netns.cgroup)
    until(lambda: lookups(netns) == 0, "no sk_lookup")
    assert redirects_out(netns) and "--to-ports 15006" in netns.iptables_save()
    assert netlink.read_sysctl(netns.path, FWMARK_ACCEPT) == "0"
    return shown


def test_both_directions_are_captured_by_hooks_without_rules_and_conntrack(instance: Instance, outside: Netns) -> None:
    instance.up("--capture", "ebpf")
    assert all("NARROWS" not in netns.iptables_save(family) for netns in (instance.client, instance.server) for family in (4, 6))
    assert hooked(instance, "client", instance.client) and hooked(instance, "web-0", instance.server)
    assert programs(instance.proxy) == ON_PROXY
    for _ in range(10):
        assert served(instance)
    until(lambda: instance.requests("source") == instance.requests("destination") == 10, "10 requests counted twice")
    for _ in range(5):
        comes_in(instance, outside)
    assert (conntrack.count(instance.client), conntrack.count(instance.server)) == (0, 0)
    lines = instance.metrics()
    assert 'narrows_capture_methods{direction="egress",method="ebpf"} 2.0' in lines
    assert 'narrows_capture_methods{direction="ingress",method="ebpf"} 2.0' in lines
    assert instance.ask("/server_info")["capture"]["ebpf"] == {"state": "ready", "reason": "", "directions": ["egress", "ingress"]}
    assert any("captured by ebpf in" in event["message"] for event in instance.events("Captured"))


def test_an_agent_that_is_killed_leaves_capture_in_force_and_the_next_one_adopts_it(instance: Instance, outside: Netns) -> None:
    instance.up("--capture", "ebpf")
    assert served(instance)
    comes_in(instance, outside)
    live, entered = Connection(instance), Connection(instance, outside)
    live.get()
    rules = instance.client.iptables_save()
    before = pinned(instance)
    for number in (signal.SIGKILL, signal.SIGTERM):
        instance.kill("agent", number)
        assert served(instance)
        assert instance.get(outside, f"http://{instance.server.ip}:8080/").startswith("served")
        for one in (live, entered):
            one.get()
        instance.start_agent("--capture", "ebpf")
        instance.ready()
        assert hooked(instance, "client", instance.client) and hooked(instance, "web-0", instance.server) and served(instance)
        comes_in(instance, outside)
        for one in (live, entered):
            one.get()
    for one in (live, entered):
        one.close()
    assert (instance.client.iptables_save(), pinned(instance)) == (rules, before)
    assert {event["message"].rpartition(": ")[2] for event in instance.events("Captured")} == {"0 changes"}
    assert not instance.events("Repaired")


def pins(instance: Instance) -> list[Path]:
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    return sorted(path for _, target, kind, *_ in mounts if kind == "bpf"
                  for path in Path(target).glob(f"narrows/*{instance.run_dir.name}/v*/*/*"))


def pinned(instance: Instance) -> list[str]:
    """An adopted link keeps its own pin."""
    return [f"{path} {path.stat().st_ino}" for path in pins(instance)]


def test_what_a_pod_whose_cgroup_nobody_names_connects_to_is_captured_by_redirects_and_says_why(instance: Instance) -> None:
    cgroup, instance.client.cgroup = instance.client.cgroup, ""
    instance.pod("client", instance.client, cgroup="")
    instance.up("--capture", "ebpf")
    shown = instance.shown("client")
    assert (shown["method"], shown["egress"], shown["ingress"]) == ("iptables+ebpf", "iptables", "ebpf")
    assert redirects_out(instance.client) and "--to-ports 15006" not in instance.client.iptables_save() and lookups(instance.client) == 1
    assert "names no cgroup" in shown["fallback"] and shown["fallback"] in shown["reason"]
    assert [event["about"] for event in instance.events("CaptureFallback")] == ["pod default/client"]
    assert served(instance) and hooked(instance, "web-0", instance.server)
    instance.client.cgroup = cgroup  # the runtime names it now
    instance.pod("client", instance.client)
    until(lambda: hooked(instance, "client", instance.client), "captured by hooks")
    assert served(instance)


def test_a_keeper_in_the_root_cgroup_is_not_served_and_everything_is_redirected(instance: Instance) -> None:
    instance.proxy = str(cgroup2())
    instance.up("--capture", "ebpf")
    shown = redirected(instance, "client", instance.client)
    assert "root of cgroup v2" in shown["fallback"] and "start it in a cgroup of its own" in shown["fallback"]
    assert served(instance)


def test_a_pods_annotation_goes_before_the_nodes_default_and_a_bad_one_is_told(instance: Instance) -> None:
    instance.pod("client", instance.client, **{WAY: "ebpf"})
    instance.up()
    assert hooked(instance, "client", instance.client) and served(instance)
    redirected(instance, "web-0", instance.server)
    instance.pod("client", instance.client, **{WAY: "epbf"})
    event = until(lambda: instance.events("AnnotationRefused"), "an event")[0]
    assert event["about"] == "pod default/client" and "'epbf', expected auto or ebpf or iptables" in event["message"]
    until(lambda: instance.shown("client")["method"] == "iptables", "the node's default")
    redirected(instance, "client", instance.client)
    assert served(instance)
    instance.pod("client", instance.client, **{WAY: "ebpf"})
    until(lambda: hooked(instance, "client", instance.client), "captured by hooks again")
    assert served(instance) and VIRTUAL not in instance.client.iptables_save()


# Asks the service without end over new connections and one that it keeps; a line for each answer, and the first wrong one ends it.
ASKER = """if True:
    import http.client, socket, sys
    address, port = sys.argv[1], int(sys.argv[2])
    kept = http.client.HTTPConnection(address, port, timeout=20)
    while True:
        fresh = http.client.HTTPConnection(address, port, timeout=20)
        for one in (kept, fresh):
            one.request("GET", "/")
            answer = one.getresponse()
            assert answer.read().startswith(b"served / to ") and answer.status == 200, answer.status
            assert one is fresh or one.sock is not None
        fresh.close()
        print("x", flush=True)"""


class Asker:
    """ASKER in the client's pod, which asks the service; or in another, which asks the server itself."""

    def __init__(self, instance: Instance, other: Netns | None = None) -> None:
        self.log = instance.run_dir / "asker.log"
        place = (VIRTUAL, str(PORT)) if other is None else (instance.server.ip, "8080")
        with self.log.open("wb") as log:
            self.process = (other or instance.client).start(sys.executable, "-c", ASKER, *place, stdout=log, stderr=log)

    def answers(self) -> int:
        assert self.process.poll() is None, self.log.read_text()[-2000:]
        return self.log.read_text().count("x\n")

    def goes_on(self, much: int = 20) -> None:
        before = self.answers()
        until(lambda: self.answers() >= before + much, f"{much} more answers", 60)


def test_a_pod_that_changes_its_method_under_load_has_no_failed_request_and_none_escapes(instance: Instance) -> None:
    instance.up("--capture", "ebpf")
    asker = Asker(instance)
    asker.goes_on()
    for _ in range(2):
        instance.pod("client", instance.client, **{WAY: "iptables"})
        until(lambda: instance.shown("client")["method"] == "iptables", "captured by redirects")
        redirected(instance, "client", instance.client)
        asker.goes_on()
        instance.pod("client", instance.client, **{WAY: "ebpf"})
        until(lambda: hooked(instance, "client", instance.client), "captured by hooks")
        asker.goes_on()


@pytest.mark.parametrize("backend", ["iptables", "nftables"])
def test_a_pod_that_changes_its_method_under_load_takes_every_request_through_the_proxy(instance: Instance, outside: Netns,
                                                                                       backend: str) -> None:
    instance.up("--capture", backend)
    asker = Asker(instance, outside)
    asker.goes_on()
    for _ in range(2):
        instance.pod("web-0", instance.server, **{WAY: "ebpf"})
        until(lambda: hooked(instance, "web-0", instance.server), "captured by hooks")
        asker.goes_on()
        instance.pod("web-0", instance.server)
        until(lambda: instance.shown("web-0")["method"] == backend, "captured by redirects")
        until(lambda: lookups(instance.server) == 0, "no sk_lookup")
        asker.goes_on()
    asker.process.terminate()
    asker.process.wait()
    asked = 2 * asker.log.read_text().count("x\n")
    until(lambda: asked <= taken(instance) <= asked + 2, "each was taken; the last ones have not been told")


def test_pods_change_their_method_with_the_agent_that_comes_after_a_kill(instance: Instance) -> None:
    instance.up("--capture", "ebpf")
    asker = Asker(instance)
    asker.goes_on()
    for option in ("iptables", "ebpf", "nftables", "ebpf"):
        instance.kill("agent")
        asker.goes_on(5)
        instance.start_agent("--capture", option)
        instance.ready()
        assert instance.shown("client")["method"] == option
        until(lambda: programs(instance.client.cgroup) == (ON_POD if option == "ebpf" else set()), "the pod's cgroup follows")  # noqa: B023
        until(lambda: programs(instance.proxy) == (ON_PROXY if option == "ebpf" else set()), "the keeper's cgroup follows")  # noqa: B023
        asker.goes_on(5)


def undo_link(instance: Instance, cgroup: str) -> None:
    """The pin goes, and with it the link."""
    number = Path(cgroup).stat().st_ino
    next(path for path in pins(instance) if path.name == f"{number}_sockops").unlink()


def undo_attachment(instance: Instance, cgroup: str) -> None:
    """The link is taken off, and its pin stays."""
    number = Path(cgroup).stat().st_ino
    pin = next(path for path in pins(instance) if path.name == f"{number}_sockops")
    shown = json.loads(instance.node.netns.run("bpftool", "-j", "link", "show", "pinned", str(pin)).stdout)
    instance.node.netns.run("bpftool", "link", "detach", "id", str(shown["id"]))


def undo_entry(instance: Instance, name: str) -> None:
    pods = next(path for path in pins(instance) if path.name == (name if name == "inbound" else "pods"))
    for one in json.loads(instance.node.netns.run("bpftool", "-j", "map", "dump", "pinned", str(pods)).stdout):
        instance.node.netns.run("bpftool", "map", "delete", "pinned", str(pods), "key", "hex", *[byte[2:] for byte in one["key"]])


def undo_lookup(instance: Instance, _: str) -> None:
    """The client's, by its namespace."""
    number = netns_cookie(instance.client.path)
    next(path for path in pins(instance) if path.name == f"in-{number}-sk-lookup").unlink()


def undo_sysctl(instance: Instance, _: str) -> None:
    netlink.write_sysctl(instance.client.path, FWMARK_ACCEPT, 0)


def undo_listen(instance: Instance, cgroup: str) -> None:
    """The keeper's link, taken off; its pin stays."""
    pin = next(path for path in pins(instance) if path.name == f"in-{Path(cgroup).stat().st_ino}-listen")
    shown = json.loads(instance.node.netns.run("bpftool", "-j", "link", "show", "pinned", str(pin)).stdout)
    instance.node.netns.run("bpftool", "link", "detach", "id", str(shown["id"]))


def undo_inbound(instance: Instance, _: str) -> None:
    undo_entry(instance, "inbound")


def undo_everything(instance: Instance, _: str) -> None:
    for path in pins(instance):
        path.unlink()


@pytest.mark.parametrize(("whose", "undo"), [
    *[("client", undo) for undo in (undo_link, undo_attachment, undo_entry, undo_lookup, undo_inbound, undo_sysctl, undo_everything)],
    *[("proxy", undo) for undo in (undo_link, undo_attachment, undo_listen)]])
def test_hooks_that_somebody_else_takes_away_are_put_back_and_told(instance: Instance, outside: Netns, whose: str,
                                                                   undo: Callable[[Instance, str], None]) -> None:
    instance.up("--capture", "ebpf")
    assert served(instance)
    undo(instance, instance.client.cgroup if whose == "client" else instance.proxy)
    about = "pod default/client" if whose == "client" else "keeper"
    event = until(lambda: next((one for one in instance.events("Repaired") if one["about"] == about), None), "the repair is told", 30)
    assert event["warning"] and "socket hooks" in event["message"]
    assert hooked(instance, "client", instance.client) and programs(instance.proxy) == ON_PROXY
    until(lambda: served(instance), "served again")
    comes_in(instance, outside)
    if whose == "client":
        assert instance.shown("client")["repairs"] == 1 and instance.metric("narrows_capture_repairs_total") >= 1


def test_a_cgroup_that_the_runtime_makes_again_is_linked_again(instance: Instance) -> None:
    instance.up("--capture", "ebpf")
    assert served(instance)
    path = Path(instance.client.cgroup)
    instance.client.cgroup = ""  # what looks at the rules runs outside
    before = path.stat().st_ino
    path.rmdir()
    until(lambda: instance.shown("client")["method"] == "iptables+ebpf", "without a cgroup it is redirected", 30)
    assert "is not there" in instance.shown("client")["fallback"] and redirects_out(instance.client)
    path.mkdir()
    instance.client.cgroup = str(path)
    until(lambda: hooked(instance, "client", instance.client), "the new one is linked", 30)
    assert served(instance) and path.stat().st_ino != before
    path.rmdir()
    path.mkdir()  # at once: no look falls in between, or one does
    until(lambda: hooked(instance, "client", instance.client), "linked once more", 30)
    assert served(instance)
    assert not [pin for pin in pins(instance) if pin.name.startswith(f"{before}_")]


def test_what_pods_leave_goes_with_them_also_when_no_agent_looked(instance: Instance) -> None:
    late = instance.node.pod("late")
    instance.pod("late", late)
    instance.up("--capture", "ebpf")
    assert hooked(instance, "late", late)
    of_late, of_client = (f"{Path(pod.cgroup).stat().st_ino}_" for pod in (late, instance.client))
    instance.remove_pod("late")
    until(lambda: not any(pin.name.startswith(of_late) for pin in pins(instance)), "the links go")
    bare(instance, late.cgroup)
    assert entries(instance) == entries(instance, "inbound") == 2
    instance.kill("agent")
    instance.remove_pod("client")
    instance.start_agent("--capture", "ebpf")
    instance.ready()
    until(lambda: not any(pin.name.startswith(of_client) for pin in pins(instance)), "the links go", 30)
    bare(instance, instance.client.cgroup)
    assert entries(instance) == entries(instance, "inbound") == 1
    assert programs(instance.proxy) == ON_PROXY and hooked(instance, "web-0", instance.server)


def test_opting_out_takes_the_hooks_off_and_live_connections_finish(instance: Instance, outside: Netns) -> None:
    instance.up("--capture", "ebpf")
    live, entered = Connection(instance), Connection(instance, outside)
    live.get()
    for name, netns in (("web-0", instance.server), ("client", instance.client)):
        instance.pod(name, netns, intercept="disabled")
        until(lambda: not instance.shown(name)["captured"], "the pod is released")  # noqa: B023
        live.get()
        entered.get()
        until(lambda: lookups(netns) == 0, "no sk_lookup")  # noqa: B023
        assert netlink.read_sysctl(netns.path, FWMARK_ACCEPT) == "0"
    assert not served(instance) and entries(instance) == entries(instance, "inbound") == 0
    for one in (live, entered):
        one.get()
        one.close()
    until(lambda: programs(instance.client.cgroup) == set(), "the links go with the last connection", 30)
    until(lambda: "NARROWS" not in instance.client.iptables_save(), "and the marks", 30)


def test_a_namespace_that_is_cleaned_by_hand_keeps_no_hook_and_the_agent_puts_them_back(instance: Instance) -> None:
    instance.up("--capture", "ebpf")
    sleeper = instance.client.start("sleep", "60")  # by its namespace the cgroup is known
    instance.kill("agent")
    said = instance.node.netns.run(*NARROWS, "capture", "clean", "--netns", instance.client.path, timeout=60).stdout
    assert said.count("the pod in") == 2 and "NARROWS" not in instance.client.iptables_save()
    bare(instance, instance.client.cgroup)
    until(lambda: lookups(instance.client) == 0, "no sk_lookup")
    assert entries(instance) == entries(instance, "inbound") == 1
    assert programs(instance.server.cgroup) == ON_POD
    instance.start_agent("--capture", "ebpf")
    instance.ready()
    assert hooked(instance, "client", instance.client) and served(instance)
    assert sleeper.poll() is None


def test_a_cleaned_instance_leaves_nothing(instance: Instance) -> None:
    instance.up("--capture", "ebpf")
    assert served(instance) and hooked(instance, "web-0", instance.server)
    for name in ("agent", "keeper"):
        instance.kill(name, signal.SIGTERM)
    instance.node.netns.run(*NARROWS, "capture", "clean", "--instance", str(instance.run_dir), timeout=60)
    until(lambda: lookups(instance.client) + lookups(instance.server) == 0, "no sk_lookup")
    for cgroup in (instance.client.cgroup, instance.server.cgroup, instance.proxy):
        bare(instance, cgroup)
    assert pins(instance) == []


def entries(instance: Instance, name: str = "pods") -> int:
    """Pods in the map."""
    found = next(path for path in pins(instance) if path.name == name)
    return len(json.loads(instance.node.netns.run("bpftool", "-j", "map", "dump", "pinned", str(found)).stdout))
