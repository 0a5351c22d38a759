"""See shm.pxd. First the worker's side, without Python; then the door for the keeper and the agent, over any buffer."""
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy
from ext.core.view cimport View

if sizeof(Series) != 640 or sizeof(SeriesKey) != 24 or sizeof(TunnelRow) != 496:
    raise ImportError("ext.core.shm: a struct has not the size that both sides agreed on")
if sizeof(Series) - COPIED_WORDS * 8 != 2 * sizeof(uint32_t) + 9 * sizeof(uint64_t):
    raise ImportError("ext.core.shm: what a reader copies does not end where a series' counters do")
if sizeof(StatsHeader) > HEADER_BYTES:
    raise ImportError("ext.core.shm: the header is larger than the room reserved for it")

# ---- statistics ------------------------------------------------------------------------------------------------


cdef size_t stats_segment() noexcept nogil:
    return HEADER_BYTES + (STATS_SLOTS + STATS_OVERFLOW) * sizeof(Series) + sizeof(Roster)


cdef inline Series* series_at(void* memory) noexcept nogil:
    return <Series*>(<char*>memory + HEADER_BYTES)


cdef inline uint32_t overflow_slot(uint8_t reporter, uint8_t protocol) noexcept nogil:
    cdef uint32_t side = 1 if reporter == REPORTER_DESTINATION else 0
    cdef uint32_t kind = protocol - SERIES_TCP if SERIES_TCP <= protocol <= SERIES_GRPC else 0
    return STATS_SLOTS + side * 3 + kind


cdef int stats_format(void* memory, size_t size) noexcept nogil:
    cdef StatsHeader* header = <StatsHeader*>memory
    cdef Series* series = series_at(memory)
    cdef Series* one
    cdef uint8_t reporter
    cdef uint8_t protocol
    if size < stats_segment():
        return -1
    for reporter in range(REPORTER_SOURCE, REPORTER_DESTINATION + 1):
        for protocol in range(SERIES_TCP, SERIES_GRPC + 1):
            one = &series[overflow_slot(reporter, protocol)]
            one.key.reporter = reporter
            one.key.protocol = protocol
            one.key.grpc_status = 0xff
            nrw_store_release(&one.used, SLOT_LIFE | SLOT_VALID)
    header.version = STATS_VERSION
    header.slot_size = sizeof(Series)
    header.slots = STATS_SLOTS
    header.magic = STATS_MAGIC
    return 0


cdef int stats_attach(Stats* stats, void* memory, size_t size, uint32_t pid, uint64_t now_ns) noexcept nogil:
    cdef StatsHeader* header = <StatsHeader*>memory
    cdef Series* one
    cdef uint32_t i
    if (size < stats_segment() or header.magic != STATS_MAGIC or header.version != STATS_VERSION
            or header.slot_size != sizeof(Series) or header.slots != STATS_SLOTS):
        return -1
    stats.header = header
    stats.series = series_at(memory)
    stats.roster = <Roster*>(stats.series + STATS_SLOTS + STATS_OVERFLOW)
    nrw_store(&stats.roster.version, (stats.roster.version | 1) + 2)    # the tunnels of the worker before: none
    nrw_fence_release()
    stats.roster.rows = stats.roster.total = 0
    nrw_store_release(&stats.roster.version, stats.roster.version + 1)
    stats.taken = 0
    header.pid = pid
    nrw_store(&header.started_ns, now_ns)
    nrw_store(&header.heartbeat_ns, now_ns)
    nrw_store(&header.downstream_open, 0)
    nrw_store(&header.upstream_open, 0)
    nrw_store(&header.upstream_idle, 0)
    nrw_store(&header.held, 0)
    nrw_store(&header.buffered_bytes, 0)
    nrw_store(&header.sockets_ready, 0)
    for i in range(<uint32_t>(&header.waiting_memory - &header.descriptors) + 1):
        nrw_store(&header.descriptors + i, 0)
    nrw_store(&header.confinement, 0)
    nrw_store(&header.tunnels_open, 0)
    # the worker before may have died holding
    for i in range(STATS_SLOTS):
        one = &stats.series[i]
        one.holders = 0
        if one.used & SLOT_STATE != SLOT_FREE:
            stats.taken += 1
        if one.used & SLOT_STATE == SLOT_GONE:
            clear(one)                          # or while clearing
    for i in range(STATS_SLOTS):
        one = &stats.series[i]
        if one.forgotten and one.used & SLOT_STATE == SLOT_VALID:
            slot_free(stats, i)
    return 0


