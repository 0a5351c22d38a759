"""Manifests are read field by field; what is wrong is named with file and line, and nothing is silently ignored."""
from __future__ import annotations

from pathlib import Path

import pytest

from agent.lab import manifest, objects
from agent.lab.spec import (
    DEFAULT_CAPABILITIES,
    Deployment,
    MeshObject,
    Namespace,
    Object,
    Pod,
    ProbeKind,
    Service,
    ServiceAccount,
    same_workload,
)

POD = """\
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, labels: {app: web}, annotations: {a: b}}
spec:
  nodeName: n2
  serviceAccountName: web
  containers:
  - name: main
    image: nginx
    command: [server]
    args: [--port, "80"]
    workingDir: files
    env:
    - {name: A, value: x}
    - {name: IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
    ports: [{name: http, containerPort: 80}]
    securityContext: {runAsUser: 7, runAsGroup: 8}
    readinessProbe: {httpGet: {path: /ok, port: http}, periodSeconds: 2, failureThreshold: 5}
"""


def read(text: str) -> tuple[list[Object], list[str]]:
    source = manifest.parse("f.yaml", "/base", text)
    found = objects.objects(source)
    return [item.thing for item in found], [str(problem) for problem in source.problems]


def one(text: str) -> Object:
    found, problems = read(text)
    assert problems == []
    assert len(found) == 1
    return found[0]


def test_a_pod_is_read_with_everything_it_says() -> None:
    pod = one(POD)
    assert isinstance(pod, Pod)
    assert (pod.namespace, pod.name, pod.template.node_name) == ("shop", "web", "n2")
    assert pod.template.service_account == "web"
    main = pod.template.containers[0]
    assert main.argv == ("server", "--port", "80")
    assert pod.template.directory(main) == "/base/files"
    assert (main.uid, main.gid) == (7, 8)
    assert main.capabilities == tuple(sorted(DEFAULT_CAPABILITIES.values()))
    assert [(v.name, v.value, v.field_path) for v in main.env] == [("A", "x", ""), ("IP", "", "status.podIP")]
    assert main.readiness is not None
    assert (main.readiness.kind, main.readiness.port, main.readiness.path) == (ProbeKind.HTTP, 80, "/ok")
    assert (main.readiness.period, main.readiness.failure_threshold, main.readiness.timeout) == (2, 5, 1)


def test_a_working_directory_is_the_folder_of_the_manifest_unless_said_otherwise() -> None:
    for text, expected in (("", "/base"), ("workingDir: /srv", "/srv"), ("workingDir: a/../b", "/base/b")):
        pod = one(f"apiVersion: v1\nkind: Pod\nmetadata: {{name: p}}\nspec:\n  containers:\n  - name: m\n"
                  f"    command: [x]\n    {text}\n")
        assert isinstance(pod, Pod)
        assert pod.template.directory(pod.template.containers[0]) == expected


def test_the_other_kinds_are_read() -> None:
    found, problems = read("""\
apiVersion: v1
kind: Namespace
metadata: {name: shop, annotations: {narrows.mesh/intercept: enabled}}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: web, namespace: shop}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, namespace: shop}
spec:
  replicas: 3
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec: {containers: [{name: m, command: [x]}]}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  clusterIP: None
  ipFamilyPolicy: PreferDualStack
  selector: {app: web}
  ports: [{name: http, port: 80, targetPort: http}, {name: b, port: 81, appProtocol: tcp, protocol: UDP}]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: web, namespace: shop}
spec: {hosts: [web]}
""")
    assert problems == []
    namespace, account, deployment, service, mesh = found
    assert isinstance(namespace, Namespace)
    assert namespace.annotations == {"narrows.mesh/intercept": "enabled"}
    assert account == ServiceAccount("shop", "web")
    assert isinstance(deployment, Deployment)
    assert deployment.replicas == 3
    assert isinstance(service, Service)
    assert service.headless
    assert service.families == (4, 6)
    assert [(p.port, p.target, p.protocol, p.app_protocol) for p in service.ports] == [
        (80, "http", "TCP", ""), (81, 81, "UDP", "tcp")]
    assert mesh == MeshObject("VirtualService", "shop", "web", {
        "apiVersion": "networking.istio.io/v1", "kind": "VirtualService",
        "metadata": {"name": "web", "namespace": "shop"}, "spec": {"hosts": ["web"]}})


