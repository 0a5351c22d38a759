"""Tables for people, JSON for programs: the same data."""
from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import click


def as_json(value: Any) -> None:
    """`-o json` is an interface of Narrows: keys are added, not renamed."""
    click.echo(json.dumps(value, indent=2, sort_keys=True))


def as_table(heads: Sequence[str], rows: Iterable[Sequence[Any]], empty: str) -> None:
    """Columns as wide as their widest cell, two blanks apart; `empty` when there are no rows."""
    cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
    if not cells:
        click.echo(empty)
        return
    table = [list(heads), *cells]
    widths = [max(len(row[column]) for row in table) for column in range(len(heads))]
    for row in table:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


OUTPUT = click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True,
                      help="How to print.")
