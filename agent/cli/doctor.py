"""`narrows doctor`: what this machine offers, what a lack of it means, and what to do. Changes nothing.

Each check is one function that returns one Check; `fail` is what the mesh cannot do without, `warn` what it does worse without.
"""
from __future__ import annotations

import asyncio
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, distribution, requires, version
from pathlib import Path

import click

from agent.cli.main import EX_UNAVAILABLE
from agent.cli.output import OUTPUT, as_json

SECCOMP_MACHINES = ("x86_64", "aarch64")  # those that ext/sys/syscalls.pyx has tables for
KERNEL = (5, 10)  # Debian 11's: cgroup v2 hooks, pidfd, memfd seals; what we run on is newer
PYTHON = (3, 11)
SOMAXCONN = 1024  # the backlog in which connections wait while a worker is replaced
NOFILE = 65_536  # connections of a worker, twice
CONNTRACK = 65_536  # a captured connection has an entry per hop
CONNTRACK_FULL = 0.9  # of the limit
BPF_SECONDS = 60.0  # clang on a slow machine
TOOL_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Check:
    """One finding. `means` and `todo` are empty when all is well."""

    name: str
    status: str  # ok, warn, fail
    found: str
    means: str = ""
    todo: str = ""


def good(name: str, found: str) -> Check:
    return Check(name, "ok", found)


def kernel() -> Check:
    release = platform.release()
    numbers = re.match(r"(\d+)\.(\d+)", release)
    if numbers and (int(numbers[1]), int(numbers[2])) >= KERNEL:
        return good("kernel", release)
    return Check("kernel", "fail", release, "cgroup and socket features that capture builds on are missing",
                 f"run Linux {KERNEL[0]}.{KERNEL[1]} or newer")


def root() -> Check:
    if os.geteuid() == 0:
        return good("privilege", "root")
    return Check("privilege", "warn", f"uid {os.geteuid()}", "agent, keeper and lab need root; some checks are guesses",
                 "run this as root")


def mounts() -> list[tuple[str, str]]:
    """(path, type) of every mount of this process."""
    return [(fields[1], fields[2]) for line in Path("/proc/self/mounts").read_text().splitlines()
            if len(fields := line.split()) > 2]


def seccomp() -> Check:
    """What the kernel offers; whether workers are under it is in `narrows status` and /server_info."""
    try:
        actions = Path("/proc/sys/kernel/seccomp/actions_avail").read_text().split()
    except OSError:
        actions = []
    if {"kill_process", "trap", "allow"} <= set(actions) and platform.machine() in SECCOMP_MACHINES:
        return good("seccomp", " ".join(actions))
    found = f"actions: {' '.join(actions) or 'none'}; machine {platform.machine()}"
    return Check("seccomp", "fail", found, "workers do not start: they refuse to run without their filter of system calls",
                 "use a kernel with CONFIG_SECCOMP_FILTER, or run the keeper with --seccomp off (SECURITY.md says what that costs)")


def cgroup() -> Check:
    found = [path for path, kind in mounts() if kind == "cgroup2"]
    if found:
        return good("cgroup v2", found[0])
    return Check("cgroup v2", "fail", "not mounted", "pods cannot be told apart by cgroup; the lab cannot start any",
                 "mount -t cgroup2 none /sys/fs/cgroup (or boot with systemd.unified_cgroup_hierarchy=1)")


def bpffs() -> Check:
    found = [path for path, kind in mounts() if kind == "bpf"]
    if found:
        return good("bpffs", found[0])
    return Check("bpffs", "warn", "not mounted", "eBPF programs cannot be pinned; capture by iptables is not concerned",
                 "mount -t bpf bpf /sys/fs/bpf")


