"""Builds the harnesses of this folder and lets libFuzzer look for inputs for which a claim does not hold.

    run.py [--seconds N] [HARNESS ...]      all harnesses, two at a time; FUZZ_SECONDS (60) each. Status 1: something was found
    run.py --repeat HARNESS INPUT ...       these inputs once more, with everything that the sanitizers say
    run.py --minimise HARNESS ...           what .cache/fuzz found, merged into tests/fuzz/corpus as few small inputs

Everything is under .cache/fuzz: build, corpus (kept between runs), findings, output of each harness.
"""
from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.append(str(ROOT))
from tests.fuzz.scripts import explain  # noqa: E402

CACHE = ROOT / ".cache" / "fuzz"
BUILD = CACHE / "build"
CORPUS = HERE / "corpus"
TOOLS = Path(sys.executable).parent  # meson, ninja, cython
CLANG = "14"
ROOMS = ("sys", "core", "wire", "route", "tunnel", "proxy")
# harness -> most bytes of an input: beyond, mutations are slow and say nothing new
HARNESSES = {"http1": 4096, "forward": 2048, "sniff": 1100, "tables": 8192, "hbone": 1024, "connections": 1024}
IN_NAMESPACE = {"connections"}  # a network of its own, made by tests/fuzz/world.py; its kernel keeps its own time
REPEATS = 10    # of a claim that failed there, before it is put down to the kernel's time
AT_ONCE = 2
# libFuzzer's library comes first: AddressSanitizer has empty ones of the functions by which modules report what they cover
# The repository comes last and late, for what Python prepares: its `ext` is another.
CHILD = ("import sys, importlib; sys.path[:0] = sys.argv[1:3]; harness = importlib.import_module(sys.argv[4]); "
         "sys.path.append(sys.argv[3]); harness.run(sys.argv[5:])")


def environment(**extra: str) -> dict[str, str]:
    runtime = subprocess.run([f"clang-{CLANG}", "-print-file-name=libclang_rt.asan-x86_64.so"], capture_output=True, text=True, check=True)
    return {
        "PATH": os.environ.get("PATH", "/usr/bin:/bin"),
        "LD_PRELOAD": f"{BUILD}/tests/fuzz/libfuzzer.so {runtime.stdout.strip()}",
        # leaks: the interpreter's own; what a harness must give back, it counts. The order of libraries is as it should be (above)
        "ASAN_OPTIONS": "detect_leaks=0:verify_asan_link_order=0:allow_addr2line=1:detect_stack_use_after_return=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        **extra,
    }


def build() -> None:
    path = {**os.environ, "PATH": f"{TOOLS}:{os.environ.get('PATH', '')}", "CC": f"clang-{CLANG}", "CXX": f"clang++-{CLANG}"}
    if not (BUILD / "build.ninja").exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        call(["meson", "setup", "--buildtype=debugoptimized", "-Dfuzz=true", str(BUILD), str(ROOT)], path)
    ninja = ["ninja", "-C", str(BUILD)]
    call([*ninja, "build.ninja"], path)
    every = subprocess.run([*ninja, "-t", "targets", "all"], env=path, capture_output=True, text=True, check=True).stdout
    wanted = re.findall(rf"^((?:ext/(?:{'|'.join(ROOMS)})|tests/fuzz)/[^/\s]+\.so):", every, re.M)
    call([*ninja, *wanted], path)


def call(argv: list[str], env: dict[str, str]) -> None:
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"fuzz: {' '.join(argv[:4])} … ended with {done.returncode}\n{(done.stdout + done.stderr)[-4000:]}\n"
                 f"is clang-{CLANG} installed (make setup)?")


def command(harness: str, *words: str) -> list[str]:
    """By a script, since libFuzzer starts itself again when it merges. -R: addresses are the same each time, and the sanitizer's shadow
    finds its place."""
    script = BUILD / f"run-{harness}"
    child = [sys.executable, "-I", "-S", "-c", CHILD, str(BUILD / "tests" / "fuzz"), str(BUILD), str(ROOT), harness, str(script)]
    apart = ("unshare --net " if os.geteuid() == 0 else "unshare --map-root-user --net ") if harness in IN_NAMESPACE else ""
    script.write_text(f'#!/bin/sh\nexec {apart}setarch -R {shlex.join(child)} "$@"\n')
    script.chmod(0o755)
    return [str(script), f"-max_len={HARNESSES[harness]}", "-timeout=20", "-rss_limit_mb=3000", *words]


