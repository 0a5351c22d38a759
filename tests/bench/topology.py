"""One origin namespace and one client namespace per proxy, joined by a veth each; capture in every client's but the direct one.

    client namespace (10.60.k.2)                                    origin namespace (10.60.k.1, and 0.0.0.0:8080 ... for all)
      load generator -> 10.96.0.10:PORT, REDIRECT -> proxy :15001  ----veth---->  origin
      (direct: load generator -> 10.60.k.1:PORT                    ----veth---->  origin)

The rules are the agent's own plan with the origin's range excluded: what the proxy dials itself goes out, and every proxy pays
for the same rules. A proxy has a namespace of its own, so that all can stand ready while their turns alternate.
"""
from __future__ import annotations

import asyncio
import os
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import ip_network
from pathlib import Path

import psutil

from agent import netlink
from agent.capture.plan import plan
from agent.capture.reconcile import Reconciler
from agent.model.pod import CaptureSettings
from tests.support.netns import Namespaces, Netns
from tests.support.wait import until

LOAD_CORE, PROXY_CORE = 0, 1
VIP = "10.96.0.10"  # routed to nowhere: only capture answers there
CAPTURED_PORT = 15001
CONGESTION = "reno"  # bbr, many machines' default, paces bulk over a veth to a third (shared datapath notes, README)
SYSCTLS = {
    "net.ipv4.tcp_congestion_control": CONGESTION,
    "net.ipv4.ip_local_port_range": "1024 65535",  # one connection a request: 60,000 wait in TIME_WAIT for 60 s
    "net.ipv4.tcp_tw_reuse": 1,
    "net.ipv4.ip_nonlocal_bind": 1,  # HAProxy and nginx refuse nothing of ours; harmless elsewhere
    "net.core.somaxconn": 16384,  # 10,000 idle connections are opened in one go
    "net.ipv4.tcp_max_syn_backlog": 16384,
}
CONNTRACK = {"net.netfilter.nf_conntrack_tcp_timeout_time_wait": 1}  # s; a table full of dead connections measures the table


class BenchError(RuntimeError):
    """The benchmark cannot be run, or what it measured is not to be trusted. The text says why and what to do."""


@dataclass
class Site:
    """A client namespace; `address` is the origin's, as seen from here."""

    netns: Netns
    address: str
    captured: bool

    def target(self, origin_port: int) -> str:
        """What the load generator dials."""
        return f"{VIP if self.captured else self.address}:{origin_port}"


class Topology:
    """Makes sites. `close` ends what was started in them."""

    def __init__(self) -> None:
        check_machine()
        self.namespaces = Namespaces()
        try:
            self.origin = self.namespaces.make("origin")
            settle(self.origin.path, SYSCTLS)
        except BaseException:
            self.namespaces.close()
            raise
        self._sites = 0

    def site(self, label: str, *, captured: bool) -> Site:
        return self._join(label, self.origin, "10.60", captured=captured)

    def pair(self, label: str) -> tuple[Site, Site]:
        """A captured client, and a server namespace of its own (its Site: what is local to it)."""
        server = self.namespaces.make(f"{label}-server")
        settle(server.path, SYSCTLS)
        netlink.set_link(server.path, "lo", up=True)
        site = self._join(label, server, "10.61", captured=True)
        server.ip = site.address
        return site, Site(server, site.address, captured=False)

    def _join(self, label: str, server: Netns, prefix: str, *, captured: bool) -> Site:
        self._sites += 1
        number = self._sites
        netns = self.namespaces.make(label)
        netlink.add_veth(netns.path, "eth0", f"s{number}", server.path)
        netns.ip, address = f"{prefix}.{number}.2", f"{prefix}.{number}.1"
        for path, link, own in ((netns.path, "eth0", netns.ip), (server.path, f"s{number}", address)):
            netlink.set_link(path, link, up=True)
            netlink.add_address(path, link, f"{own}/24")
        netlink.set_link(netns.path, "lo", up=True)
        # the kernel starts a veth's queue behind the scenes; what is sent before is dropped, a SYN for a second
        until(lambda: netns.ip_json("link", "show", "eth0")[0]["operstate"] == "UP", f"{label}: the link to the origin is up")
        netlink.add_route(netns.path, "0.0.0.0/0", gateway=address)
        settle(netns.path, SYSCTLS)
        if captured:
            settings = CaptureSettings(exclude_outbound_ranges=(ip_network(f"{prefix}.{number}.0/24"),))
            asyncio.run(Reconciler(f"bench{os.getpid()}").apply(netns.path, plan(settings, (4,), f"bench{os.getpid()}")))
            settle(netns.path, CONNTRACK)
        return Site(netns, address, captured)

    def close(self) -> None:
        self.namespaces.close()