cdef inline uint64_t words_hash(const uint64_t* words) noexcept nogil:
    """Three words to one; multipliers are those of MurmurHash3's 64-bit finalizer, which mixes well enough for linear probing."""
    cdef uint64_t h = words[0] * <uint64_t>0x9e3779b97f4a7c15
    h = (h ^ (h >> 32) ^ words[1]) * <uint64_t>0xff51afd7ed558ccd
    h = (h ^ (h >> 32) ^ words[2]) * <uint64_t>0xc4ceb9fe1a85ec53
    return h ^ (h >> 33)


cdef Series* stats_series(Stats* stats, const SeriesKey* key) noexcept nogil:
    cdef uint64_t words[3]
    memcpy(words, key, 24)
    cdef uint32_t i = <uint32_t>words_hash(words) & (STATS_SLOTS - 1)
    cdef Series* one
    cdef Series* gone = NULL
    cdef uint64_t* place
    cdef uint64_t state
    cdef uint32_t n
    while True:                                 # ends: at least an eighth of the slots is free
        one = &stats.series[i]
        state = one.used & SLOT_STATE
        if state == SLOT_FREE:
            break
        if state == SLOT_VALID:
            if memcmp(&one.key, key, 24) == 0:
                one.forgotten = 0               # an index that was forgotten comes back only if the agent was wrong
                return one
        elif gone == NULL:
            gone = one
        i = (i + 1) & (STATS_SLOTS - 1)
    if gone != NULL:
        one = gone
    elif stats.taken >= STATS_FULL:
        bump(&stats.header.overflow_series, 1)
        return &stats.series[overflow_slot(key.reporter, key.protocol)]
    else:
        stats.taken += 1
    state = one.used                            # free or gone: no reader keeps what is written now, but one may be looking
    place = <uint64_t*>&one.key
    for n in range(3):
        nrw_store(&place[n], words[n])
    nrw_store_release(&one.used, ((state & ~<uint64_t>SLOT_STATE) + SLOT_LIFE) | SLOT_VALID)
    return one


cdef void slot_free(Stats* stats, uint32_t i) noexcept nogil:
    """Valid -> gone; the end of a probe run -> free, so that runs get shorter again."""
    cdef Series* one = &stats.series[i]
    cdef uint64_t life = one.used & ~<uint64_t>SLOT_STATE
    nrw_store(&one.used, life | SLOT_GONE)
    nrw_fence_release()                         # a reader that sees a zero below also sees that the slot is gone
    clear(one)
    if stats.series[(i + 1) & (STATS_SLOTS - 1)].used & SLOT_STATE != SLOT_FREE:
        return
    while stats.series[i].used & SLOT_STATE == SLOT_GONE:
        one = &stats.series[i]
        nrw_store_release(&one.used, one.used & ~<uint64_t>SLOT_STATE)
        stats.taken -= 1
        i = (i - 1) & (STATS_SLOTS - 1)


