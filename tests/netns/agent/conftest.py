"""A node with a keeper, a control plane and an agent as real processes, and pods in namespaces of their own."""
from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent import netlink
from agent.capture import pins
from agent.capture.egress import netns_cookie
from agent.cli.admin_client import ask
from agent.cli.main import CommandError
from tests.support.bpftool import keys, lookups, programs
from tests.support.capture import CAPTURE, EGRESS, INGRESS
from tests.support.cgroup import Cgroups, entering, visited
from tests.support.netns import Namespaces, Netns, Node
from tests.support.wait import until

HERE = Path(__file__).parent
CAPTURED = {"egress": "ebpf" if EGRESS else "iptables", "ingress": "ebpf" if INGRESS else "iptables"}
VIRTUAL, PORT = "10.96.0.10", 80  # the service's address: routed to nowhere without the mesh
NARROWS = [sys.executable, "-c", "from agent.cli.main import main; main()"]

SERVICE = f"""
apiVersion: v1
kind: Service
metadata: {{name: web, namespace: default}}
spec:
  clusterIP: {VIRTUAL}
  selector: {{app: web}}
  ports: [{{name: http, port: {PORT}, targetPort: 8080}}]
"""


def pod_object(name: str, app: str, netns: Netns, annotations: dict[str, str]) -> dict[str, Any]:
    return {
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": "default", "uid": f"uid-{name}", "labels": {"app": app, "version": "v1"},
                     "annotations": annotations},
        "spec": {"nodeName": "n1", "serviceAccountName": "default",
                 "containers": [{"name": "c", "image": "none", "ports": [{"containerPort": 8080}]}]},
        "status": {"phase": "Running", "podIP": netns.ip, "podIPs": [{"ip": netns.ip}],
                   "conditions": [{"type": "Ready", "status": "True"}]},
    }


