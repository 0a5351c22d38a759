"""One end of a control connection: messages in, messages out through a bounded queue. Format: ext/core/protocol.pxd.

    datagram   u16 type, u16 version, u32 sequence, payload      descriptors beside it
"""
import os
import struct
from collections import deque

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.errno cimport EAGAIN, EMSGSIZE
from libc.stdint cimport int64_t, uint32_t
from ext.core.protocol cimport PROTOCOL_VERSION
from ext.sys.packet cimport PACKET_DESCRIPTORS_MAX, packet_receive, packet_send

from ext.keeper.loop import READ, WRITE

cdef extern from "<errno.h>" nogil:
    int ETOOMANYREFS

HEAD = struct.Struct("<HHI")
U16, U32, U64 = struct.Struct("<H"), struct.Struct("<I"), struct.Struct("<Q")

cdef enum:
    RECEIVE_BYTES = 65536


class Gone(Exception):
    """The peer closed its end, or does not read what it is sent."""


class Malformed(Exception):
    """A message that breaks the protocol. `sequence` is what it said, 0 if it was too short to say."""

    def __init__(self, str text, sequence=0):
        super().__init__(text)
        self.sequence = sequence


class Fields:
    """Reads a payload from its start. Every take raises Malformed when there is less than it needs."""

    def __init__(self, bytes data, str what):
        self._data, self._at, self._what = data, 0, what

    def take(self, size_t size) -> bytes:
        cdef size_t at = self._at
        if size > len(self._data) - at:
            raise Malformed(f"{self._what}: payload of {len(self._data)} bytes is cut; {at + size} are needed")
        self._at = at + size
        return self._data[at:at + size]

    def u8(self) -> int:
        return self.take(1)[0]

    def u16(self) -> int:
        return U16.unpack(self.take(2))[0]

    def u32(self) -> int:
        return U32.unpack(self.take(4))[0]

    def u64(self) -> int:
        return U64.unpack(self.take(8))[0]

    def text(self, size_t most) -> str:
        cdef size_t size = self.u32()
        if size > most:
            raise Malformed(f"{self._what}: text of {size} bytes, at most {most}")
        try:
            return self.take(size).decode()
        except UnicodeDecodeError:
            raise Malformed(f"{self._what}: text is not UTF-8") from None

    def end(self) -> None:
        if self._at != len(self._data):
            raise Malformed(f"{self._what}: {len(self._data) - self._at} bytes too many")


def text(str value) -> bytes:
    """`str` of the protocol."""
    data = value.encode("utf-8", "replace")
    return U32.pack(len(data)) + data


class Link:
    """Owns `fd`, a non-blocking SOCK_SEQPACKET socket. `room`: descriptors accepted with one message. `queue`: messages that may wait."""

    def __init__(self, loop, int fd, handler, int room, int queue):
        self.fd = fd
        self._loop, self._room, self._most = loop, room, queue
        self._queue = deque()
        loop.add(fd, handler)

    @property
    def waiting(self) -> int:
        """Messages that the peer has not taken."""
        return len(self._queue)

    def receive(self):
        """(type, sequence, payload, descriptors), which the caller owns; None when there is nothing now. Raises Gone, Malformed."""
        cdef char[RECEIVE_BYTES] data
        cdef int[PACKET_DESCRIPTORS_MAX] fds
        cdef uint32_t n = 0, i
        cdef int64_t got = packet_receive(self.fd, data, RECEIVE_BYTES, fds, self._room, &n)
        if got == -EAGAIN:
            return None
        if got == 0 or (got < 0 and got != -EMSGSIZE and got != -ETOOMANYREFS):
            raise Gone("closed by the peer" if got == 0 else os.strerror(<int>-got))
        held = [fds[i] for i in range(n)]
        try:
            # of a message that was too long the start is there, and tells whom to answer
            head = PyBytes_FromStringAndSize(data, got if 0 < got < 8 else 8)
            kind, version, sequence = HEAD.unpack(head) if got >= 8 or got < 0 else (0, 0, 0)
            if got == -EMSGSIZE:
                raise Malformed(f"a message is longer than {RECEIVE_BYTES} bytes", sequence)
            if got == -ETOOMANYREFS:
                raise Malformed(f"a message carries more than {self._room} descriptors", sequence)
            if got < 8:
                raise Malformed(f"a message of {got} bytes is shorter than its head (8)")
            if version != PROTOCOL_VERSION:
                raise Malformed(f"protocol version {version}, {PROTOCOL_VERSION} is spoken here", sequence)
        except Malformed:
            close_all(held)
            raise
        return kind, sequence, PyBytes_FromStringAndSize(data + 8, got - 8), held

    def send(self, int kind, sequence, bytes payload=b"", fds=()) -> None:
        """Sends or queues; the caller keeps its descriptors. Raises Gone when the peer is, or its queue is full."""
        message = HEAD.pack(kind, PROTOCOL_VERSION, sequence) + payload
        if not self._queue:
            try:
                if self._put(message, fds):
                    return
            except OSError as error:
                raise Gone(str(error)) from None
        if len(self._queue) >= self._most:
            raise Gone(f"{len(self._queue)} messages wait and are not read")
        copies = []
        try:
            for fd in fds:
                copies.append(os.dup(fd))
        except OSError:
            close_all(copies)
            raise
        self._queue.append((message, copies))
        if len(self._queue) == 1:
            self._loop.modify(self.fd, READ | WRITE)

    def flush(self) -> None:
        """Call when the socket is writable. Raises Gone."""
        while self._queue:
            message, fds = self._queue[0]
            try:
                if not self._put(message, fds):
                    return
            except OSError as error:
                raise Gone(str(error)) from None
            self._queue.popleft()
            close_all(fds)
        self._loop.modify(self.fd, READ)

    def _put(self, bytes message, fds) -> bool:
        cdef int[PACKET_DESCRIPTORS_MAX] raw
        cdef uint32_t n = 0
        cdef int64_t sent
        for fd in fds:
            if n == PACKET_DESCRIPTORS_MAX:
                raise ValueError(f"{len(fds)} descriptors, at most {PACKET_DESCRIPTORS_MAX} go with a message")
            raw[n] = fd
            n += 1
        sent = packet_send(self.fd, PyBytes_AS_STRING(message), PyBytes_GET_SIZE(message), raw, n)
        if sent == -EAGAIN:
            return False
        if sent < 0:
            raise OSError(-sent, os.strerror(<int>-sent))
        return True

    def close(self) -> None:
        if self.fd >= 0:
            self._loop.remove(self.fd)
            os.close(self.fd)
            self.fd = -1
            for _, fds in self._queue:
                close_all(fds)
            self._queue.clear()


def close_all(fds) -> None:
    for fd in fds:
        os.close(fd)
