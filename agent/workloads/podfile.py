"""Reads a pod file (ARCHITECTURE.md, "Files of an instance") into a LocalPod; everything is checked here and only here."""
from __future__ import annotations

import os
from pathlib import Path

import msgspec

from agent.model.pod import LocalPod
from agent.model.workload import address_of

SIZE_LIMIT = 1 << 20  # bytes; etcd does not take an object of more than 1.5 MiB, and a pod's annotations 256 KiB


class PodFileError(ValueError):
    """The file is no pod. The text names the file, the field and what is expected."""


class _Metadata(msgspec.Struct):
    name: str
    namespace: str
    uid: str
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class _Spec(msgspec.Struct, rename="camel"):
    service_account_name: str = "default"
    host_network: bool = False


class _PodIP(msgspec.Struct):
    ip: str


class _Status(msgspec.Struct, rename="camel"):
    pod_ips: list[_PodIP] = msgspec.field(default_factory=list, name="podIPs")


class _Local(msgspec.Struct, rename="camel"):
    netns: str = ""
    cgroup: str = ""
    namespace_labels: dict[str, str] = {}
    namespace_annotations: dict[str, str] = {}


class _Pod(msgspec.Struct):
    metadata: _Metadata
    kind: str = "Pod"
    spec: _Spec = msgspec.field(default_factory=_Spec)
    status: _Status = msgspec.field(default_factory=_Status)
    narrows: _Local = msgspec.field(default_factory=_Local)


_DECODER = msgspec.json.Decoder(_Pod)


def file_name(namespace: str, name: str) -> str:
    """The name of a pod's file."""
    return f"{namespace}.{name}.json"


def read_pod(path: Path) -> LocalPod:
    """The pod of a file. Raises PodFileError, and FileNotFoundError when there is no such file."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(fd, "rb") as file:
            raw = file.read(SIZE_LIMIT + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise PodFileError(f"{path}: cannot be read: {error.strerror}") from error
    if len(raw) > SIZE_LIMIT:
        raise PodFileError(f"{path}: larger than {SIZE_LIMIT} bytes; this is no pod")
    return parse_pod(raw, path)


def parse_pod(raw: bytes, path: Path) -> LocalPod:
    """The same for bytes that were read; `path` is for its name and for errors."""
    try:
        pod = _DECODER.decode(raw)
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise PodFileError(f"{path}: {error}; expected a Pod as ARCHITECTURE.md describes it") from error
    meta, local = pod.metadata, pod.narrows
    if pod.kind != "Pod":
        raise PodFileError(f"{path}: kind is {pod.kind!r}, expected Pod")
    for field, value in (("metadata.name", meta.name), ("metadata.namespace", meta.namespace), ("metadata.uid", meta.uid)):
        if not value or "/" in value or not value.isprintable() or len(value) > 253:
            raise PodFileError(f"{path}: {field} is {value[:80]!r}, expected 1 to 253 printable characters without `/`")
    if path.name != file_name(meta.namespace, meta.name):
        raise PodFileError(f"{path}: holds pod {meta.namespace}/{meta.name}, whose file is "
                           f"{file_name(meta.namespace, meta.name)}")
    if not pod.spec.host_network and not local.netns.startswith("/"):
        raise PodFileError(f"{path}: narrows.netns is {local.netns!r}, expected the absolute path of the pod's network namespace")
    if local.cgroup and not local.cgroup.startswith("/"):
        raise PodFileError(f"{path}: narrows.cgroup is {local.cgroup!r}, expected an absolute path or nothing")
    addresses = []
    for number, entry in enumerate(pod.status.pod_ips):
        try:
            addresses.append(address_of(entry.ip))
        except ValueError as error:
            raise PodFileError(f"{path}: status.podIPs[{number}].ip is {entry.ip[:80]!r}, expected an IP address") from error
    return LocalPod(uid=meta.uid, namespace=meta.namespace, name=meta.name, service_account=pod.spec.service_account_name,
                    addresses=tuple(addresses), netns=local.netns, cgroup=local.cgroup, host_network=pod.spec.host_network,
                    labels=meta.labels, annotations=meta.annotations, namespace_labels=local.namespace_labels,
                    namespace_annotations=local.namespace_annotations)
