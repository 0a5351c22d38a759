"""Which hooks run where, by bpftool's word."""
from __future__ import annotations

import json
import os
import subprocess
from typing import Any

from tests.support.netns import Netns


def _said(*argv: str) -> Any:
    done = subprocess.run(["bpftool", "-j", *argv], capture_output=True, text=True, check=True, timeout=20)
    return json.loads(done.stdout.strip() or "null") or []


def programs(cgroup: str) -> set[str]:
    """Hooks on a cgroup, ours without their prefix."""
    return {one["name"].removeprefix("nw_") for one in _said("cgroup", "show", cgroup)}


def lookups(netns: Netns) -> int:
    """How many sk_lookup links a namespace has."""
    number = os.stat(netns.path).st_ino
    return sum((one.get("netns_ino"), one.get("attach_type")) == (number, "sk_lookup") for one in _said("link", "show"))


def keys(pin: os.PathLike[str]) -> set[bytes]:
    """Of a pinned map."""
    return {bytes(int(byte, 16) for byte in one["key"]) for one in _said("map", "dump", "pinned", os.fspath(pin))}