def fuzz(harness: str, seconds: int) -> str:
    """What was found, in words for the operator; empty: nothing."""
    corpus, findings, log = CACHE / "corpus" / harness, CACHE / "findings", CACHE / f"{harness}.log"
    for folder in (corpus, findings, CORPUS / harness):
        folder.mkdir(parents=True, exist_ok=True)
    words = [f"-max_total_time={seconds}", f"-artifact_prefix={findings}/{harness}-", "-print_final_stats=1", "-use_value_profile=0"]
    if (HERE / f"{harness}.dict").exists():
        words.append(f"-dict={HERE / f'{harness}.dict'}")
    else:
        words.append(f"-dict={HERE / 'http.dict'}")
    before = set(findings.glob(f"{harness}-*"))     # another harness may run beside this one
    tape = CACHE / f"{harness}.tape"
    with log.open("w") as out:
        done = subprocess.run(command(harness, *words, str(corpus), str(CORPUS / harness)), env=environment(NARROWS_FUZZ_TAPE=str(tape)),
                              stdout=out, stderr=subprocess.STDOUT, check=False, timeout=seconds * 2 + 300)
    text = log.read_text(errors="replace")
    runs = re.findall(r"stat::number_of_executed_units: (\d+)", text)
    covered = re.findall(r"cov: (\d+)", text)
    places = covered[-1] if covered else "?"
    print(f"fuzz: {harness:<11} {seconds:>4} s  {int(runs[-1]) if runs else 0:>10,} inputs  {places:>5} places covered", flush=True)
    found = sorted(set(findings.glob(f"{harness}-*")) - before)
    if done.returncode == 0 and runs and not found:
        return ""
    said = [line for line in text.splitlines() if re.search(r"DOES NOT HOLD|ERROR: |runtime error|SUMMARY", line)]
    paths = "\n".join(f"  input:  {path}\n  repeat: {sys.executable} tests/fuzz/run.py --repeat {harness} {path}" for path in found)
    words_of = f"fuzz: {harness} ended with {done.returncode}: {'; '.join(said[:4]) or text[-1500:]}\n{paths}\n  output: {log}"
    if harness not in IN_NAMESPACE or not found:
        return words_of
    for path in found:
        words_of += f"\n  {path.read_bytes().hex()}\n  as words:\n    " + "\n    ".join(explain(path.read_bytes()))
    before_it = text[:text.find("DOES NOT HOLD")].splitlines()[-12:]
    words_of += "\n  said before it:\n    " + "\n    ".join(line[:300] for line in before_it)
    if not said or not said[0].startswith("DOES NOT HOLD"):
        return words_of
    scripts = unroll(tape, findings / f"{found[0].name}-tape")
    alone, whole = (sum(repeated(harness, files) for _ in range(REPEATS)) for files in (found[:1], scripts))
    words_of += (f"\n  repeated: {alone} of {REPEATS} times alone, {whole} of {REPEATS} behind the {len(scripts) - 1} scripts that its "
                 f"worker played before it ({findings / found[0].name}-tape)")
    if alone or whole:
        return words_of
    print(f"{words_of}\nfuzz: not counted as found: the kernel's own time (retransmission, a machine that stood still) may be why",
          file=sys.stderr, flush=True)
    return ""


def unroll(tape: Path, into: Path) -> list[Path]:
    """The scripts of a tape (connections.pyx), a file each, in their order; the last is the one that was being played."""
    into.mkdir(parents=True, exist_ok=True)
    data, at, files = tape.read_bytes(), 0, []
    while at + 4 <= len(data):
        size = int.from_bytes(data[at:at + 4], "little")
        files.append(into / f"{len(files):03}")
        files[-1].write_bytes(data[at + 4:at + 4 + size])
        at += 4 + size
    return files


def repeated(harness: str, files: list[Path]) -> bool:
    """Whether anything ends badly, a time-out included."""
    try:
        done = subprocess.run(command(harness, *map(str, files)), env=environment(), capture_output=True, check=False, timeout=300)
    except subprocess.TimeoutExpired:
        return True
    return done.returncode != 0


def minimise(harness: str) -> None:
    kept = CORPUS / harness
    kept.mkdir(parents=True, exist_ok=True)
    fresh = CACHE / "merged" / harness
    fresh.mkdir(parents=True, exist_ok=True)
    for old in fresh.iterdir():
        old.unlink()
    merge = command(harness, "-set_cover_merge=1", "-use_counters=0", str(fresh), str(kept), str(CACHE / "corpus" / harness))
    subprocess.run(merge, env=environment(), check=True)
    for old in kept.iterdir():
        old.unlink()
    for path in fresh.iterdir():
        (kept / path.name).write_bytes(path.read_bytes())
    if harness in IN_NAMESPACE:
        call([sys.executable, "-m", "tests.fuzz.scripts", "found", str(kept)], {**os.environ, "PYTHONPATH": str(ROOT)})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=int(os.environ.get("FUZZ_SECONDS", "60")))
    parser.add_argument("--repeat", action="store_true")
    parser.add_argument("--minimise", action="store_true")
    parser.add_argument("words", nargs="*", metavar="HARNESS")
    asked = parser.parse_args()
    harnesses = asked.words[:1] if asked.repeat else asked.words or list(HARNESSES)
    for name in harnesses:
        if name not in HARNESSES:
            parser.error(f"no harness {name}: there are {', '.join(HARNESSES)}")
    build()
    if asked.repeat:
        return subprocess.run(command(harnesses[0], *asked.words[1:]), env=environment(), check=False).returncode
    if asked.minimise:
        for name in harnesses:
            minimise(name)
        return 0
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = [words for words in pool.map(lambda name: fuzz(name, asked.seconds), harnesses) if words]
    print("\n".join(found) or "fuzz: nothing found", file=sys.stderr if found else sys.stdout)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
