"""The log ring between one worker (writer) and the agent (reader): a record for each connection or request that ended.

One writer, one reader, no lock, and right on machines with weak memory order: a record is written, then `head` is stored with release; the
reader loads `head` with acquire, copies, then stores `tail` with release, which the writer loads with acquire before it writes over what
was read. The segment belongs to a worker index and outlives the worker; the agent writes `tail` alone. What a worker wrote is not
trusted: the door bounds it.
"""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from ext.core.shm cimport Stats
from ext.core.text cimport Span

cdef enum:
    LOG_MAGIC = 0x474c524e        # 'NRLG'
    LOG_VERSION = 1
    LOG_BYTES = 1048576           # ring capacity, power of two
    LOG_TEXT_MAX = 1024           # a string is cut there
    LOG_SKIP = 0xffffffffu

cdef struct LogHeader:             # 4096 bytes reserved
    uint32_t magic
    uint16_t version
    uint16_t pad
    uint32_t capacity
    uint32_t pad2
    uint64_t head                  # bytes ever written (worker, release)
    uint64_t tail                  # bytes ever consumed (agent, release)

# A log record, padded to 8: this struct, then TEXT_COUNT strings (u16 length + bytes), in the order of LogText, then LogLegs where they
# were asked for. Strings are cut at 1,024 bytes. A record never wraps: a record of length 0xffffffff says "skip to the ring's start".
# What is added goes behind what is there: a reader knows by the length how much of it there is (padding is less than 8 bytes, any
# addition is more), and passes over what it does not know. So agents and workers of two builds read each other and LOG_VERSION stays.
cdef packed struct LogRecord:
    uint32_t length                # of the whole record, padding included
    uint8_t reporter
    uint8_t protocol               # SeriesProtocol
    uint8_t flag
    uint8_t version_minor          # HTTP/1.x
    uint64_t start_us              # CLOCK_REALTIME
    uint64_t duration_us
    uint64_t upstream_us           # until the first byte of the response; 0 none
    uint64_t received              # from downstream, bytes (request body for HTTP)
    uint64_t sent                  # to downstream, bytes (response body for HTTP)
    uint32_t source                # indexes as in SeriesKey
    uint32_t destination
    uint32_t service
    uint16_t code
    uint16_t details               # Detail
    uint8_t addresses[95]          # five LogAddress, order below

cdef packed struct LogAddress:     # 19 bytes
    uint8_t family                 # 0, 4, 6
    uint16_t port
    uint8_t ip[16]

# order in LogRecord.addresses: downstream remote, downstream local (original destination), upstream remote, upstream local, spare

cdef enum LogText:
    TEXT_METHOD = 0
    TEXT_PATH = 1
    TEXT_AUTHORITY = 2
    TEXT_USER_AGENT = 3
    TEXT_REQUEST_ID = 4
    TEXT_FORWARDED_FOR = 5
    TEXT_ROUTE = 6
    TEXT_CLUSTER = 7
    TEXT_SNI = 8
    TEXT_FAILURE = 9               # upstream transport failure reason
    TEXT_COUNT = 10

cdef enum LegKind:                 # what carries one side of a connection
    LEG_NONE = 0                   # nothing: there is no connection on that side
    LEG_SOCKET                     # a TCP connection of its own
    LEG_TUNNEL                     # a stream of a tunnel; the figures are those of the tunnel's TCP connection
    LEG_NODE                       # joined inside this worker to the other pod: no TCP, no figures
    LEG_KINDS

cdef struct LogLeg:                # 16 bytes; figures as in ext/sys/tcpinfo.pxd, at the moment at which the record was written
    uint32_t rtt_us
    uint32_t min_rtt_us
    uint32_t retransmits
    uint8_t kind                   # LegKind
    uint8_t pad[3]

cdef struct LogLegs:
    LogLeg downstream
    LogLeg upstream

cdef struct LogRing:                # private to the worker
    LogHeader* header
    char* ring
    uint64_t head                   # as in the header: a reader that scribbles there does not move the writer

# For the keeper: a fresh zeroed segment of log_segment() bytes. 0, or -1: too small.
cdef size_t log_segment() noexcept nogil
cdef int log_format(void* memory, size_t size) noexcept nogil

# For a worker that starts: 0, or -1 for a segment of another format. It goes on behind the records of the one before.
cdef int log_attach(LogRing* log, void* memory, size_t size) noexcept nogil

# One record; `record.length` is set here, `texts` has TEXT_COUNT spans (n 0: none), `legs` may be NULL. 1; 0: dropped and counted, the
# ring is full.
cdef int log_append(LogRing* log, Stats* stats, LogRecord* record, const Span* texts, const LogLegs* legs) noexcept nogil
