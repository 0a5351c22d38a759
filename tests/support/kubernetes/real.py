"""The real Kubernetes on loopback: etcd, kube-apiserver and, when asked for, kube-controller-manager, as processes of the test.

    with Cluster() as cluster:                      certificates, ports and data of its own; nothing is left behind
        cluster.kubeconfig                          of an administrator, for any client
        cluster.configuration()                     the same for ours
        cluster.kubectl("get", "pods", "-A")        what it printed
        cluster.token("default", "web", "istio-ca") a service account's token, from TokenRequest

The programs come from `tools/kubernetes.py`, which `make test-kubernetes` runs first. Nothing schedules pods or runs
them, but `kubelet.py`.
"""
from __future__ import annotations

import base64
import http.client
import json
import os
import shutil
import socket
import ssl
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from protos.kubernetes import configuration
from protos.kubernetes.configuration import Configuration
from tests.support.pki import Authority
from tests.support.wait import PATIENCE, until
from tools.kubernetes import built

START = 90.0  # s until it is ready: 6 s on a machine that does nothing else
END = 10.0  # s for one process to end by itself, before it is killed
ISSUER = "https://kubernetes.default.svc"
ADDRESSES = "10.96.0.0/16"  # of services
LOG_LINES = 25


class Missing(Exception):
    """What the slow lane needs is not on this machine."""


class Failed(Exception):
    """One of the programs ended, or was not ready in time."""


class _PortTaken(Failed):
    pass


def programs() -> Path:
    """The folder with kube-apiserver, kube-controller-manager and kubectl. Raises Missing."""
    folder = built()
    if folder is None or shutil.which("etcd") is None:
        what = "the real kube-apiserver is" if folder is None else "etcd is"
        raise Missing(f"{what} not on this machine: `make test-kubernetes` gets it, once (about ten minutes; root)")
    return folder


