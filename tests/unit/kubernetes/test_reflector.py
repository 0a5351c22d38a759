"""The core of a reflector, told by hand what came: it ends with what the server has, and says what it does not know."""
from __future__ import annotations

import random
from typing import Any

import pytest

from protos.kubernetes.errors import ApiError, BadRequest, Forbidden, Gone, NotServed, TooLarge, TooManyRequests, Unavailable, Unreachable
from protos.kubernetes.objects import Item, Key, Page
from protos.kubernetes.reflector import BACKOFF_MOST, STALE_LISTS, WATCH_SECONDS, List, Phase, Reflector, Wait, Watch
from protos.kubernetes.stream import Bookmark, Changed, Failed, Skipped

GONE = Gone("watch", "/p", 410, "Expired", "too old")
DOWN = Unreachable("list", "/p", 0, "Unreachable", "refused")


def key(name: str) -> Key:
    return Key("a", name)


def one(name: str, version: int, *, problem: str = "", uid: str = "") -> Item[str]:
    return Item(key(name), uid or f"u-{name}", str(version), None if problem else f"{name}@{version}", problem)


def listed(version: int, *items: Item[str], continue_: str = "") -> Page[str]:
    return Page(list(items), str(version), continue_)


def put(name: str, version: int, **more: Any) -> Changed[str]:
    return Changed(one(name, version, **more), False)


def gone(name: str, version: int) -> Changed[str]:
    return Changed(one(name, version), True)


def fresh(**options: Any) -> Reflector[str]:
    return Reflector(0.0, draw=lambda: 0.0, **options)


def watching(*items: Item[str], version: int = 10) -> Reflector[str]:
    core = fresh()
    assert isinstance(core.next(), List)
    core.page(listed(version, *items), 1.0)
    assert core.take().synced
    assert core.next() == Watch(str(version), WATCH_SECONDS[0])
    core.opened(1.0)
    return core


def looked(core: Reflector[str], version: int) -> List | Watch | Wait:
    """What it does next, when it asks before that whether the server still is where it was, and hears that."""
    assert core.next() == List(1, "")
    core.page(listed(version, one("whichever", 1)), 0.0)
    return core.next()


def test_it_is_synced_once_after_the_last_page() -> None:
    core = fresh(limit=2)
    assert core.next() == List(2, "") and core.state().stale_since == 0.0
    core.page(listed(10, one("x", 3), one("y", 4), continue_="c"), 1.0)
    assert not core.take().synced and core.next() == List(2, "c") and not core.state().synced
    core.page(listed(10, one("z", 5)), 2.0)
    batch = core.take()
    assert batch.synced and batch.puts == {key("z"): "z@5"} and core.next() == Watch("10", 300)
    core.opened(2.0)
    core.failed(GONE, 3.0)
    core.page(listed(11, one("x", 3), one("y", 4), one("z", 5)), 4.0)
    assert not core.take() and core.state().synced and core.state().stale_since is None


def test_a_batch_has_the_last_word_of_each_object() -> None:
    core = watching(one("x", 1), one("y", 2))
    for event in (put("x", 11), put("x", 12), put("new", 13), gone("new", 14), gone("y", 15), put("y", 16)):
        assert core.event(event, 2.0)
    batch = core.take()
    assert batch.puts == {key("x"): "x@12", key("y"): "y@16"} and batch.deletes == {key("new")} and not batch.synced
    assert not core.take()


def test_it_resumes_where_events_and_bookmarks_left_off() -> None:
    core = watching(one("x", 1))
    core.event(put("x", 12), 2.0)
    core.ended(302.0)
    assert core.next() == Watch("12", 300)
    core.opened(303.0)
    core.event(Bookmark("40"), 303.0)
    core.ended(603.0)
    assert core.next() == Watch("40", 300) and core.state().lists == 1


def test_after_a_cut_or_silence_it_asks_first_whether_the_server_knows_what_it_knows() -> None:
    core = watching(one("x", 1))
    core.event(put("x", 12), 2.0)
    core.ended(100.0)  # cut
    assert looked(core, 12) == Watch("12", 300)
    core.opened(100.0)
    core.ended(400.0)  # silent
    assert looked(core, 900) == Watch("12", 300) and core.state().lists == 1 and core.state().objects == 1
    core.opened(400.0)
    core.failed(DOWN, 500.0)
    assert isinstance(core.next(), Wait) and core.next() == List(1, "")
    core.failed(DOWN, 501.0)
    assert isinstance(core.next(), Wait) and core.next() == List(1, "")
    core.failed(DOWN, 503.0)
    assert isinstance(core.next(), Wait) and looked(core, 11) == List(500, "")  # restored from a backup: all is to be listed
    for turn in range(STALE_LISTS):
        core.page(listed(11, one("y", 7)), 504.0 + turn)
    batch = core.take()
    assert batch.puts.keys() == {key("y")} and batch.deletes == {key("x")}
    assert isinstance(core.next(), Wait) and core.next() == Watch("11", 300)


