"""From the documents of a file to the objects of spec.py."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

from agent.lab.manifest import Document, Map, Problem, Source
from agent.lab.reader import DNS_LABEL, Reader
from agent.lab.spec import (
    DEFAULT_CAPABILITIES,
    Container,
    Deployment,
    EnvVar,
    MeshObject,
    Namespace,
    Object,
    Pod,
    PodTemplate,
    Probe,
    ProbeKind,
    Service,
    ServiceAccount,
    ServicePort,
)

# API groups whose resources the control plane reads.
MESH_GROUPS = ("networking.istio.io", "security.istio.io", "telemetry.istio.io", "gateway.networking.k8s.io",
               "narrows.mesh")
# Kinds that a cluster would take and that change nothing here.
NOT_HERE = {"ConfigMap", "Secret", "Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding", "NetworkPolicy",
            "Ingress", "HorizontalPodAutoscaler", "PodDisruptionBudget", "PodMonitor", "ServiceMonitor", "LimitRange",
            "ResourceQuota"}
FIELD_PATHS = ("metadata.name", "metadata.namespace", "metadata.uid", "status.podIP", "status.podIPs", "status.hostIP",
               "spec.nodeName", "spec.serviceAccountName")
ALL_CAPABILITIES = DEFAULT_CAPABILITIES | {"NET_ADMIN": 12, "NET_BROADCAST": 11, "IPC_LOCK": 14, "SYS_PTRACE": 19,
                                           "SYS_NICE": 23, "SYS_RESOURCE": 24}


@dataclass(frozen=True, slots=True)
class Found:
    """One object and where it stands."""

    thing: Object
    path: str
    line: int


def objects(source: Source) -> list[Found]:
    """Parse the documents of a file; problems are added to those of the source."""
    found = []
    for document in source.documents:
        thing = _object(document, source)
        if thing is not None:
            found.append(Found(thing, document.path, document.body.line))
    return found


def _object(document: Document, source: Source) -> Object | None:
    body, path, problems = document.body, document.path, source.problems
    kind, version = body.get("kind"), body.get("apiVersion")
    if not isinstance(kind, str) or not isinstance(version, str):
        problems.append(Problem(path, body.line, "apiVersion and kind are missing; every object needs both"))
        return None
    before = sum(problem.error for problem in problems)
    top = Reader(body, kind, path, problems)
    top.string("apiVersion"), top.string("kind")
    meta = top.child("metadata", required=True)
    if meta is None:
        return None
    name = meta.name("name")
    top.where = f"{kind} {name}"
    group = version.rpartition("/")[0]
    if group.endswith(MESH_GROUPS):
        return MeshObject(kind, meta.name("namespace", "default"), name, plain(body)) if name else None
    reader = _READERS.get((group, kind))
    if reader is None:
        if kind in NOT_HERE:
            top.warn("kind", f"{kind} changes nothing in the lab; it is skipped")
        else:
            top.error("kind", f"unknown kind {kind} of {version}; the lab knows Namespace, ServiceAccount, Pod, Service, "
                              f"Deployment (apps/v1) and the kinds of {', '.join(MESH_GROUPS[:2])}")
        return None
    head = _Head("" if kind == "Namespace" else meta.name("namespace", "default", DNS_LABEL), name,
                 meta.string_map("labels"), meta.string_map("annotations"), source.folder)
    meta.done(("uid", "resourceVersion", "creationTimestamp", "generation", "managedFields", "ownerReferences",
               "finalizers"))
    thing = reader(top, head)
    top.done(("status",))
    return thing if sum(problem.error for problem in problems) == before else None


Strings = dict[str, str]


@dataclass(frozen=True, slots=True)
class _Head:
    """What every object has in its metadata, and the folder of its file."""

    namespace: str
    name: str
    labels: Strings
    annotations: Strings
    folder: str


def _namespace(top: Reader, head: _Head) -> Namespace:
    top.skip("spec")
    return Namespace(head.name, head.labels, head.annotations)


def _service_account(top: Reader, head: _Head) -> ServiceAccount:
    top.skip("secrets", "imagePullSecrets", "automountServiceAccountToken")
    return ServiceAccount(head.namespace, head.name)


def _pod(top: Reader, head: _Head) -> Pod | None:
    spec = top.child("spec", required=True)
    if spec is None:
        return None
    return Pod(head.namespace, head.name, _template(spec, head.labels, head.annotations, head.folder))


def _deployment(top: Reader, head: _Head) -> Deployment | None:
    spec = top.child("spec", required=True)
    template = spec.child("template", required=True) if spec else None
    if spec is None or template is None:
        return None
    replicas = spec.integer("replicas", 0, 250, 1)
    labels: Strings = {}
    annotations: Strings = {}
    if meta := template.child("metadata"):
        labels, annotations = meta.string_map("labels"), meta.string_map("annotations")
        meta.done(("name", "creationTimestamp", "namespace"))
    wanted: Strings = {}
    if selector := spec.child("selector", required=True):
        wanted = selector.string_map("matchLabels")
        selector.done(refused={"matchExpressions": "is not understood by the lab; use matchLabels"})
        if not wanted:
            selector.error("matchLabels", "matchLabels is empty; it must name labels of the template")
    if any(labels.get(key) != value for key, value in wanted.items()):
        spec.error("selector", "selector does not match the template's labels; give both the same labels")
    pod = template.child("spec", required=True)
    template.done()
    spec.done(("revisionHistoryLimit", "progressDeadlineSeconds", "minReadySeconds", "paused", "strategy"))
    if pod is None:
        return None
    return Deployment(head.namespace, head.name, replicas, wanted, _template(pod, labels, annotations, head.folder))


def _template(spec: Reader, labels: Strings, annotations: Strings, folder: str) -> PodTemplate:
    security = spec.child("securityContext")
    uid, gid = _user(security)
    if security:
        security.done(("runAsNonRoot", "fsGroup", "seccompProfile", "supplementalGroups", "fsGroupChangePolicy"),
                      not_done={"sysctls": "are not set", "seLinuxOptions": "are not set"})
    containers = tuple(_container(child, uid, gid) for child in spec.children("containers", required=True))
    if not containers:
        spec.error("containers", "a pod needs a container")
    names = [container.name for container in containers]
    if len(set(names)) != len(names):
        spec.error("containers", "two containers have the same name")
    if spec.string("restartPolicy", "Always") != "Always":
        spec.warn("restartPolicy", "restartPolicy: the lab restarts always")
    if spec.flag("hostNetwork", False):
        spec.error("hostNetwork", "hostNetwork: true is not possible in the lab: each pod has a namespace of its own")
    template = PodTemplate(labels, annotations, spec.name("nodeName", "", DNS_LABEL),
                           spec.name("serviceAccountName", spec.name("serviceAccount", "default")), containers,
                           spec.name("hostname", "", DNS_LABEL), spec.name("subdomain", "", DNS_LABEL),
                           folder)
    spec.done(
        ("terminationGracePeriodSeconds", "dnsPolicy", "schedulerName", "enableServiceLinks", "imagePullSecrets",
         "automountServiceAccountToken", "priorityClassName", "priority", "preemptionPolicy", "shareProcessNamespace"),
        not_done=dict.fromkeys(("affinity", "tolerations", "nodeSelector", "topologySpreadConstraints"),
                               "is not looked at; use nodeName to choose a node")
        | {"volumes": "are not made; a process of the lab sees this machine's file system"},
        refused={"initContainers": "are not run by the lab; do their work before `up`",
                 "hostPID": "is not possible in the lab", "hostIPC": "is not possible in the lab",
                 "dnsConfig": "is not understood by the lab", "hostAliases": "are not understood by the lab"})
    return template


def _user(security: Reader | None) -> tuple[int | None, int | None]:
    if security is None:
        return None, None
    uid = security.integer("runAsUser", 0, 2**31 - 1, -1) if "runAsUser" in security.body else None
    gid = security.integer("runAsGroup", 0, 2**31 - 1, -1) if "runAsGroup" in security.body else None
    return uid, gid


def _container(reader: Reader, pod_uid: int | None, pod_gid: int | None) -> Container:
    name = reader.name("name", pattern=DNS_LABEL)
    reader.string("image", "")
    argv = reader.strings("command") + reader.strings("args")
    if not reader.body.get("command"):
        reader.error("image", "command is missing; the lab does not read images, so it cannot know their entry point")
    uid, gid, capabilities = pod_uid, pod_gid, dict(DEFAULT_CAPABILITIES)
    if security := reader.child("securityContext"):
        own_uid, own_gid = _user(security)
        uid, gid = (own_uid if own_uid is not None else uid), (own_gid if own_gid is not None else gid)
        capabilities = _capabilities(security.child("capabilities"), capabilities)
        security.done(("runAsNonRoot", "allowPrivilegeEscalation", "seccompProfile"),
                      not_done={"readOnlyRootFilesystem": "is not done: the lab runs on this machine's file system"},
                      refused={"privileged": "is not possible in the lab"})
    ports = []
    for port in reader.children("ports"):
        ports.append((port.string("name", ""), port.integer("containerPort", 1, 65535), port.string("protocol", "TCP")))
        port.done(("hostPort", "hostIP"))
    probe = reader.child("readinessProbe")
    container = Container(name, argv, tuple(_env(reader)), reader.string("workingDir", ""), uid, gid, tuple(sorted(capabilities.values())),
                          tuple(ports), _probe(probe, ports) if probe else None)
    reader.done(("imagePullPolicy", "resources", "terminationMessagePath", "terminationMessagePolicy", "stdin", "tty"),
                not_done={"livenessProbe": "is not run", "startupProbe": "is not run", "lifecycle": "hooks are not run",
                          "volumeMounts": "are not made; the process sees this machine's file system"},
                refused={"envFrom": "is not understood by the lab; give the variables with their values in env"})
    return container


def _capabilities(reader: Reader | None, default: dict[str, int]) -> dict[str, int]:
    if reader is None:
        return default
    result = dict(default)
    for name in reader.strings("drop"):
        result = {} if name == "ALL" else {have: number for have, number in result.items() if have != name}
    for name in reader.strings("add"):
        if name not in ALL_CAPABILITIES:
            known = ", ".join(sorted(ALL_CAPABILITIES))
            reader.error("add", f"capability {name} is not given by the lab; it knows {known}")
        else:
            result[name] = ALL_CAPABILITIES[name]
    reader.done()
    return result


def _env(reader: Reader) -> list[EnvVar]:
    found = []
    for item in reader.children("env"):
        name, field_path = item.string("name"), ""
        value = item.string("value", "")
        if source := item.child("valueFrom"):
            if ref := source.child("fieldRef"):
                field_path = ref.string("fieldPath")
                one_of_many = field_path.startswith(("metadata.labels[", "metadata.annotations["))
                if field_path not in FIELD_PATHS and not one_of_many:
                    ref.error("fieldPath", f"unknown field {field_path!r}; the lab knows {', '.join(FIELD_PATHS)}")
                ref.done(("apiVersion",))
            source.done(refused=dict.fromkeys(("configMapKeyRef", "secretKeyRef", "resourceFieldRef"),
                                              "is not understood by the lab; give the value itself"))
        if not name or "=" in name or "\0" in name + value:
            item.error("name", f"{name!r} cannot name a variable")
        item.done()
        found.append(EnvVar(name, value, field_path))
    return found


def _probe(reader: Reader, ports: list[tuple[str, int, str]]) -> Probe | None:
    named = {name: number for name, number, _ in ports if name}

    def number(of: Reader) -> int:
        port = of.port("port")
        if isinstance(port, str):
            if port not in named:
                of.error("port", f"no port of this container is named {port!r}")
            return named.get(port, 1)
        return port

    timing: dict[str, Any] = {
        "initial_delay": reader.integer("initialDelaySeconds", 0, 86400, 0),
        "period": reader.integer("periodSeconds", 1, 86400, 10),
        "timeout": reader.integer("timeoutSeconds", 1, 3600, 1),
        "success_threshold": reader.integer("successThreshold", 1, 1000, 1),
        "failure_threshold": reader.integer("failureThreshold", 1, 1000, 3)}
    probe = None
    if http := reader.child("httpGet"):
        headers = []
        for item in http.children("httpHeaders"):
            headers.append((item.string("name"), item.string("value")))
            item.done()
        scheme = http.string("scheme", "HTTP")
        if scheme not in ("HTTP", "HTTPS"):
            http.error("scheme", f"scheme must be HTTP or HTTPS, not {scheme!r}")
        probe = Probe(ProbeKind.HTTP, number(http), http.string("path", "/"), scheme, tuple(headers), **timing)
        http.done(refused={"host": "is not understood by the lab: the pod itself is asked"})
    elif tcp := reader.child("tcpSocket"):
        probe = Probe(ProbeKind.TCP, number(tcp), **timing)
        tcp.done(refused={"host": "is not understood by the lab: the pod itself is asked"})
    elif command := reader.child("exec"):
        probe = Probe(ProbeKind.EXEC, command=command.strings("command"), **timing)
        command.done()
    else:
        instead = "; grpc is not done" if "grpc" in reader.body else ""
        reader.error("", f"a probe needs httpGet, tcpSocket or exec{instead}")
        reader.skip("grpc")
    reader.done()
    return probe


def _service(top: Reader, head: _Head) -> Service | None:
    spec = top.child("spec", required=True)
    if spec is None:
        return None
    if spec.string("type", "ClusterIP") not in ("ClusterIP", "NodePort", "LoadBalancer"):
        spec.error("type", f"type {spec.body['type']} is not known to the lab; use ClusterIP")
    elif spec.string("type", "ClusterIP") != "ClusterIP":
        spec.warn("type", f"type {spec.body['type']} is treated as ClusterIP")
    cluster_ip = spec.string("clusterIP", "")
    if cluster_ip not in ("", "None"):
        try:
            ip_address(cluster_ip)
        except ValueError:
            spec.error("clusterIP", f"clusterIP {cluster_ip!r} is no address")
    names = spec.strings("ipFamilies")
    if any(family not in ("IPv4", "IPv6") for family in names):
        spec.error("ipFamilies", "ipFamilies must be IPv4 or IPv6")
    families = tuple(6 if family == "IPv6" else 4 for family in names) or (4,)
    policy = spec.string("ipFamilyPolicy", "SingleStack")
    if policy in ("PreferDualStack", "RequireDualStack"):
        families = (families[0], 10 - families[0])
    elif policy != "SingleStack":
        spec.error("ipFamilyPolicy", f"ipFamilyPolicy {policy!r} is unknown")
    ports = []
    for item in spec.children("ports"):
        port = item.integer("port", 1, 65535)
        protocol = item.string("protocol", "TCP")
        if protocol not in ("TCP", "UDP"):
            item.error("protocol", f"protocol {protocol!r} is not known to the lab; use TCP or UDP")
        ports.append(ServicePort(item.string("name", ""), port, item.port("targetPort", port), protocol,
                                 item.string("appProtocol", "")))
        item.done(("nodePort",))
    if len({(port.port, port.protocol) for port in ports}) != len(ports):
        spec.error("ports", "two ports have the same number")
    if len(ports) > 1 and len({port.name for port in ports}) != len(ports):
        spec.error("ports", "several ports need a name each, and different ones")
    if not ports and cluster_ip != "None":
        spec.error("ports", "a service with a cluster IP needs a port")
    service = Service(head.namespace, head.name, spec.string_map("selector"), tuple(ports), cluster_ip, families,
                      spec.flag("publishNotReadyAddresses", False), head.labels, head.annotations)
    spec.done(("internalTrafficPolicy", "allocateLoadBalancerNodePorts", "externalTrafficPolicy", "clusterIPs"),
              not_done={"sessionAffinity": "is not done", "sessionAffinityConfig": "is not done",
                        "trafficDistribution": "is not done"},
              refused={"externalName": "is not known to the lab", "externalIPs": "are not known to the lab"})
    return service


_READERS: dict[tuple[str, str], Callable[[Reader, _Head], Object | None]] = {
    ("", "Namespace"): _namespace, ("", "ServiceAccount"): _service_account, ("", "Pod"): _pod,
    ("apps", "Deployment"): _deployment, ("", "Service"): _service}


def plain(value: Any) -> Any:
    """The same as plain dicts and lists, for writing."""
    if isinstance(value, Map):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value
