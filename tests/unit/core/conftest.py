"""The segments of one worker, formatted as the keeper does it, and a worker's side of them."""
from __future__ import annotations

import mmap

import pytest

from ext.core import ring, shm, shm_door


@pytest.fixture
def segments():
    stats, log = mmap.mmap(-1, shm.stats_bytes()), mmap.mmap(-1, ring.log_bytes())
    shm.format_stats(stats)
    ring.format_log(log)
    return stats, log


@pytest.fixture
def writer(segments):
    return shm_door.Writer(*segments)
