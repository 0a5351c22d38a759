"""docs/: commands are ones that the product takes, files are there, and what is quoted is said somewhere in the source."""
from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import click
import pytest

from agent.cli.main import group

ROOT = Path(__file__).parents[3]
PAGES = sorted((ROOT / "docs").glob("*.md"))
SHELL = re.compile(r"^```sh\n(.*?)^```", re.M | re.S)


def lines(page: Path) -> list[str]:
    """Of the page's shell blocks; a line that ends with a backslash goes on."""
    return [line for block in SHELL.findall(page.read_text()) for line in block.replace("\\\n", " ").splitlines() if line.strip()]


COMMANDS = sorted({(page.name, line[match.start("narrows"):]) for page in PAGES for line in lines(page)
                   if (match := re.search(r"(?:^|-- |/opt/narrows/bin/)(?P<narrows>narrows [a-z].*)", line))})


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_a_command_is_one_that_the_product_takes(page: str, line: str) -> None:
    words = shlex.split(line.split("&&", maxsplit=1)[0])[1:]
    assert isinstance(group, click.Group)
    command: click.Command = group
    name = "narrows"
    while isinstance(command, click.Group):
        name = words.pop(0)
        found = command.get_command(click.Context(command), name)
        assert found is not None, f"{page}: {name}"
        command = found
    try:
        command.make_context(name, words)
    except click.BadParameter as error:
        assert "does not exist" in str(error), "what is named there is on the reader's machine, not here"


def test_pages_have_commands() -> None:
    assert len(COMMANDS) > 8


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_is_there(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / target).exists(), target
    for path in re.findall(r"(?<![\w/.-])((?:deploy|tests|controlplane|docs|ext|examples)/[\w./-]+)", text):
        assert list(ROOT.glob(f"{path.rstrip('./')}*")), path
    if page.name != "README.md":
        assert f"({page.name})" in (ROOT / "docs/README.md").read_text(), "the index has every page"


def said() -> list[str]:
    """Every text of the product, with … for what is put into it; an implicit concatenation is one text."""
    found = []
    for folder in ("agent", "controlplane"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    found.append("".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    keeper = "".join(path.read_text() for path in sorted((ROOT / "ext/keeper").glob("*.pyx")))
    return [*found, *(re.sub(r"\{[^}]*\}", "…", text) for text in re.findall(r'"((?:[^"\\\n]|\\.)*)"', keeper))]


def test_every_line_that_is_quoted_is_one_that_the_product_says() -> None:
    texts = said()
    quoted = [line[2:] for line in (ROOT / "docs/troubleshooting.md").read_text().splitlines() if line.startswith("> ")]
    assert len(quoted) > 12
    for line in quoted:
        pattern = re.compile(".*".join(re.escape(part) for part in line.split("…")))
        assert any(pattern.search(text) for text in texts), line
    assert not any(re.search("the mesh is on holiday", text) for text in texts)
