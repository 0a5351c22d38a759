"""deploy/daemonset says what the product says: options, ports, paths, kinds. What a manifest names and nobody has is found here."""
from __future__ import annotations

import ast
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from agent.app import command as agent_command
from agent.cli.main import group
from agent.telemetry.server import METRICS_PATHS, READY_PATH
from protos.kubernetes import resources

ROOT = Path(__file__).parents[3]
DEPLOY = ROOT / "deploy/daemonset"
FILES = sorted(path for path in DEPLOY.rglob("*.yaml") if path.parent.name != "crds")
KINDS = {one for one in vars(resources).values() if isinstance(one, resources.Resource)}
OBJECTS = [(path, body) for path in FILES if path.name != "kustomization.yaml" for body in yaml.safe_load_all(path.read_text())]
WORKLOADS = [(path, body) for path, body in OBJECTS if body["kind"] in ("DaemonSet", "Deployment", "Job")]
WRAPPERS = {"narrows-standby": DEPLOY / "standby", "narrows-clean": DEPLOY / "uninstall/clean"}


def containers() -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Name, spec of its pod, container."""
    for _, body in WORKLOADS:
        spec = body["spec"]["template"]["spec"]
        for one in [*spec.get("initContainers", ()), *spec["containers"]]:
            yield f"{body['metadata']['name']}/{one['name']}", spec, one


CONTAINERS = {name: (spec, one) for name, spec, one in containers()}


def words(container: dict[str, Any]) -> list[str]:
    """What is run, with the image's entry point, and without the one who waits before it."""
    found = [*container.get("command", ["narrows"]), *container.get("args", ())]
    return found[2:] if found[0] == "narrows-standby" else found


def options(container: dict[str, Any]) -> dict[str, Any]:
    """What the product's own parser makes of the command line."""
    _, name, *rest = words(container)
    assert isinstance(group, click.Group)
    command = group.get_command(click.Context(group), name)
    assert command is not None, name
    return dict(command.make_context(name, list(rest)).params)


def object_of(kind: str, name: str) -> dict[str, Any]:
    (found,) = [body for _, body in OBJECTS if body["kind"] == kind and body["metadata"]["name"] == name]
    return dict(found)


def test_every_file_is_in_its_folders_kustomization() -> None:
    for path in FILES:
        if path.name == "kustomization.yaml":
            listed = yaml.safe_load(path.read_text())["resources"]
            assert sorted(listed) == sorted(one.name for one in path.parent.glob("*.yaml") if one != path), path


@pytest.mark.parametrize("name", [name for name, (_, one) in CONTAINERS.items() if words(one)[0] == "narrows"])
def test_every_command_line_is_one_that_the_product_takes(name: str) -> None:
    options(CONTAINERS[name][1])


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_container_has_what_its_command_line_names(name: str) -> None:
    spec, one = CONTAINERS[name]
    said = [*one.get("command", ()), *one.get("args", ()), str(one.get("lifecycle")), str(one.get("readinessProbe"))]
    text = " ".join(said)
    assert set(re.findall(r"\$\((\w+)\)", " ".join(one.get("args", ())))) == {env["name"] for env in one.get("env", ())}
    mounts = {mount["mountPath"]: mount["name"] for mount in one["volumeMounts"]}
    assert set(mounts.values()) <= {volume["name"] for volume in spec["volumes"]}
    for path in re.findall(r"(?<![\w:/.])(/(?:run|etc|var|tmp)/[\w./-]+)", text):
        assert any(path.startswith(f"{mount}/") or path == mount for mount in mounts), path
    for program in [word for word in shlex.split(text.replace("'", " ").replace("(", " ")) if word.startswith("narrows-")]:
        assert program in WRAPPERS or program.startswith("narrows-control-plane."), program


@pytest.mark.parametrize("name", CONTAINERS)
def test_no_container_has_more_than_it_says_why(name: str) -> None:
    spec, one = CONTAINERS[name]
    context = one["securityContext"]
    assert "privileged" not in context and "hostNetwork" not in spec
    assert context["readOnlyRootFilesystem"] and not context["allowPrivilegeEscalation"] and context["capabilities"]["drop"] == ["ALL"]
    profile = context.get("seccompProfile") or spec["securityContext"]["seccompProfile"]
    assert profile == {"type": "RuntimeDefault"}
    assert "cpu" in one["resources"]["requests"] and "memory" in one["resources"]["limits"]
    path = next(path for path, body in WORKLOADS if body["metadata"]["name"] == name.partition("/")[0])
    for capability in context["capabilities"].get("add", ()):
        assert re.search(rf"^ +- {capability}(  # .+)?$", path.read_text(), re.M), f"{capability}: on a line of its own, with its reason"


