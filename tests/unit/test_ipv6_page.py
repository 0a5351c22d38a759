"""docs/ipv6.md names tests for every item: they are there, and those that are said to run for both families do."""
from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "ipv6.md").read_text()
ROWS = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| item")]
TEST = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`( \[4, 6\])?")


def functions(path: Path) -> dict[str, str]:
    """Each function's source with its decorators."""
    text = path.read_text()
    return {node.name: "\n".join(ast.get_source_segment(text, part) or "" for part in (*node.decorator_list, node.args))
            for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


@pytest.mark.parametrize("row", ROWS, ids=[row.split(" | ")[0].strip("| ") for row in ROWS])
def test_an_item_has_its_tests(row: str) -> None:
    assert TEST.search(row), "no test"


def test_every_test_that_is_named_is_there() -> None:
    for path, name, both in TEST.findall(PAGE):
        assert (ROOT / path).exists(), path
        if name:
            found = functions(ROOT / path)
            assert name in found, f"{path}::{name}"
            assert not both or "family" in found[name].lower() or "families" in found[name].lower(), f"{name} does not run for each family"


def test_every_file_and_folder_that_is_named_is_there() -> None:
    for place in re.findall(r"`((?:agent|ext|controlplane)/?[\w/.]*)`", PAGE):
        assert (ROOT / place).exists(), place