def test_a_watch_lasts_as_long_as_is_drawn() -> None:
    core: Reflector[str] = Reflector(0.0, draw=lambda: 0.999)
    core.page(listed(10), 1.0)
    action = core.next()
    assert isinstance(action, Watch) and WATCH_SECONDS[0] < action.seconds < WATCH_SECONDS[1]


def test_after_410_it_lists_at_once_and_finds_what_was_deleted() -> None:
    core = watching(one("x", 1), one("y", 2), one("z", 3))
    assert not core.event(Failed(GONE), 2.0)
    assert core.next() == List(500, "") and core.state().stale_since is None
    core.page(listed(90, one("x", 1), one("z", 80)), 3.0)
    batch = core.take()
    assert batch.puts == {key("z"): "z@80"} and batch.deletes == {key("y")} and not batch.synced
    assert core.next() == Watch("90", 300)


def test_an_object_made_anew_under_its_name_is_put() -> None:
    core = watching(one("x", 1))
    core.failed(GONE, 2.0)
    core.page(listed(90, one("x", 1, uid="another")), 3.0)
    assert core.take().puts == {key("x"): "x@1"}


def test_a_server_that_forgets_faster_than_it_lists_is_not_listed_in_a_loop() -> None:
    core = watching()
    waited = []
    for turn in range(6):
        core.failed(GONE, 2.0 + turn)
        action = core.next()
        if isinstance(action, Wait):
            waited.append(action.seconds)
            action = core.next()
        assert isinstance(action, List)
        core.page(listed(20 + turn), 2.0 + turn)
        core.opened(2.0 + turn)
    assert len(waited) == 5 and waited == sorted(waited) and waited[0] > 0


def test_nothing_is_deleted_before_the_last_page() -> None:
    core = watching(one("x", 1), one("y", 2))
    core.failed(GONE, 2.0)
    core.page(listed(20, one("x", 1), continue_="c"), 3.0)
    core.failed(DOWN, 3.0)
    assert isinstance(core.next(), Wait) and core.next() == List(500, "c")
    core.page(listed(20, one("y", 2)), 4.0)
    assert not core.take()


def test_pages_that_expire_are_asked_for_anew_and_then_all_at_once() -> None:
    core = fresh(limit=2)
    core.page(listed(10, one("x", 1), continue_="c"), 1.0)
    core.failed(Gone("list", "/p", 410, "Expired", "continue"), 2.0)
    assert isinstance(core.next(), Wait) and core.next() == List(0, "")
    core.page(listed(12, one("y", 2)), 3.0)
    batch = core.take()
    assert batch.synced and batch.deletes == {key("x")} and batch.puts == {key("y"): "y@2"}


def test_a_stale_list_is_refused_until_it_keeps_being_so() -> None:
    core = watching(one("x", 5), version=50)
    core.failed(GONE, 2.0)
    for turn in range(STALE_LISTS - 1):
        core.page(listed(40), 3.0 + turn)
        assert not core.take() and "older than 50" in core.state().reason and core.state().stale_since == 3.0
        assert isinstance(core.next(), Wait) and core.next() == List(500, "")
    core.page(listed(40), 60.0)
    assert core.take().deletes == {key("x")} and core.next() == Watch("40", 300) and core.state().stale_since is None


def test_versions_that_are_no_numbers_are_not_compared() -> None:
    core = fresh()
    core.page(Page([one("x", 1)], "zz"), 1.0)
    core.failed(GONE, 2.0)
    core.page(Page([], "aa"), 2.0)
    assert core.take().deletes == {key("x")}


def test_a_server_whose_past_is_shorter_than_ours_is_listed() -> None:
    core = watching(one("x", 1), version=50)
    core.failed(Unavailable("watch", "/p", 504, "Timeout", "Too large resource version: 50, current: 40"), 2.0)
    assert isinstance(core.next(), Wait) and isinstance(core.next(), List)


@pytest.mark.parametrize("error", [DOWN, Unavailable("watch", "/p", 500, "InternalError", "no"),
                                   Forbidden("watch", "/p", 403, "Forbidden", "no"),
                                   TooManyRequests("watch", "/p", 429, "TooManyRequests", "no")])
