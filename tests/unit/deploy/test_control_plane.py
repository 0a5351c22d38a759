"""The control plane's container as a process: its own options, paths and probes, the key made as docs/install-kubernetes.md says."""
from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.authority import node_token, openssl_accepts
from tests.support.cluster import kubeconfig, put
from tests.support.controlplane import ControlPlane
from tests.support.kubernetes.server import ApiServer
from tests.support.manifests import REVIEWS
from tests.support.mesh_client import addresses, channel, create, refused
from tests.support.wait import until

ROOT = Path(__file__).parents[3]
BODIES = list(yaml.safe_load_all((ROOT / "deploy/daemonset/control-plane.yaml").read_text()))
SPEC = BODIES[0]["spec"]["template"]["spec"]
(CONTAINER,) = SPEC["containers"]
ACCOUNT = "narrows-system/narrows-agent"


def volume_of_secret(folder: Path, files: list[Path], mode: int) -> None:
    """A Secret as kubelet shows it: links to a folder that is changed as a whole."""
    (folder / "..1").mkdir()
    (folder / "..data").symlink_to("..1")
    for one in files:
        (folder / "..1" / one.name).write_bytes(one.read_bytes())
        (folder / "..1" / one.name).chmod(mode)
        (folder / one.name).symlink_to(f"..data/{one.name}")


class Deployed(ControlPlane):
    """With the container's options; its mounts are folders here, its cluster is ours, its port the kernel's choice."""

    def __init__(self, folder: Path, config: Path) -> None:
        super().__init__(folder)
        self._kubeconfig = config
        self.mounts = {mount["mountPath"]: folder / "mounts" / mount["name"] for mount in CONTAINER["volumeMounts"]}
        for path in self.mounts.values():
            path.mkdir(parents=True)

    def here(self, text: str) -> str:
        return re.sub(rf"(?<![\w/])({'|'.join(self.mounts)})(?=/)", lambda found: str(self.mounts[found[1]]), text)

    def options(self) -> list[str]:
        args = [self.here(word) for word in CONTAINER["args"][1:]]
        assert args.count("--kubernetes") == 1 and args.count("--listen=0.0.0.0:15012") == 1
        changed = {"--kubernetes": f"--kubeconfig={self._kubeconfig}", "--listen=0.0.0.0:15012": "--listen=127.0.0.1:0"}
        return [changed.get(word, word) for word in args]

    def probe(self, name: str) -> int:
        return subprocess.run([self.here(word) for word in CONTAINER[name]["exec"]["command"]], timeout=20, check=False).returncode


@pytest.fixture
def server() -> Iterator[ApiServer]:
    with ApiServer() as one:
        yield one


@pytest.fixture
def plane(server: ApiServer, tmp_path: Path) -> Iterator[Deployed]:
    page = (ROOT / "docs/install-kubernetes.md").read_text()
    (block,) = [block for block in re.findall(r"^```sh\n(.*?)^```", page, re.M | re.S) if "openssl req" in block]
    made = tmp_path / "made"
    made.mkdir()
    commands = [line for line in block.replace("\\\n", " ").splitlines() if line.startswith(("openssl ", "cp "))]
    subprocess.run(["sh", "-e", "-c", "\n".join(commands)], cwd=made, check=True, capture_output=True, timeout=60)
    (secret,) = [volume["secret"] for volume in SPEC["volumes"] if "secret" in volume]
    put(server, REVIEWS)
    one = Deployed(tmp_path, kubeconfig(server, tmp_path))
    files = [made / f"{name}.pem" for name in ("ca-cert", "ca-key", "root-cert")]
    volume_of_secret(one.mounts["/etc/narrows/ca"], files, secret["defaultMode"])
    try:
        one.start()
        one.ports = [one.listen]
        yield one
    finally:
        if one.process is not None and one.process.poll() is None:
            one.process.kill()
            one.process.wait(timeout=10)


def brought(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


async def test_the_container_serves_and_signs_for_agents_by_their_pods_tokens(server: ApiServer, plane: Deployed, tmp_path: Path) -> None:
    assert plane.probe("livenessProbe") == 0
    root = (plane.mounts["/etc/narrows/ca"] / "root-cert.pem").read_bytes()
    token = node_token(server, account=ACCOUNT, node="n1")
    async with channel(plane, tls=True, root=root) as one:
        assert len(await addresses(one, brought(token), "n1")) >= 3
        chain = await create(one, metadata=brought(token))
        assert chain[-1].encode().strip() == root.strip() and openssl_accepts(tmp_path, chain)
        code, _ = await refused(one, metadata=brought(node_token(server, account="default/sa-reviews", node="n1")))
        assert code.name == "UNAUTHENTICATED"
    assert plane.probe("readinessProbe") == 0
    log = plane.mounts["/var/log/narrows"] / "audit.log"
    assert '"event": "issued"' in log.read_text() or '"event":"issued"' in log.read_text()
    assert plane.end() == 0
    assert plane.probe("readinessProbe") != 0 and plane.probe("livenessProbe") != 0


def test_agents_find_it_under_the_name_that_its_certificate_has(plane: Deployed, tmp_path: Path) -> None:
    service = next(body for body in BODIES if body["kind"] == "Service")
    name = f"{service['metadata']['name']}.narrows-system.svc"
    daemonset = yaml.safe_load((ROOT / "deploy/daemonset/daemonset.yaml").read_text())
    agent = next(one for one in daemonset["spec"]["template"]["spec"]["containers"] if one["name"] == "agent")
    assert f"--xds={name}:{service['spec']['ports'][0]['port']}" in agent["args"]
    root = plane.mounts["/etc/narrows/ca"] / "root-cert.pem"

    def verified(host: str) -> str:
        """What openssl says of the certificate. Its exit code says how the connection ended too, which is the server's to choose."""
        argv = ["openssl", "s_client", "-connect", plane.listen, "-CAfile", str(root), "-verify_hostname", host, "-alpn", "h2"]
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=30, check=False)
        found = re.search(r"Verify return code: (\d+ \(.*\))", done.stdout.decode(errors="replace"))  # HTTP/2 comes behind it
        return found[1] if found else ""

    assert until(lambda: verified(name), "openssl verifies the certificate", 30) == "0 (ok)"
    assert "mismatch" in until(lambda: verified("elsewhere.example"), "openssl verifies another name", 30)


def test_it_runs_as_nobody_with_nothing() -> None:
    pod, container = SPEC["securityContext"], CONTAINER["securityContext"]
    assert pod["runAsNonRoot"] and pod["runAsUser"] > 0
    assert container["capabilities"] == {"drop": ["ALL"]}
    budget: dict[str, Any] = next(body for body in BODIES if body["kind"] == "PodDisruptionBudget")
    assert budget["spec"]["minAvailable"] < BODIES[0]["spec"]["replicas"]
