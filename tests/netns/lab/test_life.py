"""A lab comes and goes without a trace, whatever happens to it, and changes while it runs."""
from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.lab import NARROWS, Lab, LabError, lab, narrows
from tests.support.wait import until

pytestmark = pytest.mark.netns

ONE = """\
apiVersion: v1
kind: Pod
metadata: {name: %s, labels: {app: one}}
spec: {containers: [{name: m, image: x, command: [sleep, infinity]}]}
"""
WEB = """\
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: %d
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      containers:
      - {name: m, image: x, command: [python3, -m, http.server, "80"], env: [{name: V, value: "%s"}],
         readinessProbe: {tcpSocket: {port: 80}}}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {selector: {app: web}, ports: [{port: 80}]}
"""


def traces(name: str) -> list[str]:
    """What a lab of this name has on the machine, asked of other tools than ours."""
    found = [line for line in subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout.split()
             if f"narrows.{name}." in line]
    found += [str(path) for path in Path("/run/narrows/lab").glob(f"*{name}*")] if Path("/run/narrows/lab").exists() else []
    found += subprocess.run(["find", "/sys/fs/cgroup", "-type", "d", "-path", f"*/narrows.lab/{name}*"],
                            capture_output=True, text=True, check=True).stdout.split()
    return found


def alive(pid: int) -> bool:
    """Whether a process runs; one that is dead and not collected by its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def host_rules() -> str:
    tools = (["iptables-save"], ["ip6tables-save"], ["nft", "list", "ruleset"], ["ip", "-br", "link"], ["ip", "route"])
    return "".join(subprocess.run(tool, capture_output=True, text=True, check=True).stdout.split("# Completed")[0]
                   for tool in tools if tool[0] not in ("iptables-save", "ip6tables-save")) + "".join(
        line for tool in tools[:2] for line in subprocess.run(tool, capture_output=True, text=True, check=True)
        .stdout.splitlines(keepends=True) if not line.startswith(("#", ":")))


@pytest.fixture
def name() -> Iterator[str]:
    chosen = f"t{os.getpid()}-{uuid.uuid4().hex[:4]}"
    yield chosen
    narrows("lab", "down", "--name", chosen)


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    path = tmp_path / "one.yaml"
    path.write_text(ONE % "one")
    return path


def test_down_leaves_nothing_and_the_host_was_never_touched(name: str, manifest: Path) -> None:
    before = host_rules()
    with lab(manifest, options=("--no-mesh", "--nodes", "2"), prefix=name) as running:
        assert host_rules() == before
        assert len(traces(running.name)) > 3
    assert traces(running.name) == []
    assert host_rules() == before


@pytest.mark.parametrize(("number", "options"), [(signal.SIGINT, ()), (signal.SIGTERM, ("--no-mesh",))])
def test_a_signal_ends_a_lab_in_the_foreground_without_a_trace_or_a_complaint(
        name: str, manifest: Path, number: int, options: tuple[str, ...]) -> None:
    with subprocess.Popen([NARROWS, "lab", "up", "--name", name, *options, str(manifest)], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert "is up: 1 pods on 1 nodes" in process.stdout.readline()
        process.send_signal(number)
        _, said = process.communicate(timeout=20)
        assert process.returncode == 0
    assert all(line.startswith("narrows lab: ") for line in said.splitlines()), said
    assert traces(name) == []


def test_a_killed_supervisor_is_cleaned_up_after_by_the_next_up(name: str, manifest: Path, tmp_path: Path) -> None:
    this = Lab(name)
    this.run("up", str(manifest), "--no-mesh", "--detach")
    pid = int(Path(f"/run/narrows/lab/.{name}.lock").read_text())
    old = [int(process) for path in Path("/sys/fs/cgroup").glob(f"**/narrows.lab/{name}/nodes/n1/*/cgroup.procs")
           for process in path.read_text().split()]
    assert len(old) == 2  # the pod's process and who stands before it
    os.kill(pid, signal.SIGKILL)
    until(lambda: not alive(pid), "the supervisor dead")
    assert traces(name) != []
    other = tmp_path / "two.yaml"
    other.write_text(ONE % "two")
    this.run("up", str(other), "--no-mesh", "--detach")
    assert [pod["name"] for pod in this.status()] == ["two"]
    assert not any("pod.default.one" in trace or "default.one" in trace for trace in traces(name))
    assert not [process for process in old if alive(process)]


def test_down_cleans_up_after_a_killed_supervisor_too(name: str, manifest: Path) -> None:
    this = Lab(name)
    this.run("up", str(manifest), "--no-mesh", "--detach")
    os.kill(int(Path(f"/run/narrows/lab/.{name}.lock").read_text()), signal.SIGKILL)
    this.run("down")
    assert traces(name) == []
    assert "was not up" in this.run("down").stdout


def test_up_on_a_name_that_runs_is_an_error_and_harms_nothing(name: str, manifest: Path) -> None:
    this = Lab(name)
    this.run("up", str(manifest), "--no-mesh", "--detach")
    for more in ((), ("--detach",)):
        done = this.run("up", str(manifest), "--no-mesh", *more, check=False)
        assert done.returncode == 69
        assert "already up" in done.stderr
    assert this.pod("one")["ready"]


def test_two_labs_run_side_by_side_and_do_not_see_each_other(name: str, manifest: Path) -> None:
    with lab(manifest, options=("--no-mesh",), prefix=f"{name}a") as one, \
            lab(manifest, options=("--no-mesh",), prefix=f"{name}b") as two:
        assert one.pod("one")["ip"] == two.pod("one")["ip"] == "10.244.1.2"
        two.run("down")
        assert one.exec("one", "true").returncode == 0


def test_a_command_for_a_lab_that_is_not_up_says_so() -> None:
    for argv in (("status",), ("exec", "x", "--", "true"), ("logs", "x"), ("metrics",), ("events",)):
        done = narrows("lab", argv[0], "--name", "t-nowhere", *argv[1:], check=False)
        assert done.returncode == 69
        assert "is not up" in done.stderr


@pytest.mark.parametrize(("text", "words"), [
    ("a: [", "broken YAML"),
    (ONE.replace("command", "comand") % "x", "unknown field comand"),
    ("apiVersion: v1\nkind: Gizmo\nmetadata: {name: x}\n", "unknown kind Gizmo"),
    (ONE % "same" + "---\n" + ONE % "same", "is defined already in"),
    ((ONE % "x").replace("name: x,", "name: x, namespace: nowhere,"), "there is no namespace nowhere"),
])
def test_bad_manifests_are_refused_with_their_line_and_nothing_is_made(name: str, tmp_path: Path, text: str,
                                                                      words: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    for more in ((), ("--detach",)):
        done = Lab(name).run("up", str(path), "--no-mesh", *more, check=False)
        assert done.returncode == 65 or more
        assert done.returncode != 0
        assert words in done.stderr
    assert traces(name) == []


def test_a_bad_file_changes_nothing_of_a_running_lab(name: str, manifest: Path, tmp_path: Path) -> None:
    this = Lab(name)
    this.run("up", str(manifest), "--no-mesh", "--detach")
    bad = tmp_path / "bad.yaml"
    bad.write_text(ONE % "two" + "---\n" + (ONE % "three").replace("command", "comand"))
    done = this.run("apply", str(bad), check=False)
    assert done.returncode == 65
    assert f"{bad}:9: Pod three" in done.stderr
    assert [pod["name"] for pod in this.status()] == ["one"]


def test_a_program_that_cannot_run_is_explained(name: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.yaml"
    path.write_text((ONE % "odd").replace("sleep, infinity", "no-such-program"))
    this = Lab(name)
    done = this.run("up", str(path), "--no-mesh", "--detach", "--wait", "1", check=False)
    assert done.returncode == 1
    assert "ended with 127" in done.stderr
    assert "no such program on this machine" in this.run("logs", "odd").stdout


def test_labels_and_annotations_change_without_a_restart_and_everything_else_with_one(name: str, manifest: Path,
                                                                                      tmp_path: Path) -> None:
    this = Lab(name)
    this.run("up", str(manifest), "--no-mesh", "--detach")
    first = this.exec("one", "cat", "/proc/1/stat").stdout.split()[21]  # start time
    copy = tmp_path / "elsewhere" / "copy.yaml"
    copy.parent.mkdir()
    copy.write_text((ONE % "one").replace("labels: {app: one}", "labels: {app: db}"))
    this.apply(copy)
    assert this.exec("one", "cat", "/proc/1/stat").stdout.split()[21] == first
    manifest.write_text((ONE % "one").replace("infinity", "9999s"))
    this.apply(manifest)
    until(lambda: b"9999s" in this.exec("one", "cat", "/proc/1/cmdline", check=False).stdout.encode(), "the new command")


def test_a_deployment_scales_and_rolls_without_an_interruption(name: str, manifest: Path, tmp_path: Path) -> None:
    this = Lab(name)
    web = tmp_path / "web.yaml"
    web.write_text(WEB % (2, "1"))
    this.run("up", str(manifest), str(web), "--no-mesh", "--detach")
    old = {pod["name"] for pod in this.status() if pod["workload"] == "web"}
    assert len(old) == 2
    loop = ("import urllib.request, time\nend = time.time() + 60\nn = 0\n"
            "import os\n"
            "while not os.path.exists('%s') and time.time() < end:\n"
            " urllib.request.urlopen('http://web', timeout=5).read(); n += 1\n"
            "print(n)") % (tmp_path / "stop")
    with subprocess.Popen([NARROWS, "lab", "exec", "--name", name, "one", "--", "python3", "-c", loop], text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as client:
        web.write_text(WEB % (2, "2"))
        this.apply(web)
        until(lambda: not old & {pod["name"] for pod in this.status()}, "the old pods gone")
        (tmp_path / "stop").touch()
        out, err = client.communicate(timeout=60)
        assert client.returncode == 0, err
        assert int(out) > 0
    web.write_text(WEB % (3, "2"))
    this.apply(web)
    assert sum(pod["workload"] == "web" for pod in this.status()) == 3
    this.run("delete", "deployment/web")
    until(lambda: [pod["name"] for pod in this.status()] == ["one"], "the deployment's pods gone")
    assert this.exec("one", "curl", "-sS", "-m", "5", "http://web", check=False).returncode == 7
    assert this.run("delete", "deployment/web", check=False).returncode == 65
    assert len([trace for trace in traces(name) if ".pod." in trace]) == 1


def test_ten_pods_are_up_in_seconds(name: str, tmp_path: Path) -> None:
    path = tmp_path / "ten.yaml"
    path.write_text("---\n".join(ONE % f"p{number}" for number in range(10)))
    began = time.monotonic()
    Lab(name).run("up", str(path), "--no-mesh", "--detach", "--nodes", "3")
    assert time.monotonic() - began < 15  # 2 s on an idle machine
    assert json.loads(Lab(name).run("status", "-o", "json").stdout)["pods"][9]["ready"]


def test_without_a_lab_error_a_lab_is_never_left(manifest: Path) -> None:
    with pytest.raises(LabError), lab(manifest, options=("--no-mesh",)) as running:
        running.exec("one", "false")
    assert traces(running.name) == []
