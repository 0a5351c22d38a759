"""The first bytes of a connection: HTTP/1, HTTP/2, TLS or TCP.

Input: the bytes.

What must hold:
  1. Every prefix gives "more" until it gives an answer, and the answer stays, whatever follows.
  2. SNIFF_MAX bytes always give an answer, and no more of them are read.
  3. HTTP/2 is its preface and nothing else; TLS begins a handshake record.
  4. Any request with a name that begins with three capitals that our parser takes with a known method is HTTP/1.
"""
from libc.stdint cimport uint8_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcmp
from ext.wire.http1 cimport M_OTHER, Head, parse_request
from ext.wire.sniff cimport SNIFF_HTTP1, SNIFF_HTTP2, SNIFF_MAX, SNIFF_MORE, SNIFF_TLS, sniff
from driver cimport Curtain, claim, curtain_close, curtain_open, curtain_show, run as drive


cdef int one_input(const uint8_t* data, size_t size) noexcept nogil:
    cdef Curtain c
    cdef Head* head
    cdef size_t i, scanned = 0
    cdef int said = SNIFF_MORE, before = SNIFF_MORE
    curtain_open(&c, data, size)
    for i in range(1, (size if size < SNIFF_MAX + 16 else SNIFF_MAX + 16) + 1):
        curtain_show(&c, i if i < SNIFF_MAX else SNIFF_MAX)
        said = sniff(<const uint8_t*>c.data, i)
        claim(before == SNIFF_MORE or said == before, b"an answer stays, whatever follows")
        claim(said != SNIFF_MORE or i < SNIFF_MAX, b"SNIFF_MAX bytes give an answer")
        before = said
    claim(size == 0 or sniff(data, size) == said, b"the whole gives what its prefixes gave")
    if said == SNIFF_HTTP2:
        claim(memcmp(data, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 24) == 0, b"HTTP/2 is its preface")
    elif said == SNIFF_TLS:
        claim(data[0] == 22 and data[1] == 3 and data[5] == 1, b"TLS begins with a ClientHello")
    if size and data[0] >= b'A' and data[0] <= b'Z':
        head = <Head*>malloc(sizeof(Head))
        if parse_request(<const char*>data, size, &scanned, head) > 0 and head.method_id != M_OTHER:
            claim(said == SNIFF_HTTP1, b"what is parsed as a request with a known method is HTTP/1")
        free(head)
    curtain_close(&c)
    return 0


def run(list words):
    return drive(words, one_input)
