"""What crosses a link, by dumpcap, and what tshark makes of it."""
from __future__ import annotations

import json
import signal
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.wait import until

BUFFER = "64"  # MiB in the kernel: nothing is dropped while dumpcap waits for its turn
DISCARD = 9  # RFC 863


class Wire:
    """A capture in a file; complete once the body of `captured` has ended."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def count(self, text: str) -> int:
        """How often these bytes are anywhere in the file."""
        return self.path.read_bytes().count(text.encode())

    def fields(self, select: str, *names: str, hbone: int = 15008) -> list[list[list[str]]]:
        """For each frame that tshark's filter selects its values of the named fields; that port is read as TLS."""
        argv = ["tshark", "-r", str(self.path), "-d", f"tcp.port=={hbone},tls", "-T", "json", "-Y", select]
        done = subprocess.run([*argv, *(word for name in names for word in ("-e", name))], capture_output=True, text=True, check=True,
                              timeout=120)
        frames: list[dict[str, Any]] = json.loads(done.stdout)
        return [[frame["_source"].get("layers", {}).get(name, []) for name in names] for frame in frames]


@contextmanager
def captured(netns: str, link: str, path: Path, towards: str) -> Iterator[Wire]:
    """All that crosses a link within the body, both ways. `towards`: an address behind the link, to which one datagram marks the end."""
    inside = ["nsenter", f"--net=/run/netns/{netns}", "--"]
    reader = subprocess.Popen([*inside, "dumpcap", "-q", "-B", BUFFER, "-i", link, "-w", str(path)], stderr=subprocess.PIPE, text=True)
    try:
        assert reader.stderr is not None
        said: list[str] = []
        for line in reader.stderr:
            said.append(line)
            if line.startswith("File:"):
                break
        else:
            raise AssertionError(f"dumpcap ended: {said}")
        yield Wire(path)
        end = f"end-{uuid.uuid4().hex}"
        talk = f"import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'{end}', ('{towards}', {DISCARD}))"
        subprocess.run([*inside, "/usr/bin/python3", "-c", talk], check=True, timeout=30)
        until(lambda: end.encode() in path.read_bytes(), "the end is in the capture", 30, 0.1)
        reader.send_signal(signal.SIGINT)
        said = reader.stderr.read().splitlines()
        assert reader.wait(timeout=30) == 0 and "/0 " in said[-1], f"frames were dropped: {said}"
    finally:
        reader.kill()
        reader.wait(timeout=10)
        assert reader.stderr is not None
        reader.stderr.close()