class Instance:
    """One instance of Narrows on one node, process by process. `close` ends everything."""

    def __init__(self, namespaces: Namespaces) -> None:
        self.cgroups = Cgroups()
        self.proxy = self.cgroups.make("proxy").path  # the keeper's
        self.run_dir = Path(f"/run/narrows/t{os.getpid()}-{uuid.uuid4().hex[:6]}")
        self.config = self.run_dir / "config"
        (self.run_dir / "pods").mkdir(parents=True, mode=0o700)
        self.config.mkdir()
        self.node = Node(namespaces)
        self.client, self.server = self.node.pod("client"), self.node.pod("server")
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.before: list[str] = []  # the command that starts the agent, if any
        (self.config / "web.yaml").write_text(SERVICE)
        self.pod("client", self.client)
        self.pod("web-0", self.server)
        self.serve(self.server)

    # -- processes --------------------------------------------------------------------------------------------------

    def start(self, name: str, *arguments: str) -> None:
        if name == "agent" and CAPTURE and "--capture" not in arguments:
            arguments += ("--capture", CAPTURE)
        with open(self.run_dir / f"{name}.log", "ab") as log:
            argv = ["nsenter", f"--net={self.node.netns.path}", "--", *(self.before if name == "agent" else ()), *NARROWS, *arguments]
            self.processes[name] = subprocess.Popen(argv if name != "keeper" else entering(self.proxy, *argv), stderr=log, stdout=log)

    def start_keeper(self) -> None:
        self.start("keeper", "keeper", "--run-dir", str(self.run_dir), "--drain", "0")

    def start_plane(self) -> None:
        (self.run_dir / "xds.sock").unlink(missing_ok=True)
        self.start("plane", "control-plane", "--config", str(self.config), "--listen", f"unix:{self.run_dir}/xds.sock")

    def start_agent(self, *options: str) -> None:
        self.start("agent", "agent", "--run-dir", str(self.run_dir), "--node", "n1", "--xds",
                   f"unix:{self.run_dir}/xds.sock", *options)

    def kill(self, name: str, number: int = signal.SIGKILL) -> int:
        process = self.processes.pop(name)
        process.send_signal(number)
        return process.wait(timeout=15)

    def up(self, *options: str) -> None:
        """`options`: of the agent."""
        self.start_keeper()
        self.start_plane()
        self.start_agent(*options)
        self.ready()

    def close(self) -> None:
        for name in ("agent", "plane", "keeper"):
            if name in self.processes:
                self.kill(name, signal.SIGTERM)
        subprocess.run([*NARROWS, "capture", "clean", "--instance", str(self.run_dir)], check=True, timeout=60)
        self.cgroups.close()
        shutil.rmtree(self.run_dir)

    # -- pods -------------------------------------------------------------------------------------------------------

    def pod(self, name: str, netns: Netns, intercept: str | None = "enabled", cgroup: str | None = None,
            **annotations: str) -> None:
        """Write or change a pod: for the control plane, and for the agent."""
        if intercept is not None:
            annotations["narrows.mesh/intercept"] = intercept
        app = name.rpartition("-")[0] or name
        shape = pod_object(name, app, netns, annotations)
        self.write(self.config / f"pod-{name}.yaml", shape)
        if cgroup is None and not netns.cgroup:
            netns.cgroup = self.cgroups.make(name).path
        local = {"netns": netns.path, "cgroup": netns.cgroup if cgroup is None else cgroup, "namespaceLabels": {},
                 "namespaceAnnotations": {}}
        self.write(self.run_dir / "pods" / f"default.{name}.json", shape | {"narrows": local})

    def remove_pod(self, name: str) -> None:
        (self.run_dir / "pods" / f"default.{name}.json").unlink()
        (self.config / f"pod-{name}.yaml").unlink()

    @staticmethod
    def write(path: Path, value: dict[str, Any]) -> None:
        beside = path.with_name(f".{path.name}")
        beside.write_text(json.dumps(value))
        beside.rename(path)

    def serve(self, netns: Netns) -> None:
        process = netns.start(sys.executable, str(HERE / "web.py"), stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline() == b"listening\n"

    # -- what is in force, by other tools' word -----------------------------------------------------------------------

    def turned(self, netns: Netns) -> dict[str, str]:
        """By what new connections from (egress) and to (ingress) a pod are turned to us."""
        rules, found = netns.iptables_save(4), {}
        for direction, port in (("egress", 15001), ("ingress", 15006)):
            if f"--to-ports {port}" in rules:
                found[direction] = "iptables"
        cookie = netns_cookie(netns.path).to_bytes(8, sys.byteorder)
        pods = [one.maps / "pods" for one in pins.found(str(self.run_dir)) if (one.maps / "pods").exists()]
        if "connect4" in programs(netns.cgroup) and any(cookie in keys(one) for one in pods):
            found["egress"] = "ebpf"
        if lookups(netns):
            found["ingress"] = "ebpf"
        return found

    def traces(self, netns: Netns) -> list[str]:
        """All that is ours in a pod: chains and rules, hooks."""
        chains = [line for family in (4, 6) for line in netns.iptables_save(family).splitlines() if "NARROWS" in line]
        return [*chains, *sorted(programs(netns.cgroup)), *["sk_lookup"] * lookups(netns)]

    # -- questions --------------------------------------------------------------------------------------------------

    def ask(self, what: str, method: str = "GET") -> Any:
        return ask(self.run_dir / "admin.sock", what, method)

    def logs(self) -> str:
        return "".join(f"--- {path.name}\n{path.read_text()[-4000:]}" for path in sorted(self.run_dir.glob("*.log")))

    def ready(self, timeout: float = 60) -> None:
        said: list[str] = []

        def check() -> bool:
            try:
                answer = self.ask("/ready")
            except CommandError as error:
                said[:] = [str(error)]
                return False
            said[:] = answer["missing"]
            return bool(answer["ready"])

        try:
            until(check, "the agent is ready", timeout)
        except AssertionError as error:
            raise AssertionError(f"{error}: {said}\n{self.logs()}") from None

    def shown(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.ask(f"/pods/default/{name}?wait=20")
        return found

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.ask("/events") if event["kind"] == kind]

    def get(self, netns: Netns | None = None, where: str = f"http://{VIRTUAL}:{PORT}/", *options: str) -> str:
        """Status and body of a request from inside a pod, as curl sees it."""
        done = (netns or self.client).run("curl", "-s", "-S", "-m", "10", "-w", " %{http_code}", *options, where, check=False)
        return done.stdout + done.stderr

    def metrics(self) -> list[str]:
        text = self.node.netns.run("curl", "-s", "http://127.0.0.1:15020/metrics").stdout
        return [line for line in text.splitlines() if not line.startswith("#")]

    def metric(self, name: str) -> float:
        """The value of a metric without labels."""
        return next(float(line.rpartition(" ")[2]) for line in self.metrics() if line.startswith(name + " "))

    def requests(self, reporter: str) -> float:
        return sum(float(line.rpartition(" ")[2]) for line in self.metrics()
                   if line.startswith("istio_requests_total{") and f'reporter="{reporter}"' in line
                   and 'destination_service_name="web"' in line)


class Connection:
    """A keep-alive connection of the client pod to the service; or of another one, to the server itself."""

    def __init__(self, instance: Instance, other: Netns | None = None) -> None:
        def connect() -> socket.socket:
            return socket.create_connection((VIRTUAL, PORT) if other is None else (instance.server.ip, 8080), timeout=10)
        if other is not None:
            self.socket: socket.socket = netlink.in_netns(other.path, connect)
            return
        with visited(instance.client.cgroup):
            self.socket = netlink.in_netns(instance.client.path, connect)

    def get(self, path: str = "/live") -> bytes:
        self.ask(path)
        return self.answer(path)

    def ask(self, path: str) -> None:
        self.socket.sendall(b"GET %s HTTP/1.1\r\nHost: web\r\n\r\n" % path.encode())

    def answer(self, path: str) -> bytes:
        data = b""
        while b"served " + path.encode() not in data:
            more = self.socket.recv(4096)
            assert more, f"the connection ended after {data!r}"
            data += more
        return data

    def close(self) -> None:
        self.socket.close()


@pytest.fixture
def instance(namespaces: Namespaces) -> Iterator[Instance]:
    made = Instance(namespaces)
    try:
        yield made
    finally:
        made.close()
