"""How long one changed endpoint takes to be in force, and what it costs, by the number of services.

    python -m tests.bench.growth [--services 50,500,5000] [--changes 50]

A lab with that many services, all of them in use by a captured client; then the readiness of one pod of one service is flipped in
the files that the control plane watches. "In force" is what the client sees: the time from the rename of the file to the first answer
of that pod, so the control plane, ADS, agent, keeper and worker are all in it. CPU is that of the processes themselves
(/proc/PID/schedstat), per change. Opening the lab is timed too.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.bench import ends
from tests.support.lab import NARROWS

RUN = Path("/run/narrows/lab")
SERVER = """
import http.server, sys
class H(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"; wbufsize = -1  # one segment an answer
    def do_GET(self):
        self.send_response(200); self.send_header("content-length", "1"); self.end_headers(); self.wfile.write(sys.argv[1].encode())
    def log_message(self, *a): pass
http.server.ThreadingHTTPServer(("0.0.0.0", 8080), H).serve_forever()
"""
TOUCH = """
import concurrent.futures, http.client, sys, time
def touch(i):
    began = time.monotonic()
    c = http.client.HTTPConnection(f"s{i}", 80, timeout=30); c.request("GET", "/"); a = c.getresponse(); a.read(); c.close()
    return a.status, time.monotonic() - began
with concurrent.futures.ThreadPoolExecutor(16) as pool:
    found = list(pool.map(touch, range(int(sys.argv[1]))))
assert {status for status, _ in found} == {200}, {status for status, _ in found}
print(sorted(t for _, t in found)[len(found) // 2])
"""
WATCH = """
import http.client, time, sys
c = http.client.HTTPConnection("s0", 80, timeout=10); last = b""; seen = 0.0
while True:
    c.request("GET", "/"); who = c.getresponse().read(); now = time.monotonic()
    if who == b"b":
        if now - seen > 0.2: print(now, flush=True)
        seen = now
    time.sleep(0.0005)
"""


def manifests(services: int) -> str:
    pod = {"apiVersion": "v1", "kind": "Pod"}
    mesh = {"narrows.mesh/intercept": "enabled"}
    things: list[dict[str, Any]] = [
        {**pod, "metadata": {"name": "client", "labels": {"app": "client"}, "annotations": mesh},
         "spec": {"containers": [{"name": "c", "command": ["sleep", "100000"]}]}},
        *({**pod, "metadata": {"name": name, "labels": labels, "annotations": mesh},
           "spec": {"containers": [{"name": "c", "command": ["/usr/bin/python3", "-c", SERVER, name],
                                    "readinessProbe": {"httpGet": {"port": 8080, "path": "/"}, "periodSeconds": 1}}]}}
          for name, labels in (("a", {"app": "web", "first": "yes"}), ("b", {"first": "yes"}))),
        *({"apiVersion": "v1", "kind": "Service", "metadata": {"name": f"s{i}"},
           "spec": {"selector": {"app": "web"} if i else {"first": "yes"},
                    "ports": [{"name": "http", "port": 80, "targetPort": 8080}]}} for i in range(services)),
    ]
    return "\n---\n".join(json.dumps(thing) for thing in things)


@contextlib.contextmanager
def lab(services: int, options: tuple[str, ...]) -> Iterator[tuple[str, float]]:
    name = f"growth-{os.getpid()}"
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(manifests(services))
        file.flush()
        began = time.monotonic()
        try:
            subprocess.run([NARROWS, "lab", "up", file.name, "--name", name, "--nodes", "1", "--workers", "1",
                            "--access-log", "off", "--detach", *options], check=True,
                           capture_output=True, timeout=240)
            yield name, time.monotonic() - began
        finally:
            subprocess.run([NARROWS, "lab", "down", "--name", name], capture_output=True, timeout=120, check=False)


def processes(name: str) -> dict[str, int]:
    found = json.loads(subprocess.run([NARROWS, "lab", "status", "--name", name, "-o", "json"], capture_output=True, check=True,
                                      timeout=60).stdout)
    return {one["name"]: one["pid"] for one in found["processes"]}


def cpu(pid: int) -> float:
    """Seconds on a CPU of a process so far, all threads."""
    return sum(int((task / "schedstat").read_text().split()[0]) for task in Path(f"/proc/{pid}/task").iterdir()) / 1e9


def inside(name: str, *argv: str, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen([NARROWS, "lab", "exec", "--name", name, "client", "--", "/usr/bin/python3", "-c", *argv], text=True,
                            stdout=subprocess.PIPE, **options)


def measure(services: int, changes: int, options: tuple[str, ...]) -> dict[str, Any]:
    with lab(services, options) as (name, opened):
        toucher = inside(name, TOUCH, str(services))
        said, _ = toucher.communicate(timeout=240)
        if toucher.returncode != 0:
            raise SystemExit(f"not every one of {services} services answered")
        folder = RUN / name / "config"
        file = folder / "pod.default.b.yaml"
        ready = file.read_text()
        pod = json.loads(ready)
        for condition in pod["status"]["conditions"]:
            condition["status"] = "False"
        away = json.dumps(pod)
        pids = processes(name)
        watcher = inside(name, WATCH)
        assert watcher.stdout is not None
        taken = []
        watcher.stdout.readline()  # it sees b now
        before = {who: cpu(pid) for who, pid in pids.items()}
        for _ in range(changes):
            put(file, away)
            time.sleep(0.5)  # the client sees no b for longer than a gap
            changed = time.monotonic()
            put(file, ready)
            taken.append(float(watcher.stdout.readline()) - changed)
        watcher.kill()
        watcher.wait()
        after = {who: cpu(pid) for who, pid in pids.items()}
    taken.sort()
    return {
        "services": services,
        "opened_s": round(opened, 1),
        "first_use_median_ms": round(float(said) * 1e3, 1),
        "in_force_median_ms": round(taken[len(taken) // 2] * 1e3, 1),
        "in_force_p99_ms": round(taken[min(len(taken) - 1, int(len(taken) * 0.99))] * 1e3, 1),
        "cpu_ms_per_change": {who: round((after[who] - before[who]) / changes / 2 * 1e3, 2) for who in pids},
    }


def put(file: Path, text: str) -> None:
    beside = file.with_name(f".{file.name}.bench")
    beside.write_text(text)
    beside.replace(file)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--services", default="50,500,5000")
    parser.add_argument("--changes", type=int, default=50)
    parser.add_argument("--no-tunnels", action="store_true", help="pods have no certificates")
    asked = parser.parse_args()
    for services in map(int, asked.services.split(",")):
        print(json.dumps(measure(services, asked.changes, ("--no-tunnels",) if asked.no_tunnels else ())), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(ends.run(main))
