"""What the parts of hbone.pyx share: the streams of one input as the peer, our users and the harness know them; what the peer says next."""
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from ext.core.buffer cimport Buffers
from ext.core.loop cimport Source
from ext.tunnel.shapes cimport Pad, Stream
from driver cimport Feed

cdef enum:
    LANES = 128                     # streams of one input
    WIRE = 262144                   # bytes of one operation

cdef enum Op:
    CONNECTS = 0
    DATA
    RESETS
    UPDATES
    SETS
    PINGS
    PRIORITISES
    GOES
    FRAME
    RAW
    TRAILERS
    BOMB
    ANSWERS
    READS
    WRITES
    SHUTS
    ABORTS
    DROPS
    PULLS
    TIME
    TAKES
    GIVES
    MANY                            # CONNECT and RST_STREAM, again and again
    REVOKES                         # a list comes that names the peer
    OP_COUNT

cdef struct Lane:
    Source source                   # first
    Stream* stream
    uint8_t intended                # 1: what was said asks for it rightly
    uint8_t asked
    uint8_t taken                   # by us
    uint8_t agreed                  # answered 200
    uint8_t headed                  # HEADERS of ours came
    uint8_t gone                    # RST_STREAM of ours
    uint64_t said                   # bytes of the peer in it
    uint64_t read                   # of these by the user
    uint64_t wrote
    uint64_t heard

cdef struct Scene:
    Lane lanes[128]
    char wire[262144]               # what the peer says with this operation
    uint32_t wire_n
    char scratch[131072]
    bint wild                       # noise was said: what it means nobody knows
    uint32_t last_id                # of the streams that the peer asked for
    uint32_t pings
    Pad pad
    Buffers pool

cdef inline uint8_t tone(uint32_t id, uint64_t at, uint8_t way) noexcept nogil:
    """The byte at this place of this stream; 251: no multiple of any buffer."""
    return <uint8_t>(id * 37 + at % 251 + way)

cdef Scene* scene() noexcept nogil
cdef Lane* lane_of(uint32_t id) noexcept nogil      # NULL: beyond those of one input, or no stream of a client's
