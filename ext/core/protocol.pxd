"""Every constant of the control protocol and the blob format. ARCHITECTURE.md explains them; nobody repeats them."""

cdef enum:
    PROTOCOL_VERSION = 1

# Message types. Requests and their answers share a number; OK and ERROR answer what has no answer of its own.
cdef enum Message:
    MSG_OK = 1
    MSG_ERROR = 2
    MSG_HELLO = 3
    MSG_INVENTORY = 4
    MSG_POD_ADD = 5
    MSG_POD_DEL = 6
    MSG_COMMIT = 7
    MSG_SHM = 8
    MSG_WORKERS = 9
    MSG_DRAIN = 10
    MSG_SHUTDOWN = 11
    MSG_MISS = 32
    MSG_WORKER = 33
    MSG_READY = 64
    MSG_APPLIED = 65
    MSG_FAILED = 66
    MSG_POD_ATTACH = 67
    MSG_POD_DETACH = 68
    MSG_SOCKETS = 69
    MSG_NEED_SOCKETS = 70
    MSG_DRAINED = 71

# Payloads between keeper and worker, as ARCHITECTURE.md names them (`str`, `list` as there, nothing padded):
#   COMMIT       empty, one memfd. Answer with the request's sequence: APPLIED (u64 transaction id) or FAILED (u64, str text). The first
#                one is the snapshot; after its APPLIED the worker sends READY (u64 transaction id, sequence 0).
#   POD_ATTACH   u32 handle, list of u8 Listener: one for each descriptor, in their order. No answer.
#   POD_DETACH   u32 handle. Listeners are closed, connections live on. No answer.
#   SOCKETS      u32 handle, u8 family (4 or 6), then as many descriptors as the keeper could make (none: it cannot).
#   NEED_SOCKETS u32 handle, u8 family, u16 how many
#   MISS         str key; repeated each second while somebody waits
#   DRAIN        u32 milliseconds; answer DRAINED (empty) with its sequence, when no connection is left or the time is over;
#                then the worker ends with status 0. It does the same within 5 s when the control socket ends.
# A worker inherits these descriptors (its argv: index, uid, gid; see ext/proxy/worker.pyx).
cdef enum:
    FD_CONTROL = 3
    FD_STATS = 4
    FD_LOG = 5

cdef enum Listener:
    LISTEN_OUTBOUND = 1   # 15001
    LISTEN_INBOUND = 2    # 15006

cdef enum:
    PORT_OUTBOUND = 15001
    PORT_INBOUND = 15006
    SOCKET_MARK = 0x539

cdef enum:
    TXN_MAGIC = 0x5457524e
    TXN_VERSION = 1
    OP_PUT = 1
    OP_DELETE = 2

cdef enum Kind:
    KIND_SETTINGS = 1
    KIND_WORKLOAD = 2
    KIND_SERVICE = 3
    KIND_DESTINATION = 4
    KIND_CLUSTER = 5
    KIND_POD = 6
    KIND_KEEPER_ONLY = 128   # this kind and above never reach a worker
    KIND_RESOURCE = 128
    KIND_NOTE = 129

cdef enum:
    INDEX_UNKNOWN = 0
    INDEX_PASSTHROUGH = 0xffffffff   # not in the mesh
