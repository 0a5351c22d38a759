"""What breaks and what does not when processes of the mesh die under traffic."""
from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.lab import NARROWS, Lab, lab
from tests.support.wait import until

pytestmark = pytest.mark.netns
BOOKINFO = Path(__file__).resolve().parents[3] / "examples" / "bookinfo"

# Connects again and again until stdin closes; prints how many worked, and each failure.
CONNECT = """
import http.client, select, sys
good = 0
while not select.select([sys.stdin], [], [], 0)[0]:
    c = http.client.HTTPConnection("details", 9080, timeout=5)
    try:
        c.connect()
    except OSError as error:
        print("connect", error, flush=True)
        continue
    try:
        c.request("GET", "/details/0"); r = c.getresponse(); r.read()
        if r.status == 200: good += 1
        else: print("status", r.status, flush=True)
    except (OSError, http.client.HTTPException) as error:
        print("request", type(error).__name__, flush=True)
    c.close()
print("good", good, flush=True)
"""


@pytest.fixture(scope="module")
def mesh() -> Iterator[Lab]:
    with lab(BOOKINFO / "bookinfo.yaml", BOOKINFO / "destination-rules.yaml") as running:
        yield running


class Traffic:
    """Requests from the captured `sleep` to `details` for as long as the body runs."""

    def __init__(self, mesh: Lab) -> None:
        self.process = subprocess.Popen(
            [NARROWS, "lab", "exec", "--name", mesh.name, "sleep", "--", "/usr/bin/python3", "-c", CONNECT],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Traffic:
        return self

    def __exit__(self, *_: object) -> None:
        out, _ = self.process.communicate(timeout=30)
        lines = out.splitlines()
        assert lines and lines[-1].startswith("good "), out
        self.good = int(lines[-1].split()[1])
        self.failures = lines[:-1]


def details(mesh: Lab) -> bool:
    done = mesh.exec("sleep", "curl", "-sS", "-m", "5", "-o", "/dev/null", "-w", "%{http_code}",
                     "http://details:9080/details/0", check=False)
    return done.stdout == "200"


def requests(mesh: Lab) -> float:
    return mesh.total("istio_requests_total", reporter="source", source_workload="sleep", destination_service_name="details")


def answering(mesh: Lab) -> bool:
    """Every node's metrics can be fetched: a restarted agent needs a moment."""
    return all(mesh.run("metrics", node, check=False).returncode == 0 for node in mesh.nodes())


def test_a_killed_worker_is_replaced_and_no_connect_is_refused(mesh: Lab) -> None:
    workers = mesh.processes("ext.proxy.worker")
    counted = requests(mesh)
    with Traffic(mesh) as traffic:
        until(lambda: requests(mesh) > counted + 20, "traffic flows")
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
        until(lambda: len(set(mesh.processes("ext.proxy.worker")) - set(workers)) == len(workers), "all workers are replaced")
        counted = requests(mesh)
        until(lambda: requests(mesh) > counted + 20, "traffic flows again")
    assert not [line for line in traffic.failures if line.startswith("connect")]
    # the requests that were in a worker when it died are lost: at most one for each of the three hops' workers and retries of none
    assert len(traffic.failures) <= len(workers), traffic.failures


def test_counters_do_not_go_back_when_a_worker_dies(mesh: Lab) -> None:
    assert details(mesh)
    before = requests(mesh)
    workers = mesh.processes("ext.proxy.worker")
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    until(lambda: len(set(mesh.processes("ext.proxy.worker")) - set(workers)) == len(workers), "all workers are replaced")
    assert requests(mesh) >= before
    assert details(mesh)
    until(lambda: requests(mesh) > before, "counting goes on")


def test_a_killed_agent_is_missed_by_no_request_and_adopts_what_runs(mesh: Lab) -> None:
    agents = mesh.processes("narrows agent")
    assert len(agents) == len(mesh.nodes())
    workers = mesh.processes("ext.proxy.worker")
    with Traffic(mesh) as traffic:
        for pid in agents:
            os.kill(pid, signal.SIGKILL)
        until(lambda: len(set(mesh.processes("narrows agent")) - set(agents)) == len(agents), "the agents are back", timeout=20)
        until(lambda: all(pod["captured"] for pod in mesh.status() if pod["name"] != "sleep-uncaptured"
                          and not pod["name"].startswith("sleep-uncaptured")), "all pods are captured still", timeout=20)
    assert traffic.failures == []
    assert traffic.good > 0
    assert mesh.processes("ext.proxy.worker") == workers, "the workers were not touched"


def test_without_a_control_plane_the_mesh_serves_on_even_across_an_agents_restart(mesh: Lab) -> None:
    assert details(mesh)
    planes = mesh.processes("narrows control-plane")
    assert len(planes) == 1
    os.kill(planes[0], signal.SIGSTOP)  # gone for everybody, and not restarted
    try:
        agents = mesh.processes("narrows agent")
        with Traffic(mesh) as traffic:
            for pid in agents:
                os.kill(pid, signal.SIGKILL)
            until(lambda: len(set(mesh.processes("narrows agent")) - set(agents)) == len(agents), "the agents are back", timeout=20)
            until(lambda: answering(mesh), "the agents answer on their metrics port", timeout=20)
            counted = requests(mesh)
            until(lambda: requests(mesh) > counted + 20, "requests are routed and counted under their names", timeout=20)
        assert traffic.failures == []
    finally:
        os.kill(planes[0], signal.SIGCONT)


def test_a_service_without_a_pod_is_503_with_its_flag_in_the_log(mesh: Lab, tmp_path: Path) -> None:
    manifest = tmp_path / "empty.yaml"
    manifest.write_text("apiVersion: v1\nkind: Service\nmetadata: {name: empty}\nspec:\n  selector: {app: nobody}\n"
                        "  ports: [{name: http, port: 80}]\n")
    mesh.apply(manifest)

    def answer() -> str:
        return mesh.exec("sleep", "curl", "-sS", "-m", "8", "-o", "/dev/null", "-w", "%{http_code}", "http://empty/",
                         check=False).stdout

    until(lambda: answer() == "503", "503")
    until(lambda: mesh.total("istio_requests_total", reporter="source", destination_service_name="empty",
                             response_code="503", response_flags="UH") > 0, "counted with UH")


def test_a_supervisor_killed_with_kill_9_leaves_nothing_after_the_next_up_and_down(tmp_path: Path) -> None:
    manifest = tmp_path / "one.yaml"
    manifest.write_text("apiVersion: v1\nkind: Namespace\nmetadata:\n  name: default\n  annotations: {narrows.mesh/intercept: enabled}\n"
                        "---\napiVersion: v1\nkind: Pod\nmetadata: {name: one}\nspec:\n  containers:\n"
                        "  - {name: main, image: none, command: [sleep, infinity]}\n")
    this = Lab(f"k{os.getpid()}")
    this.run("up", str(manifest), "--detach", timeout=60)
    try:
        everything = this.processes("")
        supervisor = [pid for pid in this.processes("lab") if "up" in Path(f"/proc/{pid}/cmdline").read_text()]
        assert supervisor and len(everything) > 4
        for pid in supervisor:
            os.kill(pid, signal.SIGKILL)
        this.run("up", str(manifest), "--detach", timeout=60)
        assert not set(everything) & set(this.processes(""))
        assert this.pod("one")["captured"]
    finally:
        this.run("down", timeout=60)
    assert this.processes("") == []
    names = subprocess.run(["ip", "-o", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert this.name not in names
    assert not Path(f"/run/narrows/lab/{this.name}").exists()
    assert sys.executable
