"""The blobs in force, and transactions as the keeper sees them: it checks that they are whole, and never what they say.

Format: ARCHITECTURE.md, "Blobs and transactions". Twins: agent/dataplane/blobs.py (encoder), ext/route/decode.pyx.
"""
import os
import struct
from zlib import crc32

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from ext.core.protocol cimport (KIND_KEEPER_ONLY, OP_DELETE, OP_PUT, TXN_MAGIC, TXN_VERSION)
from ext.sys.memory cimport memory_is_sealed, memory_sealed

HEADER = struct.Struct("<IHHQII")
ENTRY = struct.Struct("<BBHII")

cdef enum:
    TRANSACTION_BYTES = 67108864        # 64 MiB: 5,000 services with their routes and endpoints are under 10
    TABLE_BYTES = 536870912             # 512 MiB of blobs in force


class Refused(Exception):
    """A transaction that is not taken; the text says what is wrong with it."""


class Transaction:
    """`id`; `entries`: (op, kind, key, the entry's bytes); `size`: bytes of all entries."""

    def __init__(self, txn_id, entries, size):
        self.id, self.entries, self.size = txn_id, entries, size

    @property
    def has_keeper_only(self) -> bool:
        return any(kind >= KIND_KEEPER_ONLY for _, kind, _, _ in self.entries)

    def for_workers(self) -> list:
        """The entries' bytes without those that the keeper keeps to itself."""
        return [raw for _, kind, _, raw in self.entries if kind < KIND_KEEPER_ONLY]


def read(int fd) -> Transaction:
    """Raises Refused. The seals are what makes the check hold: nobody can change the bytes after it."""
    if not memory_is_sealed(fd):
        raise Refused("the descriptor is no memfd sealed against writing, shrinking and growing")
    size = os.fstat(fd).st_size
    if size < HEADER.size or size > TRANSACTION_BYTES:
        raise Refused(f"a transaction of {size} bytes; it has {HEADER.size} at least and {TRANSACTION_BYTES} at most")
    data = read_whole(fd, size)
    magic, version, flags, txn_id, count, crc = HEADER.unpack_from(data)
    if magic != TXN_MAGIC:
        raise Refused(f"not a transaction: magic {magic:#010x} instead of {<unsigned int>TXN_MAGIC:#010x}")
    if version != TXN_VERSION or flags != 0:
        raise Refused(f"transaction {txn_id} has version {version} and flags {flags:#x}; {TXN_VERSION} and none are known here")
    if crc32(memoryview(data)[HEADER.size:]) != crc:
        raise Refused(f"transaction {txn_id}: checksum differs; it was cut or changed on its way")
    return Transaction(txn_id, split(data, txn_id, count), size - HEADER.size)


def read_whole(int fd, size_t size) -> bytes:
    parts = []
    cdef size_t at = 0
    while at < size:
        part = os.pread(fd, size - at, at)
        if not part:
            raise Refused(f"the memfd ended at byte {at} of {size}")
        parts.append(part)
        at += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def split(bytes data, txn_id, count) -> list:
    cdef size_t at = HEADER.size, end, start, size = len(data)
    entries = []
    for number in range(count):
        if size - at < <size_t>ENTRY.size:
            raise Refused(f"transaction {txn_id}: entry {number} of {count} at byte {at} is cut")
        op, kind, key_size, payload_size, crc = ENTRY.unpack_from(data, at)
        start = at + <size_t>ENTRY.size
        end = start + <size_t>key_size + <size_t>payload_size
        end += -end % 8
        if end > size:
            raise Refused(f"transaction {txn_id}: entry {number} of {count} at byte {at}: {end - size} bytes beyond the end")
        key = data[start:start + key_size]
        if op == OP_DELETE:
            if payload_size:
                raise Refused(f"transaction {txn_id}: entry {number} deletes and has a payload")
        elif op != OP_PUT:
            raise Refused(f"transaction {txn_id}: entry {number}: unknown operation {op}")
        elif crc32(memoryview(data)[start + key_size:start + key_size + payload_size]) != crc:
            raise Refused(f"transaction {txn_id}: entry {number} of {count}: checksum of the payload differs")
        entries.append((op, kind, key, data[at:end]))
        at = end
    if at != size:
        raise Refused(f"transaction {txn_id}: {size - at} bytes after the last of {count} entries")
    return entries


def write(txn_id, list entries) -> int:
    """A sealed memfd with these entries' bytes; the caller closes it. OSError when there is no memory or descriptor."""
    body = b"".join(entries)
    cdef bytes data = HEADER.pack(TXN_MAGIC, TXN_VERSION, 0, txn_id, len(entries), crc32(body)) + body
    cdef int fd = memory_sealed(b"narrows-transaction", PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data))
    if fd < 0:
        raise OSError(-fd, os.strerror(-fd))
    return fd


class Table:
    """Blobs in force: kind -> key -> the entry's bytes, as they came."""

    def __init__(self):
        self.id = 0
        self.bytes = 0
        self._kinds = {}

    def check(self, transaction) -> None:
        """Raises Refused when there is no room for it."""
        if self.bytes + transaction.size > TABLE_BYTES:
            raise Refused(f"transaction {transaction.id}: {self.bytes} bytes are in force and {TABLE_BYTES} are the bound; "
                          "are resources deleted that nobody uses any more?")

    def store(self, transaction) -> None:
        for op, kind, key, raw in transaction.entries:
            kept = self._kinds.setdefault(kind, {})
            self.bytes -= len(kept.pop(key, b""))
            if op == OP_PUT:
                kept[key] = raw
                self.bytes += len(raw)
        self.id = transaction.id

    def snapshot(self, bint keeper_only) -> int:
        """A memfd with a transaction of everything in force, with or without what the keeper keeps to itself."""
        return write(self.id, [raw for kind in sorted(self._kinds) if keeper_only or kind < KIND_KEEPER_ONLY
                               for raw in self._kinds[kind].values()])

    def __len__(self):
        return sum(len(kept) for kept in self._kinds.values())
