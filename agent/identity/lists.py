"""Revocation lists from a file that somebody else writes: looked at now and then, the last good ones stay."""
from __future__ import annotations

from pathlib import Path

from agent.identity import der

LIST_BYTES, LISTS_MOST = 4 << 20, 64  # what workers take (twin: ext/route/trust.pyx)
FILE_BYTES = 32 << 20


class RevocationFile:
    """PEM, any number of `X509 CRL` blocks; an empty file is no list at all."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int, int] | None = None

    def read(self) -> tuple[bytes, ...] | None:
        """The lists, when the file is another than at the last call; None when it is the same.

        Raises OSError or ValueError, once for each version of the file, when it cannot be used.
        """
        facts = self._path.stat()
        seen = (facts.st_ino, facts.st_mtime_ns, facts.st_size)
        if seen == self._seen:
            return None
        self._seen = seen
        if facts.st_size > FILE_BYTES:
            raise ValueError(f"{self._path}: {facts.st_size} bytes, at most {FILE_BYTES}")
        text = self._path.read_text(encoding="ascii", errors="replace")
        found = tuple(dict.fromkeys(der.pem(text, "X509 CRL")))
        if not found and text.strip():
            raise ValueError(f"{self._path}: no revocation list in PEM (-----BEGIN X509 CRL-----)")
        if len(found) > LISTS_MOST or any(len(one) > LIST_BYTES for one in found):
            raise ValueError(f"{self._path}: at most {LISTS_MOST} lists of {LIST_BYTES} bytes")
        for one in found:
            der.revocation_list(one)
        return found