def test_a_watch_that_is_refused_goes_on_from_the_same_place_and_says_since_when(error: ApiError) -> None:
    core = watching(one("x", 1))
    core.ended(400.0)
    core.failed(error, 401.0)
    assert isinstance(core.next(), Wait) and looked(core, 10) == Watch("10", 300)
    core.failed(error, 409.0)
    state = core.state()
    assert (state.stale_since, state.reason, state.failures, state.objects) == (401.0, str(error), 2, 1)
    core.next()
    core.opened(420.0)
    assert core.state().stale_since is None and core.state().reason == ""


def test_waits_grow_to_a_bound_with_jitter_and_start_anew_after_an_event() -> None:
    core = watching()
    waits = []
    for turn in range(12):
        core.failed(DOWN, float(turn))
        action = core.next()
        assert isinstance(action, Wait)
        waits.append(action.seconds)
        assert isinstance(looked(core, 10), Watch)
    assert waits[0] == 0.4 and waits == sorted(waits) and waits[-1] == BACKOFF_MOST / 2
    core.opened(20.0)
    core.event(Bookmark("11"), 20.0)
    core.failed(DOWN, 30.0)
    assert core.next() == Wait(0.4)
    longest: Reflector[str] = Reflector(0.0, draw=lambda: 1.0)
    for turn in range(12):
        longest.failed(DOWN, float(turn))
    assert longest.next() == Wait(BACKOFF_MOST)


def test_the_server_says_how_long_to_wait() -> None:
    core = watching()
    core.failed(TooManyRequests("watch", "/p", 429, "TooManyRequests", "no", 17.0), 2.0)
    assert core.next() == Wait(17.0)


def test_watches_that_end_at_once_are_not_made_in_a_loop() -> None:
    core = watching()
    core.ended(1.1)
    assert isinstance(core.next(), Wait) and "end at once" in core.state().reason
    assert isinstance(looked(core, 10), Watch)
    core.opened(2.0)
    core.ended(300.0)
    assert isinstance(looked(core, 10), Watch)


def test_what_cannot_be_read_keeps_its_last_version_and_is_told_by_name() -> None:
    core = watching(one("x", 1), one("y", 2))
    core.event(put("x", 11, problem="$.spec: bad"), 2.0)
    core.event(put("y", 12), 2.0)
    batch = core.take()
    assert batch.puts == {key("y"): "y@12"} and not batch.deletes and core.state().unreadable == {key("x"): "$.spec: bad"}
    core.failed(GONE, 3.0)
    core.page(listed(20, one("x", 11, problem="$.spec: bad"), one("y", 12)), 3.0)
    assert not core.take() and core.state().unreadable == {key("x"): "$.spec: bad"}
    core.opened(3.0)
    core.event(put("x", 21), 4.0)
    assert core.take().puts == {key("x"): "x@21"} and core.state().unreadable == {}


def test_an_unreadable_object_that_is_deleted_is_no_problem_any_more() -> None:
    core = watching(one("x", 1, problem="bad"), one("y", 2, problem="bad"))
    core.event(gone("x", 11), 2.0)
    assert not core.take().deletes and set(core.state().unreadable) == {key("y")}
    core.failed(GONE, 3.0)
    core.page(listed(20), 3.0)
    assert core.state().unreadable == {}


def test_a_list_with_an_item_nobody_can_name_takes_nothing_for_deleted() -> None:
    core = watching(one("x", 1))
    core.failed(GONE, 2.0)
    core.page(listed(20, Item(None, "", "", None, "no name")), 3.0)
    assert not core.take() and core.state().unnamed == 1
    core.failed(GONE, 4.0)
    core.page(listed(21), 5.0)
    assert core.take().deletes == {key("x")} and core.state().unnamed == 0


def test_a_line_that_was_too_long_is_counted_and_the_watch_goes_on() -> None:
    core = watching()
    assert core.event(Skipped(9 << 20), 2.0) and core.event(put("x", 11), 2.0)
    assert core.take().puts and core.state().unnamed == 1


def test_a_list_that_is_too_large_is_asked_for_in_smaller_pages() -> None:
    core = fresh()
    limits = []
    for _ in range(5):
        core.failed(TooLarge("list", "/p", 200, "TooLarge", "much"), 1.0)
        core.next()
        action = core.next()
        assert isinstance(action, List)
        limits.append(action.limit)
    assert limits == [125, 31, 7, 1, 1]


