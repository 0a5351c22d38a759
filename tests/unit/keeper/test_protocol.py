"""Nothing that arrives on the keeper's socket ends it or leaks a descriptor; what is wrong is answered in words."""
from __future__ import annotations

import fcntl
import os
import random
import re
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.dataplane import blobs, protocol
from agent.dataplane.protocol import Message, Reason, text
from tests.support.keeper import Keeper, Raw, error, pod_payload, running
from tests.support.wait import until

PXD = Path(__file__).resolve().parent.parent.parent.parent / "ext" / "core" / "protocol.pxd"
REQUESTS = [kind for kind in Message if 3 <= kind <= 16]
FUZZ_SECONDS = 3.0


@pytest.fixture(scope="module")
def keeper(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keeper]:
    with running(tmp_path_factory.mktemp("keeper") / "run", workers=1, puppets=True) as one:
        yield one


@pytest.fixture(scope="module")
def baseline(keeper: Keeper) -> int:
    """Descriptors of a keeper that nobody is connected to."""
    return keeper.descriptors()


@pytest.fixture
def agent(keeper: Keeper, baseline: int) -> Iterator[Raw]:
    raw = Raw(keeper.path)
    try:
        yield raw.hello()
        assert raw.ask(Message.WORKERS)[0] == Message.WORKERS, "the keeper serves on"
    finally:
        raw.close()
    until(lambda: keeper.descriptors() == baseline, f"every descriptor is closed again but {baseline}")


def numbers(prefix: str) -> dict[str, int]:
    return {name: int(value, 0) for name, value in re.findall(rf"\b{prefix}_(\w+) = (\w+)", PXD.read_text())}


def sealed(data: bytes, seals: int = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW) -> int:
    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.write(fd, data)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def test_python_and_the_extension_have_the_same_numbers() -> None:
    messages = numbers("MSG")
    assert {kind.name: kind.value for kind in Message}.items() <= messages.items()
    assert {one.name: one.value for one in Reason} == numbers("REASON")
    states = {one.name: one.value for one in protocol.WorkerState if one.value}
    assert states == numbers("WORKER")
    assert numbers("PROTOCOL")["VERSION"] == protocol.VERSION


@pytest.mark.parametrize("size", range(1, 8))
def test_a_message_shorter_than_its_head_is_answered(agent: Raw, size: int) -> None:
    agent.say(bytes(size))
    assert error(agent.hear()) == (Reason.MALFORMED, f"a message of {size} bytes is shorter than its head (8)")


def test_another_version_is_answered_with_both_versions(agent: Raw) -> None:
    agent.say(protocol.HEAD.pack(Message.WORKERS, 2, 77))
    answer = agent.hear()
    assert answer[1] == 77
    assert error(answer) == (Reason.MALFORMED, "protocol version 2, 1 is spoken here")


def test_an_unknown_type_is_answered(agent: Raw) -> None:
    assert error(agent.ask(999)) == (Reason.MALFORMED, "unknown message type 999")


def test_a_message_that_is_too_long_is_answered_with_its_sequence(agent: Raw) -> None:
    answer = agent.ask(Message.WORKERS, bytes(100_000), sequence=5)
    assert answer[1] == 5
    assert "longer than 65536 bytes" in error(answer)[1]


def test_too_many_descriptors_are_closed_and_answered(agent: Raw, keeper: Keeper) -> None:
    answer = agent.ask(Message.WORKERS, b"", [0] * 200, sequence=6)
    assert answer[1] == 6
    assert "more than 4 descriptors" in error(answer)[1]


