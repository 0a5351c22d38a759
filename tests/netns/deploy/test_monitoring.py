"""deploy/daemonset/monitoring in a real Prometheus: every query of the dashboard over a lab with traffic, and every alert."""
from __future__ import annotations

import http.client
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
import yaml

from agent import netlink
from tests.support.lab import NARROWS, Lab, lab
from tests.support.wait import until

pytestmark = pytest.mark.netns

ROOT = Path(__file__).parents[3]
MONITORING = ROOT / "deploy/daemonset/monitoring"
BOOKINFO = ROOT / "examples/bookinfo/bookinfo.yaml"
JOB = "narrows-system/narrows"  # as the Prometheus operator names the PodMonitor's
RULES = yaml.safe_load((MONITORING / "rules.yaml").read_text())["spec"]
ALERTS = {rule["alert"]: rule for group in RULES["groups"] for rule in group["rules"]}
WINDOW = "10s"  # what Grafana would put in for $__rate_interval: four scrapes at least
TRAFFIC = "while :; do curl -s -o /dev/null http://productpage:9080/productpage; sleep 0.1; done"
ECHO = """
import socket, threading
listener = socket.create_server(("", 7000))
while True:
    one, _ = listener.accept()
    one.sendall(b"x" * 1000); one.recv(10); one.close()
"""
TALK = """
import socket, sys, time
while True:
    with socket.create_connection((sys.argv[1], 7000)) as one:
        one.recv(1000); one.sendall(b"y")
    time.sleep(0.2)
"""


class Prometheus:
    """A Prometheus in the namespace of a lab's first node, which reaches the others' agents."""

    def __init__(self, mesh: Lab, folder: Path) -> None:
        self._netns = f"/run/netns/narrows.{mesh.name}.node.n1"
        targets = [self._address(f"/run/netns/narrows.{mesh.name}.node.{node}") + ":15020" for node in mesh.nodes()]
        (folder / "rules.yml").write_text(yaml.safe_dump(RULES))
        (folder / "prometheus.yml").write_text(yaml.safe_dump({
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"}, "rule_files": ["rules.yml"],
            "scrape_configs": [{"job_name": JOB, "metrics_path": "/stats/prometheus", "static_configs": [{"targets": targets}]}]}))
        self._log = folder / "prometheus.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                ["nsenter", f"--net={self._netns}", "--", "prometheus", f"--config.file={folder}/prometheus.yml",
                 f"--storage.tsdb.path={folder}/data", "--web.listen-address=127.0.0.1:9090"], stdout=log, stderr=log)

    @staticmethod
    def _address(netns: str) -> str:
        argv = ["nsenter", f"--net={netns}", "--", "ip", "-j", "-4", "address"]
        listing = json.loads(subprocess.run(argv, capture_output=True, check=True, text=True, timeout=20).stdout)
        found = [one["local"] for link in listing for one in link["addr_info"] if one["local"].startswith("172.31.")]
        assert len(found) == 1, listing
        return str(found[0])

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(timeout=20)

    def get(self, path: str) -> Any:
        def ask() -> Any:
            connection = http.client.HTTPConnection("127.0.0.1", 9090, timeout=10)
            try:
                connection.request("GET", path)
                answer = connection.getresponse()
                return json.loads(answer.read())
            finally:
                connection.close()

        return netlink.in_netns(self._netns, ask)

    def ready(self) -> bool:
        assert self._process.poll() is None, self._log.read_text()
        try:
            return len(self.samples(f'up{{job="{JOB}"}} == 1')) == 2
        except (OSError, ValueError):
            return False

    def samples(self, query: str) -> list[float]:
        """The values of an instant query, without those that are no number. AssertionError when Prometheus refuses it."""
        answer = self.get("/api/v1/query?" + urlencode({"query": query}))
        if answer.get("errorType") == "unavailable":
            return []
        assert answer["status"] == "success", f"{query}: {answer}"
        values = [float(one["value"][1]) for one in answer["data"]["result"]]
        return [value for value in values if not math.isnan(value)]


