"""Runs an agent as this process: event loop, checks before the start, exit code."""
from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import resource
import time
from typing import Any

import click
import uvloop

from agent.app.access import Access, AccessError
from agent.app.agent import Options, serve

log = logging.getLogger("narrows.agent")


LOCK_SECONDS = 5.0  # the agent before this one may be ending just now


def locked(fd: int) -> bool:
    """Whether this process has the lock alone; waits LOCK_SECONDS for the one that has it."""
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)


def run(options: dict[str, Any]) -> int:
    """Returns the exit code: 0 after SIGTERM, 69 when a port or socket cannot be had, 70 on a fault of ours."""
    chosen = Options(**options)
    if not chosen.run_dir.is_dir():
        click.echo(f"narrows: {chosen.run_dir} is no directory; make it (mode 0700) before keeper and agent start", err=True)
        return os.EX_CONFIG
    try:
        Access(chosen.xds, chosen.cluster, chosen.ca_token, chosen.ca_root)
        Access(chosen.ca or chosen.xds, chosen.cluster, chosen.ca_token, chosen.ca_root)
    except AccessError as error:
        click.echo(f"narrows: {error}", err=True)
        return os.EX_USAGE
    lock = os.open(chosen.run_dir / "agent.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    if not locked(lock):
        click.echo(f"narrows: another agent serves {chosen.run_dir} (agent.lock); end it first. Two would take the keeper "
                   "from each other.", err=True)
        return os.EX_UNAVAILABLE
    (chosen.run_dir / "pods").mkdir(mode=0o700, exist_ok=True)
    chosen.run_dir.chmod(0o700)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a question to a pod's resolver is a descriptor
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
