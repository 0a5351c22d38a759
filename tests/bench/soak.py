"""Half an hour under load while everything around changes: is a request lost, a counter wrong, memory growing?

    make soak [MINUTES=30]        (root; python -m tests.bench.soak --help)

A lab of two nodes, two workers each. Two pods answer; a captured client asks at 70 % of what a first closed loop reached, open loop,
and a second one asks request by request and notes when one fails. Meanwhile, each second the routes change (weights and a header);
every 5 s three captured pods come or go; every 20 s a worker of some node is killed. Ends with 1 and a reason if

- a request failed that was not in flight on a killed worker: more failures than connections times kills, or one of the second
  client's further than 2 s from a kill;
- the counters of a side do not lie between what was answered (less one a kill) and what was asked; without a kill they are equal;
- a process grew: its median of the last quarter is more than 5 MiB and a tenth above that of the second quarter.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.bench import ends
from tests.bench.growth import RUN, put
from tests.bench.tools import BOOT, BUILT, build
from tests.support.lab import NARROWS, Lab, lab
from tests.support.wait import until

CONNECTIONS = 32
SHARE = 0.7
REQUEST = "GET /1k HTTP/1.1\r\nHost: web\r\n\r\n"
MESH = {"narrows.mesh/intercept": "enabled"}
# One request after the other; prints the time of each failure, and at the end how many went well.
PROBE = """
import http.client, sys, time
good, end = 0, time.monotonic() + float(sys.argv[1])
connection = http.client.HTTPConnection("web", 80, timeout=5)
while time.monotonic() < end:
    try:
        connection.request("GET", "/1k"); answer = connection.getresponse(); answer.read()
        if answer.status != 200: raise OSError(f"status {answer.status}")
        good += 1
    except (OSError, http.client.HTTPException) as error:
        print("failed", time.monotonic(), repr(error), flush=True); connection.close()
    time.sleep(0.01)
print("good", good, flush=True)
"""


def program(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-I", "-S", "-c", BOOT.format(str(BUILT), name), *arguments]


def pod(name: str, node: str, command: list[str], **labels: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": labels, "annotations": MESH},
            "spec": {"nodeName": node, "containers": [{"name": "c", "command": command}]}}


def manifests() -> list[dict[str, Any]]:
    origin = program("origin", "8080", "7001", "7002")
    return [
        pod("client", "n1", ["sleep", "1000000"], app="client"), pod("probe", "n1", ["sleep", "1000000"], app="probe"),
        pod("web-1", "n2", origin, app="web", version="v1"), pod("web-2", "n1", origin, app="web", version="v2"),
        {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"},
         "spec": {"selector": {"app": "web"}, "ports": [{"name": "http", "port": 80, "targetPort": 8080}]}},
        {"apiVersion": "networking.istio.io/v1", "kind": "DestinationRule", "metadata": {"name": "web"},
         "spec": {"host": "web", "subsets": [{"name": name, "labels": {"version": name}} for name in ("v1", "v2")]}},
        churn(0),
    ]


def churn(replicas: int) -> dict[str, Any]:
    labels = {"app": "churn"}
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "churn"},
            "spec": {"replicas": replicas, "selector": {"matchLabels": labels},
                     "template": {"metadata": {"labels": labels, "annotations": MESH},
                                  "spec": {"containers": [{"name": "c", "command": ["sleep", "1000000"]}]}}}}


def routes(turn: int) -> str:
    first = 10 + turn * 7 % 81
    return json.dumps({
        "apiVersion": "networking.istio.io/v1", "kind": "VirtualService", "metadata": {"name": "web", "namespace": "default"},
        "spec": {"hosts": ["web"], "http": [{
            "headers": {"request": {"set": {"x-turn": str(turn)}}},
            "route": [{"destination": {"host": "web", "subset": "v1"}, "weight": first},
                      {"destination": {"host": "web", "subset": "v2"}, "weight": 100 - first}]}]}})


class Soak:
    """A running lab and what is seen of it."""

    def __init__(self, mesh: Lab, folder: Path, kill_every: float) -> None:
        self.mesh, self.folder, self.kill_every = mesh, folder, kill_every
        self.routes = RUN / mesh.name / "config" / "virtualservice.default.web.yaml"
        self.kills: list[float] = []
        self.turn = 0
        self.sizes: dict[str, list[int]] = {}
        self.dice = random.Random(1)

    def inside(self, name: str, *argv: str) -> subprocess.Popen[str]:
        return subprocess.Popen([NARROWS, "lab", "exec", "--name", self.mesh.name, name, "--", *argv], text=True,
                                stdout=subprocess.PIPE)

    def load(self, seconds: float, rate: float) -> subprocess.Popen[str]:
        what = {"do": "exchange", "host": self.address, "port": 80, "connections": CONNECTIONS, "seconds": seconds, "request": REQUEST,
                "rate": rate}
        return self.inside("client", *program("load", json.dumps(what)))

    @property
    def address(self) -> str:
        return self.mesh.exec("client", "getent", "ahostsv4", "web").stdout.split()[0]

    def change(self) -> None:
        """What happens each second."""
        self.turn += 1
        put(self.routes, routes(self.turn))
        if self.turn % 5 == 0:
            file = self.folder / "churn.yaml"
            file.write_text(json.dumps(churn(3 if self.turn % 10 else 0)))
            self.mesh.apply(file)
        if self.kill_every and self.turn % self.kill_every == 0 and (workers := self.mesh.processes("ext.proxy.worker")):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.dice.choice(workers), signal.SIGKILL)
                self.kills.append(time.monotonic())
        if self.turn % 10 == 5:
            self.weigh()

    def weigh(self) -> None:
        for who, role in (("worker", "ext.proxy.worker"), ("keeper", "ext.keeper"), ("agent", "narrows agent"),
                          ("control plane", "narrows control-plane")):
            found = [anonymous(pid) for pid in self.mesh.processes(role)]
            self.sizes.setdefault(who, []).append(max(found, default=0))

    def growth(self) -> list[str]:
        """Processes that grew, in words."""
        said = []
        for who, sizes in self.sizes.items():
            quarter = len(sizes) // 4
            if quarter < 2:
                continue
            early, late = statistics.median(sizes[quarter:2 * quarter]), statistics.median(sizes[-quarter:])
            if late > early * 1.1 + 5 * 1024:
                said.append(f"{who} grew from {early / 1024:.1f} to {late / 1024:.1f} MiB")
        return said


def anonymous(pid: int) -> int:
    """KiB of a process that are its own: counters and log ring are shared and bounded."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), 0)