def test_ports_and_paths_are_the_agents() -> None:
    spec, one = CONTAINERS["narrows/agent"]
    found = options(one)
    assert found["metrics_port"] == next(p.default for p in agent_command.params if p.name == "metrics_port")
    ports = {port["name"]: port["containerPort"] for port in one["ports"]}
    assert ports == {"metrics": found["metrics_port"], "readiness": found["readiness_port"]}
    annotations = object_of("DaemonSet", "narrows")["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(found["metrics_port"]) and annotations["prometheus.io/path"] in METRICS_PATHS
    for probe in ("readinessProbe", "livenessProbe"):
        (command,) = [word for word in one[probe]["exec"]["command"] if "curl" in word]
        assert f"http://127.0.0.1:{found['readiness_port']}{READY_PATH}" in command and "/run/standby/agent.lock" in command
    keeper = options(CONTAINERS["narrows/keeper"][1])
    assert keeper["run_dir"] == found["run_dir"]
    for role in ("keeper", "agent"):
        waits = CONTAINERS[f"narrows/{role}"][1]["command"][1]
        assert waits == f"{found['run_dir']}/{role}.lock", "the locks are ext/keeper/keeper.pyx's and agent/app/run.py's"
    assert '"keeper.lock"' in (ROOT / "ext/keeper/keeper.pyx").read_text() and '"agent.lock"' in (ROOT / "agent/app/run.py").read_text()
    assert spec["terminationGracePeriodSeconds"] > keeper["drain"] + 30, "the agent's preStop waits 30 s at most"


def rules(*names: tuple[str, str]) -> dict[str, set[str]]:
    """`plural.group` -> verbs, of these roles."""
    found: dict[str, set[str]] = {}
    for kind, name in names:
        for rule in object_of(kind, name)["rules"]:
            assert len(rule["apiGroups"]) == 1 and set(rule) == {"apiGroups", "resources", "verbs"}
            for plural in rule["resources"]:
                found.setdefault(f"{plural}.{rule['apiGroups'][0]}".rstrip("."), set()).update(rule["verbs"])
    return found


GRANTED = {
    "agent": rules(("ClusterRole", "narrows-agent")),
    "controlplane": rules(("ClusterRole", "narrows-control-plane"), ("Role", "narrows-control-plane")),
}


UNUSED = {"secrets"}  # of --ca-secret; here the key is mounted, so nobody needs a right on secrets


def named(folder: str) -> set[str]:
    """Kinds that the code below a folder imports from protos.kubernetes.resources."""
    found = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "protos.kubernetes.resources":
                found |= {str(value) for one in node.names if isinstance(value := getattr(resources, one.name), resources.Resource)}
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "resources":
                value = getattr(resources, node.attr, None)
                found |= {str(value)} if isinstance(value, resources.Resource) else set()
    return found


@pytest.mark.parametrize("folder", GRANTED)
def test_roles_name_the_kinds_that_the_product_names(folder: str) -> None:
    granted = GRANTED[folder]
    known = {str(one) for one in KINDS}
    assert {re.sub(r"/\w+", "", one) for one in granted} <= known
    assert named(folder) - UNUSED <= set(granted), "the code names a kind that its role does not"
    verbs = set().union(*granted.values())
    assert verbs <= {"get", "list", "watch", "create", "update", "patch"}, "nothing is deleted, and no wildcard"
    assert not set(granted) & UNUSED and not any("--ca-secret" in word for _, one in CONTAINERS.values() for word in words(one))


def test_what_may_be_written_everywhere_is_short() -> None:
    written = {folder: {one for one, verbs in rules(("ClusterRole", role)).items() if verbs - {"get", "list", "watch"}}
               for folder, role in (("agent", "narrows-agent"), ("controlplane", "narrows-control-plane"))}
    assert written["agent"] == {"pods/status", "events.events.k8s.io"}, "patch on pods would be every node's root"
    assert all("/status" in one or one.startswith("tokenreviews") for one in written["controlplane"])


def test_accounts_and_bindings_meet() -> None:
    accounts = {body["metadata"]["name"] for _, body in OBJECTS if body["kind"] == "ServiceAccount"}
    for _, body in WORKLOADS:
        spec = body["spec"]["template"]["spec"]
        assert spec.get("serviceAccountName") in accounts or spec["automountServiceAccountToken"] is False
        assert body["spec"]["selector"]["matchLabels"].items() <= body["spec"]["template"]["metadata"]["labels"].items()
    for kind in ("ClusterRoleBinding", "RoleBinding"):
        for _, body in OBJECTS:
            if body["kind"] == kind:
                assert object_of(body["roleRef"]["kind"], body["roleRef"]["name"])
                assert {one["name"] for one in body["subjects"]} <= accounts


def test_an_upgrade_waits_for_the_new_pod() -> None:
    strategy = object_of("DaemonSet", "narrows")["spec"]["updateStrategy"]
    assert strategy == {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}


def test_the_image_has_what_the_manifests_run() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    for source, target in re.findall(r"^COPY --chmod=0755 (\S+) (\S+)$", text, re.M):
        script = ROOT / source
        assert WRAPPERS[Path(target).name] == script
        subprocess.run(["sh", "-n", str(script)], check=True)
        assert script.read_text().startswith("#!/bin/sh\n") and script.stat().st_mode & 0o111
    assert len(re.findall("^COPY --chmod", text, re.M)) == len(WRAPPERS)
    assert 'ENTRYPOINT ["narrows"]' in text
