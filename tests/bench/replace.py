"""A captured pod connects all the time while programs are replaced and the agent is killed: does a connect fail, or escape?

    python -m tests.bench.replace [--connects 100000 --replacements 200 --kills 10]
    python -m tests.bench.replace --payloads 20000 [--capture ebpf,iptables]

A real keeper, worker, control plane and agent. The service's address is at the same time an address of the node, where a canary listens:
the proxy dials the service's pod and never the canary, so each connection that the canary sees has escaped. Before anything is counted,
a process of the pod's namespace that is not captured has to be seen there. Programs are replaced by `agent.capture.loader` from sources
whose programs have other tags, and bpftool has to show others on the pod's cgroup each time; the agent is killed by SIGKILL in the midst
of every so manyeth replacement, and the next one replaces them again. Each connection sends random bytes, whose hash comes back in front
of others; both are checked. Ends with 1 when a connection failed, escaped, or carried something else.
"""
from __future__ import annotations

import argparse
import json
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from agent.capture import loader, pins
from agent.capture.loader import HOOKS, POD
from tests.bench import ends
from tests.netns.agent.conftest import Instance
from tests.support.netns import Namespaces, Netns
from tests.support.wait import until

VIRTUAL, PORT = "10.96.0.77", 9
THREADS = 8
SERVICE = f"""
apiVersion: v1
kind: Service
metadata: {{name: sums, namespace: default}}
spec:
  clusterIP: {VIRTUAL}
  selector: {{app: sums}}
  ports: [{{name: tcp, port: {PORT}, targetPort: 9000}}]
"""
# Takes {seed, bytes up, bytes down} and the bytes up; answers their hash and the bytes down, which the seed makes, and ends the connection.
ORIGIN = """if True:
    import hashlib, socket, struct, threading
    listener = socket.create_server(("", 9000), backlog=1024)
    def whole(connection, size):
        parts = []
        while size:
            data = connection.recv(min(size, 262144))
            if not data:
                raise OSError("ended early")
            parts.append(data)
            size -= len(data)
        return b"".join(parts)
    def work():
        while True:
            connection, _ = listener.accept()
            try:
                with connection:
                    connection.settimeout(60)
                    seed, up, down = struct.unpack("=8sII", whole(connection, 16))
                    connection.sendall(hashlib.sha256(whole(connection, up)).digest() + hashlib.shake_128(seed).digest(down))
            except OSError:
                pass
    for _ in range(16):
        threading.Thread(target=work).start()
    print("listening", flush=True)"""
# Tells of each connection that it gets.
CANARY = """if True:
    import socket, sys
    listener = socket.create_server((sys.argv[1], int(sys.argv[2])), backlog=1024)
    print("listening", flush=True)
    while True:
        connection, peer = listener.accept()
        print(*peer, flush=True)
        connection.close()"""
# Every other connect is an IPv6 socket's to the mapped address. Connections end by RST: a source port of a pod is not used up for a minute.
CLIENT = """if True:
    import collections, hashlib, json, os, random, socket, struct, sys, threading, time
    address, port, least, most, threads, stop, told = sys.argv[1], *map(int, sys.argv[2:6]), *sys.argv[6:8]
    made, wrong, failed = [0] * threads, [0] * threads, collections.Counter()
    def once(number, six, up, down):
        seed, sent = os.urandom(8), os.urandom(up)
        with socket.socket(socket.AF_INET6 if six else socket.AF_INET) as s:
            s.settimeout(60)
            s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            s.connect(("::ffff:" + address if six else address, port))
            s.sendall(struct.pack("=8sII", seed, up, down) + sent)
            heard = bytearray()
            while data := s.recv(262144):
                heard += data
        made[number] += 1
        wrong[number] += heard != hashlib.sha256(sent).digest() + hashlib.shake_128(seed).digest(down)
    def work(number):
        turn = number
        while sum(made) < least or not os.path.exists(stop):
            turn += 1
            up, down = (int(most ** random.random()) for _ in range(2))
            try:
                once(number, turn % 2, up, down)
            except OSError as error:
                failed[f"{type(error).__name__}: {error}"] += 1
    every = [threading.Thread(target=work, args=(n,)) for n in range(threads)]
    [one.start() for one in every]
    while any(one.is_alive() for one in every):
        with open(told + ".new", "w") as file:
            file.write(str(sum(made) + failed.total()))
        os.rename(told + ".new", told)
        time.sleep(0.05)
    print(json.dumps({"made": sum(made), "wrong": sum(wrong), "failed": failed}))"""
