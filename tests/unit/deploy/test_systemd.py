"""deploy/systemd: units that systemd takes, with command lines that the product takes and the capabilities that the containers have."""
from __future__ import annotations

import configparser
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from agent.cli.main import group

ROOT = Path(__file__).parents[3]
UNITS = sorted((ROOT / "deploy/systemd").glob("*.service"))
PREFIX = "/opt/narrows/bin/narrows"  # where docs/install-vm.md puts it
NEEDED = {"NARROWS_XDS": "plane.example:15012", "NARROWS_SERVER_NAME": "plane.example"}


def service(unit: Path) -> dict[str, str]:
    parser = configparser.ConfigParser(interpolation=None, delimiters=("=",), strict=True)  # no directive twice
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(unit)
    return dict(parser["Service"])


def parsed(unit: Path) -> dict[str, Any]:
    text = service(unit)["ExecStart"].replace("%H", "node")
    for name, value in NEEDED.items():
        text = text.replace(f"${{{name}}}", value)
    program, name, *words = [word for word in shlex.split(text) if not re.fullmatch(r"\$\w+_OPTIONS", word)]
    assert program == PREFIX and "$" not in " ".join(words)
    assert isinstance(group, click.Group)
    command = group.get_command(click.Context(group), name)
    assert command is not None
    return dict(command.make_context(name, words).params)


def test_there_is_a_unit_for_each_process() -> None:
    assert [unit.name for unit in UNITS] == [f"narrows-{one}.service" for one in ("agent", "control-plane", "keeper")]


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_systemd_takes_every_unit(unit: Path, tmp_path: Path) -> None:
    for one in UNITS:  # they name each other
        (tmp_path / one.name).write_text(one.read_text().replace(PREFIX, str(Path(sys.executable).with_name("narrows"))))
    argv = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=one", str(tmp_path / unit.name)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    ours = [line for line in (done.stdout + done.stderr).splitlines() if "narrows" in line]
    assert done.returncode == 0 and not ours, done.stdout + done.stderr


def test_systemd_refuses_what_is_no_unit(tmp_path: Path) -> None:
    (tmp_path / "broken.service").write_text("[Service]\nExecStart=/does/not/exist\n")
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", str(tmp_path / "broken.service")], capture_output=True, text=True,
                          timeout=60, check=False)
    assert done.returncode != 0


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_every_command_line_is_one_that_the_product_takes(unit: Path) -> None:
    found, said = parsed(unit), service(unit)
    writable = [f"/run/{said['RuntimeDirectory']}", f"/var/lib/{said.get('StateDirectory', '-')}"]
    for value in (found.get("run_dir"), found.get("ca_dir")):
        assert value is None or str(value) in writable
    assert said["NoNewPrivileges"] == "yes" and said["ProtectSystem"] == "strict"


def test_keeper_and_agent_share_a_directory_that_outlives_both() -> None:
    agent, keeper = (next(unit for unit in UNITS if unit.stem == f"narrows-{name}") for name in ("agent", "keeper"))
    assert parsed(agent)["run_dir"] == parsed(keeper)["run_dir"]
    for unit in (agent, keeper):
        said = service(unit)
        assert (said["RuntimeDirectory"], said["RuntimeDirectoryPreserve"], said["RuntimeDirectoryMode"]) == ("narrows/node", "yes", "0700")
    assert int(service(keeper)["TimeoutStopSec"]) > parsed(keeper)["drain"]


@pytest.mark.parametrize("name", ["keeper", "agent"])
def test_capabilities_are_those_of_the_containers(name: str) -> None:
    body = yaml.safe_load((ROOT / "deploy/daemonset/daemonset.yaml").read_text())
    container = next(one for one in body["spec"]["template"]["spec"]["containers"] if one["name"] == name)
    unit = next(unit for unit in UNITS if unit.stem == f"narrows-{name}")
    assert service(unit)["CapabilityBoundingSet"].split() == [f"CAP_{one}" for one in container["securityContext"]["capabilities"]["add"]]
