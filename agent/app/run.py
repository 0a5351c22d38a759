"""Runs an agent as this process: event loop, checks before the start, exit code."""
from __future__ import annotations

import asyncio
import logging
import os
from typing import Any

import click
import uvloop

from agent.app.agent import Options, serve

log = logging.getLogger("narrows.agent")


def run(options: dict[str, Any]) -> int:
    """Returns the exit code: 0 after SIGTERM, 69 when a port or socket cannot be had, 70 on a fault of ours."""
    chosen = Options(**options)
    if not chosen.run_dir.is_dir():
        click.echo(f"narrows: {chosen.run_dir} is no directory; make it (mode 0700) before keeper and agent start", err=True)
        return os.EX_CONFIG
    (chosen.run_dir / "pods").mkdir(mode=0o700, exist_ok=True)
    chosen.run_dir.chmod(0o700)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            runner.run(serve(chosen))
        except OSError as error:
            log.error("the agent cannot run: %s", error)
            return os.EX_UNAVAILABLE
        except Exception:
            log.exception("the agent broke; the data path serves on, and a new agent takes over what is in force")
            return os.EX_SOFTWARE
    return 0