STRAY = "import socket, sys; print(socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=20).recv(1))"


@dataclass
class Outcome:
    """`replaced`: by how many loads all programs of the pod became others; `events`: those that say that capture was not by eBPF."""

    made: int = 0
    wrong: int = 0
    escaped: int = 0
    failed: dict[str, int] = field(default_factory=dict)
    replaced: int = 0
    kills: int = 0
    seconds: float = 0.0
    events: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        return not (self.wrong or self.escaped or self.failed or self.events) and self.made > 0

    def __str__(self) -> str:
        return (f"{self.made:,} connections in {self.seconds:.0f} s ({self.made / self.seconds:,.0f}/s), "
                f"{sum(self.failed.values())} failed {self.failed or ''}, {self.escaped} escaped, {self.wrong} wrong; "
                f"{self.replaced} replacements, {self.kills} kills"
                f"{'; ' + '; '.join(self.events) if self.events else ''}")


def edited(folder: Path) -> Path:
    """The sources, with one helper call more in every program: other tags, and nothing else."""
    folder.mkdir()
    for name in (*loader.HEADERS, *loader.FILES):
        text = (loader.SOURCES / name).read_text()
        text, count = re.subn(r"(?m)^(int narrows_\w+\(struct \w+ \*ctx\)\n\{\n)", r"\1\tbpf_ktime_get_ns();\n", text)
        if name in loader.FILES and not count:
            raise RuntimeError(f"{name} has no entry function of the known form")
        (folder / name).write_text(text)
    return folder


class Site:
    """The instance, a service that answers, and the canary at its address."""

    def __init__(self, capture: str, scratch: Path) -> None:
        self.capture, self.scratch = capture, scratch
        self._closing = ExitStack()
        namespaces = Namespaces()
        self._closing.callback(namespaces.close)
        self.instance = Instance(namespaces)
        self._closing.callback(self.instance.close)
        (self.instance.config / "sums.yaml").write_text(SERVICE)
        sums = self.instance.node.pod("sums")
        self.instance.pod("sums-0", sums, intercept="disabled")
        self._listening(sums, ORIGIN)
        node = self.instance.node.netns
        node.run("ip", "address", "add", f"{VIRTUAL}/32", "dev", "lo")
        self._seen = scratch / "canary"
        self._listening(node, CANARY, VIRTUAL, str(PORT))
        self.which = "ours"  # the programs in force
        self.sources = {"ours": loader.SOURCES, "edited": edited(scratch / "sources")}

    def __enter__(self) -> Site:
        try:
            self.instance.up("--capture", self.capture)
            self._stray()
        except BaseException:
            self._closing.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._closing.close()

    def _listening(self, netns: Netns, code: str, *argv: str) -> None:
        path = self.scratch / ("canary" if code is CANARY else "origin")
        with path.open("wb") as out:
            netns.start(sys.executable, "-c", code, *argv, stdout=out)
        until(lambda: path.read_text().startswith("listening\n"), f"{path.name} listens")

    def escaped(self) -> int:
        return len(self._seen.read_text().splitlines()) - 1 - 1  # its first line, and our stray one

    def _stray(self) -> None:
        """Who is not captured reaches the canary: from the pod's namespace, and not from its cgroup; by iptables, from another pod."""
        client = self.instance.client if self.capture == "ebpf" else self.instance.node.pod("stray")
        subprocess.run(["nsenter", f"--net={client.path}", "--", sys.executable, "-c", STRAY, VIRTUAL, str(PORT)], check=True, timeout=60,
                       stdout=subprocess.DEVNULL)
        until(lambda: self.escaped() == 0, "the canary sees who is not captured")

    # -- what is done meanwhile -----------------------------------------------------------------------------------------

    def programs(self) -> dict[str, int]:
        """Ids on the pod's cgroup by attach type, by bpftool's word."""
        said = subprocess.run(["bpftool", "-j", "cgroup", "show", self.instance.client.cgroup], capture_output=True, text=True, check=True,
                              timeout=60).stdout.strip()
        return {one["attach_type"]: one["id"] for one in json.loads(said or "null") or []}

    def load(self) -> None:
        """The programs that are not in force."""
        self.which = "ours" if self.which == "edited" else "edited"
        (mine,) = pins.found(str(self.instance.run_dir))
        found = loader.load(mine, self.scratch / self.which, sources=self.sources[self.which])
        if any(found.hooks.values()):
            raise RuntimeError(f"the kernel refuses {found.hooks}")

    def replace(self) -> None:
        before = self.programs()
        self.load()
        after = self.programs()
        if len(before) != len([hook for hook in HOOKS if POD in hook.on]) or before.keys() != after.keys() or \
                set(before.values()) & set(after.values()):
            raise RuntimeError(f"programs were not replaced: {before}, then {after}")

    def kill(self) -> None:
        """The agent, while programs are being replaced; the next one replaces them if they are not of its own sources."""
        failed: list[BaseException] = []

        def work() -> None:
            try:
                self.load()
            except BaseException as error:
                failed.append(error)
        thread = threading.Thread(target=work)
        thread.start()
        self.instance.kill("agent", signal.SIGKILL)
        thread.join()
        if failed:
            raise failed[0]
        self.instance.start_agent("--capture", self.capture)
        self.instance.ready()
        self.which = "ours"


