"""What gRPC does not know it ignores in silence: a misspelt option is no option."""
from __future__ import annotations

from pathlib import Path

import grpc._cython
import pytest

from agent.xds import client
from controlplane.server import grpc_server

NAMES = sorted({name for name, _ in [*client.OPTIONS, *grpc_server.OPTIONS]})


@pytest.fixture(scope="module")
def library() -> bytes:
    found = next(Path(grpc._cython.__file__).parent.glob("cygrpc*.so"))
    return found.read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_the_library_knows_every_option_that_we_set(library: bytes, name: str) -> None:
    assert name.encode() + b"\0" in library


def test_the_control_plane_takes_the_pings_that_the_agent_sends() -> None:
    sent = dict(client.OPTIONS)["grpc.keepalive_time_ms"]
    assert dict(grpc_server.OPTIONS)["grpc.http2.min_ping_interval_without_data_ms"] < sent
