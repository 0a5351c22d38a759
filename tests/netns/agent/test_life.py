"""The agent with a real keeper, control plane and pods: what survives the death of whom."""
from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time

import pytest

from agent.app.keeper import HUNG_SECONDS, PULSE_SECONDS
from agent.app.pods import WATCH_SECONDS
from agent.cli.main import CommandError
from tests.netns.agent.conftest import CAPTURED, NARROWS, PORT, VIRTUAL, Connection, Instance
from tests.support.logs import whole_lines
from tests.support.wait import until

pytestmark = pytest.mark.netns


def served(instance: Instance) -> bool:
    return instance.get() == f"served / to {instance.client.ip} 200"


def test_one_request_end_to_end_is_routed_and_counted_on_both_sides(instance: Instance) -> None:
    instance.up()
    assert [pod["captured"] for pod in instance.ask("/pods")] == [True, True]
    for _ in range(10):
        assert served(instance)
    until(lambda: instance.requests("source") == instance.requests("destination") == 10, "10 requests counted twice")
    dump = instance.ask("/config_dump")
    assert [one["authority"] for one in dump["destinations"]] == [f"web.default.svc.cluster.local:{PORT}"]
    assert {one["kind"] for one in dump["listeners"]} == {"outbound", "inbound", "hbone", "api"}
    lines = until(lambda: whole_lines(instance.run_dir / "access.log"), "an access log")
    assert any('"response_code":200' in line and '"reporter":"source"' in line for line in lines)


def test_an_access_log_that_asks_has_what_the_kernel_measured_on_both_sides(instance: Instance) -> None:
    instance.up("--access-log", "json-tcp")
    assert served(instance)
    path = instance.run_dir / "access.log"
    lines = until(lambda: [one for one in map(json.loads, whole_lines(path)) if one["reporter"] == "source"], "a line of the client's side")
    assert (lines[0]["downstream_leg"], lines[0]["downstream_retransmits"]) == ("socket", 0)
    assert lines[0]["downstream_rtt_us"] > 0
    assert lines[0]["upstream_leg"] in ("socket", "tunnel", "node")


def test_an_agent_that_is_killed_and_started_again_adopts_what_runs_and_changes_nothing(instance: Instance) -> None:
    instance.up()
    assert served(instance)
    live = Connection(instance)
    live.get()
    before = instance.traces(instance.client), instance.ask("/config_dump")
    assert instance.turned(instance.client) == CAPTURED
    counted = instance.requests("source")
    instance.kill("agent")
    assert served(instance)
    live.get()
    instance.start_agent()
    instance.ready()
    live.get()
    live.close()
    assert served(instance)
    found = instance.events("KeeperFound")[0]["message"]
    assert "; 0 of " in found and "2 pods attached" in found, found
    assert instance.traces(instance.client) == before[0] and instance.turned(instance.client) == CAPTURED
    after = instance.ask("/config_dump")
    for part in ("workloads", "services", "destinations", "clusters"):
        assert after[part] == before[1][part], part
    until(lambda: instance.requests("source") >= counted + 4, "what was counted while no agent looked")


def test_without_a_control_plane_everything_serves_on_also_across_an_agent_restart(instance: Instance) -> None:
    instance.up()
    assert served(instance)
    instance.kill("plane")
    assert served(instance)
    instance.kill("agent", signal.SIGTERM)
    assert served(instance)
    instance.start_agent()
    instance.ready()
    assert served(instance)
    assert instance.ask("/server_info")["controlPlane"]["state"] == "connecting"
    (instance.config / "more.yaml").write_text((instance.config / "web.yaml").read_text()
                                              .replace("name: web", "name: more").replace(VIRTUAL, "10.96.0.11"))
    instance.start_plane()
    until(lambda: any(one["name"] == "more" for one in instance.ask("/config_dump")["services"]),
          "the control plane is followed again", 20)
    assert served(instance)


