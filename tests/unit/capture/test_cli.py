"""`narrows capture` as an operator types it."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from agent.capture.cli import command
from agent.capture.plan import plan
from agent.model.pod import CaptureSettings


def run(*argv: str) -> tuple[int, str]:
    done = CliRunner().invoke(command, argv)
    return done.exit_code, done.output


def test_plan_prints_the_families_of_the_pods_addresses() -> None:
    code, text = run("plan", "--pod-ip", "10.0.0.1", "--exclude-outbound-port", "3306", "--exclude-outbound-port", "25")
    assert code == 0
    assert text == "# IPv4\n" + plan(CaptureSettings(exclude_outbound_ports=(25, 3306)), (4,), "default").text(4)
    assert "# IPv6" in run("plan", "--pod-ip", "10.0.0.1", "--pod-ip", "fd00::1")[1]


def test_a_star_includes_everything() -> None:
    assert run("plan", "--include-outbound-range", "*") == run("plan")


@pytest.mark.parametrize(("argv", "said"), [
    (("plan", "--pod-ip", "10.0.0"), "'10.0.0' does not appear to be an IPv4 or IPv6 address; expected the pod's address"),
    (("plan", "--exclude-outbound-range", "10.0.0.1/8"), "expected a network like 10.0.0.0/8"),
    (("plan", "--exclude-outbound-port", "0"), "0 is not in the range 1<=x<=65535"),
    (("verify", "--netns", "/run/netns/gone"), "cannot open namespace /run/netns/gone"),
    (("clean", "--netns", "/etc/hostname"), "/etc/hostname is not a network namespace"),
    (("clean",), "name a namespace with --netns, or an instance by --instance or its directory with --run-dir"),
])
def test_bad_input_is_named_and_ends_with_an_error(argv: tuple[str, ...], said: str) -> None:
    code, text = run(*argv)
    assert code != 0 and said in " ".join(text.split())


def test_clean_passes_over_a_broken_pod_file(tmp_path: Path) -> None:
    (tmp_path / "pods").mkdir()
    (tmp_path / "pods/default.a.json").write_text("{")
    (tmp_path / "pods/default.b.json").write_text(json.dumps({"narrows": {"netns": "/run/netns/gone"}}))
    code, text = run("clean", "--run-dir", str(tmp_path))
    assert code == 1
    assert "default.a.json: not a pod file" in text and "/run/netns/gone: cannot open namespace" in text