def check_machine() -> None:
    if os.geteuid() != 0:
        raise BenchError("the benchmark makes namespaces and rules: run it as root")
    if (os.cpu_count() or 1) < 2:
        raise BenchError("the proxy has one core and the load another: this machine has one")


def settle(path: str, values: dict[str, str | int]) -> None:
    """Writes and reads back: a congestion control that the kernel refuses in a namespace would spoil every figure."""
    for name, value in values.items():
        try:
            netlink.write_sysctl(path, name, value)
            got = netlink.read_sysctl(path, name).split()
        except OSError as error:
            raise BenchError(f"{name} = {value} is refused in {path}: {error}; load the module or change the kernel") from error
        if got != str(value).split():
            raise BenchError(f"{name} is {got} in {path} after {value} was written: the figures would not be comparable")


def check_congestion(netns: Netns) -> int:
    """How many established sockets there are; BenchError if one of them is not reno."""
    lines = netns.run("ss", "-Htin", "state", "established").stdout.splitlines()
    infos = [line.split() for line in lines if line.startswith(("\t", " "))]
    wrong = [words[0] for words in infos if words and CONGESTION not in words]
    if wrong:
        raise BenchError(f"{netns.name}: {len(wrong)} of {len(infos)} sockets have congestion control {wrong[0]}, not {CONGESTION}")
    return len(infos)


# ---- processes -----------------------------------------------------------------------------------------------------

def family(pid: int) -> list[int]:
    """A process and its descendants."""
    top = psutil.Process(pid)
    return [pid, *(child.pid for child in top.children(recursive=True))]


def pin(pids: Iterable[int], core: int) -> None:
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").iterdir():
            os.sched_setaffinity(int(task.name), {core})


def cpu_ns(pids: Iterable[int]) -> int:
    """Time on a CPU of all threads, in nanoseconds, from /proc/PID/task/*/schedstat.

    The kernel charges a thread with the interrupts and the network receive work done while it runs (no IRQ time accounting here).
    """
    return sum(int((task / "schedstat").read_text().split()[0]) for pid in pids for task in Path(f"/proc/{pid}/task").iterdir())


def softirqd_ns(core: int = PROXY_CORE) -> int:
    """CPU of the core's ksoftirqd: network work of the proxy that is charged to nobody's process."""
    for path in Path("/proc").glob("[0-9]*/comm"):
        try:
            if path.read_text() == f"ksoftirqd/{core}\n":
                return cpu_ns([int(path.parent.name)])
        except OSError:
            continue
    raise BenchError(f"no ksoftirqd/{core}: is this a container without the kernel's threads?")


def core_ns(core: int = PROXY_CORE) -> int:
    """What a core has been busy with so far, whoever it was for: /proc/stat, which counts in ticks of 10 ms."""
    line = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith(f"cpu{core} "))
    user, nice, system, _, _, irq, softirq, steal = (int(word) for word in line.split()[1:9])
    return (user + nice + system + irq + softirq + steal) * 10**9 // os.sysconf("SC_CLK_TCK")


def wait_listening(netns: Netns, port: int, process: subprocess.Popen[str] | None, log: Path, seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while not netns.run("ss", "-Hltn", f"sport = :{port}").stdout.strip():
        if process is not None and process.poll() is not None:
            raise BenchError(f"{netns.name}: ended with {process.returncode} before it listened on {port}:\n{log.read_text()[-2000:]}")
        if time.monotonic() > deadline:
            raise BenchError(f"{netns.name}: nothing listens on {port} after {seconds} s:\n{log.read_text()[-2000:]}")
        time.sleep(0.02)
