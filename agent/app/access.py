"""How the control plane is called: TLS or a unix socket, with which roots and which token. Files are read anew for each use."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

TOKEN_BYTES = 65_536  # a service account's token has some 1,000


class AccessError(ValueError):
    """Options that do not go together; the text says which."""


@dataclass(frozen=True, slots=True)
class Access:
    """`target` is `unix:PATH` or `HOST:PORT`; `token` and `root` are files or None. Over a network a token goes with TLS only."""

    target: str
    cluster: str
    token: Path | None = None
    root: Path | None = None

    def __post_init__(self) -> None:
        if self.token is not None and self.root is None and not self.local:
            raise AccessError(f"a token is not sent to {self.target} in plain text: give the roots of the control plane with --ca-root")

    @property
    def local(self) -> bool:
        return self.target.startswith("unix:")

    def open(self, options: Sequence[tuple[str, Any]]) -> Any:
        """A new grpc.aio channel. Raises OSError when the file of roots cannot be read."""
        if self.local or self.root is None:
            return grpc.aio.insecure_channel(self.target, options)
        return grpc.aio.secure_channel(self.target, grpc.ssl_channel_credentials(self.root.read_bytes()), options)

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Of one call. Raises OSError when the token cannot be read, ValueError when it is none."""
        found = (("clusterid", self.cluster),)
        if self.token is None:
            return found
        with self.token.open("rb") as file:
            text = file.read(TOKEN_BYTES + 1).decode("ascii", "replace").strip()
        if not text or len(text) > TOKEN_BYTES or not text.isascii() or not text.isprintable():
            raise ValueError(f"{self.token} holds no token: one line of text is expected")
        return (("authorization", f"Bearer {text}"), *found)