def run(site: Site, connects: int, most: int, replacements: int = 0, kills: int = 0) -> Outcome:
    """`most`: bytes each way of the largest connection. At least so many connects, and until everything else was done."""
    stop, told = site.scratch / "stop", site.scratch / "told"
    for path in (stop, told):
        path.unlink(missing_ok=True)
    done = Outcome()
    began = time.monotonic()
    client = site.instance.client.start(sys.executable, "-c", CLIENT, VIRTUAL, str(PORT), str(connects), str(most), str(THREADS),
                                        str(stop), str(told), stdout=subprocess.PIPE, text=True)
    try:
        for number in range(1, replacements + 1):
            site.replace()
            done.replaced += 1
            if number * kills // replacements > done.kills:
                site.kill()
                done.replaced += 1
                done.kills += 1
                done.events += [f"{event['kind']}: {event['message']}" for kind in ("CaptureFallback", "EbpfUnavailable")
                                for event in site.instance.events(kind)]
    finally:
        stop.touch()
        said, _ = client.communicate(timeout=1800)
    found: dict[str, Any] = json.loads(said)
    done.seconds = time.monotonic() - began
    done.made, done.wrong, done.failed, done.escaped = found["made"], found["wrong"], found["failed"], site.escaped()
    if (shown := site.instance.shown("client"))["egress"] != site.capture:
        done.events.append(f"the pod was captured by {shown['method']}: {shown['reason']}")
    return done


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--connects", type=int, default=100_000)
    parser.add_argument("--replacements", type=int, default=200)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--payloads", type=int, default=0, metavar="N", help="N connections of up to 256 KiB each way, and no replacements")
    parser.add_argument("--capture", default="ebpf,iptables", help="with --payloads: by what; default: %(default)s")
    asked = parser.parse_args()
    good = True
    for capture in asked.capture.split(",") if asked.payloads else ["ebpf"]:
        with tempfile.TemporaryDirectory() as scratch, Site(capture, Path(scratch)) as site:
            outcome = run(site, asked.payloads, 1 << 18) if asked.payloads else \
                run(site, asked.connects, 64, asked.replacements, asked.kills)
            print(f"{capture}: {outcome}", flush=True)
            good = good and outcome.good
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(ends.run(main))
