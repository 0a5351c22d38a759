"""Shared memory between one worker (writer) and the agent (reader): statistics. The log ring is in ring.pxd.

One writer, no lock. Counters: relaxed store by the worker, relaxed load by the reader. The segment belongs to a
worker index and outlives the worker, so counters never go back.

A slot's life, in the two low bits of `Series.used`; the bits above count its lives, so that a reader who finds the same number
before and after reading has read one life:

    free (0)  -- stats_series -->  valid (1)  -- forgotten and not held -->  gone (2)  -- stats_series -->  valid
                                                                                       -- end of its probe run -->  free

The agent maps it read-only. What a worker wrote is not trusted: the door bounds it.
"""
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from *:
    """
    #include <stdint.h>
    static const uint64_t DURATION_BOUNDS_US[19] __attribute__((unused)) = {500, 1000, 5000, 10000, 25000, 50000, 100000, 250000,
        500000, 1000000, 2500000, 5000000, 10000000, 30000000, 60000000, 300000000, 600000000, 1800000000, 3600000000ull};
    static const uint64_t SIZE_BOUNDS[19] __attribute__((unused)) = {0, 1, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10000,
        30000, 60000, 300000, 600000, 1800000, 3600000};
    #define nrw_load(at) __atomic_load_n((at), __ATOMIC_RELAXED)
    #define nrw_load_acquire(at) __atomic_load_n((at), __ATOMIC_ACQUIRE)
    #define nrw_store(at, value) __atomic_store_n((at), (value), __ATOMIC_RELAXED)
    #define nrw_store_release(at, value) __atomic_store_n((at), (value), __ATOMIC_RELEASE)
    #define nrw_fence_acquire() __atomic_thread_fence(__ATOMIC_ACQUIRE)
    #define nrw_fence_release() __atomic_thread_fence(__ATOMIC_RELEASE)
    """
    const uint64_t DURATION_BOUNDS_US[19]
    const uint64_t SIZE_BOUNDS[19]
    uint64_t nrw_load(const uint64_t* at) noexcept nogil
    uint64_t nrw_load_acquire(const uint64_t* at) noexcept nogil
    void nrw_store(uint64_t* at, uint64_t value) noexcept nogil
    void nrw_store_release(uint64_t* at, uint64_t value) noexcept nogil
    void nrw_fence_acquire() noexcept nogil
    void nrw_fence_release() noexcept nogil

cdef enum:
    STATS_MAGIC = 0x5354524e      # 'NRTS'
    STATS_VERSION = 2
    STATS_SLOTS = 4096            # series per worker; 4096 * 640 B = 2.5 MiB of address space, touched as used
    STATS_OVERFLOW = 6            # series behind them for what found no slot: reporter x protocol
    STATS_FULL = 3584             # slots not free, 7/8: above, probe runs get long and new keys go to overflow
    ROSTER_ROWS = 1024            # tunnels of a worker that are listed; 0.5 MiB, touched as used
    ROSTER_PEER = 384             # bytes of an identity
    HEADER_BYTES = 4096           # of either segment
    BOUNDS = 19
    BUCKETS = 20                  # 19 bounds and +Inf

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
    FLAG_DENY = 14  # a policy said no; Envoy has no letters for it, ztunnel's metrics say DENY
    FLAG_CERT_REVOKED = 15  # the other proxy's certificate is in a revocation list; ztunnel's word
    FLAG_COUNT = 16

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

cdef enum SlotState:
    SLOT_FREE = 0
    SLOT_VALID = 1
    SLOT_GONE = 2                  # probing goes on behind it
    SLOT_STATE = 3                 # mask
    SLOT_LIFE = 4                  # one life more