class Cluster:
    def __init__(self, *, controllers: bool = False) -> None:
        """`controllers`: Deployments make pods, namespaces get accounts with tokens, endpoints follow pods. Without them pods are admitted
        without a ServiceAccount, since nobody would make one."""
        self._programs, self._controllers = programs(), controllers
        self._folder = Path(tempfile.mkdtemp(prefix="narrows-kubernetes-"))
        self._processes: list[tuple[str, subprocess.Popen[bytes]]] = []
        self.kubeconfig = self._folder / "admin.kubeconfig"
        self.data = self._folder / "data"  # etcd's; not to be touched but between `stop` and `start`
        self.port = 0

    def __enter__(self) -> Cluster:
        try:
            self._credentials()
            for again in (2, 1, 0):  # a free port may be somebody else's a moment later
                self._etcd, self._peers, self.port = _free_ports(3)
                pem = base64.b64encode(self._admin.read_bytes()).decode()
                self._write_kubeconfig(self.kubeconfig, {"client-certificate-data": pem, "client-key-data": pem})
                try:
                    self.start()
                    return self
                except _PortTaken:
                    self.stop()
                    shutil.rmtree(self.data, ignore_errors=True)
                    if not again:
                        raise
            raise AssertionError("unreachable")
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    def configuration(self) -> Configuration:
        return configuration.kubeconfig(self.kubeconfig)

    def kubectl(self, *argv: str, given: str = "", check: bool = True, timeout: float = 60.0) -> str:
        """What it printed. AssertionError with its words when it fails, unless `check` is off: then those are given back too."""
        done = subprocess.run([str(self._programs / "kubectl"), *argv], input=given, capture_output=True, text=True, check=False,
                              timeout=timeout * PATIENCE, env={**os.environ, "KUBECONFIG": str(self.kubeconfig), "HOME": str(self._folder)})
        assert not check or done.returncode == 0, f"kubectl {' '.join(argv)}: {done.stdout}{done.stderr}"
        return done.stdout if check else done.stdout + done.stderr

    def apply(self, namespace: str, *manifests: str | dict[str, Any]) -> str:
        """By kubectl: text, or objects."""
        text = "\n---\n".join(one if isinstance(one, str) else yaml.safe_dump(one) for one in manifests)
        return self.kubectl("-n", namespace, "apply", "-f", "-", given=text)

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """One request as the administrator: status, and the answer (JSON, or text)."""
        connection = http.client.HTTPSConnection("127.0.0.1", self.port, timeout=30, context=self._tls)
        try:
            data = None if body is None else json.dumps(body)
            connection.request(method, path, data, {"Content-Type": "application/json"} if data else {})
            answer = connection.getresponse()
            text = answer.read().decode()
            return answer.status, json.loads(text) if "json" in answer.getheader("Content-Type", "") else text
        finally:
            connection.close()

    def ready(self, namespace: str, labels: str = "") -> list[dict[str, Any]]:
        """Pods that are ready, and not about to go."""
        query = urlencode({"labelSelector": labels})
        found = self.ask("GET", f"/api/v1/namespaces/{namespace}/pods?{query}")[1]["items"]
        return [one for one in found if "deletionTimestamp" not in one["metadata"] and any(
            each["type"] == "Ready" and each["status"] == "True" for each in one["status"].get("conditions") or ())]

    def token(self, namespace: str, account: str, *audiences: str, seconds: int = 3600, pod: tuple[str, str] | None = None) -> str:
        """A token as kubelet projects it; `pod` is the name and uid that it is bound to."""
        spec: dict[str, Any] = {"audiences": list(audiences), "expirationSeconds": seconds}
        if pod is not None:
            spec["boundObjectRef"] = {"apiVersion": "v1", "kind": "Pod", "name": pod[0], "uid": pod[1]}
        status, told = self.ask("POST", f"/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token",
                                {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec})
        assert status == 201, told
        return str(told["status"]["token"])

    def kubeconfig_of(self, token: str) -> Path:
        """For whoever has this token."""
        path = self._folder / f"{len(list(self._folder.iterdir()))}.kubeconfig"
        self._write_kubeconfig(path, {"token": token})
        return path

    def forget(self) -> None:
        """etcd forgets what was before now: watches and pages from then are gone (410)."""
        status, told = self.ask("GET", "/api/v1/namespaces?limit=1")
        assert status == 200, told
        revision = int(told["metadata"]["resourceVersion"])
        connection = http.client.HTTPConnection("127.0.0.1", self._etcd, timeout=30)
        try:
            connection.request("POST", "/v3/kv/compaction", json.dumps({"revision": revision, "physical": True}))
            answer = connection.getresponse()
            said = answer.read().decode()
            assert answer.status == 200, said
        finally:
            connection.close()

    def start(self) -> None:
        """Also after `stop`: at the same address, with the data that is there."""
        here = self._folder
        etcd, peers = f"http://127.0.0.1:{self._etcd}", f"http://127.0.0.1:{self._peers}"
        self._run("etcd", "etcd", "--name=test", f"--data-dir={self.data}", f"--listen-client-urls={etcd}", "--logger=zap",
                  f"--advertise-client-urls={etcd}", f"--listen-peer-urls={peers}", f"--initial-advertise-peer-urls={peers}",
                  f"--initial-cluster=test={peers}")
        admission = [] if self._controllers else ["--disable-admission-plugins=ServiceAccount"]
        self._run("kube-apiserver", str(self._programs / "kube-apiserver"), f"--etcd-servers={etcd}", "--bind-address=127.0.0.1",
                  f"--secure-port={self.port}", f"--cert-dir={here}", f"--tls-cert-file={self._serving}",
                  f"--tls-private-key-file={self._serving}", f"--client-ca-file={self._ca}", "--authorization-mode=Node,RBAC",
                  f"--service-account-issuer={ISSUER}", f"--service-account-key-file={self._signing}",
                  f"--service-account-signing-key-file={self._signing}", f"--service-cluster-ip-range={ADDRESSES}",
                  "--allow-privileged", "--endpoint-reconciler-type=none", *admission)
        until(self._is_ready, "kube-apiserver is ready", START, 0.1)
        if not self._controllers:
            return
        # a node is never found dead for lack of heartbeats: nobody sends any
        self._run("kube-controller-manager", str(self._programs / "kube-controller-manager"), f"--kubeconfig={self.kubeconfig}",
                  "--leader-elect=false", "--port=0", "--secure-port=0", f"--service-account-private-key-file={self._signing}",
                  f"--root-ca-file={self._ca}", "--node-monitor-grace-period=24h", "--controllers=*,-nodeipam,-attachdetach,-ttl")
        until(lambda: self._alive() and self.ask("GET", "/api/v1/namespaces/default/serviceaccounts/default")[1].get("secrets"),
              "kube-controller-manager made the account `default`, and its token", START, 0.1)

    def stop(self) -> None:
        """All of it, as when a machine goes down in order."""
        for _, process in reversed(self._processes):
            process.terminate()
        deadline = time.monotonic() + END
        for _, process in reversed(self._processes):
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(END)
        self._processes.clear()

    # -- inside -----------------------------------------------------------------------------------------------------

    def _credentials(self) -> None:
        root = Authority("kubernetes")
        self._ca = Path(root.pem(self._folder))
        self._serving = Path(root.issue(dns=("localhost",), addresses=("127.0.0.1",)).pem(self._folder))
        self._admin = Path(root.issue(subject=("admin", "system:masters")).pem(self._folder))
        self._signing = self._folder / "service-accounts.pem"
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        self._signing.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL,
                                                    serialization.NoEncryption()))
        self._tls = ssl.create_default_context(cafile=str(self._ca))
        self._tls.load_cert_chain(self._admin)

    def _write_kubeconfig(self, path: Path, user: dict[str, str]) -> None:
        cluster = {"server": self.url, "certificate-authority-data": base64.b64encode(self._ca.read_bytes()).decode()}
        path.touch(0o600)
        path.write_text(json.dumps({
            "apiVersion": "v1", "kind": "Config", "current-context": "test", "users": [{"name": "test", "user": user}],
            "clusters": [{"name": "test", "cluster": cluster}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}]}))

    def _run(self, name: str, *argv: str) -> None:
        with (self._folder / f"{name}.log").open("wb") as log:
            # ends with this process, also when that is killed
            process = subprocess.Popen(["setpriv", "--pdeathsig", "KILL", *argv], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                       cwd=self._folder)
        self._processes.append((name, process))

    def _alive(self) -> bool:
        """Raises Failed with the log of one that ended."""
        for name, process in self._processes:
            if process.poll() is not None:
                text = self.log(name)
                kind = _PortTaken if "address already in use" in text else Failed
                raise kind(f"{name} ended with {process.returncode}:\n" + "\n".join(text.splitlines()[-LOG_LINES:]))
        return True

    def log(self, name: str) -> str:
        return (self._folder / f"{name}.log").read_text(errors="replace")

    def _is_ready(self) -> bool:
        self._alive()
        try:
            return self.ask("GET", "/readyz")[0] == 200 and self.ask("GET", "/api/v1/namespaces/default")[0] == 200
        except (OSError, http.client.HTTPException):
            return False


def _free_ports(count: int) -> list[int]:
    held = [socket.socket() for _ in range(count)]
    try:
        for one in held:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in held]
    finally:
        for one in held:
            one.close()
