"""sleep: a pod to send requests from. It does nothing until somebody runs a command in it."""
from __future__ import annotations

import signal
import sys

signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
while True:
    signal.pause()