cdef struct Series:                # 640 bytes; all zero: the slot is free
    uint64_t used                  # SlotState and life; written last (release)
    SeriesKey key
    uint64_t opened                # TCP connections; HTTP: requests begun
    uint64_t closed                # HTTP: requests ended, istio_requests_total
    uint64_t failed                # TCP: connections that reached no server (also counted as closed if opened)
    uint64_t sent                  # TCP: bytes client -> server; HTTP: sum of request bytes (head and body)
    uint64_t received              # TCP: bytes server -> client; HTTP: sum of response bytes
    uint64_t duration_us           # HTTP: sum
    uint64_t duration[20]          # HTTP request duration; not cumulative; bounds in DURATION_BOUNDS_US
    uint64_t request_bytes[20]     # bounds in SIZE_BOUNDS
    uint64_t response_bytes[20]
    uint32_t holders               # the worker's: connections that keep the pointer (series_hold)
    uint32_t forgotten             # the worker's: free it once nobody holds it
    uint64_t reserved[9]

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
    # gauges: what pods have together, what they may have, and what that pod has that has the most (looked at each second)
    uint64_t descriptors
    uint64_t descriptors_limit
    uint64_t buffered_limit
    uint64_t held_limit
    uint64_t pod_connections
    uint64_t pod_connections_limit
    uint64_t pod_buffered
    uint64_t pod_buffered_limit
    uint64_t waiting_memory         # connections that are not read until their pod gives buffers back
    # counters: work that was refused, or that was ended to make room, by reason
    uint64_t refused_connections    # connections_per_pod
    uint64_t refused_descriptors
    uint64_t refused_memory
    uint64_t refused_held           # hold_connections, hold_bytes
    uint64_t refused_head_timeout   # 408
    uint64_t refused_body_timeout   # 408
    uint64_t refused_head_size      # 431, 414
    uint64_t shed_idle              # kept-alive connections of clients
    uint64_t shed_stalled           # whose peer does not read
    uint64_t shed_replay            # copies of requests, kept to send them again
    uint64_t shed_sockets           # prefetched and pooled
    uint64_t turns_cut              # times that a pod had more to do than its turn
    uint64_t confinement           # Confinement of the present worker (ext/sys/seccomp.pxd)
    uint64_t refused_calls         # system calls that the filter refused; each was a worker's end
    uint64_t refused_call          # the last one's number; not reset, so that it can be told after the worker's end
    # counters: what policies said of inbound connections
    uint64_t policy_denied         # when they came, or later
    uint64_t policy_cut            # of these, those that were open when a policy changed
    uint64_t policy_dry_denied     # let through, and would not be if policies on trial were in force
    uint64_t tunnels_open          # gauge: dialled and accepted ones, from their socket on
    # counters: tunnels
    uint64_t tunnels_opened        # handshakes that ended well
    uint64_t tunnels_failed        # that did not, of both sides
    uint64_t tunnels_revoked       # open ones that ended because a revocation list names their peer
    uint64_t tunnels_silent        # open ones whose peer did not answer a PING in time
    uint64_t tunnels_idle          # dialled ones that ended because nobody used them
    uint64_t tunnels_early         # dialled before anything needed them
    uint64_t tunnels_early_used    # of these, that carried a stream
    uint64_t tunnels_waited        # streams that waited for a handshake

cdef enum RosterState:
    ROSTER_CONNECTING = 0
    ROSTER_HANDSHAKE = 1
    ROSTER_OPEN = 2
    ROSTER_FINISHING = 3           # open, and takes no more streams
    ROSTER_STATES = 4

cdef struct TunnelRow:             # 496 bytes: one HBONE tunnel
    uint64_t opened_us             # CLOCK_REALTIME: when its socket was dialled or accepted
    uint64_t bytes                 # of its streams, both ways, ever
    uint64_t streams_ever
    uint64_t until                 # s since 1970: the end of our certificate
    uint64_t peer_until            # and of the peer's; 0: not known yet
    uint32_t pod                   # handle
    uint32_t streams               # open ones
    uint8_t server                 # 1: accepted on 15008, 0: dialled
    uint8_t state                  # RosterState
    uint16_t peer_n
    uint8_t address[20]            # LogAddress: whom we dialled, or who came
    char peer[384]                 # its identity; of a dialled one that has not shaken hands, the one that it must prove
    uint64_t reserved[5]

cdef struct Roster:                # behind the series: the tunnels of the present worker, as of some second ago
    uint64_t version               # odd: being written
    uint32_t rows
    uint32_t total                 # more than the rows have room for, maybe
    uint64_t reserved[6]
    TunnelRow row[1024]            # ROSTER_ROWS

