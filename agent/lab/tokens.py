"""Each node's token for the control plane: in the node's run directory; the control plane knows its hash only."""
from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterable
from pathlib import Path

from agent.lab.place import Place

TOKEN_BYTES = 32


class Tokens:
    """A token is made once for a node, and lives as long as the lab."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._lines: list[str] = []

    def add(self, nodes: Iterable[str]) -> None:
        """Make those of `nodes`, and tell the control plane. The file is there from the first call on, also without any."""
        for node in nodes:
            token = secrets.token_hex(TOKEN_BYTES)
            _write(self._place.token(node), token)
            self._lines.append(f"{node} sha256:{hashlib.sha256(token.encode()).hexdigest()}\n")
        _write(self._place.tokens, "".join(self._lines))


def _write(path: Path, text: str) -> None:
    """A file that is its owner's alone from its first moment, put in place by renaming."""
    beside = path.with_name(f".{path.name}.new")
    beside.unlink(missing_ok=True)
    with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w") as file:
        file.write(text)
    beside.replace(path)
