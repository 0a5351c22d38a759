"""The control protocol between agent and keeper as values; every number is that of ext/core/protocol.pxd.

Cython's enums are not visible to Python, so they stand here again; tests/unit/keeper/test_protocol.py holds the two together.
"""
from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

VERSION = 1
HEAD = struct.Struct("<HHI")  # type, version, sequence
U16, U32, U64 = struct.Struct("<H"), struct.Struct("<I"), struct.Struct("<Q")
DATAGRAM_BYTES = 262144  # INVENTORY with 1,024 pods is the largest
DESCRIPTORS_MAX = 253


class Message(IntEnum):
    OK = 1
    ERROR = 2
    HELLO = 3
    INVENTORY = 4
    POD_ADD = 5
    POD_DEL = 6
    COMMIT = 7
    SHM = 8
    WORKERS = 9
    DRAIN = 10
    SHUTDOWN = 11
    KEY_MAKE = 12
    KEY_FORGET = 13
    KEYS = 14
    POD_DNS = 15
    POD_LEAVE = 16
    MISS = 32
    WORKER = 33


class Reason(IntEnum):
    MALFORMED = 1
    REFUSED = 2
    AWAY = 3


class WorkerState(IntEnum):
    """Of a worker. DOWN: none runs now; REPLACED comes only as an event, DRAINING and DOWN only in a list."""

    DOWN = 0
    STARTED = 1
    READY = 2
    DIED = 3
    REPLACED = 4
    DRAINING = 5


class ProtocolError(ConnectionError):
    """The keeper said something that this agent does not understand: they are of different releases."""


class Fields:
    """Reads a payload from its start; ProtocolError when there is less than asked for."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def take(self, size: int) -> bytes:
        end = self._at + size
        if end > len(self._data):
            raise ProtocolError(f"the keeper's answer of {len(self._data)} bytes is cut; {end} are needed")
        part, self._at = self._data[self._at : end], end
        return part

    def unpack(self, form: struct.Struct) -> tuple[int, ...]:
        return form.unpack(self.take(form.size))

    def u8(self) -> int:
        return self.take(1)[0]

    def u16(self) -> int:
        return int(self.unpack(U16)[0])

    def u32(self) -> int:
        return int(self.unpack(U32)[0])

    def u64(self) -> int:
        return int(self.unpack(U64)[0])

    def data(self) -> bytes:
        return self.take(self.u32())

    def text(self) -> str:
        return self.data().decode("utf-8", "replace")


def text(value: str) -> bytes:
    data = value.encode()
    return U32.pack(len(data)) + data


@dataclass(frozen=True, slots=True)
class Hello:
    """Who the keeper is. `start_us`: Unix time in microseconds; with `instance` it tells one keeper from the next."""

    version: int
    instance: str
    pid: int
    start_us: int
    workers: int


@dataclass(frozen=True, slots=True)
class PodListing:
    """A pod that the keeper holds. `netns` is the inode of its network namespace."""

    handle: int
    uid: str
    netns: int
    listening: bool


@dataclass(frozen=True, slots=True)
class KeyListing:
    """A private key that the keeper holds for an identity."""

    id: int
    identity: str


@dataclass(frozen=True, slots=True)
class WorkerListing:
    """A worker index. `pid` 0: none runs now. `restarts` counts the workers after the first."""

    index: int
    pid: int
    state: WorkerState
    restarts: int
    pods: int


@dataclass(frozen=True, slots=True)
class Miss:
    """Event: a worker holds connections for this destination (`scope|host:port`). Repeated each second while they wait."""

    key: str


@dataclass(frozen=True, slots=True)
class WorkerChange:
    """Event: what became of a worker. `status` counts for DIED: exit status, or minus the signal."""

    index: int
    pid: int
    state: WorkerState
    status: int


Event = Miss | WorkerChange
