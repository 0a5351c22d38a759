"""A tunnel's structs: one Session over one connection, a Stream for each application connection in it.

    bytes of the socket --> session_feed --> libssl --> libnghttp2 --> Stream.first .. last --> hbone_read
    hbone_write --> Stream.out --> libnghttp2 --> libssl --> session_pull --> Pad.sink --> the socket, once a turn

Who owns what. The proxy owns a Session (embedded in what has the socket). A Stream is the tunnel room's: it is made by hbone_open or
hbone_accept, its user lets it go with hbone_drop, and it is freed when HTTP/2 has ended it too. A Session that ends tells every
Stream (its Source fails) and forgets it.

Memory. A Stream holds what its user has not read (at most its window) and at most SEND_BYTES that are not sent, in buffers of its
user's pod. The window is opened again only by reading: a user who sleeps stops the peer, and with it whoever sends there. The
connection's window is not coupled: one who sleeps must not stop the others.
"""
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t
from ext.core.buffer cimport Buffer, Buffers
from ext.core.loop cimport Source
from ext.core.slab cimport Slab
from ext.tunnel.nghttp2 cimport nghttp2_session
from ext.tunnel.tls cimport Sink, Tls

cdef enum:
    STREAMS_MOST = 200              # at a server; ztunnel's limit too
    WINDOW = 131072                 # of a stream at first: what a user who never reads costs
    WINDOW_WIDE = 1048576           # of one that has read much: 8 Gbit/s at 1 ms
    WIDE_AFTER = 262144
    WINDOW_CONNECTION = 16777216    # above what its streams use
    SEND_BYTES = 65536              # of a stream that are not sent yet
    FRAME_HEAD = 9                  # of HTTP/2 (RFC 9113 4.1)
    WHOLE_LEAST = 4096              # of a frame that has a TLS record of its own, encrypted from where its bytes lie
    HEADERS_SERVER = 65536          # bytes of a header list (RFC 9113 10.5.1), as ztunnel has them. One beyond it ends the tunnel
    HEADERS_CLIENT = 16384
    ODD_MOST = 2000                 # frames a second that carry nothing: PING, SETTINGS, PRIORITY, RST_STREAM, empty DATA, what is refused
    QUEUE_MOST = 2000               # frames that wait for a peer that does not read: its streams' make some 600 at most
    UPDATES_MOST = 50000            # WINDOW_UPDATEs a second
    RESETS_BURST = 2000             # RST_STREAM of a peer: so many at once,
    RESETS_RATE = 1000              # and a second (CVE-2023-44487)
    SINK_BYTES = 262144             # of one turn's write at most
    SINK_KEPT = 65536               # of these for what one frame of nghttp2's makes
    SEALED_BYTES = 131072           # of one read of the socket

cdef enum:
    AUTHORITY_MAX = 280             # a name (253), brackets or a colon and a port
    FORWARDED_MAX = 512
    BAGGAGE_MAX = 1024
    TRACE_MAX = 128

cdef enum StreamState:
    STREAM_OPENING = 0              # CONNECT was sent, or was received and is not answered
    STREAM_OPEN                     # 200
    STREAM_REFUSED                  # another status: `status`
    STREAM_BROKEN                   # reset, or its session ended

cdef enum Trouble:                  # why a session ended
    TROUBLE_NONE = 0
    TROUBLE_TLS                     # tls.fault
    TROUBLE_HTTP2                   # `code`: of libnghttp2
    TROUBLE_FLOOD
    TROUBLE_CLOSED                  # its connection ended, or said it would
    TROUBLE_SILENT                  # no answer to a PING
    TROUBLE_MEMORY

cdef struct Chunk:                  # received bytes; heads the buffer that they lie in
    Chunk* next
    uint32_t size
    uint32_t start
    uint32_t end

cdef struct Asked:                  # of a CONNECT; what is longer than its place is left out (n 0), an authority is then refused
    uint16_t status                 # of a response
    uint8_t method                  # 1: CONNECT, 0: another
    uint8_t authority_n_high        # the authority was too long
    uint32_t bytes                  # of the header list
    uint32_t authority_n
    uint32_t forwarded_n
    uint32_t baggage_n
    uint32_t trace_n
    char authority[280]
    char forwarded[512]
    char baggage[1024]
    char trace[128]

cdef struct Stream:
    Session* session                # NULL: HTTP/2 has ended it
    Stream* prev                    # of the session
    Stream* next
    Source* source                  # whose flags say what may be done; NULL: its user has let it go
    Buffers* pool
    int32_t id
    uint8_t state
    uint8_t server
    uint8_t fin_in                  # the peer's end was received
    uint8_t fin_out                 # our end is to be sent behind `out`
    uint8_t fin_sent
    uint8_t resets                  # RST_STREAM is to be sent behind `out`, or was
    uint8_t deferred                # nghttp2 waits to be told of bytes
    uint8_t wide
    uint8_t swept                   # let go, and seen by so many sweeps
    uint16_t status                 # of the response, 0: none
    int error                       # -errno for its user once it is broken
    uint32_t code                   # HTTP/2's error code
    uint64_t taken                  # bytes that its user has read
    Chunk* first
    Chunk* last
    uint32_t waiting                # bytes in them
    Buffer out

cdef struct Pad:                    # of a worker, shared by its sessions
    char* plain                     # TLS_RECORD: decrypted
    char* gather                    # TLS_RECORD: frames to be encrypted, small ones together
    uint32_t gathered               # bytes in it
    Sink sink                       # SINK_BYTES; whoever calls sends what is in it before the next session is touched
    Slab streams
    Slab asked

ctypedef void (*Told)(Session* session) noexcept nogil
ctypedef void (*Asks)(Session* session, int32_t id, Asked* asked, bint ended) noexcept nogil
ctypedef void (*Wakes)(Session* session, Source* source) noexcept nogil

cdef struct Ops:                    # what the owner does; called from within the session, where no session_... may be called
    Told ready                      # the handshake is over: streams may be opened
    Told dirty                      # there is something to pull; said once, until it was pulled
    Told going                      # GOAWAY came: no more streams
    Asks asks                       # server: a CONNECT; answer it by hbone_accept or hbone_refuse, now
    Wakes wakes                     # a stream's Source has other flags

cdef struct Session:
    nghttp2_session* h2             # NULL: not begun, or closed
    Tls tls
    Pad* pad
    const Ops* ops
    void* owner
    Stream* first
    uint32_t streams                # living ones
    uint32_t let_go                 # of these, whose user is gone
    uint8_t server
    uint8_t dirty
    uint8_t going                   # the peer's GOAWAY
    uint8_t leaving                 # ours: 1 notice, 2 final
    uint8_t pinged                  # a PING is out
    uint8_t trouble                 # Trouble
    int code
    int broke                       # of libnghttp2: what it last refused
    uint32_t odd
    uint32_t updates
    uint64_t odd_ns                 # since when they are counted
    uint64_t opened                 # streams, ever
    uint64_t moved                  # bytes of all streams, ever
    Asked* asked                    # the header list that is being received; NULL: none