def bpf() -> Check:
    try:
        done = subprocess.run([sys.executable, "-m", "agent.capture.bpf"], capture_output=True, text=True,
                              timeout=BPF_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return Check("BPF tool chain", "warn", f"no answer in {BPF_SECONDS:g} s", "eBPF capture is not available",
                     "try again when the machine is idle")
    said = (done.stdout or done.stderr).strip().splitlines()
    if done.returncode == 0:
        return good("BPF tool chain", said[-1] if said else "compiles and loads a program")
    return Check("BPF tool chain", "warn", said[-1] if said else f"exit code {done.returncode}",
                 "eBPF capture is not available; capture by iptables is not concerned",
                 "`make setup` installs python3-bpfcc and prepares kernel headers; root is needed to load")


def bpf_hooks() -> Iterator[Check]:
    """Each program is loaded, attached to nothing and forgotten."""
    from agent.capture.loader import HOOKS, INGRESS, OBSERVE, LoadError, probe

    if os.geteuid() != 0:
        yield Check("BPF hooks", "warn", f"uid {os.geteuid()}", "only root may load programs", "run this as root")
        return
    with tempfile.TemporaryDirectory(prefix="narrows-bpf-") as folder:
        try:
            found = probe(Path(folder), deadline=BPF_SECONDS)
        except LoadError as error:
            yield Check("BPF hooks", "warn", str(error), "capture by socket hooks is not available; capture by iptables is not concerned",
                        "see BPF tool chain")
            return
    for hook in (*HOOKS, *INGRESS, *OBSERVE):
        why = found.hooks[hook.name]
        yield good(f"BPF hook {hook.name}", "loads") if not why else Check(
            f"BPF hook {hook.name}", "warn", why,
            hook.lack or f"what {'connects to pods' if hook.inward else 'pods connect to'} is captured by iptables",
            "nothing, if that will do; else a newer kernel, or one that is not locked down (`cat /sys/kernel/security/lockdown`)")


def capture() -> Check:
    """Asks the agent's own way: a plan is written in a namespace made for that."""
    from agent.capture.reconcile import CaptureError, Reconciler

    async def ask() -> tuple[str, str]:
        reconciler = Reconciler(None)
        try:
            chosen = await reconciler.backend()
            return chosen.name, chosen.reason
        finally:
            reconciler.close()

    try:
        name, reason = asyncio.run(ask())
    except CaptureError as error:
        return Check("capture", "fail", str(error), "no pod can be captured", "run this as root; apt-get install iptables nftables; "
                     "modprobe iptable_nat iptable_mangle iptable_filter iptable_raw (ip6table_... for IPv6), or nf_tables")
    return good("capture", f"by {name}: {reason}")


def legacy_tables() -> Iterator[Check]:
    for family, tool in (("IPv4", "iptables-legacy-save"), ("IPv6", "ip6tables-legacy-save")):
        name = f"iptables tables, {family}"
        path = shutil.which(tool)
        if path is None:
            yield Check(name, "warn", f"{tool} is missing", "capture has no libiptc, and uses nftables", "apt-get install iptables")
            continue
        lacking = []
        for table in ("nat", "mangle", "filter", "raw"):
            done = subprocess.run([path, "-t", table], capture_output=True, text=True, timeout=TOOL_SECONDS, check=False)
            if done.returncode:
                lacking.append(table)
        if not lacking:
            yield good(name, "nat, mangle, filter, raw")
        elif family == "IPv6" and not Path("/proc/net/if_inet6").exists():
            yield Check(name, "warn", "IPv6 is off", "pods with IPv6 addresses are not captured", "nothing, if there are none")
        else:
            yield Check(name, "warn", f"{', '.join(lacking)} cannot be read", f"{family} traffic is captured by nftables alone",
                        "run this as root; modprobe iptable_nat iptable_mangle iptable_filter iptable_raw (ip6table_... for IPv6)")


def ipv6() -> Check:
    if Path("/proc/net/if_inet6").exists():
        return good("IPv6", "available")
    return Check("IPv6", "warn", "not available", "pods have IPv4 alone", "boot without ipv6.disable=1 if you need it")


def conntrack() -> Iterator[Check]:
    """The limit, and how near to it the tables of this machine are: each namespace has one of its own."""
    limit = number("/proc/sys/net/netfilter/nf_conntrack_max")
    if limit is None:
        yield Check("conntrack", "warn", "not loaded yet", "it is loaded with the first redirect; its limit is unknown",
                    "modprobe nf_conntrack")
        return
    if limit >= CONNTRACK:
        yield good("conntrack", f"nf_conntrack_max {limit}")
    else:
        yield Check("conntrack", "warn", f"nf_conntrack_max {limit}", "each captured connection takes two entries; above the "
                    "limit new ones are dropped", f"sysctl -w net.netfilter.nf_conntrack_max={CONNTRACK}")
    from agent import netlink
    from agent.netlink import conntrack as kernel_table

    paths = ["/proc/self/ns/net", *(str(netlink.NAMESPACES / name) for name in netlink.list_namespaces())]
    found = kernel_table.tables(paths)
    if not found:
        yield Check("conntrack use", "warn", "cannot be read", "a full table would not be seen",
                    "run this as root; modprobe nf_conntrack_netlink")
        return
    path = max(found, key=lambda path: found[path].entries)
    table = found[path]
    said = f"{table.entries} of {table.limit} in the fullest of {len(found)} namespaces, {path}"
    if table.used < CONNTRACK_FULL:
        yield good("conntrack use", said)
    else:
        yield Check("conntrack use", "warn", f"{said}; {table.dropped} packets dropped", "new connections of that namespace time out when "
                    "the table is full; none passes by the proxy, and those that live go on", f"nsenter --net={path} conntrack -L shows "
                    f"who opens so many; sysctl -w net.netfilter.nf_conntrack_max={2 * table.limit}")


def backlog() -> Check:
    limit = number("/proc/sys/net/core/somaxconn") or 0
    if limit >= SOMAXCONN:
        return good("somaxconn", str(limit))
    return Check("somaxconn", "warn", str(limit), "while a worker is replaced, more than so many new connections per "
                 "listener are refused", f"sysctl -w net.core.somaxconn={SOMAXCONN}")


def descriptors() -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or hard >= NOFILE:
        return good("descriptors", f"{soft} (may be raised to {hard})")
    return Check("descriptors", "warn", f"{soft} (at most {hard})", f"a worker carries at most {hard // 2} connections",
                 f"ulimit -n {NOFILE}, or LimitNOFILE={NOFILE} in the unit")


TOOLS = {
    "ip": ("iproute2", "the lab and its tests look at namespaces with it", "warn"),
    "ss": ("iproute2", "you will want it to look at sockets", "warn"),
    "iptables-save": ("iptables", "you will want it to look at what capture wrote", "warn"),
    "nft": ("nftables", "the lab makes cluster IPs with it", "warn"),
    "nsenter": ("util-linux", "you will want it to look into a pod", "warn"),
    "curl": ("curl", "the demo and the tests drive traffic with it", "warn"),
}


def tools() -> Iterator[Check]:
    for tool, (package, means, status) in TOOLS.items():
        path = shutil.which(tool)
        yield good(f"tool {tool}", path) if path else Check(f"tool {tool}", status, "missing", means,
                                                            f"apt-get install {package}")


def python() -> Check:
    if sys.version_info[:2] >= PYTHON:
        return good("Python", platform.python_version())
    return Check("Python", "fail", platform.python_version(), "Narrows does not run on it",
                 f"use Python {PYTHON[0]}.{PYTHON[1]} or newer; `make setup` makes .venv from /usr/bin/python3")


def packages() -> Iterator[Check]:
    """The packages that pyproject.toml asks for, and whether the installed versions are within its bounds."""
    try:
        wanted = requires("narrows") or []
    except PackageNotFoundError:
        yield Check("package narrows", "fail", "not installed", "the command was not installed by `make setup`", "make setup")
        return
    for line in wanted:
        name, _, condition = line.partition(";")
        found = re.match(r"[A-Za-z0-9._-]+", name)
        if found is None or "extra" in condition:
            continue
        try:
            there = version(found[0])
        except PackageNotFoundError:
            yield Check(f"package {found[0]}", "fail", "missing", "part of Narrows does not start", "make setup")
            continue
        bounds = name[len(found[0]):].strip()
        if within(there, bounds):
            yield good(f"package {found[0]}", there)
        else:
            yield Check(f"package {found[0]}", "warn", f"{there}, not {bounds}", "nobody has tried this version", "make setup")


def extension() -> Check:
    try:
        distribution("narrows")
        done = subprocess.run([sys.executable, "-c", "import agent.dataplane.cli"], capture_output=True, text=True,
                              timeout=120, check=False)
    except (PackageNotFoundError, subprocess.TimeoutExpired) as error:
        return Check("extension", "fail", str(error), "the data path cannot start", "make setup")
    if done.returncode == 0:
        return good("extension", "loads")
    said = done.stderr.strip().splitlines()
    return Check("extension", "fail", said[-1] if said else "does not load", "the data path cannot start", "make build")


def within(there: str, bounds: str) -> bool:
    """Whether `1.2.3` satisfies `>=1,<2`. Numbers only: pre-releases count as what they precede."""
    def parts(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in re.findall(r"\d+", text)[:4])

    for bound in filter(None, bounds.strip("()").split(",")):
        found = re.match(r"\s*(>=|<=|==|<|>|!=|~=)\s*([\d.]+)", bound)
        if found is None:
            continue
        have, want = parts(there), parts(found[2])
        width = max(len(have), len(want))
        have, want = have + (0,) * (width - len(have)), want + (0,) * (width - len(want))
        holds = {">=": have >= want, "<=": have <= want, "==": have == want, "<": have < want, ">": have > want,
                 "!=": have != want, "~=": have >= want}[found[1]]
        if not holds:
            return False
    return True


def number(path: str) -> int | None:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):
        return None


CHECKS: tuple[Callable[[], Check] | Callable[[], Iterator[Check]], ...] = (
    kernel, root, seccomp, cgroup, bpffs, bpf, bpf_hooks, capture, legacy_tables, ipv6, conntrack, backlog, descriptors, tools, python,
    packages, extension,
)


def examine() -> Iterator[Check]:
    """Every check, in order. A check that breaks is a failed check, not the end of the others."""
    for check in CHECKS:
        try:
            found = check()
            yield from [found] if isinstance(found, Check) else found
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            yield Check(check.__name__.replace("_", " "), "warn", f"{type(error).__name__}: {error}",
                        "it could not be found out", "run this as root")


@click.command()
@OUTPUT
def command(output: str) -> int:
    """Check what this machine offers. Exits with 0 when nothing fails; a warning is no failure."""
    found = []
    for one in examine():
        found.append(one)
        if output == "table":
            click.echo(f"{one.status:4}  {one.name:28}  {one.found}")
            if one.status != "ok":
                click.echo(f"      means: {one.means}\n      to do: {one.todo}")
    if output == "json":
        as_json({"checks": [asdict(one) for one in found]})
    return EX_UNAVAILABLE if any(one.status == "fail" for one in found) else 0
