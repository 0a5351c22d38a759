"""BCC compiles and loads here, with every kind of headers there is; and what is missing is said."""
from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from agent.capture import bpf

pytestmark = pytest.mark.netns  # root


@pytest.fixture(autouse=True)
def no_headers_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BCC_KERNEL_SOURCE", raising=False)
    monkeypatch.delenv("BCC_LINUX_VERSION_CODE", raising=False)


def test_the_probe_compiles_and_the_kernel_has_it() -> None:
    found = bpf.check()
    assert found.problem == ""
    assert found.loaded["prog_type"] == "18"  # BPF_PROG_TYPE_CGROUP_SOCK_ADDR
    assert re.fullmatch("[0-9a-f]{16}", found.loaded["prog_tag"])


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_what_bcc_itself_prints_is_not_taken_for_the_answer(monkeypatch: pytest.MonkeyPatch, unbuffered: str) -> None:
    """With buffers, C's comes out last: it warns that it was told a version."""
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    monkeypatch.setenv("BCC_KERNEL_SOURCE", str(bpf.STUB_HEADERS))
    monkeypatch.setenv("BCC_LINUX_VERSION_CODE", bpf.STUB_VERSION)
    assert bpf.check().problem == ""


def test_the_stubs_alone_suffice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BCC_KERNEL_SOURCE", str(bpf.STUB_HEADERS))
    monkeypatch.setenv("BCC_LINUX_VERSION_CODE", bpf.STUB_VERSION)
    found = bpf.check()
    assert (found.problem, found.headers) == ("", f"BCC_KERNEL_SOURCE={bpf.STUB_HEADERS}")


def test_the_stubs_say_the_version_that_bcc_is_told() -> None:
    major, minor, patch = map(int, re.search(r"LINUX_VERSION_CODE KERNEL_VERSION\((\d+), (\d+), (\d+)\)", (
        bpf.STUB_HEADERS / "include/linux/version.h").read_text()).groups())  # type: ignore[union-attr]
    assert str((major << 16) + (minor << 8) + patch) == bpf.STUB_VERSION


@pytest.mark.parametrize(("source", "said"), [
    ("int narrows_probe(struct bpf_sock_addr *ctx) { return undeclared; }", "does not compile with .*undeclared"),
    ("int narrows_probe(struct bpf_sock_addr *ctx) { return 7; }", "the kernel refuses the program"),
    ("int narrows_probe(struct bpf_sock_addr *ctx) { for (;;) ctx = 0; }", "the kernel refuses the program|not compile"),
])
def test_a_program_that_is_wrong_is_refused_by_the_compiler_or_the_kernel(tmp_path: Path, source: str, said: str) -> None:
    path = tmp_path / "wrong.c"
    path.write_text(source)
    found = bpf.check(path)
    assert re.search(said, found.problem) and found.loaded == {}


def test_headers_that_are_none_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BCC_KERNEL_SOURCE", str(tmp_path))
    assert f"does not compile with BCC_KERNEL_SOURCE={tmp_path}" in bpf.check().problem


def test_a_python_without_bcc_is_told_which_package(tmp_path: Path) -> None:
    (tmp_path / "bcc.py").write_text("raise ImportError('none here')")
    done = subprocess.run([sys.executable, "-c", "from agent.capture import bpf; print(bpf.check().problem)"], check=True,
                          env={**os.environ, "PYTHONPATH": f"{tmp_path}:{Path(bpf.__file__).parents[2]}"},
                          capture_output=True, text=True, timeout=60)
    assert "BCC does not load: none here; install Debian's python3-bpfcc" in done.stdout


def test_a_compiler_that_takes_too_long_is_ended() -> None:
    assert "took longer than 0.01 s" in bpf.check(deadline=0.01).problem


def test_headers_are_found_in_the_documented_order(tmp_path: Path) -> None:
    assert bpf.find_headers(tmp_path, tmp_path / "one")[0].startswith("stubs in")
    for version in ("6.1.0-9", "6.1.0-30"):
        for name, content in (("common", ("include/linux/kconfig.h", "arch/x86/include/asm/page.h")),
                              ("amd64", ("include/generated/autoconf.h", "arch/x86/include/generated/asm/x.h"))):
            for file in content:
                path = tmp_path / f"usr/src/linux-headers-{version}-{name}" / file
                path.parent.mkdir(parents=True)
                path.write_text(f"{version}-{name}")
    headers, environment = bpf.find_headers(tmp_path, tmp_path / "two")
    assert "linux-headers-6.1.0-30-common merged with linux-headers-6.1.0-30-amd64" in headers
    merged = Path(environment["BCC_KERNEL_SOURCE"])
    assert (merged / "include/linux/kconfig.h").read_text() == "6.1.0-30-common"
    assert (merged / "include/generated/autoconf.h").read_text() == "6.1.0-30-amd64"
    assert (merged / "arch/x86/include/generated/asm/x.h").read_text() == "6.1.0-30-amd64"
    build = tmp_path / "lib/modules" / os.uname().release / "build/include/linux"
    build.mkdir(parents=True)
    (build / "kconfig.h").touch()
    assert bpf.find_headers(tmp_path, tmp_path / "three") == (f"build tree {build.parents[1]}", {})
