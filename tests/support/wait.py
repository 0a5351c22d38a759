"""Waiting on a condition with a deadline: tests never sleep for a guess."""
from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")
PATIENCE = float(os.environ.get("NARROWS_TEST_PATIENCE", "1"))  # times as long: sanitizers slow down what is waited for


def until(condition: Callable[[], T], what: str, timeout: float = 10.0, interval: float = 0.02) -> T:
    """Returns the condition's first truthy value; fails saying what was waited for and what was seen last."""
    for seen in _looks(condition, what, timeout):
        if seen:
            return seen
        time.sleep(interval)
    raise AssertionError("unreachable")


async def until_async(condition: Callable[[], T], what: str, timeout: float = 10.0, interval: float = 0.01) -> T:
    """The same, while the loop of the test runs on."""
    for seen in _looks(condition, what, timeout):
        if seen:
            return seen
        await asyncio.sleep(interval)
    raise AssertionError("unreachable")


def _looks(condition: Callable[[], T], what: str, timeout: float) -> Iterator[T]:
    """What is seen each time, without end before the deadline; then it fails, unless the last was truthy."""
    timeout *= PATIENCE
    deadline = time.monotonic() + timeout
    while True:
        seen = condition()
        if not seen and time.monotonic() > deadline:
            raise AssertionError(f"after {timeout} s still not: {what} (last: {seen!r})")
        yield seen
