"""`make demo`: Bookinfo in a mesh on this machine, what the mesh sees of it and what others see on the wire, and traffic shifted.

On a terminal it stays until Ctrl-C; without one it does the tour, tears down and exits with 0, or with 1 and a reason if
requests were not routed or not counted as the routes say.
"""
from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from examples.bookinfo.observe import Parties, Snapshot

HERE = Path(__file__).resolve().parent
NARROWS = str(Path(sys.executable).with_name("narrows"))
REQUESTS = 200  # per step: with a share of 50 %, five standard deviations are 35
SIGMAS = 5.0
SETTLE = 20.0  # seconds for a route to be in force, and for both sides to have counted
UP_SECONDS = 150
PRINCIPALS = "spiffe://cluster.local/ns/default/sa/"

# Sends N requests for the page's data over one kept connection and says which version of reviews answered, and how often.
CLIENT = """
import collections, http.client, json, sys
seen = collections.Counter()
connection = http.client.HTTPConnection("productpage", 9080, timeout=10)
for _ in range(int(sys.argv[1])):
    connection.request("GET", "/api/v1/products/0", headers={"end-user": sys.argv[2]} if len(sys.argv) > 2 else {})
    answer = connection.getresponse()
    body = answer.read()
    seen[json.loads(body)["reviews"]["version"] if answer.status == 200 else f"status {answer.status}"] += 1
print(json.dumps(seen))
"""

EXERCISES: tuple[tuple[str, str, str, dict[str, float]], ...] = (  # file, what it does, user, expected shares
    ("reviews-all-v1", "everybody to v1", "", {"v1": 1.0}),
    ("reviews-jason-v2", "jason to v2 by header ...", "jason", {"v2": 1.0}),
    ("reviews-jason-v2", "... and everybody else to v1", "", {"v1": 1.0}),
    ("reviews-canary-10", "a canary: one of ten to v3", "", {"v1": 0.9, "v3": 0.1}),
    ("reviews-50-v1-50-v3", "half and half, v1 and v3", "", {"v1": 0.5, "v3": 0.5}),
)

console = Console(highlight=False, soft_wrap=not sys.stdout.isatty(), width=None if sys.stdout.isatty() else 120)


# Sends N requests for details, each over a connection of its own, with a marker where everybody on the way could read it.
MARKED = """
import http.client, sys
for _ in range(int(sys.argv[1])):
    connection = http.client.HTTPConnection("details", 9080, timeout=10)
    connection.request("GET", "/details/0", headers={"end-user": sys.argv[2]})
    assert connection.getresponse().read()
    connection.close()
"""


class Wrong(Exception):
    """The mesh did not do as it should; the text says what was expected and what was seen."""


class Lab:
    """The lab of the demo, driven by the same commands that a user has."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.nodes: dict[str, str] = {}  # name, network namespace

    def run(self, verb: str, *arguments: str, seconds: float = 90) -> str:
        done = subprocess.run([NARROWS, "lab", verb, "--name", self.name, *arguments], stdin=subprocess.DEVNULL,
                              capture_output=True, text=True, timeout=seconds, check=False)
        if done.returncode != 0:
            raise Wrong(f"`narrows lab {verb} {' '.join(arguments)[:200]}` ended with {done.returncode}: "
                        f"{(done.stderr or done.stdout).strip()[-2000:]}")
        return done.stdout

    def send(self, pod: str, count: int, user: str = "") -> dict[str, int]:
        said = self.run("exec", pod, "--", "/usr/bin/python3", "-c", CLIENT, str(count), *([user] if user else []))
        seen: dict[str, int] = json.loads(said)
        return seen

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.run("status", "-o", "json"))
        return found

    def metrics(self) -> Snapshot:
        if not self.nodes:
            self.nodes = {node["name"]: node["netns"] for node in self.status()["nodes"]}
        return Snapshot(self.run("metrics", node) for node in self.nodes)

    def announced(self) -> bool:
        """Whether each node knows of every captured pod that it takes tunnels."""
        done = subprocess.run([NARROWS, "config", "workloads", "--name", self.name, "-o", "json"], stdin=subprocess.DEVNULL,
                              capture_output=True, text=True, timeout=60, check=True)
        return all((one["protocol"] == "HBONE") is not one["name"].startswith("sleep-uncaptured")
                   for told in json.loads(done.stdout).values() for one in told)


def free_name() -> str:
    """`demo`, unless somebody's demo runs already."""
    done = subprocess.run([NARROWS, "lab", "status", "--name", "demo"], capture_output=True, check=False, timeout=60)
    return "demo" if done.returncode != 0 else f"demo-{os.getpid()}"


