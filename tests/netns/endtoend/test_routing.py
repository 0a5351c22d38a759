"""Every field of VirtualService and DestinationRule that the mesh takes, seen from a captured client; and what faults answer."""
from __future__ import annotations

import collections
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.cli.admin_client import ask as admin
from tests.support.lab import NARROWS, Lab, LabError, lab
from tests.support.logs import whole_lines
from tests.support.wait import until

pytestmark = pytest.mark.netns
HERE = Path(__file__).parent

# Asks each URL that comes on stdin, one connection a request, and prints the version that answered or the status.
MANY = """
import collections, http.client, json, sys
seen = collections.Counter()
for _ in range(int(sys.argv[3])):
    c = http.client.HTTPConnection(sys.argv[1], timeout=5)
    c.request("GET", sys.argv[2]); r = c.getresponse(); body = r.read()
    seen[json.loads(body)["version"] if r.status == 200 else str(r.status)] += 1
    c.close()
print(json.dumps(seen))
"""
# Asks until stdin closes; every third request closes its connection. Prints what came, counted.
STEADY = """
import collections, http.client, json, select, sys
seen = collections.Counter()
c = http.client.HTTPConnection("web", timeout=5)
while not select.select([sys.stdin], [], [], 0.002)[0]:
    try:
        c.request("GET", "/v1"); r = c.getresponse(); r.read(); seen[str(r.status)] += 1
    except (OSError, http.client.HTTPException) as error:
        seen[type(error).__name__] += 1; c.close()
    if sum(seen.values()) % 3 == 0: c.close()
print(json.dumps(seen))
"""
NODE = "n1"  # the lab's name for the only one
CHANGES = 200
SHIFT = """apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{name: web, namespace: default}}
spec:
  hosts: [web]
  http:
  - route: [{{destination: {{host: web, subset: v1}}, weight: {0}}}, {{destination: {{host: web, subset: v2}}, weight: {1}}}]
"""


@pytest.fixture(scope="module")
def mesh() -> Iterator[Lab]:
    with lab(HERE / "routing.yaml", options=("--workers", "1")) as running:
        yield running


def ask(mesh: Lab, url: str, *options: str) -> tuple[int, dict[str, str], Any]:
    """Status, response fields and what the application saw (None when the mesh answered)."""
    out = mesh.exec("client", "curl", "-sS", "-i", "-m", "8", *options, url).stdout
    head, _, body = out.partition("\n\n")  # text mode made \n of CRLF
    lines = head.splitlines()
    fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    return int(lines[0].split()[1]), fields, json.loads(body) if body.startswith("{") else None


def many(mesh: Lab, host: str, path: str, count: int) -> dict[str, int]:
    found: dict[str, int] = json.loads(mesh.exec("client", "/usr/bin/python3", "-c", MANY, host, path, str(count)).stdout)
    return found


def logged(mesh: Lab, path: str) -> list[dict[str, Any]]:
    """Access log records of the client's side for a path."""
    records = [json.loads(line) for line in whole_lines(Path(f"/run/narrows/lab/{mesh.name}/nodes/{NODE}/access.log"))]
    return [one for one in records if one["reporter"] == "source" and str(one["path"]).partition("?")[0] == path]


def commits(mesh: Lab) -> int:
    """Transactions in force so far."""
    done: int = admin(Path(f"/run/narrows/lab/{mesh.name}/nodes/{NODE}/admin.sock"), "/server_info")["commits"]
    return done


def test_the_worker_count_is_the_one_that_was_asked_for_and_no_worker_holds_a_capability(mesh: Lab) -> None:
    (worker,) = mesh.processes("ext.proxy.worker")
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{worker}/status").read_text().splitlines() if ":\t" in line)
    for one in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(status[one], 16) == 0, one
    assert "0" not in status["Uid"].split() and status["NoNewPrivs"] == "1"


@pytest.mark.parametrize("url, options, version", [
    ("http://web/exact", (), "v2"),
    ("http://web/prefix/a", (), "v2"),
    ("http://web/re/12", (), "v2"),
    ("http://web/v1", ("-X", "DELETE"), "v2"),
    ("http://web/v1", ("-H", "x-who: me"), "v2"),
    ("http://web/v1?a=1&q=2", (), "v2"),
    ("http://web/v1?q=3", ("-H", "x-who: you"), "v1"),
])
def test_a_request_takes_the_first_route_that_matches(mesh: Lab, url: str, options: tuple[str, ...], version: str) -> None:
    status, _, seen = ask(mesh, url, *options)
    assert (status, seen["version"]) == (200, version)


@pytest.mark.parametrize("path", ["/exact/", "/prefix", "/re/x", "/re/12/", "/"])
def test_a_request_that_matches_no_route_is_404_with_nr(mesh: Lab, path: str) -> None:
    assert ask(mesh, f"http://web{path}")[0] == 404
    until(lambda: {(one["response_code"], one["response_flags"]) for one in logged(mesh, path)} == {(404, "NR")}, "logged as NR")


def test_header_fields_are_set_added_and_removed_both_ways(mesh: Lab) -> None:
    _, fields, seen = ask(mesh, "http://web/edits", "-H", "x-gone: 1", "-H", "x-set: mine", "-H", "x-add: mine")
    assert seen["headers"]["x-set"] == ["route"] and "x-gone" not in seen["headers"]
    assert ",".join(seen["headers"]["x-add"]).replace(" ", "") == "mine,route"
    assert (fields["x-set"], fields["x-add"]) == ("route", "route") and "x-old" not in fields


