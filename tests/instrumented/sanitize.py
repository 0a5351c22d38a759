"""`make test-sanitize`: the tests of ext/ and of the processes made of it, against an extension compiled with sanitizers.

    sanitize.py [--sanitize address,undefined|thread] [WORDS FOR PYTEST ...]

Fails when a test fails, and when any process wrote a report, whether a test noticed or not. Reports stay in
.cache/instrumented/NAME/reports.
"""
from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from tests.instrumented.environment import Environment  # noqa: E402

# leaks: the interpreter's own at its end; what a room must give back, its tests count
COMMON = "detect_leaks=0:print_stacktrace=1:symbolize=1:handle_segv=1"
EXT = ["tests/unit/core", "tests/unit/wire", "tests/unit/route", "tests/unit/tunnel", "tests/unit/proxy", "tests/unit/keeper",
       "tests/unit/telemetry"]
# sanitizers -> (name, options of the runtime, what runs)
RUNS = {
    "address,undefined": ("address", f"{COMMON}:detect_stack_use_after_return=1:strict_string_checks=1",
                          [*EXT, "tests/netns/proxy", "tests/netns/hbone", "tests/netns/agent/test_certificates.py", "tests/netns/keeper",
                           "tests/netns/strict", "tests/netns/endtoend"]),
    # what threads share: the segments of ext/core/shm and ring, of which each process maps its own copy elsewhere, so only tests that read
    # and write in one process can show a race; the others show that a worker has no second thread and that its signal handler is safe.
    # Nobody with gRPC's threads: it is not instrumented, so its locks are not seen, and each of its queues would be reported as a race
    "thread": ("thread", "die_after_fork=0:report_signal_unsafe=1:second_deadlock_stack=1",
               ["tests/unit/core", "tests/unit/telemetry", "tests/unit/keeper", "tests/unit/tunnel", "tests/netns/proxy",
                "tests/netns/hbone", "tests/netns/keeper"]),
}
UNPRIVILEGED = "64321"
PROOFS = {"address": ("heap-buffer-overflow", "signed integer overflow"), "thread": ("data race",)}
MARKS = {"address": b"__asan_", "thread": b"__tsan_"}


def environment(sanitize: str) -> Environment:
    # clang would need b_lundef=false alone; -O1 keeps frames readable and the build short
    options = ("-Dbuildtype=debugoptimized", "-Doptimization=1", f"-Db_sanitize={sanitize}", "-Db_lundef=false",
               "-Dc_args=-fno-omit-frame-pointer", "-Dcpp_args=-fno-omit-frame-pointer")
    return Environment(RUNS[sanitize][0], options, "sanitizer.c", (f"-fsanitize={sanitize}",),
                       # its shadow wants the places that addresses have without randomisation
                       ("setarch", "-R") if sanitize == "thread" else ())


def reports(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.stat().st_size)


def prove(made: Environment, folder: Path) -> None:
    """What each sanitizer is for, done on purpose by a user like the workers' (when we are root), must be reported where we look."""
    demote = ["setpriv", f"--reuid={UNPRIVILEGED}", f"--regid={UNPRIVILEGED}", "--clear-groups"] if os.geteuid() == 0 else []
    reached = folder / "interpreter"  # the tree may be closed to that user
    shutil.copy(made.python, reached)
    subprocess.run([*made.prefix, *demote, str(reached), "--prove"], capture_output=True, check=False, cwd="/")
    reached.unlink()
    text = "".join(path.read_text() for path in reports(folder))
    lacking = [words for words in PROOFS[made.name] if words not in text]
    plain = [path.name for path in sorted(made.build.glob("ext/*/*.so")) if MARKS[made.name] not in path.read_bytes()]
    if lacking or plain:
        sys.exit(f"sanitize: a clean run would prove nothing: not reported in {folder}: {lacking}; not instrumented: {plain}")
    for path in reports(folder):
        path.unlink()


def told(folder: Path) -> str:
    """Each kind of report once: its head, and in how many processes it came."""
    kinds: dict[str, list[Path]] = {}
    for path in reports(folder):
        text = path.read_text(errors="replace")
        summary = "; ".join(sorted(set(re.findall(r"SUMMARY: .*|[^\s:]+:\d+:\d+: runtime error: .*", text)))) or text[:200]
        kinds.setdefault(summary, []).append(path)
    return "\n".join(f"sanitize: {len(paths)} x {summary}\n  {paths[0]}" for summary, paths in kinds.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sanitize", choices=list(RUNS), default="address,undefined")
    asked, words = parser.parse_known_args()
    name, options, tests = RUNS[asked.sanitize]
    made = environment(asked.sanitize)
    # under /tmp: a worker's user must write there, and may not reach the tree
    with tempfile.TemporaryDirectory(prefix=f"narrows-{name}-") as folder:
        scratch = Path(folder)
        scratch.chmod(0o1777)
        began = time.monotonic()
        made.make(f'-DOPTIONS="{options}"', f'-DLOG="{scratch}"')
        print(f"sanitize: {asked.sanitize}: built in {time.monotonic() - began:.0f} s", flush=True)
        prove(made, scratch)
        began = time.monotonic()
        status = made.pytest(5, words, tests)
        found = told(scratch)
        print(f"sanitize: {asked.sanitize}: tests in {time.monotonic() - began:.0f} s, {len(reports(scratch))} reports", flush=True)
        kept = made.folder / "reports"
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(scratch, kept)
    if found:
        print(found.replace(folder, str(kept)), file=sys.stderr)
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main())
