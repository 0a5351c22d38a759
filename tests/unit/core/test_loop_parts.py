"""Timers, buffers and slabs against plain models."""
from __future__ import annotations

import heapq

import pytest
from ext.core.loop_door import LARGE, SMALL, Bytes, Heap, Items
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
