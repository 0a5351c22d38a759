"""A fake API server for each test, and a client of it. A folder of tests takes them by its conftest."""
from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from protos.kubernetes.client import Client
from tests.support.kubernetes.server import ApiServer


@pytest.fixture
def server() -> Iterator[ApiServer]:
    with ApiServer() as one:
        yield one


@pytest.fixture
async def client(server: ApiServer) -> AsyncIterator[Client]:
    async with Client(server.configuration()) as one:
        yield one
