"""Makes a fresh Debian machine able to build, run and test Narrows; skips every step that is done.

Run by `make` as `/usr/bin/python3 tools/setup.py`; only the standard library is at hand. A step that fails says what to
do and ends with exit status 69. What was done is remembered in `.venv/narrows-setup.json` as hashes of its inputs.
"""
from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "narrows-setup.json"
BUILD = ROOT / "build"
PYTHON = "/usr/bin/python3"  # the one that sees Debian's python3-bpfcc
APT_LIST = ROOT / "tools" / "apt-packages.txt"


def fail(step: str, what: str, hint: str) -> NoReturn:
    print(f"setup: {step} failed: {what}\n  what to do: {hint}", file=sys.stderr)
    raise SystemExit(69)


def run(step: str, argv: list[str], hint: str, cwd: Path = ROOT, /, **env: str) -> None:
    """Runs a command quietly; on failure shows the end of its output."""
    try:
        done = subprocess.run(argv, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True,
                              timeout=1800, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        fail(step, f"{' '.join(argv)}: {error}", hint)
    if done.returncode != 0:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-25:])
        fail(step, f"{' '.join(argv)} ended with {done.returncode}\n{tail}", hint)


def digest(*parts: str | bytes) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(part.encode() if isinstance(part, str) else part)
        total.update(b"\0")
    return total.hexdigest()


def wanted_packages(list_: Path = APT_LIST) -> list[str]:
    lines = list_.read_text().splitlines()
    return [name for line in lines if (name := line.split("#")[0].strip())]


def missing_packages(list_: Path = APT_LIST) -> list[str]:
    """Packages of the list that dpkg does not have installed."""
    names = wanted_packages(list_)
    done = subprocess.run(["dpkg-query", "-W", "-f", "${Package} ${db:Status-Status}\n", *names],
                          capture_output=True, text=True, check=False)
    installed = {line.split()[0] for line in done.stdout.splitlines() if line.endswith(" installed")}
    return [name for name in names if name not in installed]


def apt(list_: Path = APT_LIST) -> None:
    if shutil.which("dpkg-query") is None:
        fail("apt", "this is not a Debian system (no dpkg-query)", f"install by hand: {', '.join(wanted_packages(list_))}")
    missing = missing_packages(list_)
    if not missing:
        return
    if os.geteuid() != 0:
        fail("apt", f"missing packages: {' '.join(missing)}", f"as root: apt-get install {' '.join(missing)}")
    print(f"setup: apt-get install {' '.join(missing)}", flush=True)
    hint = "check the network and /etc/apt/sources.list, then run make again"
    quiet = {"DEBIAN_FRONTEND": "noninteractive"}
    run("apt", ["apt-get", "update", "-q"], hint, **quiet)
    # No service may start on its own: tests start the servers they need, on ports of their own.
    policy = Path("/usr/sbin/policy-rc.d")
    ours = not policy.exists()
    if ours:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        run("apt", ["apt-get", "install", "-q", "-y", "--no-install-recommends", *missing], hint, **quiet)
    finally:
        if ours:
            policy.unlink()


def inputs() -> str:
    return digest((ROOT / "pyproject.toml").read_bytes(), sys.version)


def remembered() -> dict[str, str]:
    try:
        found = json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def build_requirements() -> list[str]:
    """`requires` of [build-system]: an editable install without isolation needs them in the environment."""
    found = re.search(r"^requires = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S)
    if found is None:
        fail("venv", "pyproject.toml has no [build-system] requires", "restore pyproject.toml")
    return re.findall(r'"([^"]+)"', found.group(1))


def venv() -> None:
    """.venv with the dependencies and the project itself, editable: changed Cython is rebuilt on import."""
    made = (VENV / "bin" / "narrows").exists() and (BUILD / "build.ninja").exists()
    if made and remembered().get("venv") == inputs():
        return
    pip = [str(VENV / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install", "-q"]
    hint = "check that the package index answers (pip config list), then run make again"
    if not (VENV / "bin" / "python").exists():
        print("setup: making .venv", flush=True)
        run("venv", [PYTHON, "-m", "venv", "--system-site-packages", str(VENV)], "apt-get install python3-venv")
    print("setup: installing Python packages", flush=True)
    path = f"{VENV / 'bin'}:{os.environ.get('PATH', '')}"
    run("venv", [*pip, *build_requirements()], hint, PATH=path)
    print("setup: building the extension", flush=True)
    # meson writes cython's path down: `.venv/bin/narrows` rebuilds what changed from any shell, without .venv on its PATH
    run("build", [*pip, "--no-build-isolation", "--config-settings=build-dir=build", "-e", ".[dev]"],
        "see the compiler's message above; `make clean` starts from nothing", PATH=path, CYTHON=str(VENV / "bin" / "cython"))
    write_stamp(venv=inputs())


def extension() -> None:
    ninja = VENV / "bin" / "ninja"
    run("build", [str(ninja), "-C", str(BUILD)], "see the compiler's message above; `make clean` starts from nothing",
        PATH=f"{VENV / 'bin'}:{os.environ.get('PATH', '')}")


def bpf() -> None:
    """BCC must be able to compile and load a program here; once per kernel."""
    key = digest(os.uname().release, (ROOT / "agent" / "capture" / "bpf.py").read_bytes())
    if remembered().get("bpf") == key:
        return
    if os.geteuid() != 0:
        print("setup: not root: the BPF tool chain is not checked", file=sys.stderr)
        return
    print("setup: checking the BPF tool chain", flush=True)
    run("bpf", [str(VENV / "bin" / "python"), "-m", "agent.capture.bpf"],
        "narrows doctor explains what the kernel or BCC lacks")
    write_stamp(bpf=key)


def write_stamp(**steps: str) -> None:
    STAMP.write_text(json.dumps({**remembered(), **steps}))


def main() -> None:
    start = time.monotonic()
    apt()
    venv()
    extension()
    bpf()
    took = time.monotonic() - start
    if took > 5:
        print(f"setup: done in {took:.0f} s", flush=True)


if __name__ == "__main__":
    main()
