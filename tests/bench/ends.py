"""What a benchmark has made is taken back when it is told to end: by `kill` or `timeout` (SIGTERM), a terminal (SIGINT, SIGHUP)."""
from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def run(main: Callable[[], int | None]) -> int:
    """What `main` returns. A signal ends it as an exception does, so that every `finally` runs; the exit status is 128 and the signal's
    number, as a shell has it. Those that come later are passed over: `timeout` and terminals send theirs to the whole group."""
    for number in SIGNALS:
        signal.signal(number, _end)
    return main() or 0


def _end(number: int, _: FrameType | None) -> None:
    for one in SIGNALS:
        signal.signal(one, lambda *_: None)  # not SIG_IGN, which what is started to clean up would inherit
    raise SystemExit(128 + number)