@pytest.mark.parametrize("kind", REQUESTS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("count", [0, 1, 2, 3, 4])
def test_a_wrong_number_of_descriptors_is_answered(agent: Raw, kind: Message, count: int) -> None:
    needed = 1 if kind in (Message.POD_ADD, Message.COMMIT) else 0
    if count == needed:
        return
    assert error(agent.ask(kind, b"", [0] * count)) == (
        Reason.MALFORMED, f"{kind.name} comes with {needed} descriptors, not {count}")


@pytest.mark.parametrize("kind, payload, fds", [
    (Message.HELLO, struct.pack("<HH", 1, 1), 0),
    (Message.POD_ADD, pod_payload(5, "a-pod"), 1),
    (Message.POD_DEL, struct.pack("<I", 5), 0),
    (Message.POD_LEAVE, struct.pack("<I", 5), 0),
    (Message.DRAIN, struct.pack("<I", 5), 0),
    (Message.KEY_MAKE, text("spiffe://cluster.local/ns/a/sa/b"), 0),
    (Message.KEY_FORGET, struct.pack("<I", 5), 0),
], ids=lambda value: value.name if isinstance(value, Message) else "")
def test_every_cut_and_every_excess_of_a_payload_is_malformed(agent: Raw, kind: Message, payload: bytes, fds: int) -> None:
    for size in range(len(payload)):
        assert error(agent.ask(kind, payload[:size], [0] * fds))[0] == Reason.MALFORMED
    assert error(agent.ask(kind, payload + b"x", [0] * fds))[0] == Reason.MALFORMED


def test_a_descriptor_that_is_no_namespace_is_refused(agent: Raw) -> None:
    reason, said = error(agent.ask(Message.POD_ADD, pod_payload(1, "pod"), [0]))
    assert reason == Reason.REFUSED
    assert "not a network namespace" in said


def test_only_the_agent_that_said_hello_may_change_anything(agent: Raw, keeper: Keeper) -> None:
    onlooker = Raw(keeper.path)
    try:
        assert onlooker.ask(Message.INVENTORY)[0] == Message.INVENTORY
        for kind in (Message.POD_DEL, Message.POD_LEAVE, Message.DRAIN, Message.SHUTDOWN):
            reason, said = error(onlooker.ask(kind, bytes(4)))
            assert (reason, "needs HELLO first" in said) == (Reason.REFUSED, True)
    finally:
        onlooker.close()


def test_a_keeper_that_speaks_no_version_of_the_agent_says_so(agent: Raw) -> None:
    reason, said = error(agent.ask(Message.HELLO, struct.pack("<HH", 2, 9)))
    assert reason == Reason.REFUSED
    assert "versions 2 to 9" in said


def test_a_memfd_that_could_still_change_is_refused(agent: Raw) -> None:
    data = blobs.encode_transaction(1, [blobs.put_note("a", b"b")])
    write, shrink, grow = fcntl.F_SEAL_WRITE, fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_GROW
    for seals in (0, write, shrink | grow, write | shrink, write | grow):
        fd = sealed(data, seals)
        try:
            assert "sealed" in error(agent.ask(Message.COMMIT, b"", [fd]))[1]
        finally:
            os.close(fd)


def test_descriptors_that_are_no_memfd_are_refused(agent: Raw) -> None:
    read, write = os.pipe()
    zero = os.open("/dev/zero", os.O_RDONLY)
    for fd in (read, write, zero):
        assert "sealed" in error(agent.ask(Message.COMMIT, b"", [fd]))[1]
        os.close(fd)


def test_a_transaction_that_is_damaged_anywhere_is_refused_and_changes_nothing(agent: Raw) -> None:
    data = blobs.encode_transaction(3, [blobs.put_note("key", b"payload"), blobs.Delete(129, "gone")])
    before = agent.ask(Message.INVENTORY)
    for at in range(len(data)):
        if 8 <= at < 16:  # the id: the checksum covers what follows it, and any id is one
            continue
        broken = data[:at] + bytes((data[at] ^ 0x41,)) + data[at + 1 :]
        fd = sealed(broken)
        assert error(agent.ask(Message.COMMIT, b"", [fd]))[0] == Reason.REFUSED, at
        os.close(fd)
    for size in range(len(data)):
        fd = sealed(data[:size])
        assert error(agent.ask(Message.COMMIT, b"", [fd]))[0] == Reason.REFUSED, size
        os.close(fd)
    assert agent.ask(Message.INVENTORY) == before


def test_no_noise_ends_the_keeper_or_leaks_a_descriptor(agent: Raw, keeper: Keeper) -> None:
    seed = random.randrange(2**32)
    dice = random.Random(seed)
    fds = [os.open("/dev/null", os.O_RDWR), sealed(blobs.encode_transaction(9, [])),
           sealed(bytes(dice.randrange(256) for _ in range(64))), os.open("/proc/self/ns/net", os.O_RDONLY)]
    kinds = [kind for kind in range(120) if kind not in (Message.SHUTDOWN, Message.DRAIN, Message.POD_ADD)]
    deadline, said = time.monotonic() + FUZZ_SECONDS, 0
    noise = Raw(keeper.path)
    noise.socket.setblocking(False)
    while time.monotonic() < deadline:
        kind = dice.choice(kinds)
        head = protocol.HEAD.pack(kind, dice.choice((0, 1, 1, 1, 2)), dice.randrange(2**32))
        # four bytes could be a good HELLO, and who says it takes the keeper over from the agent
        body = bytes(dice.randrange(256) for _ in range(dice.choice((0, 1, 9, 40) if kind == Message.HELLO else (0, 1, 4, 9, 40))))
        whole = head + body if dice.random() < 0.9 else (body or b"x")
        try:
            noise.say(whole, dice.choices(fds, k=dice.choice((0, 0, 1, 1, 2, 6))))
            said += 1
        except BlockingIOError:
            try:
                while noise.socket.recv(262144):
                    pass
                raise ConnectionError
            except BlockingIOError:
                continue
            except ConnectionError:
                noise.close()
                noise = Raw(keeper.path)
                noise.socket.setblocking(False)
        except ConnectionError:
            noise.close()
            noise = Raw(keeper.path)
            noise.socket.setblocking(False)
        if said % 500 == 0 and dice.random() < 0.2:
            noise.close()
            noise = Raw(keeper.path)
            noise.socket.setblocking(False)
    noise.close()
    for fd in fds:
        os.close(fd)
    assert said > 1000, f"seed {seed}"
    assert keeper.process.poll() is None, f"seed {seed}: {keeper.text[-2000:]}"