def changed(old: str, new: str) -> list[str]:
    assert old in POD
    found, problems = read(POD.replace(old, new))
    assert found == []
    return problems


@pytest.mark.parametrize(("old", "new", "line", "words"), [
    ("command:", "comand:", 10, "unknown field comand; is command meant?"),
    ("    command: [server]\n", "", 9, "command is missing; the lab does not read images"),
    ("nodeName: n2", "nodeName: N2", 5, "'N2' is no valid name"),
    ("port: http}", "port: https}", 18, "no port of this container is named 'https'"),
    ("port: http}", "port: 70000}", 18, "from 1 to 65535, not 70000"),
    ("args: [--port, \"80\"]", "args: [--port, 80]", 11, "put quotes around 80"),
    ("value: x", "value: 5", 14, "value must be text, not 5"),
    ("status.podIP", "status.qosClass", 15, "unknown field 'status.qosClass'"),
    ("runAsUser: 7", "privileged: true", 17, "privileged is not possible in the lab"),
    ("httpGet: {path: /ok, port: http}", "grpc: {port: 1}", 18, "grpc is not done"),
    ("name: web, namespace", "namespace", 3, "name is missing"),
    ("spec:\n", "spec:\n  initContainers: []\n", 5, "initContainers are not run by the lab"),
    ("spec:\n", "spec:\n  hostNetwork: true\n", 5, "hostNetwork: true is not possible"),
    ("kind: Pod", "kind: Podd", 2, "unknown kind Podd of v1"),
])
def test_a_mistake_refuses_the_object_and_is_named_with_its_line(old: str, new: str, line: int, words: str) -> None:
    problems = changed(old, new)
    assert any(problem.startswith(f"f.yaml:{line}: ") and words in problem for problem in problems), problems


def test_what_the_lab_does_not_do_is_said_and_does_not_refuse() -> None:
    found, problems = read(POD.replace("    image: nginx\n", "    image: nginx\n    livenessProbe: {exec: {command: [x]}}\n"))
    assert len(found) == 1
    assert problems == ["f.yaml:10: warning: Pod web: spec: containers[main]: livenessProbe is not run"]


def test_a_kind_that_changes_nothing_here_is_skipped_aloud() -> None:
    found, problems = read("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: c}\ndata: {}\n")
    assert found == []
    assert problems == ["f.yaml:2: warning: ConfigMap c: ConfigMap changes nothing in the lab; it is skipped"]


@pytest.mark.parametrize(("text", "expected"), [
    ("a: [1\nb: 2\n", "f.yaml:2: broken YAML"),
    ("a: 1\na: 2\n", "f.yaml:2: a is given twice; the first is in line 1"),
    ("- a\n", "f.yaml:1: an object with apiVersion, kind and metadata is expected"),
    ("metadata: {name: x}\n", "f.yaml:1: apiVersion and kind are missing"),
    ("a: " + "[" * 100 + "]" * 100, "f.yaml:1: nested deeper than 64 levels"),
    ("a: !!python/object:os.system x\n", "f.yaml:1: broken YAML"),
])
def test_broken_yaml_is_named_with_its_line(text: str, expected: str) -> None:
    found, problems = read(text)
    assert found == []
    assert problems[0].startswith(expected), problems


def test_a_deployment_whose_selector_misses_its_template_is_refused() -> None:
    _, problems = read("""\
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: other}}
    spec: {containers: [{name: m, command: [x]}]}
""")
    assert problems == ["f.yaml:5: Deployment web: spec: selector does not match the template's labels; "
                        "give both the same labels"]


def test_a_file_that_cannot_be_read_is_a_problem_and_no_crash(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for path, words in ((tmp_path / "none.yaml", "cannot be read"), (tmp_path / "binary.yaml", "not UTF-8")):
        assert words in str(manifest.read(path).problems[0])


def test_only_labels_and_annotations_let_the_processes_stay() -> None:
    pod = one(POD)
    assert isinstance(pod, Pod)
    for old, new, same in (("app: web", "app: x", True), ("a: b", "a: c", True), ("[server]", "[other]", False),
                           ("nodeName: n2", "nodeName: n1", False)):
        other = one(POD.replace(old, new))
        assert isinstance(other, Pod)
        assert same_workload(pod.template, other.template) is same
        assert other.template.hash() != pod.template.hash()
