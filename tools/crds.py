"""Writes deploy/daemonset/crds: `.venv/bin/python -m tools.crds`. A test says when what is committed is old.

The schemas come from the readers themselves (controlplane/sources): each is run on an object that has every field and notes what it is
asked for. So a field that is read is in the schema with its type and bounds, and one that is refused by name is there with the reason.

Nothing is pruned (x-kubernetes-preserve-unknown-fields on every object): what nobody knows must reach the control plane, which refuses it
by name. The API server alone would drop it in silence, and a misspelt rule would say less than was written.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from controlplane.model.objects import Metadata
from controlplane.model.problems import ObjectKey, Place, Severity
from controlplane.sources import security
from controlplane.sources.destination_rule import destination_rule
from controlplane.sources.fields import NAME_BOUND, Fields, Notes
from controlplane.sources.kinds import KINDS
from controlplane.sources.text import Map
from controlplane.sources.virtual_service import virtual_service
from protos.kubernetes import resources

FOLDER = Path(__file__).resolve().parent.parent / "deploy/daemonset/crds"
ANY = "1"  # the name of every entry of a map with names of its own: a port, a header, a label
Schema = dict[str, Any]
WHATEVER: Schema = {"x-kubernetes-preserve-unknown-fields": True}
READERS: dict[str, Callable[[Fields, Metadata], object]] = {
    "VirtualService": virtual_service, "DestinationRule": destination_rule,
    "AuthorizationPolicy": security.authorization_policy, "PeerAuthentication": security.peer_authentication,
}
# as Istio's: users' scripts say `kubectl get vs`
SHORT = {"VirtualService": "vs", "DestinationRule": "dr", "AuthorizationPolicy": "ap", "PeerAuthentication": "pa"}
COLUMNS = {
    "VirtualService": [("Hosts", ".spec.hosts")], "DestinationRule": [("Host", ".spec.host")],
    "AuthorizationPolicy": [("Action", ".spec.action")], "PeerAuthentication": [("Mode", ".spec.mtls.mode")],
}
HEAD = """\
# Written by `python -m tools.crds` from controlplane/sources; do not edit. For a cluster without Istio's own: where those are, leave
# them (`kubectl create` refuses to replace them).
"""


class Asked(Fields):
    """A map that has every field, and notes as what each is read."""

    def __init__(self) -> None:
        super().__init__(Notes(""), Map())
        self.fields_asked: dict[str, Schema | Asked | tuple[Asked]] = {}
        self.required: set[str] = set()
        self.free = False  # its names are the user's

    def __contains__(self, key: str) -> bool:
        return True

    def place(self, key: str = "") -> Place:
        return Place("", 0)

    def error(self, key: str, message: str, hint: str = "") -> None:
        """What a reader misses in an empty object is no error here."""

    warn = error

    def note_as(self, key: str, schema: Schema | Asked | tuple[Asked], required: bool = False) -> None:
        """The first word on a field counts, unless it was that the field is anything."""
        if self.fields_asked.get(key, WHATEVER) == WHATEVER:
            self.fields_asked[key] = schema
        if required:
            self.required.add(key)

    def take(self, key: str) -> Any:
        self.note_as(key, WHATEVER)

    def names(self) -> Iterator[str]:
        self.free = True
        return iter([ANY])

    def text(self, key: str, default: str = "", *, required: bool = False) -> str:
        self.note_as(key, {"type": "string"} | ({"minLength": 1} if required else {}), required)
        return default

    def choice(self, key: str, choices: Iterable[str], default: str = "") -> str:
        self.note_as(key, {"type": "string", "enum": [*choices, ""]})  # "" is read as not given
        return default

    def name(self, key: str, default: str = "", *, required: bool = False) -> str:
        self.note_as(key, {"type": "string", "maxLength": NAME_BOUND} | ({"minLength": 1} if required else {}), required)
        return default

    def integer(self, key: str, low: int, high: int, default: int = 0, *, required: bool = False) -> int:
        self.note_as(key, {"type": "integer", "minimum": low, "maximum": high}, required)
        return default

    def flag(self, key: str, default: bool = False) -> bool:
        self.note_as(key, {"type": "boolean"})
        return default

    def fields(self, key: str, *, required: bool = False) -> Fields | None:
        self.note_as(key, Asked(), required)
        found = self.fields_asked[key]
        assert isinstance(found, Asked), key
        return found

    def list_of_fields(self, key: str) -> list[Fields]:
        self.note_as(key, (Asked(),))
        found = self.fields_asked[key]
        assert isinstance(found, tuple), key
        return list(found)

    def texts(self, key: str) -> list[tuple[str, Place]]:
        self.note_as(key, {"type": "array", "items": {"type": "string"}})
        return []

    def refuse(self, reasons: Mapping[str, str]) -> None:
        for key, reason in reasons.items():
            self.note_as(key, {**WHATEVER, "description": f"Refused, since it is not supported yet: {reason}."})

    def ignore(self, *keys: str) -> None:
        for key in keys:
            self.take(key)

    def finish(self, *, severity: Severity = Severity.ERROR, known: Iterable[str] = ()) -> None:
        """Nothing is unknown."""

    def schema(self) -> Schema:
        found = {key: _schema(value) for key, value in sorted(self.fields_asked.items())}
        if self.free:
            # null is how a header's presence is asked for; where that is not allowed, the API server would take it out
            return {"type": "object", "additionalProperties": {**found.get(ANY, WHATEVER), "nullable": True}}
        made: Schema = {"type": "object", **WHATEVER, "properties": found}
        if self.required:
            made["required"] = sorted(self.required)
        return made


def _schema(value: Schema | Asked | tuple[Asked]) -> Schema:
    if isinstance(value, tuple):
        return {"type": "array", "items": value[0].schema()}
    return value.schema() if isinstance(value, Asked) else dict(value)


def crd(kind: str) -> Schema:
    """The CustomResourceDefinition (apiextensions.k8s.io/v1) of one of READERS."""
    top = Asked()
    READERS[kind](top, Metadata(ObjectKey(kind, "default", "any"), Place("", 0), "", ()))
    schema = top.schema()
    schema["properties"].pop("metadata", None)  # the API server's own
    # so that a policy without spec ("allow nothing") is one
    schema = {"type": "object", "properties": schema["properties"], "required": ["spec"]} if "spec" in top.required else {
        "type": "object", "properties": schema["properties"]}
    schema["properties"]["status"] = {"type": "object", **WHATEVER}
    resource = next(one for one in vars(resources).values() if isinstance(one, resources.Resource) and one.kind == kind)
    columns = [{"name": name, "type": "string", "jsonPath": path} for name, path in COLUMNS[kind]]
    columns.append({"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"})
    return {
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": str(resource), "labels": {"app.kubernetes.io/part-of": "narrows"}},
        "spec": {
            "group": resource.group, "scope": "Namespaced",
            "names": {"kind": kind, "listKind": f"{kind}List", "plural": resource.plural, "singular": kind.lower(),
                      "shortNames": [SHORT[kind]], "categories": ["istio-io", f"{resource.group.partition('.')[0]}-istio-io"]},
            "versions": [{"name": version, "served": True, "storage": version == resource.version, "subresources": {"status": {}},
                          "additionalPrinterColumns": columns, "schema": {"openAPIV3Schema": schema}}
                         for version in KINDS[kind].versions],
        },
    }


class _Plain(yaml.SafeDumper):
    """Without anchors: a reader of the file wants the schema, not a reference."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def files() -> dict[str, str]:
    """Name of each file in FOLDER -> its text."""
    found = {f"{kind.lower()}.yaml": HEAD + yaml.dump(crd(kind), Dumper=_Plain, sort_keys=False, width=130) for kind in READERS}
    listing = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", "resources": sorted(found)}
    return {**found, "kustomization.yaml": HEAD + yaml.dump(listing, Dumper=_Plain, sort_keys=False)}


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in files().items():
        (FOLDER / name).write_text(text)
        print(FOLDER / name)