@contextlib.contextmanager
def running() -> Iterator[Lab]:
    lab = Lab(free_name())
    try:
        console.print(f"[bold]Bringing Bookinfo up[/] in a lab named {lab.name}: two nodes, eight pods, no container runtime.")
        began = time.monotonic()
        lab.run("up", str(HERE / "bookinfo.yaml"), str(HERE / "destination-rules.yaml"), "--detach", seconds=UP_SECONDS)
        console.print(f"Up and ready after {time.monotonic() - began:.1f} s.\n")
        deadline = time.monotonic() + SETTLE
        while not lab.announced():
            if time.monotonic() > deadline:
                raise Wrong(f"after {SETTLE:g} s the nodes do not know that captured pods take tunnels; look at `narrows config workloads`")
            time.sleep(0.1)
        yield lab
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not leave half of it
        console.print("Tearing down.")
        subprocess.run([NARROWS, "lab", "down", "--name", lab.name], stdout=subprocess.DEVNULL, check=False, timeout=90,
                       start_new_session=True)


def show_pods(lab: Lab) -> None:
    table = Table("pod", "node", "address", "captured", "why", title="Pods", title_justify="left")
    for pod in lab.status()["pods"]:
        table.add_row(pod["name"], pod["node"], pod["ip"], f"yes, {pod['method']}" if pod["captured"] else "no", pod["reason"])
        if pod["captured"] is pod["name"].startswith("sleep-uncaptured"):
            raise Wrong(f"pod {pod['name']} is {'' if pod['captured'] else 'not '}captured: {pod['reason']}")
    console.print(table)


def expect(seen: dict[str, int], shares: dict[str, float], who: str) -> None:
    """Wrong unless `seen` is what `shares` make likely, within SIGMAS standard deviations."""
    total = sum(seen.values())
    odd = set(seen) - set(shares)
    for version, share in shares.items():
        slack = SIGMAS * math.sqrt(total * share * (1 - share))
        if odd or abs(seen.get(version, 0) - total * share) > slack:
            raise Wrong(f"{who}: expected {describe(shares)} of {total} requests, saw "
                        f"{', '.join(f'{name}: {count}' for name, count in sorted(seen.items()))}")


def describe(shares: dict[str, float]) -> str:
    return ", ".join(f"{version} {share:.0%}" for version, share in shares.items())


def until_counted(lab: Lab, before: Snapshot, source: str, count: int) -> Snapshot:
    """The metrics, once both sides have counted that many requests of productpage to reviews."""
    deadline = time.monotonic() + SETTLE
    while True:
        now = lab.metrics()
        sides = {side: sum(now.versions(before, "reviews", side, lambda labels: labels["source_workload"] == source).values())
                 for side in ("source", "destination")}
        if all(number == count for number in sides.values()):
            return now
        if time.monotonic() > deadline:
            raise Wrong(f"{count} requests from {source} to reviews were answered; the source counted {sides['source']}, the "
                        f"destination {sides['destination']}")
        time.sleep(0.2)


