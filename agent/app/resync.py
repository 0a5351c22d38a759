"""The difference between what is wanted and what a keeper holds: nothing but this is sent after a restart of either."""
from __future__ import annotations

from collections.abc import Iterable

from agent.app.encode import encode_put
from agent.app.mesh import Mesh
from agent.dataplane import blobs
from agent.state.entries import Key, Table
from agent.state.store import Store


def difference(store: Store, there: Iterable[blobs.Put]) -> list[blobs.Entry]:
    """Puts of what is missing or differs, and deletes of what is wanted no more; inherited entries stay.

    What cannot be encoded is left as it is: the commit of its next change says why.
    """
    held = {(one.kind, one.key): one.payload for one in there}
    wanted: set[tuple[int, str]] = set()
    puts: list[blobs.Entry] = []
    for put in store.everything():
        wanted.add((int(put.key[0]), put.key[1]))
        try:
            blob = encode_put(put, store.service_index)
        except blobs.BlobError:
            continue
        if held.get((blob.kind, blob.key)) != blob.payload:
            puts.append(blob)
    kept = {(int(table), key) for table, key in store.inherited}
    # deletes come first: an address may have moved from what went to what came
    return [*(blobs.Delete(*key) for key in held if key not in wanted and key not in kept), *puts]


def inherit(store: Store, mesh: Mesh, there: Iterable[blobs.Put]) -> None:
    """After a restart: what an earlier agent put in force and this one cannot judge yet stays.

    Pods, and the policies that they may be subject to, until the list of pods was read; destinations of which a part is
    missing, and the clusters of their scopes: the control plane may be away, and what was complete for the last agent still serves.
    """
    incomplete = set(mesh.incomplete())
    scopes = {key.partition("|")[0] for key in incomplete}
    keys: list[Key] = []
    for one in there:
        if (one.kind in (Table.POD, Table.POLICY) or (one.kind == Table.DESTINATION and one.key in incomplete)
                or (one.kind == Table.CLUSTER and one.key.partition("|")[0] in scopes)):
            keys.append((Table(one.kind), one.key))
    store.inherit(keys)


def settle_inheritance(store: Store, mesh: Mesh) -> None:
    """Let go of inherited clusters once every destination of their scope is complete."""
    if not store.inherited:
        return
    if not any(key[0] is Table.POD for key in store.inherited):
        store.disown([key for key in store.inherited if key[0] is Table.POLICY])
    waiting = {key.partition("|")[0] for key in mesh.incomplete()}
    store.disown(key for key in store.inherited
                 if key[0] is Table.CLUSTER and key[1].partition("|")[0] not in waiting)
