"""`make coverage`: which lines of ext/ run in the tests of ext/ and of the processes made of it.

    coverage.py [--least PERCENT] [--missing] [WORDS FOR PYTEST ...]

Cython writes before each line of C from which line of a .pyx or .pxd it comes, so gcc's counters are by those lines; a line counts as run
when a part of it ran in any module (an inline function of a .pxd is in many). Lines without code of their own (declarations, comments)
are in no count. --missing prints the numbers of those that did not run.
"""
from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from tests.instrumented.environment import CACHE, HERE, Environment  # noqa: E402

LEAST = 90.0
TESTS = ["tests/unit/core", "tests/unit/wire", "tests/unit/route", "tests/unit/tunnel", "tests/unit/proxy", "tests/unit/sys",
         "tests/unit/keeper", "tests/unit/telemetry",
         "tests/netns/proxy", "tests/netns/hbone", "tests/netns/keeper", "tests/netns/strict"]
Lines = dict[str, dict[int, int]]


def environment() -> Environment:
    """-O0: what is folded or moved has no line. The module's own object tells the interpreter how its counters are written."""
    CACHE.mkdir(parents=True, exist_ok=True)
    module = CACHE / "coverage_module.o"
    subprocess.run(["gcc", "-c", "-fPIC", "-O1", str(HERE / "coverage_module.c"), "-o", str(module)], check=True)
    options = ("-Dbuildtype=debug", "-Doptimization=0", "-Db_coverage=true",
               f"-Dc_link_args={module} -lgcov", f"-Dcpp_link_args={module} -lgcov")
    return Environment("coverage", options, "coverage.c", (), cython="cython_lines.py")


def counters(build: Path, prefix: Path) -> None:
    """An empty file that anybody may write for each that there will be: workers are another user than whoever came first."""
    for notes in build.glob("ext/**/*.gcno"):
        data = Path(f"{prefix}{notes.with_suffix('.gcda')}")
        data.parent.mkdir(parents=True, exist_ok=True)
        data.touch()
        data.chmod(0o666)


def counted(build: Path, notes: Path) -> Lines:
    """Executions by file of ext/ and line, of one compiled file."""
    done = subprocess.run(["gcov", "--json-format", "--stdout", str(notes)], cwd=build, capture_output=True, text=True, check=True)
    found: Lines = defaultdict(dict)
    for told in (json.loads(text) for text in done.stdout.splitlines() if text.startswith("{")):
        for file in told["files"]:
            name = file["file"]  # Cython's are from the root, of our own C++ from the build
            name = name if name.startswith("ext/") else os.path.relpath(os.path.normpath(build / name), ROOT)
            if not re.fullmatch(r"ext/\w+/\w+\.(pyx|pxd|cpp)", name):
                continue
            lines = found[name]
            for line in file["lines"]:
                number = line["line_number"]
                lines[number] = max(lines.get(number, 0), line["count"])
    return found


def ranges(numbers: list[int]) -> str:
    said: list[str] = []
    at = 0
    while at < len(numbers):
        end = at
        while end + 1 < len(numbers) and numbers[end + 1] <= numbers[end] + 1:
            end += 1
        said.append(str(numbers[at]) if end == at else f"{numbers[at]}-{numbers[end]}")
        at = end + 1
    return " ".join(said)


def report(build: Path, missing: bool) -> float:
    """Prints the table; the percentage of all."""
    total: Lines = defaultdict(dict)
    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(lambda notes: counted(build, notes), sorted(build.glob("ext/**/*.gcno"))):
            for name, lines in found.items():
                for number, count in lines.items():
                    total[name][number] = max(total[name].get(number, 0), count)
    every = ran = 0
    for name, lines in sorted(total.items()):
        silent = sorted(number for number, count in lines.items() if not count)
        every, ran = every + len(lines), ran + len(lines) - len(silent)
        print(f"{name:<28} {len(lines):>5} lines {100 * (1 - len(silent) / len(lines)):>6.1f} %"
              + (f"   {ranges(silent)}" if missing and silent else ""))
    print(f"{'ext/':<28} {every:>5} lines {100 * ran / max(every, 1):>6.1f} %")
    return 100 * ran / max(every, 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--least", type=float, default=LEAST)
    parser.add_argument("--missing", action="store_true")
    asked, words = parser.parse_known_args()
    made = environment()
    with tempfile.TemporaryDirectory(prefix="narrows-coverage-") as folder:  # the tree may be closed to a worker's user
        prefix = Path(folder)
        prefix.chmod(0o755)
        began = time.monotonic()
        made.make(f'-DPREFIX="{prefix}"')
        counters(made.build, prefix)
        print(f"coverage: built in {time.monotonic() - began:.0f} s", flush=True)
        began = time.monotonic()
        status = made.pytest(3, words, TESTS)
        print(f"coverage: tests in {time.monotonic() - began:.0f} s", flush=True)
        for notes in made.build.glob("ext/**/*.gcno"):
            data = Path(f"{prefix}{notes.with_suffix('.gcda')}")
            notes.with_suffix(".gcda").unlink(missing_ok=True)
            if data.exists() and data.stat().st_size:
                shutil.copy(data, notes.with_suffix(".gcda"))
    covered = report(made.build, asked.missing)
    if covered < asked.least:
        print(f"coverage: {covered:.1f} % of the lines of ext/ ran; at least {asked.least:.0f} % must", file=sys.stderr)
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main())
