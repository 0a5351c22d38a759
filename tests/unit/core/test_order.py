"""What readers of memory that somebody else writes rely on: words arrive whole, and behind what was written before them."""
from __future__ import annotations

import mmap
import threading

import pytest

from ext.core import order


def test_a_word_is_stored_and_loaded_where_it_was_said() -> None:
    memory = bytearray(24)
    order.store_release(memory, 8, 0x0102030405060708)
    assert memory == bytes(8) + (0x0102030405060708).to_bytes(8, "little") + bytes(8)
    assert [order.load_acquire(memory, at) for at in (0, 8, 16)] == [0, 0x0102030405060708, 0]
    order.store_release(memory, 16, 2**64 - 1)
    order.fence_acquire()
    assert order.load_acquire(memoryview(memory)[8:], 8) == 2**64 - 1


@pytest.mark.parametrize("at", [1, 4, 17, 24, 2**63])
def test_a_word_that_is_not_there_is_refused(at: int) -> None:
    memory = bytearray(24)
    with pytest.raises(ValueError, match="no 64-bit word begins"):
        order.load_acquire(memory, at)
    with pytest.raises(ValueError, match="no 64-bit word begins"):
        order.store_release(memory, at, 1)
    assert not any(memory)


def test_memory_that_may_only_be_read_is_not_written() -> None:
    assert order.load_acquire(bytes(8), 0) == 0
    with pytest.raises(BufferError):
        order.store_release(bytes(8), 0, 1)


def test_what_was_written_before_a_word_is_seen_by_who_sees_the_word() -> None:
    """Two threads, one ring of 8 slots between them, as the log's and the kernel's are."""
    memory, rounds, got = mmap.mmap(-1, 4096), 20_000, []

    def write() -> None:
        for number in range(rounds):
            while number - order.load_acquire(memory, 0) >= 8:
                pass
            memory[64 + number % 8 * 8:72 + number % 8 * 8] = number.to_bytes(8, "little")
            order.store_release(memory, 8, number + 1)

    writer = threading.Thread(target=write)
    writer.start()
    for number in range(rounds):
        while order.load_acquire(memory, 8) <= number:
            pass
        got.append(int.from_bytes(memory[64 + number % 8 * 8:72 + number % 8 * 8], "little"))
        order.store_release(memory, 0, number + 1)
    writer.join()
    assert got == list(range(rounds))
