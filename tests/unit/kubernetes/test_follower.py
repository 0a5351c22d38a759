"""A reflector before a real server on loopback that is cut, slow, forgetful and behind: it ends with what the server has."""
from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from protos.kubernetes import reflector
from protos.kubernetes.client import Client
from protos.kubernetes.configuration import Configuration
from protos.kubernetes.follow import Follower
from protos.kubernetes.objects import Key, Metadata, Struct
from protos.kubernetes.reflector import Batch, Phase
from protos.kubernetes.resources import CONFIG_MAPS, PODS, SERVICES, VIRTUAL_SERVICES, Resource
from tests.support.kubernetes.server import ApiServer, Token
from tests.support.kubernetes.table import TABLE, custom
from tests.support.wait import until_async


class Map(Struct, frozen=True):
    metadata: Metadata
    data: dict[str, str] | None = None


class Watched:
    """A follower that runs, and what its batches add up to."""

    def __init__(self, client: Client, resource: Resource = CONFIG_MAPS, kind: Any = Map, **options: Any) -> None:
        self.have: dict[Key, Any] = {}
        self.batches: list[Batch[Any]] = []
        self.follower: Follower[Any] = Follower(client, resource, kind, self._take, **options)
        self.task = asyncio.create_task(self.follower.run())

    def _take(self, batch: Batch[Any]) -> None:
        self.batches.append(batch)
        self.have.update(batch.puts)
        for key in batch.deletes:
            self.have.pop(key, None)

    @property
    def names(self) -> str:
        return "".join(sorted(key.name for key in self.have))

    async def until(self, names: str) -> None:
        def look() -> bool:
            assert not self.task.done() or self.task.result()
            self.follower.hurry()
            return self.follower.state().synced and self.names == names
        await until_async(look, f"names are {names!r}")

    async def stale(self, word: str) -> None:
        await until_async(lambda: self.follower.state().stale_since is not None and word in self.follower.state().reason,
                          f"stale because of {word!r}")

    async def well(self) -> None:
        def look() -> bool:
            self.follower.hurry()
            state = self.follower.state()
            return state.stale_since is None and state.phase is Phase.WATCH
        await until_async(look, "followed")

    async def end(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


@pytest.fixture
async def watched(server: ApiServer, client: Client) -> AsyncIterator[Watched]:
    """Two objects are there, and their watch is open."""
    await make(client, "a", "b")
    one = Watched(client)
    await one.until("ab")
    await until_async(lambda: server.watches == 1, "the watch is open")
    yield one
    await one.end()


async def make(client: Client, *names: str, **data: str) -> None:
    for name in names:
        await client.create(CONFIG_MAPS, {"metadata": {"name": name}, "data": data}, "default")


async def test_it_lists_follows_and_tells_only_what_differs(client: Client, watched: Watched) -> None:
    assert [batch.synced for batch in watched.batches] == [True]
    await client.merge(CONFIG_MAPS, "a", "default", {"data": {"x": "1"}})
    await make(client, "c")
    await client.delete(CONFIG_MAPS, "b", "default")
    await watched.until("ac")
    assert watched.have[Key("default", "a")].data == {"x": "1"}
    assert {key.name for batch in watched.batches[1:] for key in batch.puts} == {"a", "c"}
    assert {key.name for batch in watched.batches for key in batch.deletes} == {"b"}
    assert watched.follower.state().lists == 1


@pytest.mark.parametrize("middle", [False, True])
async def test_a_watch_that_is_cut_goes_on_where_it_was(server: ApiServer, client: Client, watched: Watched, middle: bool) -> None:
    await make(client, "c")
    await watched.until("abc")
    server.cut(middle=middle)
    await client.delete(CONFIG_MAPS, "a", "default")
    await make(client, "d")
    await watched.until("bcd")
    state = watched.follower.state()
    assert state.lists == 1 and state.watches >= 2
    assert [key.name for batch in watched.batches[1:] for key in batch.puts] == ["c", "d"]


async def test_a_watch_resumes_from_a_bookmark_when_the_past_is_forgotten(server: ApiServer, client: Client, watched: Watched) -> None:
    await client.create(PODS, {"metadata": {"name": "p"}}, "default")  # the revision grows, and nothing of it is ours
    server.bookmark()
    await until_async(lambda: watched.follower.state().resource_version == str(server.store.revision), "the bookmark")
    server.store.compact()
    server.cut()
    await make(client, "c")
    await watched.until("abc")
    assert watched.follower.state().lists == 1


@pytest.mark.parametrize("as_status", [False, True])
async def test_after_410_it_lists_again_and_finds_deletes(server: ApiServer, client: Client, watched: Watched, as_status: bool) -> None:
    server.chaos.gone_as_status = as_status
    refusing = server.chaos.add("watch", "configmaps", code=503, reason="ServiceUnavailable")
    server.cut()
    await watched.stale("503")
    await client.delete(CONFIG_MAPS, "a", "default")
    await make(client, "c")
    server.store.compact()
    assert watched.names == "ab"
    server.chaos.stop(refusing)
    await watched.until("bc")
    await watched.well()
    assert watched.follower.state().lists == 2 and [batch.synced for batch in watched.batches] == [True, False]


async def test_pages_that_expire_in_the_middle_end_in_a_whole_list(server: ApiServer, client: Client) -> None:
    await make(client, *"abcd")
    server.chaos.add("list", "configmaps", after=2, times=1, code=410, reason="Expired")
    one = Watched(client, limit=1)
    await one.until("abcd")
    assert [each.query.get("limit") for each in server.asked("list", "configmaps")] == ["1", "1", "1", None]
    await one.end()


async def test_a_stale_list_is_not_believed(server: ApiServer, client: Client, watched: Watched) -> None:
    old = server.store.revision
    await make(client, "c")
    await watched.until("abc")
    server.chaos.add("list", "configmaps", times=2, revision=old)
    server.chaos.add("watch", "configmaps", times=1, code=410, reason="Expired")
    server.cut()
    await watched.stale("older than")
    assert watched.names == "abc"
    await watched.well()
    assert watched.names == "abc" and not any(batch.deletes for batch in watched.batches)


async def test_a_server_that_has_too_much_to_do_is_asked_when_it_said(server: ApiServer, client: Client) -> None:
    await make(client, "a")
    server.chaos.add("list", "configmaps", times=2, code=429, reason="TooManyRequests", retry_after="1")
    one = Watched(client)
    began = asyncio.get_running_loop().time()
    await until_async(lambda: one.names == "a", "listed")
    assert asyncio.get_running_loop().time() - began >= 1.9  # two waits of a second, not hurried
    assert len(server.asked("list", "configmaps")) == 3
    await one.end()


async def test_a_watch_that_is_silent_beyond_its_time_is_given_up(server: ApiServer, client: Client,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reflector, "WATCH_SECONDS", (0, 0))
    server.chaos.silent = True
    one = Watched(client, silent_seconds=0.2)
    await one.stale("did not")
    await make(client, "a")
    assert one.names == ""
    server.chaos.silent = False
    await one.until("a")
    await one.end()


async def test_a_server_that_was_away_and_comes_back_with_an_older_state_is_believed_in_the_end(client: Client, server: ApiServer) -> None:
    """As after etcd was restored from a backup."""
    with ApiServer() as first:
        configuration = first.configuration()
        async with Client(configuration) as mine:
            await make(mine, "a", "c", "d", "e")
            one = Watched(mine)
            await one.until("acde")
            first.stop()
            await one.stale("Unreachable")
            assert one.names == "acde"
            await make(client, "a", "b")
            assert server.store.revision < first.store.revision
            configuration.server = server.url
            await one.until("ab")
            await one.well()
            assert len(server.asked("list", "configmaps")) == 1 + reflector.STALE_LISTS  # 1: where it is
            await one.end()


async def test_one_that_is_stale_touches_no_other(server: ApiServer, client: Client, watched: Watched) -> None:
    server.chaos.add(None, "services", code=403, reason="Forbidden", message="services is forbidden")
    other = Watched(client, SERVICES, dict)
    await other.stale("forbidden")
    assert "RBAC" in other.follower.state().reason and not other.follower.state().synced
    await make(client, "c")
    await watched.until("abc")
    assert watched.follower.state().stale_since is None
    await other.end()


async def test_a_malformed_object_is_told_and_the_others_come(server: ApiServer, client: Client) -> None:
    served = server.store.served["", "v1", "configmaps"]
    server.store.create(served, "default", {"metadata": {"name": "bad"}, "data": [1]}, "t")
    await make(client, "a")
    one = Watched(client)
    await one.until("a")
    assert list(one.follower.state().unreadable) == [Key("default", "bad")]
    server.store.merge(served, "default", "a", {"data": {"x": 1}}, "t")
    await until_async(lambda: len(one.follower.state().unreadable) == 2, "both are told")
    assert one.names == "a" and one.have[Key("default", "a")].data == {}
    server.store.merge(served, "default", "a", {"data": {"x": "1"}}, "t")
    await until_async(lambda: one.have[Key("default", "a")].data == {"x": "1"}, "it is read again")
    await one.end()


async def test_a_kind_without_its_definition_is_empty_until_it_comes(client: Client) -> None:
    with ApiServer([one for one in TABLE if one.resource is not VIRTUAL_SERVICES]) as server:
        async with Client(server.configuration()) as mine:
            one = Watched(mine, VIRTUAL_SERVICES, dict, optional=True)
            await until_async(lambda: one.batches, "synced")
            assert one.batches[0].synced and one.follower.state().phase is Phase.ABSENT
            served = custom("networking.istio.io", "v1", "virtualservices", "VirtualService")
            with server.store.lock:
                server.store._objects[served] = {}
                server.store.served["networking.istio.io", "v1", "virtualservices"] = served
            await mine.create(VIRTUAL_SERVICES, {"metadata": {"name": "x"}, "spec": {}}, "default")
            await one.until("x")
            await one.end()


async def test_the_pods_of_a_node_come_and_go_with_their_binding(client: Client) -> None:
    for name, node in (("a", "n1"), ("b", "n2")):
        await client.create(PODS, {"metadata": {"name": name}, "spec": {"nodeName": node}}, "default")
    one = Watched(client, PODS, dict, fields="spec.nodeName=n1")
    await one.until("a")
    await client.create(PODS, {"metadata": {"name": "c"}, "spec": {}}, "default")
    await client.merge(PODS, "c", "default", {"spec": {"nodeName": "n1"}})
    await one.until("ac")
    await client.delete(PODS, "a", "default", grace_seconds=0)  # as kubelet lets it go
    await one.until("c")
    await one.end()


async def test_a_token_that_ends_stops_nothing_once_it_is_renewed(server: ApiServer) -> None:
    server.authorize, server.tokens = True, {"one": Token("me"), "two": Token("me")}

    class Renewed:
        data = b"one"

        def read(self) -> bytes:
            return self.data

        def forget(self) -> None:
            return

    source = Renewed()
    async with Client(Configuration(server.url, token=source)) as client:  # type: ignore[arg-type]
        await make(client, "a")
        one = Watched(client)
        await one.until("a")
        del server.tokens["one"]
        server.cut()
        await one.stale("401")
        source.data = b"two"
        await make(client, "b")
        await one.until("ab")
        await one.well()
        await one.end()


async def test_a_thousand_objects_come_in_pages_and_each_once(server: ApiServer, client: Client) -> None:
    served = server.store.served["", "v1", "configmaps"]
    for number in range(1_000):
        server.store.create(served, "default", {"metadata": {"name": f"c{number}"}}, "t")
    one = Watched(client, limit=100)
    await until_async(lambda: one.follower.state().synced, "synced")
    assert len(one.have) == 1_000 and sum(len(batch.puts) for batch in one.batches) == 1_000
    assert len(server.asked("list", "configmaps")) == 10
    await one.end()