# Envoy's response_code_details (documentation of its HTTP connection manager) where it has one, for TCP records too; the texts
# are in DETAILS. Beside each the response flag it goes with.
cdef enum Detail:
    DETAIL_NONE = 0
    DETAIL_VIA_UPSTREAM             # the server answered
    DETAIL_ROUTE_NOT_FOUND          # NR
    DETAIL_NO_CLUSTER               # NC: a route names a cluster that has not come
    DETAIL_NO_CONFIG                # NC: nothing came for the destination in time, or the control plane does not know it
    DETAIL_NO_HEALTHY_UPSTREAM      # UH
    DETAIL_CONNECT_FAILURE          # UF
    DETAIL_CONNECT_TIMEOUT          # UF
    DETAIL_UPSTREAM_CLOSED          # UC, before the response
    DETAIL_UPSTREAM_RESET           # UC, likewise by RST
    DETAIL_UPSTREAM_PROTOCOL        # UPE, before the response
    DETAIL_UPSTREAM_LATE            # UC, after the response had started
    DETAIL_UPSTREAM_PROTOCOL_LATE   # UPE, likewise
    DETAIL_OVERFLOW                 # UO
    DETAIL_HELD_OVERFLOW            # UO: too many wait for configuration
    DETAIL_RESPONSE_TIMEOUT         # UT
    DETAIL_IDLE                     # DT: TCP without a byte
    DETAIL_DURATION                 # DT
    DETAIL_STREAM_IDLE              # SI
    DETAIL_REQUEST_HEAD_TIMEOUT     # SI, 408
    DETAIL_DOWNSTREAM_CLOSED        # DC
    DETAIL_DOWNSTREAM_RESET         # DC
    DETAIL_DRAIN                    # DT: closed by us
    DETAIL_MALFORMED                # DPE, 400
    DETAIL_HEAD_TOO_LARGE           # DPE, 414 and 431
    DETAIL_BAD_CODING               # DPE, 501
    DETAIL_BAD_VERSION              # DPE, 505
    DETAIL_MISSING_HOST             # DPE, 400
    DETAIL_OVERLOAD                 # OM
    DETAIL_NO_SOCKET                # OM: the keeper sent none in time
    DETAIL_UPGRADE_FAILED           # UPE
    DETAIL_LOOP                     # NR: a connection that would come back to its own listener
    DETAIL_CANNOT_SAY               # UPE: a chunked response to a client of HTTP/1.0
    DETAIL_POD_CONNECTIONS          # UO: the pod has all the connections it may have
    DETAIL_POD_DESCRIPTORS          # OM: and all the descriptors
    DETAIL_POD_MEMORY               # OM: and all the buffers
    DETAIL_STALLED                  # OM: ended because its peer does not read while the pod has no buffers left
    DETAIL_REQUEST_BODY_TIMEOUT     # SI, 408
    DETAIL_DISTRUST                 # DPE: who opened a tunnel is not believed; the failure says why
    DETAIL_RBAC                     # DENY: the policy's name is in TEXT_FAILURE
    DETAIL_UNKNOWN_WORKLOAD         # DENY: nobody has told in time which workload the pod is, so which policies it has
    DETAIL_REVOKED                  # CERT_REVOKED: a revocation list that came names the peer of an open tunnel
    DETAIL_TUNNEL_PROTOCOL          # DPE: the peer of a tunnel floods, or breaks HTTP/2; the failure says how
    DETAIL_COUNT

# ---- the worker's side -------------------------------------------------------------------------------------------

cdef struct Stats:                  # private to the worker
    StatsHeader* header
    Roster* roster
    Series* series                  # STATS_SLOTS, then the overflow ones
    uint32_t taken                  # slots that are not free

# DURATION_BOUNDS_US, SIZE_BOUNDS (above): upper bounds of the first 19 buckets, inclusive. Both are Envoy's default histogram
# buckets (.5 1 5 ... 3600000), which Istio uses for milliseconds and for bytes alike; half a byte is written as 0.

# For the keeper: a fresh zeroed segment of stats_segment() bytes. 0, or -1: too small.
cdef size_t stats_segment() noexcept nogil
cdef int stats_format(void* memory, size_t size) noexcept nogil

# For a worker that starts: 0, or -1 for a segment of another format. Counters go on; gauges and holds of the one before end.
cdef int stats_attach(Stats* stats, void* memory, size_t size, uint32_t pid, uint64_t now_ns) noexcept nogil

# The series of that key, made if need be; never NULL: when the table is full one of the overflow series, and that is counted.
# `key.pad` must be zero (start from memset, or series_key). Valid until the next stats_forget_*; to keep it longer: hold it.
cdef Series* stats_series(Stats* stats, const SeriesKey* key) noexcept nogil
cdef void series_hold(Series* series) noexcept nogil
cdef void series_drop(Stats* stats, Series* series) noexcept nogil

# The workload (service) of that index is gone for good: its series are freed, those that are held when they are let go.
# One pass over the table: some ten microseconds.
cdef void stats_forget_workload(Stats* stats, uint32_t index) noexcept nogil
cdef void stats_forget_service(Stats* stats, uint32_t index) noexcept nogil

cdef inline void bump(uint64_t* counter, uint64_t by) noexcept nogil:       # only by the one writer
    nrw_store(counter, nrw_load(counter) + by)

cdef inline void gauge(uint64_t* at, uint64_t value) noexcept nogil:
    nrw_store(at, value)

cdef inline uint32_t bucket(const uint64_t* bounds, uint64_t value) noexcept nogil:
    cdef uint32_t i = 0
    while i < BOUNDS and value > bounds[i]:
        i += 1
    return i

# A request ended: everything its families need, from the same facts.
cdef void series_request(Series* series, uint64_t duration_us, uint64_t request_bytes, uint64_t response_bytes) noexcept nogil
