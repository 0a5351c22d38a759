"""How many certificates a node may ask for: a bucket of tokens for each caller, so that one that runs wild costs the others nothing."""
from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

BURST = 1000  # requests at once: a node that starts with all its pods (the kubelet's bound is 110, the lab's 250), and tries again
PER_SECOND = 10.0  # after that; a node with 250 identities renews 500 certificates a day
CALLERS = 20_000  # buckets kept; full ones are dropped first


@dataclass(slots=True)
class _Bucket:
    level: float
    at: float


class Limit:
    """For one event loop."""

    def __init__(self, burst: int = BURST, per_second: float = PER_SECOND, clock: Callable[[], float] = time.monotonic) -> None:
        self._burst = burst
        self._rate = per_second
        self._clock = clock
        self._buckets: dict[str, _Bucket] = {}

    def take(self, caller: str) -> float:
        """0 when the caller may go on, else the seconds until it may ask again."""
        now = self._clock()
        bucket = self._buckets.get(caller)
        if bucket is None:
            if len(self._buckets) >= CALLERS:
                self._drop(now)
            bucket = self._buckets[caller] = _Bucket(self._burst, now)
        bucket.level = min(self._burst, bucket.level + (now - bucket.at) * self._rate)
        bucket.at = now
        if bucket.level < 1:
            return (1 - bucket.level) / self._rate
        bucket.level -= 1
        return 0.0

    def _drop(self, now: float) -> None:
        """A bucket that is full again says nothing."""
        self._buckets = {caller: bucket for caller, bucket in self._buckets.items()
                         if bucket.level + (now - bucket.at) * self._rate < self._burst}
