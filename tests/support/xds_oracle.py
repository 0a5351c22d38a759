"""PyPI's xds-protos as an independent decoder of what we put on the wire.

It lives in a virtual environment of its own, `.cache/xds-oracle`, and runs as a process of its own: its wheel overwrites files
of other packages, and two definitions of one message do not fit into one process. Made once; a machine that cannot make it
fails the tests that need it, with pip's words.
"""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
HOME = ROOT / ".cache" / "xds-oracle"
REQUIREMENT = "xds-protos==1.85.0"
SCRIPT = Path(__file__).with_name("xds_oracle_child.py")


def python() -> Path:
    """The oracle's interpreter; makes its environment when it is not there."""
    HOME.mkdir(parents=True, exist_ok=True)
    done, interpreter = HOME / "requirement", HOME / "venv" / "bin" / "python"
    with (HOME / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (done.exists() and done.read_text() == REQUIREMENT):
            for argv in (
                [sys.executable, "-m", "venv", "--clear", str(HOME / "venv")],
                [str(interpreter), "-m", "pip", "install", "-q", "--disable-pip-version-check", REQUIREMENT],
            ):
                made = subprocess.run(argv, capture_output=True, text=True, timeout=100, check=False)
                if made.returncode != 0:
                    raise AssertionError(
                        f"the oracle's environment cannot be made: {' '.join(argv)} ended with {made.returncode}: {made.stderr}"
                    )
            done.write_text(REQUIREMENT)
    return interpreter


def ask(question: dict[str, Any]) -> dict[str, Any]:
    """One question as JSON in, one answer as JSON out. Raises AssertionError with the oracle's traceback."""
    done = subprocess.run(
        [str(python()), "-I", str(SCRIPT)], input=json.dumps(question), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer
