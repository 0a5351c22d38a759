"""The file source against a real directory."""
from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from agent.workloads import inotify
from agent.workloads.files import Delete, Event, FileSource, Malformed, SourceError, Synced, Upsert


class Follow:
    """A source that is being read; `next()` is its next event, with a deadline."""

    def __init__(self, folder: Path) -> None:
        self._events = FileSource(folder).events()

    async def next(self) -> Event:
        return await asyncio.wait_for(anext(self._events), 5)

    async def silent(self, folder: Path) -> None:
        """Nothing came until now: a file written last is the next that is told."""
        write(folder, "zz-last")
        event = await self.next()
        assert isinstance(event, Upsert) and event.pod.name == "zz-last"

    async def close(self) -> None:
        await self._events.aclose()  # type: ignore[attr-defined]


@pytest.fixture
async def follow(tmp_path: Path) -> AsyncIterator[Follow]:
    source = Follow(tmp_path)
    yield source
    await source.close()


def write(folder: Path, name: str, uid: str = "u", raw: str | None = None, **annotations: str) -> None:
    """As the contract says: beside, then renamed into place."""
    value: dict[str, Any] = {"metadata": {"name": name, "namespace": "ns", "uid": uid, "annotations": annotations},
                             "narrows": {"netns": "/run/netns/x"}}
    beside = folder / f".{name}.tmp"
    beside.write_text(json.dumps(value) if raw is None else raw)
    beside.rename(folder / f"ns.{name}.json")


async def test_what_is_there_comes_first_then_synced_then_changes(tmp_path: Path, follow: Follow) -> None:
    write(tmp_path, "b")
    write(tmp_path, "a")
    first, second, third = [await follow.next() for _ in range(3)]
    assert isinstance(first, Upsert) and isinstance(second, Upsert)
    assert [first.pod.name, second.pod.name] == ["a", "b"] and third == Synced()
    write(tmp_path, "c")
    event = await follow.next()
    assert isinstance(event, Upsert) and event.pod.ref == "ns/c"
    (tmp_path / "ns.a.json").unlink()
    assert await follow.next() == Delete(first.pod)


async def test_a_change_is_told_and_the_same_content_is_not(tmp_path: Path, follow: Follow) -> None:
    write(tmp_path, "a")
    await follow.next()
    assert await follow.next() == Synced()
    write(tmp_path, "a", x="1")
    event = await follow.next()
    assert isinstance(event, Upsert) and event.pod.annotations == {"x": "1"}
    write(tmp_path, "a", x="1")
    await follow.silent(tmp_path)


async def test_a_pod_made_again_under_its_name_is_deleted_first(tmp_path: Path, follow: Follow) -> None:
    write(tmp_path, "a", uid="one")
    await follow.next()
    await follow.next()
    write(tmp_path, "a", uid="two")
    first, second = await follow.next(), await follow.next()
    assert isinstance(first, Delete) and first.pod.uid == "one"
    assert isinstance(second, Upsert) and second.pod.uid == "two"


async def test_a_malformed_file_is_told_once_and_the_last_good_state_stays(tmp_path: Path, follow: Follow) -> None:
    write(tmp_path, "a")
    good = await follow.next()
    assert isinstance(good, Upsert)
    await follow.next()
    write(tmp_path, "a", raw="{")
    event = await follow.next()
    assert isinstance(event, Malformed) and event.pod == good.pod and str(tmp_path / "ns.a.json") in event.text
    write(tmp_path, "a", raw="{")
    await follow.silent(tmp_path)
    (tmp_path / "ns.a.json").unlink()
    assert await follow.next() == Delete(good.pod)


async def test_a_malformed_file_that_was_never_good_has_no_pod_and_no_delete(tmp_path: Path, follow: Follow) -> None:
    write(tmp_path, "a", raw="[]")
    event = await follow.next()
    assert isinstance(event, Malformed) and event.pod is None
    assert await follow.next() == Synced()
    (tmp_path / "ns.a.json").unlink()
    await follow.silent(tmp_path)


async def test_files_of_other_kinds_are_passed_over(tmp_path: Path, follow: Follow) -> None:
    (tmp_path / "README").touch()
    (tmp_path / ".ns.a.json").touch()
    assert await follow.next() == Synced()
    (tmp_path / "notes.txt").touch()
    await follow.silent(tmp_path)


async def test_a_file_written_in_place_and_one_moved_away_are_seen(tmp_path: Path, follow: Follow) -> None:
    await follow.next()
    raw = {"metadata": {"name": "a", "namespace": "ns", "uid": "u"}, "narrows": {"netns": "/x"}}
    (tmp_path / "ns.a.json").write_text(json.dumps(raw))
    event = await follow.next()
    assert isinstance(event, Upsert)
    (tmp_path / "ns.a.json").rename(tmp_path / "aside")
    assert await follow.next() == Delete(event.pod)


async def test_after_an_overflow_everything_is_looked_at_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's queue holds 16384 events by default; here its overflow event stands for all that were lost."""
    lost = [True]
    read = inotify.Watch.read

    def overflowing(self: inotify.Watch) -> list[inotify.Event]:
        found = read(self)
        if found and lost and lost.pop():
            return [inotify.Event(inotify.IN_Q_OVERFLOW, "")]
        return found

    write(tmp_path, "a")
    source = Follow(tmp_path)
    try:
        first = await source.next()
        await source.next()
        monkeypatch.setattr(inotify.Watch, "read", overflowing)
        (tmp_path / "ns.a.json").unlink()
        write(tmp_path, "b")
        assert isinstance(first, Upsert) and await source.next() == Delete(first.pod)
        event = await source.next()
        assert isinstance(event, Upsert) and event.pod.name == "b"
        assert await source.next() == Synced()
    finally:
        await source.close()


async def test_a_directory_that_is_missing_or_removed_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=f"cannot watch {tmp_path}/gone: No such file or directory; make it"):
        await Follow(tmp_path / "gone").next()
    folder = tmp_path / "pods"
    folder.mkdir()
    source = Follow(folder)
    assert await source.next() == Synced()
    folder.rmdir()
    with pytest.raises(SourceError, match=f"{folder} was removed or renamed"):
        await source.next()


async def test_a_source_that_is_closed_leaves_no_descriptor(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    source = Follow(tmp_path)
    await source.next()
    await source.close()
    assert len(os.listdir("/proc/self/fd")) == before


async def test_many_changes_at_once_all_arrive(tmp_path: Path, follow: Follow) -> None:
    await follow.next()
    for number in range(300):
        write(tmp_path, f"p{number}")
    seen = set()
    while len(seen) < 300:
        event = await follow.next()
        assert isinstance(event, Upsert)
        seen.add(event.pod.name)
