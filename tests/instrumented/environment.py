"""A second environment: the extension compiled with instruments, and an interpreter that brings their runtime.

    .cache/instrumented/NAME/build      meson's, apart from build/
    .cache/instrumented/NAME/venv       like .venv (whose packages it sees), with that extension and an interpreter made from a .c file here

Whoever is started by this interpreter's `sys.executable` (keeper, workers, agents, labs) is instrumented too, with nothing in the
environment to be passed on.
"""
from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CACHE = ROOT / ".cache" / "instrumented"
TOOLS = Path(sys.executable).parent  # meson, ninja, cython
WHEEL = "import json, sys, mesonpy; mesonpy.build_editable(sys.argv[1], json.loads(sys.argv[2]))"


@dataclass
class Environment:
    """`options` are meson's. `flags`: of the compiler, for the interpreter's `source` alone. `prefix`:
    before the command of pytest. `cython`: a script that is given the real one's command line."""

    name: str
    options: tuple[str, ...]
    source: str
    flags: tuple[str, ...]
    prefix: tuple[str, ...] = ()
    cython: str = ""

    @property
    def folder(self) -> Path:
        return CACHE / self.name

    @property
    def build(self) -> Path:
        return self.folder / "build"

    @property
    def python(self) -> Path:
        return self.folder / "venv" / "bin" / "python3"

    def pytest(self, patience: int, words: list[str], tests: list[str]) -> int:
        """The status of pytest in it; `patience`: times as long as usual for what tests wait for. `tests`: unless `words` name some."""
        words = words if any(word.startswith("tests/") for word in words) else [*words, *tests]
        env = {**os.environ, "NARROWS_INSTRUMENTED": self.name, "NARROWS_TEST_PATIENCE": str(patience),
               "PATH": f"{self.python.parent}:{os.environ.get('PATH', '')}"}
        argv = [*self.prefix, str(self.python), "-m", "pytest", "-p", "tests.instrumented.left_out", "-o", f"timeout={120 * patience}",
                *words]
        return subprocess.run(argv, cwd=ROOT, env=env, check=False).returncode

    def make(self, *defines: str) -> None:
        """Everything that is missing or old; `defines` (-D...) go to the interpreter. Ends the process when a step fails."""
        CACHE.mkdir(parents=True, exist_ok=True)
        self._alone = (CACHE / f"{self.name}.lock").open("w")  # until this process ends: two runs would build into one another
        fcntl.flock(self._alone, fcntl.LOCK_EX)
        stamp, key = self.folder / "made", self._key()
        if not stamp.exists() or stamp.read_text() != key:
            self._install()
            stamp.write_text(key)
        else:
            self._run([str(TOOLS / "ninja") if (TOOLS / "ninja").exists() else "ninja", "-C", str(self.build)])
        self._interpreter(defines)

    def _key(self) -> str:
        parts = [*self.options, WHEEL, self.cython, sys.executable, sys.version, (ROOT / "pyproject.toml").read_text()]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def _install(self) -> None:
        """pip runs by the plain interpreter, which is replaced afterwards: an instrumented one would take minutes."""
        venv = self.folder / "venv"
        self._run(["rm", "-rf", str(self.folder)])
        self._run([f"{sys.base_prefix}/bin/python3", "-m", "venv", "--system-site-packages", str(venv)])
        packages = next(venv.glob("lib/python3*/site-packages"))
        # as plain paths: the .pth files in them, of which one leads to the normal build, are not read
        (packages / "zz-packages.pth").write_text("".join(f"{path}\n" for path in sys.path if path.endswith("site-packages")))
        # not by pip's --config-settings: Debian 12's keeps only the last of several setup-args
        settings = {"build-dir": str(self.build), "setup-args": list(self.options)}
        self._run([str(self.python), "-c", WHEEL, str(self.folder), json.dumps(settings)])
        wheel = next(self.folder.glob("narrows-*.whl"))
        self._run([str(self.python), "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-deps", str(wheel)])

    def _interpreter(self, defines: tuple[str, ...]) -> None:
        facts = sysconfig.get_config_vars()
        library = f"{facts['LIBDIR']}/{facts['INSTSONAME']}" if "INSTSONAME" in facts else ""
        if not Path(library).exists():
            library = f"{facts['LIBDIR']}/{facts['MULTIARCH']}/libpython{facts['LDVERSION']}.so.1.0"
        made = self.python.with_name("interpreter")
        # libstdc++ beside the runtime: it looks for the function that throws when it starts
        self._run([*shlex.split(os.environ.get("CC", "gcc")), "-O1", "-g", *self.flags, *defines, f"-I{facts['INCLUDEPY']}",
                   "-o", str(made), str(HERE / self.source), "-rdynamic", library, "-Wl,--no-as-needed", "-lstdc++", "-lpthread", "-ldl"])
        for name in ("python3", "python", f"python{facts['VERSION']}"):
            self.python.with_name(name).unlink(missing_ok=True)
        made.rename(self.python)
        for name in ("python", f"python{facts['VERSION']}"):
            self.python.with_name(name).symlink_to("python3")

    def _run(self, argv: list[str]) -> None:
        env = {**os.environ, "PATH": f"{TOOLS}:{os.environ.get('PATH', '')}"}
        if self.cython:
            script = CACHE / f"{self.name}.cython"
            script.write_text(f'#!/bin/sh\nexec {sys.executable} {HERE / self.cython} {shutil.which("cython", path=env["PATH"])} "$@"\n')
            script.chmod(0o755)
            env["CYTHON"] = str(script)
        done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            sys.exit(f"{self.name}: {shlex.join(argv[:6])} … ended with {done.returncode}\n{(done.stdout + done.stderr)[-4000:]}\n"
                     "does `make build` work?")
