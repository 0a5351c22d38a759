"""What an API server keeps: objects, one revision for all of them, and the history that watches are told from. Thread-safe."""
from __future__ import annotations

import base64
import copy
import json
import re
import threading
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from tests.support.kubernetes import ownership
from tests.support.kubernetes.selectors import Selector
from tests.support.kubernetes.table import TABLE, Object, Served

Key = tuple[str, str]
DATA_BOUND = 1 << 20  # of a ConfigMap's or Secret's data together
OBJECT_BOUND = 3 << 19  # of what etcd takes in one request
HISTORY = 1_000  # changes; real servers remember minutes
_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")


class Refused(Exception):
    """An answer other than success: code, reason and message of its Status."""

    def __init__(self, code: int, reason: str, message: str, **details: object) -> None:
        super().__init__(message)
        self.code, self.reason, self.details = code, reason, details

    def status(self) -> Object:
        return {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": str(self), "reason": self.reason,
                "details": self.details, "code": self.code}


@dataclass(frozen=True)
class Change:
    revision: int
    served: Served
    key: Key
    before: Object | None
    after: Object | None  # None: deleted


class Store:
    def __init__(self, table: Iterable[Served] = TABLE, history: int = HISTORY) -> None:
        self.lock = threading.RLock()
        self.served = {(one.resource.group, one.resource.version, one.resource.plural): one for one in table}
        self._bound = history
        self._objects: dict[Served, dict[Key, Object]] = {one: {} for one in self.served.values()}
        self._history: list[Change] = []
        self.revision, self.compacted = 100, 100
        self.listeners: set[Callable[[], None]] = set()
        self._addresses = 0
        namespaces = self.served.get(("", "v1", "namespaces"))
        if namespaces:
            for name in ("default", "kube-system"):
                self.create(namespaces, "", {"metadata": {"name": name}}, "fake")

    # -- reading ----------------------------------------------------------------------------------------------------

    def get(self, served: Served, namespace: str, name: str) -> Object:
        with self.lock:
            found = self._objects[served].get((namespace, name))
            if found is None:
                raise self._absent(served, name)
            return found

    def snapshot(self, served: Served, revision: int) -> dict[Key, Object]:
        """As it was. Raises Refused (410) for what is forgotten."""
        with self.lock:
            if revision < self.compacted:
                raise Refused(410, "Expired", f"The provided continue parameter is too old: {revision} ({self.compacted})")
            found = dict(self._objects[served])
            for change in reversed(self._history):
                if change.revision <= revision:
                    break
                if change.served is served:
                    found.pop(change.key, None)
                    if change.before is not None:
                        found[change.key] = change.before
            return found

    def page(self, served: Served, namespace: str, wanted: Selector, limit: int, continue_: str, revision: int | None) -> Object:
        """The body of a list. `revision` asks for a state that is at least so new, or, by a chaos knob, exactly an old one."""
        with self.lock:
            at, start = (self.revision if revision is None else revision), ("", "")
            if continue_:
                try:
                    found = json.loads(base64.urlsafe_b64decode(continue_))
                    at, start = found["rv"], (found["start"][0], found["start"][1])
                except (ValueError, KeyError, TypeError):
                    raise Refused(400, "BadRequest", "continue key is not valid") from None
            all_ = [one for key, one in sorted(self.snapshot(served, at).items())
                    if key >= start and (not namespace or key[0] == namespace) and wanted(one)]
            items = all_[:limit] if limit else all_
            meta: Object = {"resourceVersion": str(at)}
            if len(items) < len(all_):
                last = all_[len(items)]["metadata"]
                token = json.dumps({"rv": at, "start": [last.get("namespace", ""), last["name"]]})
                meta |= {"continue": base64.urlsafe_b64encode(token.encode()).decode(), "remainingItemCount": len(all_) - len(items)}
        if not served.custom:  # the items of typed lists come without kind and apiVersion
            items = [{key: value for key, value in one.items() if key not in ("kind", "apiVersion")} for one in items]
        return {"kind": f"{served.resource.kind}List", "apiVersion": served.resource.api_version, "metadata": meta, "items": items}

    def since(self, served: Served, revision: int) -> list[Change]:
        with self.lock:
            if revision < self.compacted:
                raise Refused(410, "Expired", f"too old resource version: {revision} ({self.compacted})")
            return [change for change in self._history if change.revision > revision and change.served is served]

    # -- writing ----------------------------------------------------------------------------------------------------

    def create(self, served: Served, namespace: str, body: Object, manager: str) -> Object:
        with self.lock:
            one = self._checked(served, namespace, "", body)
            meta = one["metadata"]
            if meta.get("generateName") and not meta.get("name"):
                meta["name"] = meta["generateName"] + uuid.uuid4().hex[:5]
            if not _NAME.fullmatch(meta.get("name") or "") or len(meta["name"]) > 253:
                raise Refused(422, "Invalid", f"{served.resource.kind} {meta.get('name')!r} is invalid: metadata.name: Required value or "
                                              "Invalid value: a lowercase RFC 1123 subdomain")
            if meta.get("resourceVersion"):
                raise Refused(400, "BadRequest", "resourceVersion should not be set on objects to be created")
            return self._make(served, namespace, one, (manager, "Update", ""))

    def update(self, served: Served, namespace: str, name: str, body: Object, manager: str, subresource: str = "") -> Object:
        with self.lock:
            live = self.get(served, namespace, name)
            one = self._checked(served, namespace, name, body)
            version = one["metadata"].get("resourceVersion")
            if not version and served.custom:
                raise Refused(422, "Invalid", f"{name}: metadata.resourceVersion: Invalid value: 0: must be specified for an update")
            self._must_be(served, live, one["metadata"].get("uid"), version)
            return self._replace(served, live, one, (manager, "Update", subresource), subresource)

    def merge(self, served: Served, namespace: str, name: str, patch: Object, manager: str, subresource: str = "") -> Object:
        with self.lock:
            live = self.get(served, namespace, name)
            one = self._checked(served, namespace, name, ownership.merge(live, patch))
            wanted = patch.get("metadata") or {}
            if wanted.get("uid", live["metadata"]["uid"]) != live["metadata"]["uid"]:
                raise Refused(422, "Invalid", f"{served.resource.kind} {name!r}: metadata.uid: Invalid value: field is immutable")
            self._must_be(served, live, None, wanted.get("resourceVersion"))
            return self._replace(served, live, one, (manager, "Update", subresource), subresource)

    def apply(self, served: Served, namespace: str, name: str, body: Object, manager: str, force: bool, subresource: str = "",
              ) -> tuple[Object, bool]:
        """The object, and whether it was made."""
        with self.lock:
            if body.get("kind") != served.resource.kind or body.get("apiVersion") != served.resource.api_version:
                raise Refused(400, "BadRequest", "apply needs the kind and apiVersion of the path")
            if (body.get("metadata") or {}).get("managedFields"):
                raise Refused(400, "BadRequest", "metadata.managedFields must be nil")
            given = self._checked(served, namespace, name, body)
            live = self._objects[served].get((namespace, name))
            if live is None and subresource:
                raise self._absent(served, name)
            if live is not None:
                self._must_be(served, live, given["metadata"].get("uid"), given["metadata"].get("resourceVersion"))
            if served.status and (live or subresource):
                given = {key: value for key, value in given.items() if (key == "status") is bool(subresource) or key in
                         ("metadata", "kind", "apiVersion")}
            if subresource:
                given["metadata"] = {"name": name, **({"namespace": namespace} if namespace else {})}
            owner = (manager, "Apply", subresource)
            result, conflicts = ownership.apply(live, given, owner, _now(), force=force)
            if conflicts:
                said = ", ".join(f'conflict with "{who}": .{".".join(path)}' for who, path in conflicts)
                raise Refused(409, "Conflict", f"Apply failed with {len(conflicts)} conflict: {said}", causes=[
                    {"reason": "FieldManagerConflict", "message": f'conflict with "{who}"', "field": f".{'.'.join(path)}"}
                    for who, path in conflicts])
            if live is None:
                return self._make(served, namespace, result, None), True
            return self._replace(served, live, result, None, subresource), False

    def delete(self, served: Served, namespace: str, name: str, options: Object | None = None) -> Object:
        """`options` as a client sends them; without, as if all who have a say in it had agreed."""
        with self.lock:
            live = self.get(served, namespace, name)
            conditions = (options or {}).get("preconditions") or {}
            self._must_be(served, live, conditions.get("uid"), conditions.get("resourceVersion"))
            if options is not None and (seconds := _grace(served, live, options)):
                one = copy.deepcopy(live)
                one["metadata"] |= {"deletionTimestamp": _now(seconds), "deletionGracePeriodSeconds": seconds}
                return self._store(served, live, one)
            if live["metadata"].get("finalizers"):
                if not live["metadata"].get("deletionTimestamp"):
                    one = copy.deepcopy(live)
                    one["metadata"] |= {"deletionTimestamp": _now(), "deletionGracePeriodSeconds": 0}
                    return self._store(served, live, one)
                return live
            self._store(served, live, None)
            return {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": {
                "name": name, "group": served.resource.group, "kind": served.resource.plural, "uid": live["metadata"]["uid"]}}

    def compact(self) -> None:
        """Forget the history: who was before now gets 410."""
        with self.lock:
            self.compacted = self.revision
            self._history.clear()

    # -- inside -----------------------------------------------------------------------------------------------------

    def _absent(self, served: Served, name: str) -> Refused:
        return Refused(404, "NotFound", f'{served.resource} "{name}" not found', name=name, group=served.resource.group,
                       kind=served.resource.plural)

    def _checked(self, served: Served, namespace: str, name: str, body: Object) -> Object:
        """A copy that is this object's."""
        if not isinstance(body, dict) or not isinstance(body.get("metadata", {}), dict):
            raise Refused(400, "BadRequest", "the object is no object")
        one = copy.deepcopy(body)
        meta = one.setdefault("metadata", {})
        for part, want in (("kind", served.resource.kind), ("apiVersion", served.resource.api_version)):
            if one.setdefault(part, want) != want:
                raise Refused(400, "BadRequest", f"the {part} of the object ({one[part]}) does not match that of the path ({want})")
        if namespace and meta.setdefault("namespace", namespace) != namespace:
            raise Refused(400, "BadRequest", f"the namespace of the provided object does not match the namespace sent on the request "
                                             f"({meta['namespace']!r}, {namespace!r})")
        if name and meta.setdefault("name", name) != name:
            raise Refused(400, "BadRequest", f"the name of the object ({meta['name']}) does not match the name on the URL ({name})")
        for part in ("labels", "annotations"):
            values = meta.get(part) or {}
            if not isinstance(values, dict) or not all(isinstance(value, str) for value in values.values()):
                raise Refused(400, "BadRequest", f"json: cannot unmarshal metadata.{part} into Go value of type string")
        return one

    def _must_be(self, served: Served, live: Object, uid: str | None, version: str | None) -> None:
        meta = live["metadata"]
        if (uid and uid != meta["uid"]) or (version and version != meta["resourceVersion"]):
            raise Refused(409, "Conflict", f'Operation cannot be fulfilled on {served.resource} "{meta["name"]}": the object has been '
                                           "modified; please apply your changes to the latest version and try again", name=meta["name"])

    def _make(self, served: Served, namespace: str, one: Object, owner: ownership.Owner | None) -> Object:
        meta = one["metadata"]
        namespaces = self.served.get(("", "v1", "namespaces"))
        if namespace and namespaces and ("", namespace) not in self._objects[namespaces]:
            raise Refused(404, "NotFound", f'namespaces "{namespace}" not found', name=namespace, kind="namespaces")
        if (namespace, meta["name"]) in self._objects[served]:
            raise Refused(409, "AlreadyExists", f'{served.resource} "{meta["name"]}" already exists', name=meta["name"])
        meta |= {"uid": str(uuid.uuid4()), "creationTimestamp": _now()}
        for part in ("deletionTimestamp", "selfLink"):
            meta.pop(part, None)
        if served.custom:
            meta["generation"] = 1
        if served.status:
            one.pop("status", None)
        if served.resource.kind in ("Pod", "Namespace"):
            one["status"] = {"phase": "Pending" if served.resource.kind == "Pod" else "Active"}
        if served.resource.kind == "Service":
            self._addresses += 1
            one.setdefault("spec", {}).setdefault("clusterIP", f"10.96.{self._addresses >> 8}.{self._addresses & 255}")
        if owner is not None:
            ownership.changed(None, one, owner, _now())
        return self._store(served, None, one)

    def _replace(self, served: Served, live: Object, one: Object, owner: ownership.Owner | None, subresource: str) -> Object:
        """Store what was written, but for what this door may not change. The same as before is no change."""
        managed = one["metadata"].get("managedFields")
        if subresource:
            if not served.status or subresource != "status":
                raise Refused(404, "NotFound", "the server could not find the requested resource")
            # a pod's takes labels and annotations too (registry/core/pod/strategy.go), a custom resource's the status alone
            too = ("labels", "annotations") if served.resource.plural == "pods" else ()
            taken = {key: one["metadata"][key] for key in too if key in one["metadata"]}
            one = {**live, "metadata": live["metadata"] | taken, **({"status": one["status"]} if "status" in one else {})}
            one["metadata"].pop("managedFields", None)
        elif served.status:
            one.pop("status", None)
            if "status" in live:
                one["status"] = live["status"]
        meta = one["metadata"]
        for part in ("uid", "creationTimestamp", "resourceVersion", "generation", "deletionTimestamp", "managedFields"):
            meta.pop(part, None)
            if part in live["metadata"]:
                meta[part] = live["metadata"][part]
        if owner is None:
            meta["managedFields"] = managed
        else:
            ownership.changed(live, one, owner, _now())
        if served.custom and {**one, "metadata": 0, "status": 0} != {**live, "metadata": 0, "status": 0}:
            meta["generation"] += 1
        if one == live:
            return live
        if meta.get("deletionTimestamp") and not meta.get("finalizers"):
            self._store(served, live, None)
            return one
        return self._store(served, live, one)

    def _store(self, served: Served, before: Object | None, after: Object | None) -> Object:
        of = after or before
        assert of is not None
        if after is not None:
            _must_fit(served, after)
        self.revision += 1
        key = (of["metadata"].get("namespace", "") if served.resource.namespaced else "", of["metadata"]["name"])
        if after is None:
            del self._objects[served][key]
        else:
            after["metadata"]["resourceVersion"] = str(self.revision)
            self._objects[served][key] = after
        self._history.append(Change(self.revision, served, key, before, after))
        if len(self._history) > self._bound:
            self.compacted = self._history.pop(0).revision
        for listener in list(self.listeners):
            listener()
        return of


def _must_fit(served: Served, one: Object) -> None:
    data = one.get("data")
    if isinstance(data, dict) and served.resource.kind in ("ConfigMap", "Secret") and sum(map(len, map(str, data.values()))) > DATA_BOUND:
        raise Refused(422, "Invalid", f"{served.resource.kind} {one['metadata']['name']!r} is invalid: []: Too long: must have at most "
                                      f"{DATA_BOUND} characters")
    if len(json.dumps(one)) > OBJECT_BOUND:
        raise Refused(500, "", "etcdserver: request is too large")


def _grace(served: Served, live: Object, options: Object) -> int:
    """Seconds that a pod stays for its kubelet to end it, which then deletes it with 0; none where no node has it or it has ended."""
    spec, told = live.get("spec") or {}, live.get("status") or {}
    if served.resource.kind != "Pod" or not spec.get("nodeName") or told.get("phase") in ("Succeeded", "Failed"):
        return 0
    asked = options.get("gracePeriodSeconds")
    return int(spec.get("terminationGracePeriodSeconds", 30) if asked is None else asked)


def _now(later: int = 0) -> str:
    return (datetime.now(UTC) + timedelta(seconds=later)).strftime("%Y-%m-%dT%H:%M:%SZ")
