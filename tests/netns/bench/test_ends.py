"""A benchmark that is told to end takes back what it made."""
from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bench.tools import build
from tests.support.wait import until

pytestmark = pytest.mark.netns
ROOT = Path(__file__).resolve().parents[3]


def namespaces(pid: int) -> list[str]:
    return [name for name in os.listdir("/run/netns") if name.startswith(f"t{pid}-")]


def inside(pid: int) -> list[int]:
    """Processes of its session, beside itself."""
    return [one for one in map(int, filter(str.isdigit, os.listdir("/proc"))) if one != pid and session(one) == pid]


def measures(pid: int) -> bool:
    for one in inside(pid):
        with contextlib.suppress(OSError):
            if b"from load import" in Path(f"/proc/{one}/cmdline").read_bytes():
                return True
    return False


def session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return 0


@pytest.mark.parametrize(("number", "to_all"), [(signal.SIGTERM, False), (signal.SIGTERM, True), (signal.SIGINT, True)])
def test_a_benchmark_that_is_told_to_end_leaves_no_namespace_and_no_process(number: int, to_all: bool, tmp_path: Path) -> None:
    build()  # else it would be told in the middle of that
    argv = [sys.executable, "-m", "tests.bench", "--cases", "http1k", "--proxies", "narrows", "--rounds", "100",
            "--out", str(tmp_path / "out")]
    with open(tmp_path / "said", "wb") as said, subprocess.Popen(argv, cwd=ROOT, stdout=said, stderr=said, start_new_session=True) as bench:
        try:
            until(lambda: bench.poll() is not None or measures(bench.pid), "its load generator runs", 60)
            assert len(namespaces(bench.pid)) == 2
            assert bench.poll() is None, (tmp_path / "said").read_text()
            (os.killpg if to_all else os.kill)(bench.pid, number)  # `timeout` and terminals: the whole group
            assert bench.wait(60) == 128 + number, (tmp_path / "said").read_text()
            assert namespaces(bench.pid) == []
            until(lambda: inside(bench.pid) == [], "nothing of it runs", 20)
        finally:
            bench.kill()
