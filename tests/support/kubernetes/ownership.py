"""Who owns which field (server-side apply), and merge patches (RFC 7396). Maps are owned field by field, lists as a whole."""
from __future__ import annotations

import copy
import json
from typing import Any

from tests.support.kubernetes.table import Object

Path = tuple[str, ...]
Owner = tuple[str, str, str]  # manager, operation, subresource
_OURS = {"name", "namespace", "uid", "resourceVersion", "creationTimestamp", "generation", "selfLink", "managedFields", "generateName"}


def merge(one: Any, patch: Any) -> Any:
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    found = dict(one) if isinstance(one, dict) else {}
    for key, value in patch.items():
        if value is None:
            found.pop(key, None)
        else:
            found[key] = merge(found.get(key), value)
    return found


def leaves(one: Object) -> dict[Path, Any]:
    """Each field that can be owned, with its value."""
    found: dict[Path, Any] = {}

    def walk(value: Any, path: Path) -> None:
        if isinstance(value, dict) and value:
            for key, below in value.items():
                if (path == ("metadata",) and key in _OURS) or (not path and key in ("apiVersion", "kind")):
                    continue
                walk(below, (*path, key))
        elif path not in ((), ("metadata",)):
            found[path] = value

    walk(one, ())
    return found


def remove(one: Object, path: Path) -> None:
    """Without the maps that are empty after it."""
    above = [one]
    for part in path[:-1]:
        if not isinstance(above[-1].get(part), dict):
            return
        above.append(above[-1][part])
    above[-1].pop(path[-1], None)
    for part, parent, child in zip(reversed(path[:-1]), reversed(above[:-1]), reversed(above[1:]), strict=True):
        if child:
            return
        parent.pop(part, None)


def owners(one: Object) -> dict[Owner, set[Path]]:
    found = {}
    for entry in one["metadata"].get("managedFields") or ():
        found[entry["manager"], entry["operation"], entry.get("subresource", "")] = set(_paths(entry["fieldsV1"], ()))
    return found


def _paths(fields: Object, path: Path) -> list[Path]:
    if not fields:
        return [path]
    return [found for key, below in fields.items() for found in _paths(below, (*path, key[2:]))]


def write(one: Object, owned: dict[Owner, set[Path]], now: str) -> None:
    """Into metadata.managedFields. Who owns nothing is not listed; an entry that stays as it was keeps its time."""
    entries = one["metadata"].get("managedFields") or ()
    before = {(each["manager"], each["operation"], each.get("subresource", "")): each for each in entries}
    entries = []
    for (manager, operation, subresource), paths in sorted(owned.items()):
        if not paths:
            continue
        tree: Object = {}
        for path in sorted(paths):
            at = tree
            for part in path:
                at = at.setdefault(f"f:{part}", {})
        old = before.get((manager, operation, subresource))
        if old is not None and json.dumps(old["fieldsV1"], sort_keys=True) == json.dumps(tree, sort_keys=True):
            entries.append(old)
            continue
        entry = {"manager": manager, "operation": operation, "apiVersion": one["apiVersion"], "time": now, "fieldsType": "FieldsV1",
                 "fieldsV1": tree}
        entries.append({**entry, "subresource": subresource} if subresource else entry)
    one["metadata"].pop("managedFields", None)
    if entries:
        one["metadata"]["managedFields"] = entries


def changed(before: Object | None, after: Object, owner: Owner, now: str) -> None:
    """After a write that is no apply: who changed a field owns it, alone; a field that went is nobody's."""
    old, new = leaves(before) if before else {}, leaves(after)
    mine = {path for path, value in new.items() if path not in old or old[path] != value}
    owned = {each: (paths - mine) & new.keys() for each, paths in owners(before).items()} if before else {}
    owned[owner] = owned.get(owner, set()) | mine
    write(after, owned, now)


def apply(live: Object | None, given: Object, owner: Owner, now: str, *, force: bool) -> tuple[Object, list[tuple[str, Path]]]:
    """What becomes of it, and the conflicts: manager and field. With conflicts the object must not be stored."""
    want = leaves(given)
    have = leaves(live) if live else {}
    owned = owners(live) if live else {}
    others = {each: paths for each, paths in owned.items() if each != owner}
    conflicts = [(each[0], path) for each, paths in sorted(others.items()) for path in sorted(paths & want.keys())
                 if have.get(path) != want[path]]
    if conflicts and not force:
        return given, conflicts
    result: Object = copy.deepcopy(merge(live or {}, given))
    for path in owned.get(owner, set()) - want.keys():
        if not any(path in paths for paths in others.values()):
            remove(result, path)
    lost = {path for _, path in conflicts}
    write(result, {**{each: paths - lost for each, paths in others.items()}, owner: set(want)}, now)
    return result, []
