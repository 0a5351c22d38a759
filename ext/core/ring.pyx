"""See ring.pxd. First the worker's side, without Python; then the door for the keeper and the agent, over any buffer."""
from libc.stdint cimport uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy
from ext.core.shm cimport (DETAIL_COUNT, FLAG_COUNT, HEADER_BYTES, Stats, bump, nrw_load, nrw_load_acquire, nrw_store_release)
from ext.core.text cimport Span
from ext.core.view cimport View, py_address
from ext.core.shm import DETAILS, FLAGS, PROTOCOLS, REPORTERS

if sizeof(LogRecord) != 159 or sizeof(LogAddress) != 19 or sizeof(LogLeg) != 16 or sizeof(LogLegs) != 32:
    raise ImportError("ext.core.ring: a struct has not the size that both sides agreed on")
if sizeof(LogHeader) > HEADER_BYTES:
    raise ImportError("ext.core.ring: the header is larger than the room reserved for it")


cdef size_t log_segment() noexcept nogil:
    return HEADER_BYTES + LOG_BYTES


cdef int log_format(void* memory, size_t size) noexcept nogil:
    cdef LogHeader* header = <LogHeader*>memory
    if size < log_segment():
        return -1
    header.version = LOG_VERSION
    header.capacity = LOG_BYTES
    header.magic = LOG_MAGIC
    return 0


cdef int log_attach(LogRing* log, void* memory, size_t size) noexcept nogil:
    cdef LogHeader* header = <LogHeader*>memory
    if size < log_segment() or header.magic != LOG_MAGIC or header.version != LOG_VERSION or header.capacity != LOG_BYTES:
        return -1
    log.header = header
    log.ring = <char*>memory + HEADER_BYTES
    log.head = nrw_load(&header.head)
    return 0


cdef int log_append(LogRing* log, Stats* stats, LogRecord* record, const Span* texts, const LogLegs* legs) noexcept nogil:
    cdef uint32_t size = sizeof(LogRecord)
    cdef uint32_t i
    cdef uint32_t n
    cdef uint32_t at = <uint32_t>(log.head & (LOG_BYTES - 1))
    cdef uint32_t skip = 0
    cdef uint64_t used = log.head - nrw_load_acquire(&log.header.tail)
    cdef uint16_t length
    cdef char* out
    for i in range(TEXT_COUNT):
        size += 2 + (texts[i].n if texts[i].n < LOG_TEXT_MAX else LOG_TEXT_MAX)
    if legs != NULL:
        size += sizeof(LogLegs)
    size = (size + 7) & ~<uint32_t>7
    if at + size > LOG_BYTES:
        skip = LOG_BYTES - at
    if used > LOG_BYTES or LOG_BYTES - used < skip + size:     # the first: a reader wrote nonsense
        bump(&stats.header.dropped_records, 1)
        return 0
    if skip:
        (<uint32_t*>(log.ring + at))[0] = LOG_SKIP
        at = 0
    out = log.ring + at
    record.length = size
    memcpy(out, record, sizeof(LogRecord))
    out += sizeof(LogRecord)
    for i in range(TEXT_COUNT):
        n = texts[i].n if texts[i].n < LOG_TEXT_MAX else LOG_TEXT_MAX
        length = <uint16_t>n
        memcpy(out, &length, 2)
        if n:
            memcpy(out + 2, texts[i].p, n)
        out += 2 + n
    if legs != NULL:
        memcpy(out, legs, sizeof(LogLegs))
    log.head += skip + size
    nrw_store_release(&log.header.head, log.head)
    return 1


# ---- door ------------------------------------------------------------------------------------------------------

def log_bytes() -> int:
    """Size of a log segment."""
    return log_segment()


def format_log(memory) -> None:
    """Initialises a fresh (zeroed) log segment in a writable buffer. ValueError: too small."""
    cdef View view = View(memory, log_segment(), True)
    log_format(view.raw.buf, view.raw.len)


cdef enum:
    START_MAX_US = 253402300799000000   # the end of year 9999: what a datetime can say

