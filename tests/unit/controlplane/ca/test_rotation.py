"""A new root, step by step: at no moment does a certificate of one node fail before the roots of another."""

from __future__ import annotations

import json
import os
import re
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from controlplane.ca import sign
from controlplane.ca.authority import Authority
from controlplane.ca.cli import command
from controlplane.ca.identity import parse
from controlplane.ca.material import fingerprint, pem
from controlplane.ca.store import Folder
from tests.support.authority import IDENTITY, openssl_accepts, request

NOW = datetime.now(UTC)


def narrows_ca(*arguments: str | Path) -> Result:
    return CliRunner().invoke(command, list(map(str, arguments)))


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    made = Folder(tmp_path / "ca")
    made.open("cluster.local", NOW)
    return made


def answer(authority: Authority) -> list[str]:
    leaf = sign.leaf(authority.material, sign.read_request(request(), parse(IDENTITY)), parse(IDENTITY), timedelta(days=1), NOW)
    return [pem(leaf), *authority.material.above_pem]


def test_through_all_steps_every_node_trusts_every_other(folder: Folder, tmp_path: Path) -> None:
    authority = Authority(folder)
    answers = [answer(authority)]
    first = fingerprint(authority.material.certificate)
    for step, roots in (("prepare", 2), ("switch", 2), ("finish", 1)):
        done = narrows_ca(step, *(["--now"] if step != "prepare" else []), folder.path)
        assert done.exit_code == 0, done.output
        assert authority.refresh() and len(authority.material.roots) == roots
        answers.append(answer(authority))
        # a node that renewed now, and one that did before the step: each takes the other's leaf by the roots that it has
        now, before = answers[-1], answers[-2]
        for leaf, trusting in ((now, before), (before, now)):
            # `finish` comes when the certificates before `switch` have ended; those of `switch` stay good
            assert openssl_accepts(tmp_path, [leaf[0], *leaf[1:-1], trusting[-1]]), step
    assert fingerprint(authority.material.certificate) != first
    assert not openssl_accepts(tmp_path, [answers[0][0], answers[-1][-1]])  # what the first root signed is worth nothing now
    assert sorted(os.listdir(folder.path)) == ["current", "lock", "v4"]
    assert sorted(os.listdir(folder.path / "v4")) == ["ca-cert.pem", "ca-key.pem", "root-cert.pem"]


def test_steps_out_of_order_and_too_soon_are_refused_and_change_nothing(folder: Folder) -> None:
    def refused(*arguments: str | Path) -> str:
        before = os.readlink(folder.path / "current")
        done = narrows_ca(*arguments, folder.path)
        assert done.exit_code == 69 and os.readlink(folder.path / "current") == before
        return done.output

    assert "the next step is `prepare`, not `switch`" in refused("switch", "--now")
    assert "the next step is `prepare`, not `finish`" in refused("finish", "--now")
    assert narrows_ca("prepare", folder.path).exit_code == 0
    assert "the next step is `switch`, not `prepare`" in refused("prepare")
    assert re.search(r"the step before was 0 min ago, and 12.0 h are to pass: .* come again in 12.0 h, or say --now", refused("switch"))
    os.utime(folder.path / "current", (0, (NOW - timedelta(hours=13)).timestamp()), follow_symlinks=False)
    assert narrows_ca("switch", folder.path).exit_code == 0
    assert "certificates of the old root may still be in use" in refused("finish")
    assert narrows_ca("finish", "--wait", "0", folder.path).exit_code == 0


def test_what_is_in_force_is_shown(folder: Folder) -> None:
    shown = json.loads(narrows_ca("show", "-o", "json", folder.path).output)
    assert shown["nextStep"] == "prepare" and [root["sha256"] for root in shown["roots"]] == [shown["signing"]]
    openssl_says = subprocess.run(
        ["openssl", "x509", "-noout", "-fingerprint", "-sha256", "-in", folder.path / "current/ca-cert.pem"],
        capture_output=True, text=True, check=True).stdout  # fmt: skip
    assert openssl_says.strip().rpartition("=")[2].replace(":", "").lower() == shown["signing"]
    narrows_ca("prepare", folder.path)
    text = narrows_ca("show", folder.path).output
    assert text.count("trusted:") == 2 and "next:     switch" in text
    missing = narrows_ca("show", folder.path / "nowhere")
    assert missing.exit_code == 69 and "No such file" in missing.output
