"""The load generator and the origin as processes: built on first use, run by a bare interpreter on the load core."""
from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from tests.bench.topology import LOAD_CORE, BenchError, Site
from tests.support.netns import Netns

ROOT = Path(__file__).resolve().parent.parent.parent
BUILT = ROOT / "build" / "tests" / "bench"
HTTP_PORT, ECHO_PORT, SOURCE_PORT = 8080, 7001, 7002  # of the origin
BOOT = "import sys; sys.path.insert(0, {!r}); from {} import main; main()"


@cache
def build() -> None:
    """Compiles what changed."""
    ninja = shutil.which("ninja", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if ninja is None:
        raise BenchError("ninja is not found: run `make setup`")
    targets = [f"tests/bench/{name}{sysconfig.get_config_var('EXT_SUFFIX')}" for name in ("load", "origin")]
    env = {**os.environ, "PATH": f"{Path(ninja).parent}:{os.environ.get('PATH', '')}"}  # meson calls cython by name
    done = subprocess.run([ninja, "-C", str(ROOT / "build"), *targets], capture_output=True, text=True, env=env, check=False)
    if done.returncode != 0:
        raise BenchError(f"the load generator does not build; run `make setup`:\n{done.stdout[-3000:]}{done.stderr[-1000:]}")


def command(name: str) -> list[str]:
    build()
    return ["taskset", "-c", str(LOAD_CORE), sys.executable, "-I", "-S", "-c", BOOT.format(str(BUILT), name)]


def start_origin(netns: Netns, log: Path) -> None:
    """It ends with its namespace."""
    with open(log, "wb") as out:
        netns.start(*command("origin"), str(HTTP_PORT), str(ECHO_PORT), str(SOURCE_PORT), stdin=subprocess.DEVNULL, stdout=out, stderr=out)


def load(site: Site, port: int, seconds: float, **what: Any) -> dict[str, float]:
    """Runs the load generator against a site; BenchError when a connection failed or an answer was not the origin's."""
    said = site.netns.run(*command("load"), _asked(site, port, seconds=seconds, **what), timeout=seconds + 30).stdout
    found: dict[str, float] = json.loads(said)
    if found["failed"]:
        raise BenchError(f"{site.netns.name}: {found['failed']:.0f} connections or answers failed, "
                         f"{found['work']:.0f} went well")
    return found


class Held:
    """Connections that stay open, each after one answer, until `close`."""

    def __init__(self, site: Site, port: int, connections: int, request: str) -> None:
        self.process = site.netns.start(*command("load"), _asked(site, port, do="hold", connections=connections, request=request),
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        said = json.loads(self.process.stdout.readline() or '{"held": 0, "failed": 0}')
        if said != {"held": connections, "failed": 0}:
            self.close()
            raise BenchError(f"{site.netns.name}: {said['held']} of {connections} connections are held, {said['failed']} failed")

    def close(self) -> None:
        self.process.kill()
        self.process.wait(10)


@contextmanager
def load_beside(site: Site, port: int, **what: Any) -> Iterator[None]:
    """The load runs for as long as the block does (and a minute at most)."""
    process = site.netns.start(*command("load"), _asked(site, port, seconds=60.0, **what), stdin=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL)
    try:
        yield
        if process.poll() is not None:
            raise BenchError(f"{site.netns.name}: the load beside ended with {process.returncode}")
    finally:
        process.kill()
        process.wait(10)


SHAKER = """
import socket, ssl, sys, time
home, host, port, seconds = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
context.check_hostname = False
context.minimum_version = ssl.TLSVersion.TLSv1_3
context.set_alpn_protocols(["h2"])
context.load_cert_chain(home + "/client.pem", home + "/client.key")
context.load_verify_locations(home + "/root.pem")
made, end = 0, time.monotonic() + seconds
while time.monotonic() < end:
    raw = socket.create_connection((host, port), timeout=5)
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with context.wrap_socket(raw) as one:
        one.sendall(b"PRI * HTTP/2.0\\r\\n\\r\\nSM\\r\\n\\r\\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0)))
        one.recv(1)     # the server's settings: it took our certificate
    made += 1
print(made)
"""


def shake(site: Site, home: Path, seconds: float) -> int:
    """Full handshakes with the destination's HBONE port, one after another: how many."""
    argv = ("taskset", "-c", str(LOAD_CORE), sys.executable, "-I", "-c", SHAKER, str(home), site.address, "15008", str(seconds))
    return int(site.netns.run(*argv, timeout=seconds + 30).stdout)


def _asked(site: Site, port: int, **what: Any) -> str:
    host, _, number = site.target(port).rpartition(":")
    return json.dumps({"host": host, "port": int(number), **what})