def soak(minutes: float, kill_every: float, options: tuple[str, ...] = ()) -> int:
    build()
    with tempfile.TemporaryDirectory(prefix="narrows-soak-") as made:
        file = Path(made) / "lab.yaml"
        file.write_text("\n---\n".join(map(json.dumps, manifests())))
        with lab(file, prefix="soak", options=("--workers", "2", "--access-log", "off", *options)) as mesh:
            this = Soak(mesh, Path(made), kill_every)
            put(this.routes, routes(0))
            ask = ("curl", "-sS", "-o", "/dev/null", "-w", "%{http_code}", "http://web/1k")
            until(lambda: mesh.exec("probe", *ask, check=False).stdout == "200", "the mesh answers", 20)
            rate = json.loads(this.load(5, 0).communicate(timeout=60)[0])["rate"]
            print(f"{rate:,.0f} requests/s in a closed loop of {CONNECTIONS} connections; {rate * SHARE:,.0f} for {minutes:g} minutes",
                  flush=True)
            wrong = run(this, minutes * 60, rate * SHARE)
    for text in wrong:
        print(f"soak: {text}", file=sys.stderr)
    return 1 if wrong else 0


def run(this: Soak, seconds: float, rate: float) -> list[str]:
    """Returns what went wrong, in words."""
    before = counted(this)
    load, probe = this.load(seconds, rate), this.inside("probe", "/usr/bin/python3", "-c", PROBE, str(seconds))
    began = time.monotonic()
    while load.poll() is None and probe.poll() is None:
        this.change()
        time.sleep(max(0.0, began + this.turn - time.monotonic()))
    done = json.loads(load.communicate(timeout=30)[0])
    *lines, last = probe.communicate(timeout=30)[0].splitlines()
    failures = [line.split(maxsplit=2) for line in lines]
    answered, failed = int(done["work"]) + int(last.split()[1]), int(done["failed"]) + len(failures)
    seen: list[dict[str, float]] = []
    until(lambda: seen.append(counted(this)) or (len(seen) > 2 and seen[-1] == seen[-3]), "counters stand still", 20, 0.3)
    sides = {side: seen[-1][side] - before[side] for side in before}
    kills = len(this.kills)
    print(f"{answered:,} answered, {failed} failed, {kills} workers killed, {this.turn} changes of routes; "
          f"p50 {done['p50_us']:,.0f} us, p99 {done['p99_us']:,.0f} us")
    print("counted: " + ", ".join(f"{side} {value:,.0f}" for side, value in sides.items()))
    print("own memory, MiB, first and last: " + ", ".join(
        f"{who} {sizes[0] / 1024:.1f} {sizes[-1] / 1024:.1f}" for who, sizes in this.sizes.items()))
    wrong = this.growth()
    if failed > kills * (CONNECTIONS + 1):
        wrong.append(f"{failed} requests failed; {kills} workers were killed with at most {CONNECTIONS + 1} in flight each")
    wrong += [f"a request failed away from any kill: {what[2]}" for what in failures
              if not any(-0.1 < float(what[1]) - at < 2 for at in this.kills)]
    wrong += [f"the {side} counted {value:,.0f} of {answered:,} answered and {failed} failed" for side, value in sides.items()
              if not answered - kills <= value <= answered + failed]  # a worker may die between an answer and its count
    return wrong


def counted(this: Soak) -> dict[str, float]:
    """Requests to the service so far, by reporter."""
    found = this.mesh.counts(destination_service_name="web")
    return {side: found.get(("http", side), 0.0) for side in ("source", "destination")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--kill-every", type=float, default=20.0, help="seconds between two kills of a worker; 0: none")
    parser.add_argument("--no-tunnels", action="store_true", help="what pods send each other is plain text")
    asked = parser.parse_args()
    return soak(asked.minutes, asked.kill_every, ("--no-tunnels",) if asked.no_tunnels else ())


if __name__ == "__main__":
    sys.exit(ends.run(main))
