"""Waiting on a condition with a deadline: tests never sleep for a guess."""
from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
PATIENCE = float(os.environ.get("NARROWS_TEST_PATIENCE", "1"))  # times as long: sanitizers slow down what is waited for


def until(condition: Callable[[], T], what: str, timeout: float = 10.0, interval: float = 0.02) -> T:
    """Returns the condition's first truthy value; fails saying what was waited for and what was seen last."""
    timeout *= PATIENCE
    deadline = time.monotonic() + timeout
    while True:
        seen = condition()
        if seen:
            return seen
        if time.monotonic() > deadline:
            raise AssertionError(f"after {timeout} s still not: {what} (last: {seen!r})")
        time.sleep(interval)


async def until_async(condition: Callable[[], T], what: str, timeout: float = 10.0, interval: float = 0.01) -> T:
    """The same, while the loop of the test runs on."""
    timeout *= PATIENCE
    deadline = time.monotonic() + timeout
    while True:
        seen = condition()
        if seen:
            return seen
        if time.monotonic() > deadline:
            raise AssertionError(f"after {timeout} s still not: {what} (last: {seen!r})")
        await asyncio.sleep(interval)
