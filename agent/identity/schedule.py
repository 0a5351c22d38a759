"""When to ask for a certificate: pure, with the clock and the dice of the caller. All times are seconds since 1970."""
from __future__ import annotations

from collections.abc import Callable

HALF, JITTER = 0.5, 0.05  # of a lifetime: renewal at half of it, and up to so much to either side, so that a node's do not come at once
BACKOFF_FIRST, BACKOFF_LAST, SPREAD = 1.0, 150.0, 0.2  # seconds, doubling, +-20 %: ztunnel's
LEAST = 0.5  # seconds: nobody asks again sooner
WARN = 0.25  # of a lifetime: renewals have failed for a quarter of it when so much is left

Uniform = Callable[[float, float], float]  # random.uniform


def renewal(not_before: float, not_after: float, uniform: Uniform) -> float:
    """When to renew a certificate of this validity."""
    life = not_after - not_before
    return not_before + life * uniform(HALF - JITTER, HALF + JITTER)


def retry(failures: int, now: float, not_after: float | None, uniform: Uniform) -> float:
    """When to ask again after `failures` (1 and up) in a row: never past the end of a certificate that is still valid."""
    delay = min(BACKOFF_FIRST * (1 << min(failures - 1, 16)), BACKOFF_LAST) * uniform(1 - SPREAD, 1 + SPREAD)
    if not_after is not None and now < not_after:
        delay = min(delay, not_after - now)
    return now + max(delay, LEAST)


def ending(not_before: float, not_after: float, now: float) -> bool:
    """Whether so little of the lifetime is left that an operator has to know."""
    return now > not_after - (not_after - not_before) * WARN