def test_a_malformed_annotation_is_refused_with_an_event_and_the_pod_stays_what_it_was(instance: Instance) -> None:
    instance.up()
    before = instance.traces(instance.client)
    bad = {"traffic.sidecar.istio.io/excludeOutboundPorts": "80,http"}
    instance.pod("client", instance.client, **bad)
    event = until(lambda: instance.events("AnnotationRefused"), "an event")[0]
    assert event["warning"] and event["about"] == "pod default/client"
    assert "excludeOutboundPorts" in event["message"] and "80,http" in event["message"]
    assert instance.shown("client")["captured"] and instance.traces(instance.client) == before
    assert instance.turned(instance.client) == CAPTURED
    assert served(instance)
    fresh = instance.node.pod("fresh")
    instance.pod("fresh", fresh, **bad)
    shown = instance.shown("fresh")
    assert not shown["captured"] and shown["final"] and "80,http" in shown["reason"]
    assert instance.traces(fresh) == []


def test_opting_out_acts_on_new_connections_and_live_ones_finish(instance: Instance) -> None:
    instance.up()
    live = Connection(instance)
    live.get()
    instance.pod("client", instance.client, intercept="disabled")
    until(lambda: not instance.ask("/pods/default/client")["captured"], "the pod is released")
    assert instance.turned(instance.client) == {}
    counted = instance.requests("source")
    assert "200" not in instance.get()  # the virtual address is routed to nowhere without the mesh
    live.get()
    until(lambda: instance.requests("source") == counted + 1, "the live connection is still ours")
    live.close()
    until(lambda: instance.traces(instance.client) == [], "nothing of ours is left after the last connection", 20)
    until(lambda: instance.shown("client")["handle"] is None, "the keeper has let the pod go")
    instance.pod("client", instance.client)
    until(lambda: instance.ask("/pods/default/client")["captured"], "captured again")
    assert served(instance)


@pytest.mark.redirects("asks for them, since it is about rules; test_ebpf.py has the same of hooks")
@pytest.mark.parametrize("edit", [
    ["iptables-legacy", "-t", "nat", "-F"], ["ip6tables-legacy", "-t", "mangle", "-F"], ["ip", "rule", "del", "priority", "32764"],
    ["ip", "-6", "route", "flush", "table", "100"], ["iptables-legacy", "-t", "nat", "-I", "OUTPUT", "-p", "tcp", "-j", "ACCEPT"]])
def test_rules_that_somebody_else_changes_are_put_back_and_event_and_metrics_tell(instance: Instance, edit: list[str]) -> None:
    instance.up("--capture", "iptables")
    before, moment = kernel_state(instance), time.monotonic()
    instance.client.run(*edit)
    assert kernel_state(instance) != before
    event = until(lambda: instance.events("Repaired"), "the repair is told", 30)[0]
    seconds = float(re.search(r"after at most ([0-9.]+) s", event["message"])[1])  # type: ignore[index]
    assert 0 < seconds < time.monotonic() - moment + 2 * WATCH_SECONDS
    assert "-I" in edit or kernel_state(instance) == before
    until(lambda: instance.shown("client")["repairs"] == 1 and instance.metric("narrows_capture_repairs_total") == 1, "counted")
    assert instance.metric("narrows_capture_exposed_seconds_total") == pytest.approx(seconds, abs=0.1)
    assert served(instance)


def kernel_state(instance: Instance) -> list[str]:
    run = instance.client.run
    return [instance.client.iptables_save(4), instance.client.iptables_save(6),
            *(run("ip", flag, *what, check=False).stdout for flag in ("-4", "-6")
              for what in (("rule",), ("route", "show", "table", "100")))]


def test_a_new_keeper_gets_everything_and_captures_go_on(instance: Instance) -> None:
    instance.up()
    assert served(instance)
    instance.kill("keeper")
    until(lambda: not instance.ask("/ready")["ready"], "the agent says that it is not ready")
    instance.start_keeper()
    instance.ready()
    until(lambda: served(instance), "requests are served again")


def test_what_is_captured_is_refused_and_never_passed_on_while_nobody_knows_the_mesh(instance: Instance) -> None:
    instance.up()
    assert served(instance)
    for name in ("plane", "agent", "keeper"):
        instance.kill(name)

    def direct() -> int:
        """curl's exit status for the server's own address, where only capture stands in the way."""
        return instance.client.run("curl", "-s", "-m", "3", f"http://{instance.server.ip}:8080/", check=False).returncode

    refused = 7
    until(lambda: direct() == refused, "the workers are gone with their listeners")
    instance.start_keeper()
    instance.start_agent()

    def missing() -> list[str]:
        try:
            said: list[str] = instance.ask("/ready")["missing"]
        except CommandError:  # it is starting
            return []
        return said

    until(lambda: any("default/client" in text and "control plane" in text for text in missing()),
          "the agent says what the pod waits for", 20)
    assert direct() == refused
    instance.start_plane()
    instance.ready()
    assert served(instance)
    assert direct() == 0


