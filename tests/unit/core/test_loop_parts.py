"""Turns, timers, buffers and slabs against plain models."""
from __future__ import annotations

import heapq

import pytest
from ext.core.loop_door import LARGE, SLICE_US, SMALL, Bytes, Heap, Items, Turns
from hypothesis import given, settings
from hypothesis import strategies as st

TIMERS = 12


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(
    st.tuples(st.just("set"), st.integers(0, TIMERS - 1), st.integers(1, 50)),
    st.tuples(st.just("clear"), st.integers(0, TIMERS - 1), st.just(0)),
    st.tuples(st.just("due"), st.just(0), st.integers(1, 60))), max_size=60))
def test_timers_come_due_in_order_whatever_was_set_moved_or_cleared(steps: list[tuple[str, int, int]]) -> None:
    heap, model = Heap(TIMERS), dict[int, int]()
    for step, at, value in steps:
        if step == "set":
            heap.set(at, value)
            model[at] = value
        elif step == "clear":
            heap.clear(at)
            model.pop(at, None)
        else:
            found = heap.due(value)
            earliest = min(model.values(), default=None)
            if earliest is None or earliest > value:
                assert found is None
            else:
                assert found is not None
                assert model.pop(found) == earliest
        assert heap.armed == len(model)
    left = []
    while (found := heap.due(1000)) is not None:
        left.append(model.pop(found))
    assert left == heapq.nsmallest(len(left), left)
    assert model == {}


def test_a_buffer_takes_memory_when_asked_and_gives_it_back_with_its_last_byte() -> None:
    one = Bytes(1 << 20)
    assert (one.taken, one.value()) == (0, b"")
    assert one.reserve(0)
    assert (one.taken, one.size) == (SMALL, SMALL)
    one.put(b"abc")
    one.consume(1)
    assert (one.value(), one.taken) == (b"bc", SMALL)
    one.consume(2)
    assert one.taken == 0


def test_a_buffer_grows_once_and_keeps_what_is_in_it() -> None:
    one = Bytes(1 << 20)
    assert one.reserve(0)
    data = bytes(range(256)) * 64
    assert one.put(data) == SMALL
    one.consume(10)
    assert one.room == 0
    assert one.reserve(SMALL + 1)
    assert (one.value(), one.size, one.taken) == (data[10:], LARGE, LARGE)
    assert not one.reserve(LARGE + 1)


def test_compacting_makes_room_without_changing_a_byte() -> None:
    one = Bytes(1 << 20)
    assert one.reserve(0)
    one.put(b"x" * SMALL)
    one.consume(SMALL - 5)
    one.compact()
    assert (one.value(), one.room) == (b"xxxxx", SMALL - 5)


def test_buffers_are_bounded_in_sum() -> None:
    one = Bytes(SMALL - 1)
    assert not one.reserve(0)
    assert one.taken == 0


@pytest.mark.parametrize("size", [8, 100, 4096])
def test_items_come_zeroed_and_only_so_many_are_kept(size: int) -> None:
    items = Items(size)
    for _ in range(1500):
        assert items.take()
    assert items.live == 1500
    for _ in range(1500):
        items.give()
    assert (items.live, items.kept) == (0, 1024)
    assert items.take()
    items.give()


def finish(turns: Turns) -> list[list[int]]:
    found = []
    while turns.waiting:
        found.append(turns.turn())
    return found


def test_who_comes_while_another_pod_has_a_thousand_sockets_ready_is_served_after_one_slice() -> None:
    turns = Turns(2)
    for _ in range(1000):
        turns.add(0, 10, 3)
    turns.turn()
    late = turns.add(1, 10, 1)
    served = turns.turn()
    assert late in served, "it had to wait for more than a slice of the other"
    assert served.index(late) <= SLICE_US // 10 + 4, "served behind it: at most the other's slice"
    assert sum(map(len, finish(turns))) + len(served) > 2000, "the other's work is done too"


def test_busy_pods_share_time_evenly_however_many_sockets_each_has_ready() -> None:
    turns = Turns(3)
    for flow, sockets in enumerate((500, 5, 1)):
        for _ in range(sockets):
            turns.add(flow, 10, 3000 // sockets)
    owner = [0] * 500 + [1] * 5 + [2]
    for _ in range(300):
        turns.turn()
    cut = [turns.cut(flow) for flow in range(3)]
    assert max(cut) - min(cut) <= 2, f"slices of each: {cut}"
    assert len(owner) == 506


def test_a_pod_that_always_comes_back_does_not_keep_those_waiting_that_are_never_done() -> None:
    turns = Turns(2)
    busy = turns.add(0, SLICE_US + 50, 2000)
    turns.turn()
    seen = 0
    for _ in range(40):
        turns.add(1, SLICE_US + 50, 1)
        seen += turns.turn().count(busy)
    assert seen >= 5


def test_every_ready_socket_is_served_once_and_a_closed_one_never() -> None:
    turns = Turns(4)
    made = [turns.add(at % 4, 0, 1) for at in range(400)]
    for task in made[::3]:
        turns.close(task)
    served = [task for turn in finish(turns) for task in turn]
    assert sorted(served) == [task for task in made if task % 3]
    turns.add(2, 0, 1)
    turns.close(400)
    turns.forget(2)
    assert not turns.waiting
