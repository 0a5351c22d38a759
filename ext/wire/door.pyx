"""For tests: the wire room driven from Python. Nothing in the mesh imports it."""
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t
from libc.string cimport memset
from cpython.bytes cimport PyBytes_AsString
from ext.core.text cimport Span
from ext.wire.body cimport Body, body_closed, body_feed, body_start
from ext.wire.edit cimport HeaderOp
from ext.wire.forward cimport Forward, forward_request, forward_response, local_reply
from ext.wire.http1 cimport Head, Header, parse_request, parse_response
from ext.wire.sniff cimport SNIFF_MAX as C_SNIFF_MAX
from ext.wire.sniff cimport sniff as c_sniff

import time

FRAMINGS = ("none", "length", "chunked", "until_close", "tunnel")
METHODS = ("OTHER", "GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH")
SNIFFED = ("more", "http1", "http2", "tls", "tcp")
SNIFF_MAX = C_SNIFF_MAX


cdef bytes text(Span s):
    return s.p[:s.n] if s.p != NULL else b""


cdef dict facts(Head* head):
    cdef uint32_t i
    cdef Header* h
    headers = []
    for i in range(head.n_headers):
        h = &head.headers[i]
        headers.append((text(h.name), text(h.value), bool(h.hop)))
    return {
        "size": head.size, "method": text(head.method), "method_id": METHODS[head.method_id], "target": text(head.target),
        "path": text(head.path), "query": text(head.query) if head.has_query else None, "authority": text(head.authority),
        "reason": text(head.reason), "content_type": text(head.content_type), "status": head.status,
        "version_minor": head.version_minor, "framing": FRAMINGS[head.framing], "keep_alive": bool(head.keep_alive),
        "expect_continue": bool(head.expect_continue), "upgrade": bool(head.upgrade), "has_length": bool(head.has_length),
        "chunked": bool(head.chunked), "te_trailers": bool(head.te_trailers), "content_length": head.content_length,
        "headers": headers,
    }


cdef class Parser:
    """One head at a time from a growing buffer; `feed` gives None (more), minus the status, or the facts."""
    cdef Head head
    cdef size_t scanned
    cdef bytes data
    cdef int method

    def __init__(self, request_method=None):
        """request_method: None parses requests, a name of METHODS responses to it."""
        self.data = b""
        self.scanned = 0
        self.method = -1 if request_method is None else METHODS.index(request_method)
        memset(&self.head, 0xaa, sizeof(Head))      # what a scratch head holds before is not looked at

    def feed(self, bytes more):
        cdef int result
        self.data += more
        if self.method < 0:
            result = parse_request(PyBytes_AsString(self.data), len(self.data), &self.scanned, &self.head)
        else:
            result = parse_response(PyBytes_AsString(self.data), len(self.data), &self.scanned, <uint8_t>self.method, &self.head)
        if result == 0:
            return None
        return result if result < 0 else facts(&self.head)

    def forward(self, ops=(), bytes request_id=b"", bytes forwarded_proto=b"", close=False, keep_alive=False,
                peer_http10=False, size_t room=65536):
        """ops: (op number, name, value). The head as forwarded, or the negative result."""
        cdef Forward how
        cdef HeaderOp raw[128]
        cdef bytes name
        cdef bytes value
        cdef int64_t n
        out = bytearray(room)
        cdef char[::1] view = out
        memset(&how, 0, sizeof(Forward))
        for i, (op, name, value) in enumerate(ops):
            raw[<int>i].op = op
            raw[<int>i].name.p = name
            raw[<int>i].name.n = len(name)
            raw[<int>i].value.p = value
            raw[<int>i].value.n = len(value)
        how.ops = raw
        how.n_ops = len(ops)
        how.request_id.p = request_id
        how.request_id.n = len(request_id)
        how.forwarded_proto.p = forwarded_proto
        how.forwarded_proto.n = len(forwarded_proto)
        how.close = close
        how.keep_alive = keep_alive
        how.peer_http10 = peer_http10
        if self.method < 0:
            n = forward_request(&self.head, &how, &view[0], room)
        else:
            n = forward_response(&self.head, &how, &view[0], room)
        return n if n < 0 else bytes(out[:n])

    def body(self):
        follower = Follower()
        body_start(&(<Follower>follower).body, &self.head)
        return follower

    def nanoseconds(self, uint32_t rounds):
        """Mean time of one parse of the bytes fed so far."""
        cdef uint32_t _i
        cdef size_t scanned
        cdef const char* data = PyBytes_AsString(self.data)
        cdef size_t size = len(self.data)
        cdef int total = 0
        start = time.perf_counter_ns()
        with nogil:
            for _i in range(rounds):
                scanned = 0
                total += parse_request(data, size, &scanned, &self.head) > 0
        spent = time.perf_counter_ns() - start
        assert <uint32_t>total == rounds
        return spent / rounds


cdef class Growing:
    """A head that arrives byte by byte, parsed at every prefix: to measure that the work stays linear."""
    cdef bytes data

    def __init__(self, bytes data):
        self.data = data

    def every_prefix(self) -> int:
        cdef Head head
        cdef size_t scanned = 0
        cdef size_t size
        cdef int result = 0
        cdef const char* data = PyBytes_AsString(self.data)
        cdef size_t total = len(self.data)
        with nogil:
            for size in range(1, total + 1):
                result = parse_request(data, size, &scanned, &head)
                if result != 0:
                    break
        return result


cdef class Follower:
    """`feed` gives (taken, done), taken -1 for a framing error."""
    cdef Body body

    def feed(self, bytes data):
        cdef uint8_t done = 0
        taken = body_feed(&self.body, PyBytes_AsString(data), len(data), &done)
        return taken, bool(done)

    @property
    def payload(self):
        return self.body.payload

    @property
    def closed(self):
        return bool(body_closed(&self.body))


def sniff(bytes data):
    return SNIFFED[c_sniff(<const uint8_t*>PyBytes_AsString(data), len(data))]


def reply(uint16_t status, bytes words=b"", close=False, head_only=False, size_t room=4096):
    cdef Span span
    out = bytearray(room)
    cdef char[::1] view = out
    span.p = words
    span.n = len(words)
    n = local_reply(status, span, close, head_only, &view[0], room)
    return n if n < 0 else bytes(out[:n])
