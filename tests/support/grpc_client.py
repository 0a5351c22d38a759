"""The process of grpc_peer.py that asks, as a test sees it."""
from __future__ import annotations

import json
import subprocess


class Client:
    """The gRPC client process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def ask(self, count: int, header: str = "") -> dict[str, int]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{count} {header}".strip() + "\n")
        self._process.stdin.flush()
        answer: dict[str, int] = json.loads(self._process.stdout.readline())
        return answer