TEXTS = ("method", "path", "authority", "user_agent", "request_id", "forwarded_for", "route", "cluster", "sni", "failure")
LEGS = (None, "socket", "tunnel", "node")
if len(LEGS) != LEG_KINDS:
    raise ImportError("ext.core.ring: LEGS do not match their enum")
ADDRESSES = ("downstream_remote", "downstream_local", "upstream_remote", "upstream_local")


cdef tuple py_leg(const LogLeg* leg):
    return LEGS[leg.kind], leg.rtt_us, leg.min_rtt_us, leg.retransmits


cdef dict py_record(const char* data, uint32_t size):
    """The dict of one record, or None: it is not one."""
    cdef LogRecord record
    cdef uint32_t at = sizeof(LogRecord)
    cdef LogLegs legs
    cdef uint16_t length
    memcpy(&record, data, sizeof(LogRecord))
    if (record.reporter not in REPORTERS or record.protocol not in PROTOCOLS or record.flag >= FLAG_COUNT
            or record.details >= DETAIL_COUNT or record.start_us > START_MAX_US):
        return None
    entry = {
        "reporter": REPORTERS[record.reporter], "protocol": PROTOCOLS[record.protocol], "flag": FLAGS[record.flag],
        "version_minor": record.version_minor, "start_us": record.start_us, "duration_us": record.duration_us,
        "upstream_us": record.upstream_us, "received": record.received, "sent": record.sent, "source": record.source,
        "destination": record.destination, "service": record.service, "code": record.code, "details": DETAILS[record.details],
    }
    for i, name in enumerate(ADDRESSES):
        entry[name] = py_address(record.addresses + 19 * <int>i)
    for name in TEXTS:
        if at + 2 > size:
            return None
        memcpy(&length, data + at, 2)
        at += 2
        if at + length > size:
            return None
        entry[name] = data[at:at + length].decode("utf-8", "backslashreplace")
        at += length
    if size - at >= sizeof(LogLegs):
        memcpy(&legs, data + at, sizeof(LogLegs))
        if legs.downstream.kind >= LEG_KINDS or legs.upstream.kind >= LEG_KINDS:
            return None
        entry["downstream_leg"] = py_leg(&legs.downstream)
        entry["upstream_leg"] = py_leg(&legs.upstream)
    return entry


def drain_log(memory, most: int = 1000) -> tuple:
    """Takes at most `most` records out of the ring: (list of dicts with the fields of AccessRecord, bytes skipped as damaged).

    The memory must be writable: `tail` moves. One reader at a time. A worker that wrote nonsense loses what is in the ring.
    ValueError: another format.
    """
    cdef View view = View(memory, log_segment(), True)
    cdef LogHeader* header = <LogHeader*>view.raw.buf
    cdef const char* ring = <const char*>view.raw.buf + HEADER_BYTES
    cdef uint64_t head
    cdef uint64_t tail
    cdef uint32_t at
    cdef uint32_t length
    cdef uint64_t damaged = 0
    if header.magic != LOG_MAGIC or header.version != LOG_VERSION or header.capacity != LOG_BYTES:
        raise ValueError(f"not a log segment of version {LOG_VERSION}: magic {header.magic:#x}, version {header.version}; "
                         "keeper and agent are of different builds: restart the keeper")
    head = nrw_load_acquire(&header.head)
    tail = nrw_load(&header.tail)
    found = []
    if head - tail > LOG_BYTES:
        damaged = LOG_BYTES
        tail = head
    while tail != head and len(found) < most:
        at = <uint32_t>(tail & (LOG_BYTES - 1))
        length = 0
        if at & 7 == 0:
            memcpy(&length, ring + at, 4)
        if length == LOG_SKIP and LOG_BYTES - at <= head - tail:
            tail += LOG_BYTES - at
            continue
        if length < sizeof(LogRecord) or length & 7 or at + length > LOG_BYTES or length > head - tail:
            damaged += head - tail
            tail = head
            break
        copied = ring[at:at + length]           # a copy of our own: what is checked is what is read
        entry = py_record(copied, length)
        if entry is None:
            damaged += length
        else:
            found.append(entry)
        tail += length
    nrw_store_release(&header.tail, tail)
    return found, damaged