def show_traffic(lab: Lab) -> None:
    """Requests from the captured client and from the control: who called whom, as both sides counted it."""
    before = lab.metrics()
    lab.send("sleep", REQUESTS)
    lab.send("sleep-uncaptured", REQUESTS)
    now = until_counted(lab, before, "productpage-v1", 2 * REQUESTS)
    calls = now.calls(before)
    table = Table("source", "destination", "counted by source", "by destination", "p50 ms", "p99 ms",
                  title=f"Who called whom: {REQUESTS} pages asked for by sleep, {REQUESTS} by sleep-uncaptured",
                  title_justify="left")
    for source, destination in sorted({key[1:] for key in calls}):
        sides = [calls.get((side, source, destination)) for side in ("source", "destination")]
        timed = next(side for side in sides if side is not None)
        table.add_row(source, destination, *(f"{side.requests:.0f}" if side else "-" for side in sides),
                      *("-" if (ms := timed.quantile(share)) is None else f"{ms:.1f}" for share in (0.5, 0.99)))
    console.print(table)
    control = sum(call.requests for (side, source, _), call in calls.items()
                  if side == "source" and source == "sleep-uncaptured")
    if control:
        raise Wrong(f"the control pod is not captured, and yet {control:.0f} of its requests were counted at the source")
    counted = calls.get(("source", "sleep", "productpage-v1"))
    if counted is None or counted.requests != REQUESTS:
        raise Wrong(f"sleep sent {REQUESTS} requests, the source counted {counted.requests if counted else 0:.0f}")
    console.print("sleep-uncaptured is served like any other client, and no source counted it.\n")
    show_identities(now.identities(before))


def show_identities(parties: dict[Parties, float]) -> None:
    """The same requests once more: as whom the ends of each connection proved themselves to each other."""
    table = Table("source", "its identity", "destination", "its identity", "connection", "requests",
                  title=f"Under which identity; all begin with {PRINCIPALS}", title_justify="left")
    for who, count in sorted(parties.items()):
        table.add_row(who.source_workload, who.source_principal.removeprefix(PRINCIPALS), who.destination_workload,
                      who.destination_principal.removeprefix(PRINCIPALS), who.connection_security_policy, f"{count:.0f}")
        if who.source_principal.startswith(PRINCIPALS) is (who.source_workload == "sleep-uncaptured"):
            raise Wrong(f"{who.source_workload} reached {who.destination_workload} as {who.source_principal}")
    console.print(table)


@contextlib.contextmanager
def captured(lab: Lab, marker: str) -> Iterator[dict[str, int]]:
    """What crosses the link of the first node to the others within the body; wire.py says what is in it."""
    argv = ["nsenter", f"--net=/run/netns/{lab.nodes['n1']}", "--", sys.executable, str(HERE / "wire.py"), "eth0", marker]
    reader = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    found: dict[str, int] = {}
    try:
        assert reader.stdout is not None
        if reader.stdout.readline() != "listening\n":
            raise Wrong("the link between the nodes cannot be read")
        yield found
        found.update(json.loads(reader.communicate(timeout=60)[0]))
    finally:
        reader.kill()
        reader.communicate()


def show_wire(lab: Lab) -> None:
    """The same requests with and without the mesh, read on the link between the nodes."""
    marker = f"marker-{secrets.token_hex(8)}"
    table = Table("client on n1, server on n2", "requests", "TCP connections", "bytes", "TLS records", "bytes not TLS", "marker found",
                  title="On the wire between the nodes: requests with a marker, captured", title_justify="left")
    for pod in ("sleep", "sleep-uncaptured"):
        with captured(lab, marker) as seen:
            lab.run("exec", pod, "--", "/usr/bin/python3", "-c", MARKED, str(REQUESTS), marker)
        table.add_row(f"{pod} to details", str(REQUESTS), *(str(seen[key]) for key in ("connections", "bytes", "records", "otherBytes")),
                      f"{seen['marker']} times" if seen["marker"] else "never")
        tls = seen["otherBytes"] == seen["marker"] == 0 and seen["applicationData"] >= REQUESTS
        plain = seen["applicationData"] == 0 and seen["marker"] >= REQUESTS
        if seen["dropped"] or not (tls if pod == "sleep" else plain):
            raise Wrong(f"requests of {pod} to details, on the link between the nodes: {seen}")
    console.print(table)
    console.print("In the mesh nothing but TLS crosses the link. sleep-uncaptured shows that the capture would find the marker.\n")