def queries() -> dict[str, str]:
    """Of the dashboard: title and legend -> PromQL."""
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    found = {f"{panel['title']}: {target['legendFormat']}": target["expr"].replace("$__rate_interval", WINDOW)
             for panel in dashboard["panels"] for target in panel.get("targets", ())}
    assert len(found) > 30 and not any("$" in query for query in found.values())
    return found


ASKER = """
apiVersion: v1
kind: Pod
metadata:
  name: asker
  labels: {app: asker}
  annotations: {narrows.mesh/intercept: enabled, ambient.istio.io/dns-capture: "true"}
spec:
  nodeName: n1
  containers: [{name: c, image: none, command: [sleep, infinity]}]
"""


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Lab]:
    path = tmp_path / "asker.yaml"
    path.write_text(ASKER)
    with lab(BOOKINFO, path, prefix="m") as made:
        yield made


def test_every_query_of_the_dashboard_has_samples_and_no_alert_fires(mesh: Lab, tmp_path: Path) -> None:
    address = mesh.pod("details")["ip"]
    running = [subprocess.Popen([NARROWS, "lab", "exec", "--name", mesh.name, pod, "--", *argv], stdin=subprocess.DEVNULL,
                                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
               for pod, *argv in (("asker", "sh", "-c", TRAFFIC), ("details-v1", sys.executable, "-c", ECHO),
                                  ("productpage-v1", sys.executable, "-c", f"import time; time.sleep(1); {TALK.strip()}", address))]
    prometheus = Prometheus(mesh, tmp_path)
    try:
        until(prometheus.ready, "Prometheus scrapes both nodes", 30, interval=0.2)
        missing = queries()

        def every() -> bool:
            for title, query in list(missing.items()):
                if prometheus.samples(query):
                    del missing[title]
            return not missing

        try:
            until(every, "every query has samples", 40, interval=0.5)
        except AssertionError as error:
            raise AssertionError(f"{error}: {missing}") from None

        def rules() -> list[dict[str, Any]]:
            return [rule for group in prometheus.get("/api/v1/rules")["data"]["groups"] for rule in group["rules"]]

        assert {rule["name"] for rule in rules()} == set(ALERTS)
        until(lambda: all(rule["health"] == "ok" and rule["state"] == "inactive" for rule in rules()), "no alert in a healthy lab", 30,
              interval=0.5)
    finally:
        prometheus.close()
        for process in running:
            process.terminate()
            process.wait(timeout=20)


# alert -> series of one sample a minute (promtool's notation), minutes until it fires, labels of the alert beside the rule's
FIRES: dict[str, tuple[dict[str, str], int, dict[str, str]]] = {
    "NarrowsAgentDown": ({f'up{{job="{JOB}",instance="n"}}': "0x10"}, 6, {"job": JOB, "instance": "n"}),
    "NarrowsKeeperSilent": ({'narrows_keeper_connected{instance="n"}': "0x10"}, 2, {"instance": "n"}),
    "NarrowsPodsNotCaptured": ({'narrows_capture_pods{instance="n",state="entering"}': "2x10"}, 6, {"instance": "n"}),
    "NarrowsCaptureExposed": ({'narrows_capture_exposed_seconds_total{instance="n"}': "0 0 3 3 3"}, 4, {"instance": "n"}),
    "NarrowsWorkerRefusedCall": ({'narrows_worker_refused_calls_total{instance="n",worker="1"}': "0 0 1 1"}, 3,
                                 {"instance": "n", "worker": "1"}),
    "NarrowsWorkerUnconfined": ({'narrows_worker_seccomp{instance="n",worker="1"}': "0x10"}, 2, {"instance": "n", "worker": "1"}),
    "NarrowsCertificateEnds": ({'narrows_certificate_expiration_timestamp_seconds{instance="n",identity="i"}': "21000x10"}, 6,
                               {"instance": "n", "identity": "i"}),
    "NarrowsCertificateRequestsFail": ({'narrows_certificate_request_failures_total{instance="n"}': "0+1x30"}, 25, {"instance": "n"}),
    "NarrowsBudgetNearlyUsed": ({'narrows_worker_budget_used{instance="n",resource="held"}': "90x10",
                                 'narrows_worker_budget_limit{instance="n",resource="held"}': "100x10"}, 6,
                                {"instance": "n", "resource": "held"}),
    "NarrowsConnectionsRefused": ({'narrows_worker_refused_total{instance="n",worker="1",reason="memory"}': "0+1x10"}, 6,
                                  {"instance": "n", "reason": "memory"}),
    "NarrowsTunnelsFail": ({'narrows_worker_tunnels_failed_total{instance="n",worker="1"}': "0+60x20"}, 12, {"instance": "n"}),
    "NarrowsConntrackNearlyFull": ({'narrows_conntrack_entries{instance="n"}': "90x10", 'narrows_conntrack_limit{instance="n"}': "100x10"},
                                   3, {"instance": "n"}),
    "NarrowsAccessLogIncomplete": ({'narrows_worker_dropped_records_total{instance="n",worker="1"}': "0 0 5 5"}, 3,
                                   {"instance": "n", "worker": "1"}),
}


def promtool(folder: Path, tests: list[dict[str, Any]]) -> subprocess.CompletedProcess[str]:
    plain = {"groups": [{**group, "rules": [{**rule, "annotations": {}} for rule in group["rules"]]} for group in RULES["groups"]]}
    (folder / "rules.yml").write_text(yaml.safe_dump(plain))
    (folder / "tests.yml").write_text(yaml.safe_dump({"rule_files": ["rules.yml"], "evaluation_interval": "1m", "tests": tests}))
    return subprocess.run(["promtool", "test", "rules", "tests.yml"], cwd=folder, capture_output=True, text=True, timeout=60, check=False)


def case(alert: str, series: dict[str, str], minutes: int, labels: list[dict[str, str]]) -> dict[str, Any]:
    return {"interval": "1m", "input_series": [{"series": name, "values": values} for name, values in series.items()],
            "alert_rule_test": [{"eval_time": f"{minutes}m", "alertname": alert, "exp_alerts": [{"exp_labels": one} for one in labels]}]}


def test_every_alert_fires_when_it_should_and_not_without_cause(tmp_path: Path) -> None:
    assert set(FIRES) == set(ALERTS)
    tests = []
    for alert, (series, minutes, labels) in FIRES.items():
        tests.append(case(alert, series, minutes, [labels | ALERTS[alert]["labels"]]))
        if "for" in ALERTS[alert]:
            tests.append(case(alert, series, 0, []))  # not at once
    done = promtool(tmp_path, tests)
    assert done.returncode == 0, done.stdout + done.stderr
    refused = promtool(tmp_path, [case("NarrowsAgentDown", {f'up{{job="{JOB}",instance="n"}}': "1x10"}, 6, [{"severity": "warning"}])])
    assert refused.returncode == 1, "promtool says when an alert does not fire"


def test_rules_and_dashboard_name_metrics_that_the_agent_has() -> None:
    """Those of the other test are seen in a lab; this one also holds alerts, which give no sample there."""
    source = "".join(path.read_text() for path in (ROOT / "agent").rglob("*.py"))
    for query in [*queries().values(), *(rule["expr"] for rule in ALERTS.values())]:
        for name in re.findall(r"\b(?:istio|narrows)_[a-z_]+", query):
            base = re.sub(r"_(?:total|bucket|sum|count)$", "", name)
            worker = base.removeprefix("narrows_worker_")
            assert f'"{base}"' in source or f'"{worker}"' in source or worker in source, name
