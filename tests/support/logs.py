"""Log files of a running instance, read while it writes: the last line may still be on its way."""
from __future__ import annotations

from pathlib import Path


def whole_lines(path: Path) -> list[str]:
    """The lines that are complete, without their ends."""
    return [line[:-1] for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
