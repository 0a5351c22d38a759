"""The short-lived process that enters one pod's network namespace and works on its tables.

Started by reconcile.py as a file, without site-packages (a third of the time): one JSON object on stdin, one on stdout.
It enters the namespace before it loads iptc, whose library reads /proc of where it is.

    in   {"path": [import path], "netns": descriptor, "action": "apply|repair|verify|remove|chains", "prefix": text,
          "tables": [tables of rules.py], "names": [table names to remove from], "families": [4, 6]}
    out  {"result": ...} or {"error": text}
"""
from __future__ import annotations

import json
import os
import sys
from typing import Any

CLONE_NEWNET = 0x40000000
PR_SET_PDEATHSIG, SIGKILL = 1, 9


def main() -> int:
    order = json.load(sys.stdin)
    sys.path[:0] = order["path"]
    try:
        answer = {"result": run(order)}
    except Exception as error:
        from agent.capture.tables import TableError

        answer = {"error": str(error) if isinstance(error, TableError) else f"{type(error).__name__}: {error}"}
    json.dump(answer, sys.stdout)
    return 0


def run(order: dict[str, Any]) -> Any:
    """Enter the namespace and do what is ordered. `apply` reads back what it wrote; `repair` applies and says what was wrong."""
    enter(order["netns"])
    from agent.capture import tables
    from agent.capture.rules import table_from_json

    action, prefix = order["action"], order["prefix"]
    wanted = [table_from_json(value) for value in order["tables"]]
    if action in ("apply", "repair"):
        found = tables.verify(wanted, prefix) if action == "repair" else []
        if action == "repair" and not found:
            return []
        changed = tables.apply(wanted, prefix)
        if changed and (wrong := tables.verify(wanted, prefix)):
            raise tables.TableError(f"the rules are not what was written: {'; '.join(wrong)}; another program edits "
                                    "them at the same time")
        return found or changed
    if action == "verify":
        return tables.verify(wanted, prefix)
    if action == "remove":
        return tables.remove(order["families"], order["names"], prefix)
    if action == "chains":
        return tables.chains(prefix)
    raise ValueError(f"unknown action {action}")


def enter(namespace: int) -> None:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)  # nobody would read the answer
    if libc.setns(namespace, CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"cannot enter the pod's network namespace: {os.strerror(number)}")


if __name__ == "__main__":
    sys.exit(main())
