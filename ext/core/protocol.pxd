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
    MSG_KEY_MAKE = 12
    MSG_KEY_FORGET = 13
    MSG_KEYS = 14
    MSG_POD_DNS = 15
    MSG_POD_LEAVE = 16
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
    MSG_KEY = 72
    MSG_POD_GO = 73

# Payloads between agent and keeper (`str`, `list` as ARCHITECTURE.md has them, nothing padded). A request without a
# mark works on every connection; one with * only on the master's, which is whoever said HELLO last.
#   HELLO*       u16 lowest, u16 highest version spoken.
#                Answer: u16 version, str instance, u32 pid, u64 start (CLOCK_REALTIME, us), u32 workers
#   INVENTORY    empty. Answer: list of (u32 handle, str uid, u64 netns inode, u8 listening) and one memfd: a
#                transaction with every blob
#   POD_ADD*     u32 handle, str uid, u8 Family bits, str identity (empty: none), one descriptor of a network namespace.
#                Answer OK; the same again is no error, and with another identity gives the pod that one
#   POD_DNS*     u32 handle. Answer empty, with the pod's DNS sockets (UDP and TCP, 127.0.0.1 and, where there is IPv6, ::1), made now or
#                before: they stay as long as the pod. A keeper of a build before this one answers ERROR (malformed)
#   POD_DEL*     u32 handle. Answer OK, also when there is no such pod
#   POD_LEAVE*   u32 handle. Peers of its tunnels are told to go elsewhere; the pod stays as it is otherwise. Answer OK, also when there is
#                no such pod. A keeper of a build before this one answers ERROR (malformed)
#   COMMIT*      empty, one sealed memfd. Answer OK once it is in force in every worker
#   SHM          empty. Answer: list of u32 index, with two descriptors each (statistics, log ring) in that order
#   WORKERS      empty. Answer: list of (u32 index, u32 pid, u8 WorkerState, u32 restarts, u32 pods); pid 0: none runs
#   DRAIN*       u32 milliseconds. No listener any more; answer OK when the last connection ended or the time is over
#   SHUTDOWN*    empty. Answer OK, then everything ends
#   KEY_MAKE*    str identity (SPIFFE). Answer: u32 key id, str certificate request (PKCS#10, DER)
#   KEY_FORGET*  u32 key id. Answer OK, also when there is no such key
#   KEYS         empty. Answer: list of (u32 key id, str identity)
#   OK           empty
#   ERROR        u8 Reason, str text
#   MISS         str key                                        } to the master, unasked, sequence 0
#   WORKER       u32 index, u32 pid, u8 WorkerState, i32 status } (DIED: exit status, or minus the signal)
# Payloads between keeper and worker, as ARCHITECTURE.md names them (`str`, `list` as there, nothing padded):
#   COMMIT       empty, one memfd. Answer with the request's sequence: APPLIED (u64 transaction id) or FAILED (u64, str text). The first
#                one is the snapshot; after its APPLIED the worker sends READY (u64 transaction id, sequence 0).
#   POD_ATTACH   u32 handle, list of u8 Listener: one for each descriptor, in their order. No answer.
#   POD_DETACH   u32 handle. Listeners are closed, connections live on. No answer.
#   POD_GO       u32 handle. GOAWAY in the tunnels that were dialled to it; new ones are taken as before. No answer.
#   SOCKETS      u32 handle, u8 family (4 or 6), then as many descriptors as the keeper could make (none: it cannot).
#   KEY          u32 key id, str identity, one sealed memfd with the private key (PKCS#8, DER): before the POD_ATTACH or COMMIT that
#                needs it. No answer.
#   KEY_FORGET   u32 key id. No answer.
#   NEED_SOCKETS u32 handle, u8 family, u16 how many
#   MISS         str key; repeated each second while somebody waits
#   DRAIN        u32 milliseconds; answer DRAINED (empty) with its sequence, when no connection is left or the time is over;
#                then the worker ends with status 0. It does the same within 5 s when the control socket ends.
# A worker inherits these descriptors (its argv: index, uid, gid, seccomp; see ext/proxy/worker.pyx).
cdef enum:
    FD_CONTROL = 3
    FD_STATS = 4
    FD_LOG = 5

cdef enum Reason:
    REASON_MALFORMED = 1    # the message breaks this protocol
    REASON_REFUSED = 2      # understood and not done; the same again will fare the same
    REASON_AWAY = 3         # nobody could do it now (no worker runs); the same may work later

cdef enum WorkerState:
    WORKER_STARTED = 1
    WORKER_READY = 2
    WORKER_DIED = 3
    WORKER_REPLACED = 4     # only as an event: the one that stands in for a dead worker has its pods
    WORKER_DRAINING = 5     # only in WORKERS

cdef enum:
    IDENTITY_BYTES = 384    # the longest: KEYS with every key of a node fits one datagram
    IDENTITIES = 256        # with a key on one node
    KEYS_EACH = 2           # of one identity: the one in use and its successor

cdef enum Family:
    FAMILY_IPV4 = 1
    FAMILY_IPV6 = 2

cdef enum Listener:
    LISTEN_OUTBOUND = 1   # 15001
    LISTEN_INBOUND = 2    # 15006
    LISTEN_HBONE = 3      # 15008: tunnels from other nodes

cdef enum:
    PORT_OUTBOUND = 15001
    PORT_INBOUND = 15006
    PORT_HBONE = 15008
    PORT_DNS = 15053      # no worker's: the agent serves it
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
    KIND_POLICY = 7
    KIND_TRUST = 8
    KIND_CERTIFICATE = 9
    KIND_KEEPER_ONLY = 128   # this kind and above never reach a worker
    KIND_RESOURCE = 128
    KIND_NOTE = 129

cdef enum:
    INDEX_UNKNOWN = 0
    INDEX_PASSTHROUGH = 0xffffffff   # not in the mesh