def test_a_token_for_pages_that_is_refused_starts_the_list_anew() -> None:
    core = fresh(limit=1)
    core.page(listed(10, one("x", 1), continue_="c"), 1.0)
    core.failed(BadRequest("list", "/p", 400, "BadRequest", "continue key is not valid"), 1.0)
    core.next()
    assert core.next() == List(1, "")


NOT_SERVED = NotServed("list", "/p", 404, "", "404 page not found")


def test_a_kind_that_is_not_served_is_empty_when_it_may_be_and_is_looked_for_again() -> None:
    core = fresh(optional=True)
    core.failed(NOT_SERVED, 1.0)
    assert core.take().synced and core.state().phase is Phase.ABSENT and core.state().stale_since is None
    action = core.next()
    assert isinstance(action, Wait) and action.seconds >= BACKOFF_MOST / 2 and core.next() == List(500, "")
    core.page(listed(5, one("x", 1)), 30.0)
    batch = core.take()
    assert batch.puts and not batch.synced and core.state().phase is Phase.WATCH


def test_a_kind_that_must_be_there_is_stale_without() -> None:
    core = fresh()
    core.failed(NOT_SERVED, 1.0)
    assert not core.take() and core.state().stale_since == 0.0 and "CRD" in core.state().reason


def test_a_kind_that_vanishes_with_objects_keeps_them() -> None:
    core = fresh(optional=True)
    core.page(listed(5, one("x", 1)), 1.0)
    core.take()
    core.failed(NOT_SERVED, 2.0)
    core.next()
    assert isinstance(core.next(), List)
    core.failed(NOT_SERVED, 3.0)
    assert not core.take() and core.state().objects == 1 and core.state().stale_since == 2.0


@pytest.mark.parametrize("seed", range(200))
def test_whatever_happens_it_ends_with_what_the_server_has(seed: int) -> None:
    """A server of random histories, cuts, 410s and pages; what batches add up to is the server's state."""
    rng = random.Random(seed)
    server: dict[Key, tuple[int, str]] = {}
    history: list[Changed[str]] = []
    version, forgotten, now = 1, 0, 0.0
    ours: dict[Key, str] = {}
    core: Reflector[str] = Reflector(0.0, limit=rng.choice([0, 1, 3]), draw=rng.random)
    snapshot: list[Item[str]] = []
    snapshot_version = 0

    def change() -> None:
        nonlocal version
        version += 1
        name = rng.choice("uvwxyz")
        if key(name) in server and rng.random() < 0.4:
            _, uid = server.pop(key(name))
            history.append(Changed(one(name, version, uid=uid), True))
        else:
            uid = server[key(name)][1] if key(name) in server else f"u{version}"
            server[key(name)] = (version, uid)
            history.append(Changed(one(name, version, uid=uid), False))

    def collect() -> None:
        batch = core.take()
        assert not batch.puts.keys() & batch.deletes
        ours.update(batch.puts)
        for each in batch.deletes:
            ours.pop(each, None)

    turn, done = 0, False
    while turn < 60 or not done:
        turn, now, done = turn + 1, now + 1.0, False
        quiet = turn >= 60
        assert turn < 200
        for _ in range(0 if quiet else rng.randrange(4)):
            change()
        if not quiet and rng.random() < 0.15:
            forgotten = version
        action = core.next()
        if isinstance(action, List):
            if not quiet and rng.random() < 0.2:
                core.failed(DOWN, now)
                continue
            if not action.continue_:
                snapshot_version = version
                snapshot = [one(k.name, v, uid=u) for k, (v, u) in sorted(server.items())]
            elif snapshot_version < forgotten:
                core.failed(Gone("list", "/p", 410, "Expired", "continue"), now)
                continue
            first = int(action.continue_ or 0)
            last = first + action.limit if action.limit else len(snapshot)
            core.page(Page(snapshot[first:last], str(snapshot_version), str(last) if last < len(snapshot) else ""), now)
        elif isinstance(action, Watch):
            since = int(action.resource_version)
            if since < forgotten:
                core.opened(now)
                core.event(Failed(GONE), now)
                collect()
                continue
            core.opened(now)
            told = [event for event in history if int(event.item.resource_version) > since]
            if not quiet:
                told = told[:rng.randrange(len(told) + 1)]
            for event in told:
                core.event(event, now)
            if rng.random() < 0.3:
                core.event(Bookmark(told[-1].item.resource_version if told else str(since)), now)
            core.ended(now + rng.random() * 2)
            done = quiet
        collect()
    assert ours == {each: f"{each.name}@{v}" for each, (v, _) in server.items()}
