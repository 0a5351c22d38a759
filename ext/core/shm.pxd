"""Shared memory between one worker (writer) and the agent (reader): statistics and the log ring.

One writer, no lock. Counters: relaxed store by the worker, relaxed load by the reader. The two segments belong to a
worker index and outlive the worker, so counters never go back.
"""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t, int64_t

cdef enum:
    STATS_MAGIC = 0x5354524e      # 'NRTS'
    STATS_VERSION = 1
    STATS_SLOTS = 4096            # series per worker; 4096 * 640 B = 2.5 MiB of address space, touched as used
    BUCKETS = 20                  # 19 bounds and +Inf
    LOG_MAGIC = 0x474c524e        # 'NRLG'
    LOG_VERSION = 1
    LOG_BYTES = 1048576           # ring capacity, power of two

cdef enum Reporter:
    REPORTER_SOURCE = 1
    REPORTER_DESTINATION = 2

cdef enum SeriesProtocol:
    SERIES_TCP = 1
    SERIES_HTTP = 2
    SERIES_GRPC = 3

# Response flags (Envoy's letters; docs: access log operator RESPONSE_FLAGS). A connection or request ends with at
# most one; 0 is "-".
cdef enum Flag:
    FLAG_NONE = 0
    FLAG_UH = 1     # no healthy upstream
    FLAG_UF = 2     # upstream connection failure
    FLAG_UO = 3     # overflow (a bound was reached)
    FLAG_NR = 4     # no route
    FLAG_NC = 5     # no cluster: configuration did not come
    FLAG_UC = 6     # upstream closed before the response was complete
    FLAG_UT = 7     # upstream request timeout
    FLAG_DC = 8     # downstream closed
    FLAG_DPE = 9    # downstream protocol error
    FLAG_UPE = 10   # upstream protocol error
    FLAG_DT = 11    # duration or idle timeout
    FLAG_SI = 12    # stream idle timeout (request head or body did not come)
    FLAG_OM = 13    # overload: descriptors or memory
    FLAG_COUNT = 14

cdef packed struct SeriesKey:      # 24 bytes, compared as three u64
    uint32_t source                # workload index
    uint32_t destination           # workload index
    uint32_t service               # service index; 0xffffffff passthrough
    uint16_t code                  # HTTP status as the client saw it; 0 for TCP
    uint8_t reporter
    uint8_t protocol
    uint8_t flag
    uint8_t grpc_status            # 0xff: none
    uint8_t security               # 0 none/unknown, 1 mutual_tls
    uint8_t pad[5]

cdef struct Series:                # 640 bytes; all zero: the slot is free
    uint64_t used                  # 1: key valid (release), written last
    SeriesKey key
    uint64_t opened                # TCP connections; for HTTP requests
    uint64_t closed
    uint64_t failed
    uint64_t sent                  # TCP: bytes client -> server; HTTP: sum of request bytes (head and body)
    uint64_t received              # TCP: bytes server -> client; HTTP: sum of response bytes
    uint64_t duration_us           # HTTP: sum
    uint64_t duration[20]          # HTTP request duration; not cumulative; bounds in DURATION_BOUNDS_US
    uint64_t request_bytes[20]     # bounds in SIZE_BOUNDS
    uint64_t response_bytes[20]
    uint64_t reserved[7]

cdef struct StatsHeader:           # 4096 bytes reserved at the start of the segment
    uint32_t magic
    uint16_t version
    uint16_t slot_size
    uint32_t slots
    uint32_t pid                   # of the present worker
    uint64_t heartbeat_ns          # CLOCK_MONOTONIC, each loop turn (at least once a second)
    uint64_t started_ns
    # gauges of the present worker, set to 0 when a worker starts
    uint64_t downstream_open
    uint64_t upstream_open
    uint64_t upstream_idle
    uint64_t held                  # connections waiting for configuration
    uint64_t buffered_bytes
    uint64_t sockets_ready         # prefetched sockets
    # counters
    uint64_t accepted
    uint64_t overflow_series       # updates that went to the overflow series
    uint64_t dropped_records       # log records dropped because the ring was full
    uint64_t misses
    uint64_t parse_errors
    uint64_t accept_errors
    uint64_t loop_turns

cdef struct LogHeader:             # 4096 bytes reserved
    uint32_t magic
    uint16_t version
    uint16_t pad
    uint32_t capacity
    uint32_t pad2
    uint64_t head                  # bytes ever written (worker, release)
    uint64_t tail                  # bytes ever consumed (agent, release)

# A log record, padded to 8: this struct, then TEXT_COUNT strings (u16 length + bytes), in the order of LogText. Strings are cut
# at 1,024 bytes. A record never wraps: a record of length 0xffffffff says "skip to the ring's start".
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
    uint16_t details               # index into ext.core.shm.DETAILS (response_code_details)
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
