"""The command line as a shell sees it: exit codes, one line on stderr, and nothing imported that is not called."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from agent.cli import main as cli
from agent.cli.main import CommandError, run

Install = Callable[[Callable[[], object]], None]


def narrows(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", "from agent.cli.main import main; main()", *arguments], text=True,
                          capture_output=True, timeout=100, check=False, env=os.environ)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Makes `narrows probe` run the given function."""
    def install(work: Callable[[], object]) -> None:
        monkeypatch.setattr(cli.LazyGroup, "get_command", lambda *_: click.command("probe")(work))
    return install


def raising(error: BaseException) -> Callable[[], object]:
    def work() -> object:
        raise error
    return work


@pytest.mark.parametrize(("error", "code", "said"), [
    (CommandError("no lab", 69), 69, "narrows: no lab\n"),
    (CommandError("bad file", 65), 65, "narrows: bad file\n"),
    (click.ClickException("something"), 69, "narrows: something\n"),
    (click.UsageError("wrong"), 64, "wrong"),
    (PermissionError(13, "Permission denied", "/x"), 77, "Run it as root"),
    (FileNotFoundError(2, "No such file", "/x"), 69, "No such file"),
    (ModuleNotFoundError("No module named 'iptc'", name="iptc"), 69, "the Python package 'iptc' is missing"),
    (KeyboardInterrupt(), 130, ""),
    (ZeroDivisionError("x"), 70, "a fault of Narrows"),
])
def test_exit_codes(command: Install, capsys: pytest.CaptureFixture[str], error: BaseException, code: int,
                    said: str) -> None:
    command(raising(error))
    assert run(["probe"]) == code
    out, err = capsys.readouterr()
    assert said in err and out == "" and "Traceback" not in err


def test_a_command_ends_with_the_code_it_returns(command: Install) -> None:
    for code in (0, 1, 69):
        command(lambda code=code: code)  # type: ignore[misc]
        assert run(["probe"]) == code
    command(lambda: None)
    assert run(["probe"]) == 0


def test_help_and_version_import_no_command_and_no_library_of_one() -> None:
    script = ("import sys; from agent.cli.main import run; run(['--help'])\n"
              "heavy = {'grpc', 'aiohttp', 'iptc', 'pyroute2', 'agent.lab', 'agent.app', 'controlplane', 'ext'}\n"
              "print('loaded:', sorted(heavy & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", script], text=True, capture_output=True, timeout=100, check=True)
    assert done.stdout.endswith("loaded: []\n")
    for name in cli.ABOUT:
        assert f"  {name} " in done.stdout
    assert narrows("--version").stdout.startswith("narrows ")


def test_wrong_usage_is_64_and_says_what_is_known() -> None:
    done = narrows("nonsense")
    assert done.returncode == 64 and "No such command 'nonsense'" in done.stderr
    assert narrows().returncode == 64
    assert narrows("config", "services", "--output", "xml").returncode == 64


def test_without_an_instance_status_says_how_to_start_one() -> None:
    done = narrows("status", "--name", "there-is-no-such-lab")
    assert done.returncode == 69 and "narrows lab up" in done.stderr and done.stdout == ""


def test_a_closed_pipe_ends_it_quietly() -> None:
    code = "from agent.cli.main import main; main()"
    done = subprocess.run(["bash", "-c", f"{sys.executable} -c '{code}' --help | true"], text=True, capture_output=True,
                          timeout=100, check=False)
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["doctor"], ["config", "--help"]])
def test_a_full_disk_is_74_in_one_line(arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", "from agent.cli.main import main; main()", *arguments], stdout=full,
                              stderr=subprocess.PIPE, text=True, timeout=100, check=False)
    assert (done.returncode, done.stderr) == (74, "narrows: the output cannot be written: No space left on device\n")


def walk(command: click.Command, words: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every command and group, as the words that call it."""
    found = [words]
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            assert below is not None
            found += walk(below, (*words, name))
    return found


def test_every_command_has_help_that_says_something(capsys: pytest.CaptureFixture[str]) -> None:
    calls = walk(cli.group)
    assert ("lab", "up") in calls and ("config", "routes") in calls and len(calls) > 25
    for words in calls:
        assert run([*words, "--help"]) == 0
        usage, about, *_ = capsys.readouterr().out.split("\n\n")
        assert usage.startswith(f"Usage: narrows {' '.join(words)}".rstrip()), words
        assert len(about.split()) >= 3, f"narrows {' '.join(words)} --help says nothing"


def test_an_agent_without_its_directory_says_so(tmp_path: Path) -> None:
    done = narrows("agent", "--run-dir", str(tmp_path / "none"), "--node", "n1", "--xds", "unix:/none")
    assert done.returncode == 78 and "is no directory" in done.stderr


def test_doctor_tells_programs_what_it_tells_people_and_always_what_to_do() -> None:
    done = narrows("doctor", "-o", "json")
    checks = json.loads(done.stdout)["checks"]
    assert {"kernel", "cgroup v2", "BPF tool chain", "iptables tables, IPv4", "conntrack", "somaxconn", "descriptors",
            "tool ip", "package grpcio", "extension"} <= {check["name"] for check in checks}
    for check in checks:
        assert check["status"] in ("ok", "warn", "fail")
        assert check["status"] == "ok" or (check["means"] and check["todo"])
    assert done.returncode == (69 if any(check["status"] == "fail" for check in checks) else 0)
