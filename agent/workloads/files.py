"""The file source: follows `<run dir>/pods/*.json` and tells what changed.

A pod file is written beside and renamed into place, so a file that is there is whole. What was read last without an
error stays a pod's state until a better one comes or the file goes away.

    start    scan -> upserts -> Synced          (what the agent knows beyond that is gone)
    event    changed file -> Upsert | Malformed, removed file -> Delete
    overflow of the kernel's queue -> scan again
"""
from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

from agent.model.pod import LocalPod
from agent.workloads import inotify
from agent.workloads.podfile import PodFileError, read_pod


@dataclass(frozen=True, slots=True)
class Upsert:
    """The pod is new or changed. A pod made again under its name comes as Delete of the old uid, then this."""

    pod: LocalPod


@dataclass(frozen=True, slots=True)
class Delete:
    """The pod, as it was last known, is gone."""

    pod: LocalPod


@dataclass(frozen=True, slots=True)
class Malformed:
    """A file cannot be read as a pod; the text names file and field. `pod` is the state that stays, if there was one."""

    text: str
    pod: LocalPod | None


@dataclass(frozen=True, slots=True)
class Synced:
    """Every file that was there at the start (or after the queue overflowed) has been told."""


Event = Upsert | Delete | Malformed | Synced


class SourceError(Exception):
    """The directory cannot be followed any more; the text says which and why."""


class FileSource:
    """Pods of one directory. Iterate `events()` once; it ends only by cancellation or SourceError."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[str, LocalPod] = {}
        self._refused: dict[str, str] = {}

    async def events(self) -> AsyncIterator[Event]:
        """What is there, Synced, then every change as it happens."""
        try:
            watch = inotify.Watch(self._folder)
        except OSError as error:
            hint = "; make it, or check --run-dir" if error.errno == errno.ENOENT else ""
            raise SourceError(f"{error.strerror}{hint}") from error
        ready = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(watch.fileno(), ready.set)
        try:
            for event in self._scan():
                yield event
            yield Synced()
            while True:
                await ready.wait()
                ready.clear()
                for event in self._changes(watch):
                    yield event
        finally:
            loop.remove_reader(watch.fileno())
            watch.close()

    def _changes(self, watch: inotify.Watch) -> Iterator[Event]:
        names: dict[str, None] = {}
        overflow = gone = False
        while found := watch.read():
            for event in found:
                overflow = overflow or bool(event.mask & inotify.IN_Q_OVERFLOW)
                gone = gone or bool(event.mask & inotify.GONE)
                if event.name:
                    names[event.name] = None
        if overflow:
            yield from self._scan()
            yield Synced()
        else:
            for name in names:
                yield from self._look(name)
        if gone:
            raise SourceError(f"{self._folder} was removed or renamed; the pods known so far stay as they are")

    def _scan(self) -> Iterator[Event]:
        try:
            present = sorted(path.name for path in self._folder.iterdir())
        except OSError as error:
            raise SourceError(f"{self._folder}: cannot be listed: {error.strerror}") from error
        for name in sorted(self._known.keys() - set(present)):
            yield from self._look(name)
        for name in present:
            yield from self._look(name)

    def _look(self, name: str) -> Iterator[Event]:
        """The file as it is now, whatever the event said: several events of a file become one."""
        if not name.endswith(".json") or name.startswith("."):
            return
        before = self._known.get(name)
        try:
            pod = read_pod(self._folder / name)
        except FileNotFoundError:
            self._refused.pop(name, None)
            if before is not None:
                del self._known[name]
                yield Delete(before)
            return
        except PodFileError as error:
            if self._refused.get(name) != str(error):
                self._refused[name] = str(error)
                yield Malformed(str(error), before)
            return
        self._refused.pop(name, None)
        if pod == before:
            return
        self._known[name] = pod
        if before is not None and before.uid != pod.uid:
            yield Delete(before)
        yield Upsert(pod)
