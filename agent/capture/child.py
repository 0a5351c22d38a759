"""The process that works on tables inside pods' network namespaces, one order after the other; helper.py starts and ends it.

Run as a file, without site-packages (a third of the time): `child.py DESCRIPTOR IMPORT_PATH...`. The descriptor is a stream
socket; each message is a length (4 bytes, native) and a JSON object, and with an order's length comes the namespace's descriptor.
Single-threaded: setns(2) moves this process alone, and it goes home after each order, or a pod's namespace would never end.

    in   {"action": "apply|repair|verify|remove|chains|probe", "backend": "iptables|nftables", "prefix": text,
          "tables": [tables of rules.py], "names": [table names to remove from]}
    out  {"result": ...} or {"error": text}
"""
from __future__ import annotations

import ctypes
import json
import os
import socket
import struct
import sys
from typing import Any

CLONE_NEWNET = 0x40000000
FAMILIES = [4, 6]
ORDER_LIMIT = 1 << 24  # bytes; a plan is 5 KB, with a thousand excluded networks 200


def main() -> int:
    sys.path[:0] = sys.argv[2:]
    home = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    with socket.socket(fileno=int(sys.argv[1])) as channel:
        while (received := receive(channel)) is not None:
            netns, order = received
            try:
                enter(home if netns is None else netns)
                answer = {"result": run(order)}
            except Exception as error:
                from agent.capture.tables import TableError

                answer = {"error": str(error) if isinstance(error, TableError) else f"{type(error).__name__}: {error}"}
            finally:
                enter(home)  # if that fails, what came next would be done in the wrong place: end
                if netns is not None:
                    os.close(netns)
            text = json.dumps(answer).encode()
            channel.sendall(struct.pack("=I", len(text)) + text)
    return 0


def receive(channel: socket.socket) -> tuple[int | None, dict[str, Any]] | None:
    """The next order and its namespace; None when the agent has closed or is gone."""
    head, descriptors, _, _ = socket.recv_fds(channel, 4, 1)
    if len(head) < 4:
        return None
    (length,) = struct.unpack("=I", head)
    if length > ORDER_LIMIT:
        raise ValueError(f"an order of {length} bytes")
    data = bytearray()
    while len(data) < length:
        more = channel.recv(length - len(data))
        if not more:
            return None
        data += more
    return (descriptors[0] if descriptors else None), json.loads(data)


def run(order: dict[str, Any]) -> Any:
    """Do what is ordered. `apply` reads back what it wrote; `repair` applies and says what was wrong."""
    from agent.capture import nftables, tables
    from agent.capture.rules import CHAIN_PREFIX, table_from_json

    action, prefix = order["action"], order["prefix"]
    if action == "probe":
        return probe(order["tables"])
    if action == "remove":  # whoever wrote it: an earlier agent may have had another backend
        return [*tables.remove(FAMILIES, order["names"], prefix), *nftables.remove(FAMILIES, order["names"], prefix)]
    if action == "chains":
        found = tables.chains(prefix)
        for label, names in nftables.chains(prefix).items():
            found[label] = found.get(label, []) + names
        return found
    one, other = (nftables, tables) if order["backend"] == "nftables" else (tables, nftables)
    wanted = [table_from_json(value) for value in order["tables"]]
    if action == "verify":
        return one.verify(wanted, prefix)
    if action not in ("apply", "repair"):
        raise ValueError(f"unknown action {action}")
    found_wrong = one.verify(wanted, prefix) if action == "repair" else []
    if action == "repair" and not found_wrong:
        return []
    changed = one.apply(wanted, prefix)
    if changed and (wrong := one.verify(wanted, prefix)):
        raise tables.TableError(f"the rules are not what was written: {'; '.join(wrong)}; another program edits "
                                "them at the same time")
    if prefix != CHAIN_PREFIX:
        changed += [f"{label} (of the other backend, removed)" for label in other.remove(FAMILIES, list(nftables.REMOVAL), prefix)]
    return found_wrong or changed


def probe(sample: Any) -> dict[str, str]:
    """What each backend lacks here, "" for nothing: a plan is written with it, in a namespace made for that."""
    from agent.capture import nftables, tables
    from agent.capture.rules import table_from_json

    libc = ctypes.CDLL(None, use_errno=True)
    found = {}
    wanted = [table_from_json(value) for value in sample]
    for name, backend in (("iptables", tables), ("nftables", nftables)):
        if libc.unshare(CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "cannot make a network namespace; this needs root")
        try:
            backend.apply(wanted, "NARROWS_probe_")
            found[name] = ""
        except tables.TableError as error:
            found[name] = str(error)
    return found


def enter(namespace: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(namespace, CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"cannot enter the pod's network namespace: {os.strerror(number)}")


if __name__ == "__main__":
    sys.exit(main())
