"""No function on the path of a byte may call the Python C-API: read from the machine code that was built.

A `cdef` function without `noexcept`, a stray object or a checked division would compile to a call that takes the GIL.
Cython names every cdef function `__pyx_f_<module path>_<name>`; those whose own name starts with `py_` are doors to
Python and exempt, as are `door` modules, which only tests load.
"""
from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
ROOMS = ("core", "wire", "route", "tunnel", "proxy")
FUNCTION = re.compile(r"^[0-9a-f]+ <([^>]+)>:$")
CALL = re.compile(r"\b(?:call|jmp)\s+[0-9a-f]+ <(_?Py\w+|__Pyx_\w+)(?:@plt)?[^>]*>")


def built_modules() -> list[Path]:
    return sorted(so for room in ROOMS for so in (ROOT / "build" / "ext" / room).glob("*.so"))


def is_datapath(symbol: str) -> bool:
    return symbol.startswith("__pyx_f_") and not re.search(r"_py_[\w.]+$|_\d+(\w+_)?door_", symbol)


def python_calls(listing: str) -> dict[str, set[str]]:
    """Data-path function -> C-API functions that it calls, from an objdump listing."""
    found: dict[str, set[str]] = {}
    function = ""
    for line in listing.splitlines():
        if match := FUNCTION.match(line):
            function = match[1]
        elif function and is_datapath(function) and (match := CALL.search(line)):
            found.setdefault(function, set()).add(match[1])
    return found


def disassemble(module: Path) -> str:
    command = ["objdump", "-d", "--no-show-raw-insn", str(module)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_the_extension_is_built() -> None:
    assert built_modules(), "no extension modules under build/: run make build"


def test_every_module_of_the_data_path_is_looked_at() -> None:
    looked_at = {(so.parent.name, so.name.partition(".")[0]) for so in built_modules()}
    sources = {(pyx.parent.name, pyx.stem) for room in ROOMS for pyx in (ROOT / "ext" / room).glob("*.pyx")}
    assert ("proxy", "relay") in sources and sources <= looked_at, f"not built: {sources - looked_at}"


@pytest.mark.parametrize("module", built_modules(), ids=lambda p: f"{p.parent.name}/{p.name.split('.')[0]}")
def test_no_datapath_function_calls_python(module: Path) -> None:
    assert python_calls(disassemble(module)) == {}


def test_the_check_sees_a_call_when_there_is_one() -> None:
    listing = "0000000000001000 <__pyx_f_3ext_5proxy_5relay_pump>:\n  1004:\tcall   1040 <PyErr_Occurred@plt>\n"
    assert python_calls(listing) == {"__pyx_f_3ext_5proxy_5relay_pump": {"PyErr_Occurred"}}


def test_the_check_sees_the_functions_that_matter() -> None:
    names = {m[1] for so in built_modules() for line in disassemble(so).splitlines() if (m := FUNCTION.match(line))}
    seen = sum(map(is_datapath, names))
    assert seen > 50, "symbols are stripped or the naming changed: the check would pass on anything"
