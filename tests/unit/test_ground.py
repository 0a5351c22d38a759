"""What a new user and a packager stand on: the front door, READMEs, licences, the set-up, and what an installation holds."""
from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

from tests.instrumented.left_out import LEFT_OUT

ROOT = Path(__file__).resolve().parent.parent.parent
ROOMS = ("agent", "bpf", "controlplane", "deploy", "deploy/daemonset", "docs", "examples", "ext", "protos", "tests", "tools")
INSTALLED = ("agent", "controlplane", "protos", "bpf", "ext")


@pytest.mark.parametrize("target", ["demo", "test", "test-unit", "test-netns", "test-bpf", "test-sanitize", "coverage", "fuzz",
                                    "bench", "lint", "build", "setup", "clean"])
def test_the_front_door_has_every_target_and_tells_of_it(target: str) -> None:
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    told = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout
    assert f"make {target} " in told


def test_ci_calls_the_front_door() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    text = script.read_text()
    assert "make test" in text and "export CI=true" in text


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_says_its_rules(room: str) -> None:
    text = (ROOT / room / "README.md").read_text()
    assert text.startswith(f"# {room}\n") and len(text.split()) > 50


def test_no_top_level_folder_is_without_a_readme() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    rooms = {name.partition("/")[0] for name in tracked if "/" in name and not name.startswith(".")}
    assert rooms <= set(ROOMS)


def test_the_licence_is_apache_and_bpf_is_free_for_the_kernel() -> None:
    assert "Apache License" in (ROOT / "LICENSE").read_text()[:200]
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["license"] == "Apache-2.0"
    sources = [path for path in (ROOT / "bpf").rglob("*") if path.suffix in (".c", ".h")]
    assert sources
    for path in sources:
        head = path.read_text().partition("\n")[0]
        assert "SPDX-License-Identifier: GPL-2.0" in head, path


def test_every_dependency_has_a_lowest_and_a_highest_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    asked = (project["build-system"]["requires"], project["project"]["dependencies"], project["project"]["optional-dependencies"]["dev"])
    for line in (line for lines in asked for line in lines):
        assert ">=" in line and "<" in line.partition(">=")[2], line


def test_an_installation_holds_every_room(tmp_path: Path) -> None:
    subprocess.run([str(Path(sys.executable).with_name("meson")) if Path(sys.executable).with_name("meson").exists() else "meson",
                    "install", "-C", str(ROOT / "build"), "--no-rebuild", "--quiet", "--destdir", str(tmp_path)],
                   check=True, capture_output=True, timeout=100)
    (site,) = {path.parents[1] for path in tmp_path.rglob("agent/__init__.py")}
    tracked = subprocess.run(["git", "ls-files", *INSTALLED], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    wanted = {name for name in tracked if name.endswith(".py") or name.startswith("bpf/")}
    missing = sorted(name for name in wanted if not (site / name).is_file())
    assert wanted and not missing
    modules = {name for name in tracked if name.endswith(".pyx")}
    assert modules and not [name for name in modules if not list(site.glob(f"{name.removesuffix('.pyx')}.*.so"))]
    # the rooms as installed, without the editable hook that would find the sources instead
    code = ("import sys; sys.path[:0] = sys.argv[1:]\n"
            "import agent.cli.main, agent.app, agent.dataplane.cli, agent.lab.cli, controlplane.cli, ext.proxy.worker\n"
            "print(agent.__file__, ext.proxy.worker.__file__)")
    paths = [str(site), *(path for path in sys.path if path.endswith("-packages"))]
    done = subprocess.run([sys.executable, "-S", "-c", code, *paths], cwd="/", capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert all(place.startswith(str(site)) for place in done.stdout.split())


@pytest.fixture
def setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("narrows_setup", ROOT / "tools" / "setup.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_step_that_fails_shows_why_and_says_what_to_do(setup: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    for argv, why in ((["sh", "-c", "echo the reason >&2; exit 3"], "ended with 3\nthe reason"), (["/no/such/tool"], "No such file")):
        with pytest.raises(SystemExit) as end:
            setup.run("build", argv, "ask the compiler")
        said = capsys.readouterr().err
        assert end.value.code == 69
        assert said.startswith("setup: build failed: ") and why in said and "what to do: ask the compiler" in said


def test_a_package_that_is_not_there_is_named(setup: ModuleType, tmp_path: Path) -> None:
    listed = tmp_path / "apt-packages.txt"
    listed.write_text("# comment\nbash   # there\nno-such-package-at-all\n")
    assert setup.missing_packages(listed) == ["no-such-package-at-all"]


@pytest.mark.parametrize("name", ["apt-packages.txt", "apt-kubernetes.txt"])
def test_every_debian_package_has_its_reason(name: str) -> None:
    lines = [line for line in (ROOT / "tools" / name).read_text().splitlines() if line and not line.startswith("#")]
    assert lines
    bare = [line for line in lines if not line.partition("#")[2].strip()]
    assert set(bare) <= {"redis-tools", "postgresql-client"}, "the line above gives theirs"


@pytest.mark.parametrize("run", sorted(LEFT_OUT))
def test_what_an_instrumented_run_leaves_out_is_there(run: str) -> None:
    """They run on demand: a test that moved would be found much too late."""
    gone = [f"{file}::{test}" for file, test in LEFT_OUT[run]
            if not (ROOT / file).is_file() or f"def {test}" not in (ROOT / file).read_text()]
    assert not gone
