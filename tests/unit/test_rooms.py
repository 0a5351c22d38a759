"""The rooms of ARCHITECTURE.md and who may import whom, held as data and read from the source."""
from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent

# A room of `agent` may import these rooms of `agent` (itself is understood).
BELOW = {"model", "netlink"}
AGENT: dict[str, set[str]] = {
    "model": set(),
    "netlink": {"model"},
    "xds": BELOW,
    "state": BELOW,
    "workloads": BELOW,
    "identity": BELOW,
    "capture": BELOW,
    "telemetry": BELOW,
    "dataplane": BELOW,
    "dns": BELOW,
    "admin": BELOW,
    "lab": BELOW,
    # the composition root, and the front doors for people
    "app": {"model", "netlink", "xds", "state", "workloads", "identity", "capture", "telemetry", "dataplane", "dns", "admin"},
    "cli": {"model", "netlink", "capture", "app"},
}
CONTROLPLANE: dict[str, set[str]] = {
    "model": set(),
    "sources": {"model"},
    "translate": {"model"},
    "server": {"model", "translate"},
    "ca": {"model"},
    # the composition root and its front door
    "app": {"model", "sources", "translate", "server", "ca"},
    "cli": {"model", "sources", "translate", "server", "ca", "app"},
}
EXT: dict[str, set[str]] = {
    "sys": set(),
    "core": {"sys"},
    "wire": {"sys", "core"},
    "route": {"sys", "core", "wire"},
    "tunnel": {"sys", "core", "wire"},
    "proxy": {"sys", "core", "wire", "route", "tunnel"},
    "keeper": {"sys", "core", "wire", "route", "tunnel"},
}
# top-level packages of ours that a top-level package may import; `ext` only through agent.dataplane, see below
TOP = {"agent": {"agent", "protos", "ext"}, "controlplane": {"controlplane", "protos"}, "protos": {"protos"},
       "ext": {"ext"}}
# third-party packages that exactly one file imports
SINGLE = {"iptc": "agent/capture/tables.py", "bcc": "agent/capture/bpf.py", "pyroute2": "agent/netlink/rtnetlink.py"}


def python_files(top: str) -> list[Path]:
    return sorted(path for path in (ROOT / top).rglob("*.py") if "gen" not in path.parts)


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            base = ".".join(part for part in (above, node.module or "") if part)
            found.update(f"{base}.{alias.name}" for alias in node.names)
    return found


def cython_imports(path: Path) -> set[str]:
    found: set[str] = set()
    for line in path.read_text().splitlines():
        if match := re.match(r"\s*from\s+([\w.]+)\s+c?import\s+(.*)", line):
            names = [name.split()[0] for name in match[2].strip("( ").split(",") if name.split()]
            found.update(f"{match[1]}.{name}" for name in names)
            found.add(match[1])
        elif match := re.match(r"\s*c?import\s+([\w.]+)", line):
            found.add(match[1])
    return found


def room_of(name: str) -> tuple[str, str]:
    parts = name.split(".")
    return parts[0], parts[1] if len(parts) > 1 else ""


def own_room(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[1] if len(parts) > 1 else ""


def forbidden(path: Path, names: set[str], table: dict[str, set[str]]) -> list[str]:
    here, top = own_room(path), path.relative_to(ROOT).parts[0]
    wrong = []
    for name in sorted(names):
        package, room = room_of(name)
        if package in TOP and package not in TOP[top]:
            wrong.append(f"{path.relative_to(ROOT)} imports {name}: {top} may not import {package}")
        if package == top and here in table and room not in table[here] | {here, ""}:
            wrong.append(f"{path.relative_to(ROOT)} imports {name}: room {here} may import {sorted(table[here])}")
    return wrong


def test_every_room_stands_in_the_table() -> None:
    for top, table in (("agent", AGENT), ("controlplane", CONTROLPLANE), ("ext", EXT)):
        there = {p.name for p in (ROOT / top).iterdir() if p.is_dir() and not p.name.startswith(("__", "."))}
        assert there <= set(table), f"{top}: rooms without a rule: {there - set(table)}"


def test_no_room_of_the_agent_imports_a_sibling() -> None:
    wrong = [w for path in python_files("agent") for w in forbidden(path, imports(path), AGENT)]
    assert wrong == []


def test_no_room_of_the_control_plane_imports_upwards() -> None:
    wrong = [w for path in python_files("controlplane") for w in forbidden(path, imports(path), CONTROLPLANE)]
    assert wrong == []


def test_the_contracts_import_nothing_of_ours() -> None:
    assert [w for path in python_files("protos") for w in forbidden(path, imports(path), {})] == []


def test_only_the_dataplane_room_imports_the_extension() -> None:
    wrong = [str(path.relative_to(ROOT)) for path in python_files("agent")
             if any(name.split(".")[0] == "ext" for name in imports(path)) and own_room(path) != "dataplane"]
    assert wrong == []


def test_the_extension_imports_downwards_only() -> None:
    files = sorted(p for p in (ROOT / "ext").rglob("*") if p.suffix in {".pyx", ".pxd", ".py"})
    assert files
    wrong = [w for path in files for w in forbidden(path, cython_imports(path), EXT)]
    assert wrong == []


def test_kernel_libraries_have_one_importer_each() -> None:
    for package, allowed in SINGLE.items():
        users = [str(path.relative_to(ROOT)) for top in ("agent", "controlplane") for path in python_files(top)
                 if any(name.split(".")[0] == package for name in imports(path))]
        assert users == [allowed], f"{package} is imported by {users}, only {allowed} may"