cdef void clear(Series* one) noexcept nogil:
    """Everything but `used`, word by word: a reader may be looking."""
    cdef uint64_t* words = <uint64_t*>one
    cdef uint32_t i
    for i in range(1, sizeof(Series) // 8):
        nrw_store(&words[i], 0)


cdef void series_hold(Series* series) noexcept nogil:
    series.holders += 1


cdef void series_drop(Stats* stats, Series* series) noexcept nogil:
    series.holders -= 1
    if series.forgotten and series.holders == 0:
        slot_free(stats, <uint32_t>(series - stats.series))


cdef void forget(Stats* stats, uint32_t index, int service) noexcept nogil:
    cdef Series* one
    cdef uint32_t i
    for i in range(STATS_SLOTS):
        one = &stats.series[i]
        if one.used & SLOT_STATE != SLOT_VALID:
            continue
        if service:
            if one.key.service != index:
                continue
        elif one.key.source != index and one.key.destination != index:
            continue
        if one.holders:
            one.forgotten = 1
        else:
            slot_free(stats, i)


cdef void stats_forget_workload(Stats* stats, uint32_t index) noexcept nogil:
    if index != 0:
        forget(stats, index, 0)


cdef void stats_forget_service(Stats* stats, uint32_t index) noexcept nogil:
    if index != 0 and index != ~<uint32_t>0:     # unknown, passthrough: these stay
        forget(stats, index, 1)


cdef void series_request(Series* series, uint64_t duration_us, uint64_t request_bytes, uint64_t response_bytes) noexcept nogil:
    bump(&series.opened, 1)
    bump(&series.sent, request_bytes)
    bump(&series.received, response_bytes)
    bump(&series.duration_us, duration_us)
    bump(&series.duration[bucket(DURATION_BOUNDS_US, duration_us)], 1)
    bump(&series.request_bytes[bucket(SIZE_BOUNDS, request_bytes)], 1)
    bump(&series.response_bytes[bucket(SIZE_BOUNDS, response_bytes)], 1)
    bump(&series.closed, 1)


# ---- door ------------------------------------------------------------------------------------------------------

REPORTERS = {REPORTER_SOURCE: "source", REPORTER_DESTINATION: "destination"}
PROTOCOLS = {SERIES_TCP: "tcp", SERIES_HTTP: "http", SERIES_GRPC: "grpc"}
FLAGS = ("-", "UH", "UF", "UO", "NR", "NC", "UC", "UT", "DC", "DPE", "UPE", "DT", "SI", "OM", "DENY", "CERT_REVOKED")
DETAILS = (
    "",
    "via_upstream",
    "route_not_found",
    "cluster_not_found",
    "configuration_not_received",
    "no_healthy_upstream",
    "upstream_reset_before_response_started{remote_connection_failure}",
    "upstream_reset_before_response_started{connection_timeout}",
    "upstream_reset_before_response_started{connection_termination}",
    "upstream_reset_before_response_started{remote_reset}",
    "upstream_reset_before_response_started{protocol_error}",
    "upstream_reset_after_response_started{connection_termination}",
    "upstream_reset_after_response_started{protocol_error}",
    "upstream_reset_before_response_started{overflow}",
    "configuration_overflow",
    "upstream_response_timeout",
    "idle_timeout",
    "duration_timeout",
    "stream_idle_timeout",
    "request_header_timeout",
    "downstream_remote_disconnect",
    "downstream_remote_reset",
    "downstream_local_disconnect",
    "http1.codec_error",
    "http1.headers_too_large",
    "http1.invalid_transfer_encoding",
    "low_version",
    "missing_host_header",
    "overload",
    "overload{no_socket}",
    "upgrade_failed",
    "loop_detected",
    "http1.cannot_forward_chunked_to_http10",
    "overload{pod_connections}",
    "overload{pod_descriptors}",
    "overload{pod_memory}",
    "overload{stalled}",
    "request_body_timeout",
    "peer_not_trusted",
    "rbac_access_denied",
    "workload_not_received",
    "peer_certificate_revoked",
    "http2.codec_error",
)
if len(FLAGS) != FLAG_COUNT or len(DETAILS) != DETAIL_COUNT:
    raise ImportError("ext.core.shm: FLAGS or DETAILS do not match their enum")

# Upper bounds as metrics say them: milliseconds and bytes.
DURATION_BOUNDS_MS = tuple(0.5 if i == 0 else DURATION_BOUNDS_US[i] // 1000 for i in range(BOUNDS))
SIZE_BOUNDS_BYTES = tuple(0.5 if i == 0 else SIZE_BOUNDS[i] for i in range(BOUNDS))

HEADER_FIELDS = ("pid", "heartbeat_ns", "started_ns", "downstream_open", "upstream_open", "upstream_idle", "held",
                 "buffered_bytes", "sockets_ready", "accepted", "overflow_series", "dropped_records", "misses", "parse_errors",
                 "accept_errors", "loop_turns",
                 "descriptors", "descriptors_limit", "buffered_limit", "held_limit", "pod_connections", "pod_connections_limit",
                 "pod_buffered", "pod_buffered_limit", "waiting_memory",
                 "refused_connections", "refused_descriptors", "refused_memory", "refused_held", "refused_head_timeout",
                 "refused_body_timeout", "refused_head_size", "shed_idle", "shed_stalled", "shed_replay", "shed_sockets",
                 "turns_cut", "confinement", "refused_calls", "refused_call", "policy_denied", "policy_cut",
                 "policy_dry_denied", "tunnels_open", "tunnels_opened", "tunnels_failed", "tunnels_revoked", "tunnels_silent",
                 "tunnels_idle", "tunnels_early", "tunnels_early_used", "tunnels_waited")


def stats_bytes() -> int:
    """Size of a statistics segment."""
    return stats_segment()


def format_stats(memory) -> None:
    """Initialises a fresh (zeroed) statistics segment in a writable buffer. ValueError: too small."""
    cdef View view = View(memory, stats_segment(), True)
    stats_format(view.raw.buf, view.raw.len)


cdef StatsHeader* py_stats_header(View view) except NULL:
    cdef StatsHeader* header = <StatsHeader*>view.raw.buf
    if header.magic != STATS_MAGIC or header.version != STATS_VERSION or header.slot_size != sizeof(Series):
        raise ValueError(f"not a statistics segment of version {STATS_VERSION}: magic {header.magic:#x}, version "
                         f"{header.version}; keeper and agent are of different builds: restart the keeper")
    return header


def read_header(memory) -> dict:
    """Gauges and counters of a worker by name (HEADER_FIELDS). ValueError: another format."""
    cdef View view = View(memory, stats_segment(), False)
    cdef StatsHeader* header = py_stats_header(view)
    cdef uint64_t* word = &header.heartbeat_ns
    found = {"pid": header.pid}
    for i, name in enumerate(HEADER_FIELDS[1:]):
        found[name] = nrw_load(&word[i])
    return found


cdef enum:
    COPIED_WORDS = sizeof(SeriesKey) // 8 + 7 + 3 * BUCKETS      # up to `holders`: what follows is the worker's own


cdef int copy_series(const Series* shared, Series* out) noexcept nogil:
    """One life of a series, whole words; 1, or 0: free, or it ended meanwhile."""
    cdef const uint64_t* words = <const uint64_t*>shared
    cdef uint64_t* mine = <uint64_t*>out
    cdef uint64_t before = nrw_load_acquire(&shared.used)
    cdef uint32_t i
    if before & SLOT_STATE != SLOT_VALID:
        return 0
    for i in range(1, COPIED_WORDS):
        mine[i] = nrw_load(&words[i])
    nrw_fence_acquire()
    out.used = nrw_load(&shared.used)
    return out.used == before


def read_series(memory) -> list:
    """(key, values) of every series: two dicts with the fields of `agent.model.telemetry`'s SeriesKey and SeriesValues.

    Series that are freed while they are read are left out, overflow series without a count too. `service` 0xffffffff is the
    passthrough cluster. A key that no worker writes (unknown reporter, protocol or flag) is left out: a worker is not trusted.
    """
    cdef View view = View(memory, stats_segment(), False)
    cdef Series* series = series_at(view.raw.buf)
    cdef Series one
    cdef uint32_t i
    py_stats_header(view)
    found = []
    for i in range(STATS_SLOTS + STATS_OVERFLOW):
        if not copy_series(&series[i], &one):
            continue
        if i >= STATS_SLOTS and one.opened == 0 and one.closed == 0 and one.failed == 0:
            continue
        if one.key.reporter not in REPORTERS or one.key.protocol not in PROTOCOLS or one.key.flag >= FLAG_COUNT:
            continue
        key = {
            "reporter": REPORTERS[one.key.reporter], "protocol": PROTOCOLS[one.key.protocol], "source": one.key.source,
            "destination": one.key.destination, "service": one.key.service, "code": one.key.code, "flag": FLAGS[one.key.flag],
            "grpc_status": None if one.key.grpc_status == 0xff else one.key.grpc_status, "mutual_tls": one.key.security == 1,
        }
        values = {
            "opened": one.opened, "closed": one.closed, "failed": one.failed, "sent": one.sent, "received": one.received,
            "duration_us": one.duration_us, "duration": [one.duration[n] for n in range(BUCKETS)],
            "request_bytes": [one.request_bytes[n] for n in range(BUCKETS)],
            "response_bytes": [one.response_bytes[n] for n in range(BUCKETS)],
        }
        found.append((key, values))
    return found