def test_weights_and_balancers_share_out_as_they_say(mesh: Lab) -> None:
    shares = many(mesh, "web", "/weights", 200)
    assert shares["v1"] + shares["v2"] == 200 and 15 <= shares["v1"] <= 70, shares  # 40 expected; five sigma are 28
    assert many(mesh, "turns", "/", 20) == {"v1": 10, "v2": 10}
    assert set(many(mesh, "least", "/", 40)) == {"v1", "v2"}


def test_least_request_leaves_the_one_who_is_busy(mesh: Lab) -> None:
    argv = [NARROWS, "lab", "exec", "--name", mesh.name, "client", "--", "curl", "-s", "-m", "20", "http://least/?sleep=4"]
    busy = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    try:
        rounds: list[dict[str, int]] = []

        def lopsided() -> bool:
            rounds.append(many(mesh, "least", "/", 30))
            return max(rounds[-1].values()) >= 20

        until(lopsided, "the free one gets more", timeout=3.5)
    finally:
        out, _ = busy.communicate(timeout=20)
    free = max(rounds[-1], key=lambda version: rounds[-1][version])
    assert json.loads(out)["version"] != free


@pytest.mark.parametrize("url, status, flag", [
    ("http://web/slow?sleep=2", 504, "UT"),
    ("http://web/nobody", 503, "UH"),
    ("http://deaf/refused", 503, "UF"),
])
def test_what_cannot_be_answered_is_answered_with_its_flag_in_the_log(mesh: Lab, url: str, status: int, flag: str) -> None:
    assert ask(mesh, url)[0] == status
    path = "/" + url.split("/")[3].partition("?")[0]
    last = until(lambda: logged(mesh, path), "a log record")[-1]
    assert last["response_code"] == status and flag in last["response_flags"].split(","), last


def test_the_control_plane_killed_is_back_by_itself_and_is_followed_again(mesh: Lab) -> None:
    (plane,) = mesh.processes("narrows control-plane")
    os.kill(plane, signal.SIGKILL)
    assert ask(mesh, "http://web/exact")[2]["version"] == "v2"
    until(lambda: mesh.processes("narrows control-plane") not in ([], [plane]), "the control plane is back", timeout=20)


def test_a_pod_that_comes_while_the_control_plane_is_away_is_captured_and_routed(mesh: Lab, tmp_path: Path) -> None:
    (plane,) = mesh.processes("narrows control-plane")
    manifest = tmp_path / "late.yaml"
    manifest.write_text("apiVersion: v1\nkind: Pod\nmetadata: {name: late}\n"
                        "spec: {containers: [{name: main, image: none, command: [sleep, infinity]}]}\n")
    assert ask(mesh, "http://web/exact")[0] == 200  # from now on the node knows its routes
    os.kill(plane, signal.SIGSTOP)
    # `apply` waits for the mesh, and so until the control plane is back
    apply = subprocess.Popen([NARROWS, "lab", "apply", "--name", mesh.name, str(manifest)], stdout=subprocess.DEVNULL)
    try:
        until(lambda: any(pod["name"] == "late" and pod["captured"] for pod in mesh.status()), "the pod is captured", timeout=15)
        out = mesh.exec("late", "curl", "-s", "-m", "8", "http://web/exact").stdout
        assert json.loads(out)["version"] == "v2", "routed by what its node knows"
    finally:
        os.kill(plane, signal.SIGCONT)
        assert apply.wait(timeout=60) == 0
    assert mesh.exec("late", "curl", "-s", "-m", "8", "-o", "/dev/null", "-w", "%{http_code}", "http://turns/").stdout == "200"
    mesh.run("delete", "pod/late")
    until(lambda: not list(Path("/run/netns").glob(f"*{mesh.name}*.late")) and all(pod["name"] != "late" for pod in mesh.status()),
          "the pod is gone")


def test_two_hundred_changes_of_a_route_under_traffic_lose_no_request(mesh: Lab) -> None:
    """Last of this lab: it replaces the routes."""
    argv = [NARROWS, "lab", "exec", "--name", mesh.name, "client", "--", "/usr/bin/python3", "-c", STEADY]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as traffic:
        folder = Path(f"/run/narrows/lab/{mesh.name}/config")
        file = next(path for path in folder.glob("*.yaml") if path.name.startswith("virtualservice.default.web"))
        for number in range(CHANGES):
            beside = file.with_name(f".{file.name}")
            beside.write_text(SHIFT.format(number % 100 + 1, 100 - number % 100))
            before = commits(mesh)
            beside.rename(file)
            until(lambda before=before: commits(mesh) > before, f"change {number} is in force")  # type: ignore[misc]
        out, _ = traffic.communicate(timeout=20)
    seen = collections.Counter(json.loads(out))
    assert set(seen) == {"200"} and seen["200"] > 50, seen


@pytest.mark.parametrize("text, said", [
    ("kind: [", "bad.yaml:"),
    ("apiVersion: v1\nkind: Nonsense\nmetadata: {name: a}\n", "Nonsense"),
    (SHIFT.format(1, 2).replace("hosts:", "mirrors: [x]\n  hosts:"), "bad.yaml:5"),
    (SHIFT.format(0, 0), "weights of 0"),
])
def test_what_is_wrong_is_refused_with_its_file_and_line_and_nothing_changes(mesh: Lab, tmp_path: Path, text: str, said: str) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text(text)
    with pytest.raises(LabError, match=r"bad\.yaml:\d") as refused:
        mesh.apply(bad)
    assert said in str(refused.value)
    checked = subprocess.run([NARROWS, "validate", str(bad)], capture_output=True, text=True, timeout=30, check=False)
    assert checked.returncode == 65 and said in checked.stdout + checked.stderr
    assert ask(mesh, "http://turns/")[0] == 200
