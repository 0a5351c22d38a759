"""A lab without mesh, shared by tests that only look or put back what they change."""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.lab import Lab, lab

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def plain() -> Iterator[Lab]:
    with lab(HERE / "plain.yaml", options=("--no-mesh",)) as running:
        yield running