def shift(lab: Lab) -> None:
    """The exercises, one after the other, on the running system."""
    table = Table("exercise", "user", "client saw", "source counted", "destination counted", "routes say",
                  title=f"Traffic shifted live: {REQUESTS} requests to productpage after each", title_justify="left")
    for name, what, user, shares in EXERCISES:
        lab.run("apply", str(HERE / f"{name}.yaml"))
        settle(lab, name, user, shares)
        before = lab.metrics()
        seen = lab.send("sleep", REQUESTS, user)
        now = until_counted(lab, before, "productpage-v1", REQUESTS)
        sides = [now.versions(before, "reviews", side, lambda labels: labels["source_workload"] == "productpage-v1")
                 for side in ("source", "destination")]
        table.add_row(what, user or "-", *(text(counts) for counts in (seen, *sides)), describe(shares))
        expect(seen, shares, f"{name}, as the client saw it")
        for side, counts in zip(("source", "destination"), sides, strict=True):
            if counts != seen:
                raise Wrong(f"{name}: the client saw {text(seen)}, the {side} counted {text(counts)}")
    console.print(table)


def text(counts: dict[str, int]) -> str:
    return " ".join(f"{version}: {count}" for version, count in sorted(counts.items()))


def settle(lab: Lab, name: str, user: str, shares: dict[str, float]) -> None:
    """Wait until the new route is in force: everything that it names answers, and nothing else does."""
    deadline = time.monotonic() + SETTLE
    count = 10 if len(shares) == 1 else 60  # 60 requests miss a share of 10 % once in 500 times; then it is tried again
    while set(seen := lab.send("sleep", count, user)) != set(shares):
        if time.monotonic() > deadline:
            raise Wrong(f"{name} is not in force after {SETTLE:g} s: {count} requests saw {text(seen)}, expected "
                        f"{describe(shares)}; look at `narrows lab events --name {lab.name}`")
    # a request that began under the old route may still be counted
    counted = lab.metrics()
    while (now := lab.metrics()).calls(counted):
        counted = now


def further(lab: Lab) -> None:
    command = "narrows" if shutil.which("narrows") == NARROWS else os.path.relpath(NARROWS)
    name = f" --name {lab.name}"
    exercise = os.path.relpath(HERE / "reviews-canary-10.yaml")
    console.print("\n[bold]Look further[/], in another terminal:")
    for line in (f"lab status{name}", f"lab exec{name} sleep -- curl -s http://productpage:9080/productpage",
                 f"lab apply{name} {exercise}", f"lab metrics{name} n1", f"lab logs{name} reviews-v3 -f",
                 f"config routes{name}", "doctor"):
        console.print(f"  {command} {line}", soft_wrap=True)
    console.print()


def main() -> int:
    if os.geteuid() != 0:
        console.print("The demo makes network namespaces and cgroups; run it as root: sudo make demo")
        return 77
    try:
        with running() as lab:
            show_pods(lab)
            show_traffic(lab)
            show_wire(lab)
            shift(lab)
            further(lab)
            if sys.stdin.isatty():
                console.print("[bold]Ctrl-C ends it.[/] A page a second is asked for meanwhile.")
                while True:
                    lab.send("sleep", 1)
                    time.sleep(1)
    except KeyboardInterrupt:
        return 0
    except (Wrong, subprocess.TimeoutExpired) as error:
        console.print(f"[bold red]The demo failed:[/] {escape(str(error))}")
        return 1
    console.print("All requests went where the routes say, and both sides counted them.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