def test_a_pod_that_goes_leaves_nothing_in_the_keeper_and_its_number_is_not_given_again(instance: Instance) -> None:
    instance.up()
    handle = instance.shown("client")["handle"]
    instance.remove_pod("client")
    until(lambda: [pod["name"] for pod in instance.ask("/pods")] == ["web-0"], "the pod is gone")
    until(lambda: sum(worker["pods"] for worker in instance.ask("/workers")) == 1, "the keeper holds one pod")
    instance.pod("client", instance.client)
    until(lambda: len(instance.ask("/pods")) == 2, "the pod is back")
    assert instance.shown("client")["captured"] and instance.shown("client")["handle"] > handle
    until(lambda: served(instance), "requests are served")


def test_the_agent_ends_with_0_on_sigterm_and_leaves_the_data_path_serving(instance: Instance) -> None:
    instance.up()
    assert served(instance)
    assert instance.kill("agent", signal.SIGTERM) == 0
    assert not (instance.run_dir / "admin.sock").exists()
    for _ in range(5):
        assert served(instance)


def test_readiness_names_what_is_missing(instance: Instance) -> None:
    instance.start_agent()
    until(lambda: (instance.run_dir / "admin.sock").exists(), "the admin socket")
    missing = until(lambda: instance.ask("/ready"), "an answer")["missing"]
    assert any("keeper is away" in text for text in missing) and any("control plane" in text for text in missing)
    answer = instance.node.netns.run("curl", "-s", "-w", "%{http_code}", "http://127.0.0.1:15021/healthz/ready").stdout
    assert answer.endswith("503") and "keeper" in answer
    instance.start_keeper()
    instance.start_plane()
    instance.ready()
    assert instance.node.netns.run("curl", "-s", "http://127.0.0.1:15021/healthz/ready").stdout == "ready\n"


def test_opting_out_while_agent_and_keeper_were_down_is_made_good(instance: Instance) -> None:
    instance.up()
    instance.kill("agent")
    instance.kill("keeper")
    instance.pod("client", instance.client, intercept="disabled")
    instance.start_keeper()
    instance.start_agent()
    instance.ready()
    until(lambda: instance.traces(instance.client) == [], "what the last agent made is gone", 20)
    assert not instance.shown("client")["captured"] and instance.shown("web-0")["captured"]


def test_a_second_agent_of_the_same_instance_does_not_start(instance: Instance) -> None:
    instance.up()
    first = instance.processes.pop("agent")
    try:
        instance.start_agent()
        assert instance.processes["agent"].wait(timeout=30) == 69
        assert "another agent serves" in (instance.run_dir / "agent.log").read_text()
    finally:
        instance.processes["agent"] = first
    assert served(instance)


def test_a_keeper_that_hangs_is_told_within_five_seconds_and_everything_serves_on(instance: Instance) -> None:
    instance.up()
    assert served(instance)
    assert instance.metric("narrows_keeper_connected") == 1
    pid = instance.ask("/server_info")["keeper"]["pid"]
    began = time.monotonic()
    os.kill(pid, signal.SIGSTOP)
    try:
        missing = until(lambda: instance.ask("/ready")["missing"], "readiness tells", timeout=15)
        took = time.monotonic() - began
        assert any(f"keeper (pid {pid}) has not answered" in text for text in missing)
        assert HUNG_SECONDS + PULSE_SECONDS < 5 and took < 10       # the bound itself is arithmetic; the machine may be slow
        assert instance.metric("narrows_keeper_silent_seconds") > HUNG_SECONDS
        done = subprocess.run([*NARROWS, "status", "--run-dir", str(instance.run_dir)], capture_output=True, text=True, check=False)
        assert done.returncode != 0 and "hung" in done.stdout and "has not answered" in done.stderr
        assert served(instance)
    finally:
        os.kill(pid, signal.SIGCONT)
    instance.ready()
    assert instance.ask("/server_info")["keeper"]["state"] == "connected"
