"""A worker's structs, and how a captured connection moves through them.

    accept ── who, where to ──> decide
       │   captured nothing, or a listener itself was dialled: refused
       ├─ inbound ───────────────> policy: reset (DENY); workload unknown: HELD, then DENY
       │                           HTTP if the port is declared so, else TCP, to the original destination
       ├─ outbound, a service ───> destination in force?  no: HELD + MISS (5 s) ──> wake on commit, NC when time is over
       │                              both HTTP and TCP: DETECT (sniff; server-first is dialled after detect_dial_ms)
       ├─ outbound, a workload ──> HTTP if that port is declared so, else TCP, to that very endpoint
       └─ outbound, unknown ─────> TCP to the original destination (passthrough)

    DIAL  a socket from the pod's stock (waits at most 5 s), connect          TCP only; HTTP dials per request
    RELAY bytes both ways until both ends said end, or one reset             ext/proxy/relay
    HTTP  exchange after exchange, see below                                 ext/proxy/http, request, response, answer
    LINGER the last answer is out; reads what still comes (1 s, 256 KiB), so that no reset overtakes the answer
    DEAD  closed; memory goes at the turn's end

    exchange:  IDLE -> HEAD -> (HELD) -> UPSTREAM -> FLOW -> IDLE | closed
                         └──── answer of our own ──> REPLY -> IDLE | LINGER
                                                    FLOW -> TUNNEL (101, or 2xx to CONNECT)

Who owns what. A Conn owns its downstream socket, its four buffers, its timers, its Exchange, a held Destination and Cluster while it uses
them, and the Upstream that works for it. An idle Upstream is owned by its pod's pool. A Captured (pod) outlives its connections. Every end
goes through account: `account_end`, once per TCP connection or HTTP exchange.

    din    bytes from the client: request head, body, pipelined requests (HTTP); client -> server (RELAY)
    uhead  the request head as forwarded
    uin    bytes from the server: response head, body; server -> client (RELAY)
    dhead  the response head as forwarded, or an answer of our own
"""
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from ext.core.buffer cimport Buffer, Buffers
from ext.core.loop cimport Flow, Grave, Loop, Source
from ext.core.pipes cimport Pipe, Pipes
from ext.core.slab cimport Slab
from ext.core.text cimport Span
from ext.core.timer cimport Timer
from ext.core.ring cimport LogRing
from ext.core.shm cimport Series, Stats, StatsHeader
from ext.route.shapes cimport Cluster, Destination, Endpoint, Identity, Route, Slot, Weighted
from ext.route.tables cimport Tables
from ext.sys.stream cimport Peer
from ext.tunnel.shapes cimport Ops, Pad, Session
from ext.tunnel.tls cimport Credentials
from ext.wire.body cimport Body
from ext.wire.http1 cimport Head

cdef enum ConnState:
    C_NEW = 0
    C_HELD
    C_DETECT
    C_DIAL
    C_RELAY
    C_HTTP
    C_LINGER
    C_DEAD

cdef enum ExchangeState:
    X_IDLE = 0              # no byte of a request
    X_HEAD                  # a part of its head
    X_HELD                  # the destination's configuration is waited for
    X_UPSTREAM              # a socket or the connect is waited for
    X_FLOW
    X_REPLY
    X_TUNNEL

cdef enum UpstreamState:
    U_CONNECTING = 0
    U_READY
    U_IDLE                  # in the pool
    U_DEAD

cdef enum Queue:            # a Conn waits in at most one
    Q_NONE = 0
    Q_HELD                  # for configuration
    Q_STOCK                 # for a socket
    Q_MEMORY                # for a buffer to read into

cdef enum Pause:            # of a listener
    RUNNING = 0
    PAUSED_DESCRIPTORS      # the kernel had none: the timer ends it
    PAUSED_FULL             # the pod has what it may have: ends with one of its connections, or by the timer
    REFUSING                # it has been full for hold_timeout_ms: who comes is told

cdef enum Judged:           # what policies said
    JUDGED_NOTHING = 0
    JUDGED_DENIED
    JUDGED_DRY              # would be denied if policies on trial were in force

cdef enum Intent:           # what the decision was
    GO_TCP = 1
    GO_HTTP
    GO_DETECT

cdef enum:
    STOCK_MAX = 64          # prefetched sockets per pod and family
    STOCK_MIN = 4
    STOCK_WAIT_MS = 5000    # a connection that finds none waits so long, as it does for configuration
    ACCEPT_BATCH = 16       # per listener and turn: a flood of one pod leaves time for the others
    ACCEPT_PAUSE_MS = 50    # after EMFILE
    POOL_BUCKETS = 64
    LINGER_MS = 1000
    LINGER_BYTES = 262144
    HALF_CLOSED_MS = 60000  # a client that closed its side after a whole request gets its answer within this silence
    PUMP_ROUNDS = 2         # reads of one direction before the clock is looked at
    POD_PIPES = 32          # of a pod at a time: half of the worker's, so that its slow readers leave some to the others
    PORTS = 6               # listeners of a pod: three kinds, two families
    TEXT_BYTES = 1536

cdef enum TunnelState:
    T_CONNECTING = 0        # a client's: the socket
    T_SHAKING               # TLS
    T_OPEN
    T_DEAD

cdef enum:
    TUNNEL_OPEN_MS = 10000  # connect and handshake, as connect_timeout_ms
    TUNNELS_EACH = 4        # of one key at most; more than one where a bulk transfer has the others
    TUNNELS_POD = 1024      # that a pod serves and has dialled, together
    BUSY_BYTES = 4194304    # within a second: a bulk transfer, which small requests stay away from

cdef struct Tunnel:         # one HBONE connection; see ext/proxy/tunnel.pxd
    Source source           # first
    Grave grave
    Worker* w
    Captured* pod
    Tunnel* prev            # all of its pod
    Tunnel* next
    uint8_t state
    uint8_t server
    uint8_t finishing       # takes no more streams: ends with its last
    uint8_t doubted         # shaking while revocation lists came: asked about once it is open
    uint8_t gone            # GOAWAY came, and `follows` was not called yet
    uint8_t early           # dialled ahead, and not used yet
    uint8_t bridged         # finishing: the streams in it that are idle serve on until the one that takes its place is open
    uint8_t parting         # GOAWAY came, and `parts` was not called yet: due when it is not bridged any more
    uint32_t users          # Conns (server) and Upstreams (client) that point here
    Timer timer             # T_CONNECTING, T_SHAKING: the deadline; T_OPEN: the next PING
    Peer remote             # client: who is dialled; server: who came
    Peer local              # server: the address that was dialled
    Identity* own           # client: both held
    Identity* wanted
    Span expected           # its name
    Upstream* waits_first   # client: for it to open
    Upstream* waits_last
    char* left              # encrypted bytes that the socket did not take
    uint32_t left_at
    uint32_t left_end
    uint32_t left_size
    uint64_t pinged_ns
    uint64_t used_ns        # the last time that it had a stream
    uint64_t second_ns      # since when `moved` is counted
    uint64_t second_moved
    uint64_t rate           # bytes of the second before
    int error               # -errno of a connect
    uint64_t opened_us      # CLOCK_REALTIME
    uint64_t peer_until     # s since 1970: the end of the peer's certificate; 0: not asked yet
    Session session

cdef struct Near:           # a connection between two pods of this worker, see near.pxd. End 0: the Upstream, end 1: the Conn behind it
    Grave grave
    Worker* w
    Captured* pod           # of end 1
    Identity* who           # of end 0's pod; as long as end 1 lives
    Source* ends[2]         # NULL: closed
    Buffers* memory[2]      # of their pods: what an end has not read yet is its own
    Buffer unread[2]        # by that end
    int errors[2]           # that an end gets from now on, -errno
    uint8_t shut[2]         # an end said its last
    uint8_t stopped[2]      # an end found no room
    uint8_t open            # end 1 has taken the connection
    uint16_t refusal        # else, why not, as Conn.refusal

cdef struct Texts:          # of one exchange, for its log record; taken only when logging is on
    uint16_t at[10]
    uint16_t n[10]
    uint16_t used
    char data[1536]

cdef struct Facts:          # what account needs of a TCP connection or of one HTTP exchange
    uint64_t start_ns
    uint64_t start_us
    uint64_t first_byte_ns  # of the response
    uint64_t received       # from downstream: TCP bytes, HTTP body bytes
    uint64_t sent           # to downstream
    uint64_t request_bytes  # HTTP: head and body
    uint64_t response_bytes
    uint64_t told_received  # TCP: what the series already has
    uint64_t told_sent
    uint32_t source         # workload and service indexes
    uint32_t destination
    uint32_t service
    uint16_t code
    uint16_t details
    uint8_t protocol        # SeriesProtocol
    uint8_t flag
    uint8_t version_minor
    uint8_t open            # begun and not yet ended
    int failure             # -errno of a connect that failed

cdef struct Upstream:
    Source source           # first: a Source* is its Upstream*
    Grave grave
    Worker* w
    Captured* pod
    Conn* conn              # whom it works for; NULL: idle
    Upstream* prev          # in the pool's bucket
    Upstream* next
    Upstream* older         # in the pod's order of use
    Upstream* newer
    Timer timer             # connecting: connect timeout; idle: idle timeout
    Peer remote
    Peer local              # for the log; family 0: not asked
    Peer source_ip          # inbound: the client's address that it is bound to; family 0: none
    Tunnel* tunnel          # that carries it, used; NULL: a socket of its own, or `near`
    Near* near              # it is a connection to a pod of this worker; NULL: it is not
    Upstream* wait_prev     # for the tunnel to open
    Upstream* wait_next
    uint8_t waits
    uint64_t dialled_ns
    uint32_t exchanges      # finished on it
    uint8_t state
    int error               # -errno of a failed connect

cdef struct Exchange:       # what a connection needs for HTTP alone: taken when it begins
    Grave grave
    uint8_t state
    uint8_t method
    uint8_t version_minor
    uint8_t grpc
    uint8_t down_keep       # the client's connection may live on
    uint8_t up_keep
    uint8_t request_done    # all of it was received
    uint8_t responding      # the final response head was forwarded (or put into dhead)
    uint8_t response_done
    uint8_t replay          # the whole request still lies in din: may be sent again
    uint8_t retried
    uint8_t lingers         # after the answer of our own
    uint8_t up_broken       # writing to the server failed: only its answer is waited for
    uint8_t has_id          # request_id is set
    uint8_t tunnel_asked    # upgrade or CONNECT
    uint8_t tunnelling
    uint32_t head           # bytes of the request head at din.start, 0 once consumed
    uint32_t at             # next byte of din (from start) to send upstream
    uint32_t fed            # bytes of din (from start) that are known to belong to this request
    uint32_t uready         # bytes of uin (from start) that are known to belong to this response
    uint64_t complete_ns    # when the request's last byte came
    Body request
    Body response
    size_t scanned
    size_t uscanned
    char request_id[36]         # of ours, when the request brought none
    uint32_t timeout_ms

cdef struct Bulk:           # one direction of opaque bytes
    Pipe* pipe              # held while bytes lie in it
    uint8_t large           # large reads in a row; BULK_AFTER: splices
    uint8_t small           # splices in a row that moved little

cdef struct Conn:
    Source source           # first: a Source* is its Conn*
    Grave grave
    Worker* w
    Captured* pod
    Conn* prev              # all of its pod
    Conn* next
    Conn* wait_prev         # the queue it waits in
    Conn* wait_next
    uint8_t state
    uint8_t queue
    uint8_t kind            # LISTEN_OUTBOUND, LISTEN_INBOUND
    uint8_t intent
    uint8_t is_service      # the original destination is a service's address and port
    uint8_t unconfigured    # the wait is over: NC
    uint8_t dialled_early   # DETECT: the server is dialled while the client is silent
    uint8_t down_ended      # end was read from the client
    uint8_t up_ended
    uint8_t down_shut       # and passed on: our writing side is shut
    uint8_t up_shut
    uint8_t up_reached      # TCP: the server's connection was made
    uint8_t stock_family
    uint8_t unlogged        # one of many that were refused: counted, not logged
    uint8_t promised        # a socket of the stock is this one's, in its pod's next turn
    uint8_t judged          # Judged
    uint8_t secure          # mutual TLS to the other proxy: it came by a tunnel, or goes by one
    uint16_t refusal        # of a CONNECT that is not answered yet, when it ends: 503 unless somebody says otherwise
    uint32_t connect_ms     # here and not lower: no hole
    Tunnel* tunnel          # it came by, used; NULL: by a socket, or `near`
    Near* near              # it came from a pod of this worker; NULL: it did not
    uint32_t named          # service that its CONNECT named, of those that this workload is of; 0: none
    Peer client
    Peer target             # original destination
    Peer goal               # what the dial in progress connects to
    Upstream* up
    Timer timer             # of the state: hold, detect, stock, idle, head, linger
    Timer request_timer     # the route's timeout
    uint64_t active_ns      # last byte in any direction
    uint64_t wait_until_ns
    uint64_t held_bytes
    Slot* slot              # held while in Q_HELD
    Identity* peer          # held: who the client proved to be; NULL: nobody
    Slot* judge             # held: the policy that denied, or would (see permit.pxd); NULL: none that allows matched
    uint32_t judge_rule
    Buffer din
    Buffer uhead
    Buffer uin
    Buffer dhead
    Bulk onward             # RELAY and TUNNEL: client -> server
    Bulk back
    Series* series          # TCP
    Texts* texts
    Facts facts
    Destination* destination    # held
    Cluster* cluster            # held
    Endpoint* endpoint          # begun
    const Route* route          # HTTP
    const Weighted* weighted    # HTTP
    Exchange* x                 # HTTP; NULL: not (yet)

cdef struct Stock:          # prefetched sockets of one family
    int fds[64]
    uint32_t n
    uint32_t promised       # of these, to connections that waited
    uint32_t asked          # of the keeper, not yet here
    uint32_t batch
    Conn* first
    Conn* last
    Timer retry             # the keeper did not answer
    uint8_t used            # since the last look

cdef struct Acceptor:
    Source source           # first
    Captured* pod
    Worker* w
    Timer pause
    uint8_t kind
    uint8_t paused
    uint64_t full_ns        # since when it has not been able to accept; 0: it is
cdef struct Captured:       # one pod of this worker
    Captured* chain         # by handle
    Captured* next          # all
    Worker* w
    Grave grave
    Flow flow               # its connections, both sides, and its listeners share one turn
    uint32_t handle
    uint8_t attached
    uint8_t retired         # in its grave: it is nobody's, and freed when the turn ends
    uint32_t conns
    uint32_t[4] of_kind     # of these, by Listener; what comes by a tunnel is LISTEN_INBOUND
    uint32_t upstreams      # open ones
    uint32_t pipes          # held by its connections
    uint32_t n_held         # connections that wait for configuration
    Buffers buffers         # its share of the worker's memory
    Conn* first_conn
    Conn* hand              # where the next look at some of them goes on; NULL: at the first
    Conn* review            # the next one of which policies are asked again; NULL: none
    Tunnel* recall          # the next one that revocation lists are asked about; NULL: none
    Conn* waits_first       # for memory
    Conn* waits_last
    uint64_t looked_ns
    uint64_t told_ns        # refusals logged since then
    uint32_t told
    Acceptor acceptors[6]
    Tunnel* first_tunnel
    uint32_t tunnels        # with a descriptor
    uint64_t early_ns[16]   # when tunnels to a cluster were last thought of, by its address
    Stock stock[2]          # 0: IPv4, 1: IPv6
    uint32_t idle
    Upstream* oldest
    Upstream* newest
    Upstream* pool[64]
    uint32_t pooled[64]     # how many in each bucket

ctypedef void (*Advance)(Conn* c) noexcept nogil
ctypedef void (*Expire)(Conn* c, Timer* timer) noexcept nogil
ctypedef void (*Retire)(Captured* pod) noexcept nogil
ctypedef void (*Distrusts)(Tunnel* t) noexcept nogil
ctypedef void (*Recalls)(Tunnel* t) noexcept nogil
ctypedef void (*Follows)(Tunnel* t) noexcept nogil
ctypedef void (*Parts)(Tunnel* t) noexcept nogil
ctypedef Conn* (*Enters)(Captured* pod, const Peer* client, const Peer* target, Identity* who, bint secure) noexcept nogil

cdef struct Outbox:         # datagrams to the keeper that its socket did not take yet
    char* data
    uint32_t start
    uint32_t end
    uint32_t size

cdef struct Key:            # a private key of an identity that a pod here has; see keys.pxd
    Key* next
    uint32_t id
    uint32_t identity_len
    char[384] identity      # IDENTITY_BYTES
    int fd                  # sealed memfd: PKCS#8, DER
    Credentials* credentials    # NULL: none made yet
    uint64_t certificate    # versions of what was tried last
    uint64_t trust

cdef struct Gone:           # see forget.pxd
    uint64_t due_ns
    uint32_t index
    uint8_t kind            # KIND_WORKLOAD, KIND_SERVICE

cdef struct Worker:
    Loop loop
    Buffers memory          # all buffers; a pod's are its share of them
    Pipes pipes
    Slab conns
    Slab exchanges
    Slab upstreams
    Slab pods
    Slab texts
    Slab nears
    Slab tunnels
    Pad pad                 # of all tunnels
    char* sealed            # SEALED_BYTES, what a tunnel's socket gave
    uint32_t n_tunnels
    uint64_t shunned[256]   # when dialling a tunnel failed last, by its address; of two with the same place the later
    Tables* tables
    Stats table             # of series
    StatsHeader* stats      # its header: gauges and counters of the worker
    LogRing log
    Source control
    Outbox outbox
    Captured* by_handle[256]
    Captured* first_pod
    Conn* held_first
    Conn* held_last
    uint32_t n_held
    uint32_t n_conns
    uint32_t n_waiting      # for memory
    uint32_t descriptors    # that pods may have, all together
    uint32_t descriptors_most   # of the process
    Timer survey
    uint64_t rested_ns      # when what is kept was last looked at
    uint64_t trimmed_ns     # when free memory was last given back to the kernel
    uint32_t ended          # tunnels since then
    Advance advance         # goes on with a connection: flow, relay, http
    Expire expire           # one of its timers is due
    Retire retire           # a detached pod lost what it had
    Distrusts distrusts     # a handshake that was begun to us failed
    Recalls recalls         # a tunnel whose `doubted` is set has opened
    Follows follows         # a dialled tunnel that is in use takes no more streams, or has ended
    Parts parts             # nobody will use the idle streams of a dialled tunnel again
    Enters enters           # a connection comes from a pod of this worker
    Head head               # scratch: the head parsed last
    Conn* head_of           # whose request it is, with spans still valid; NULL: nobody's
    uint8_t ready           # READY was sent
    uint8_t draining
    uint8_t orphaned        # the keeper is gone
    uint8_t stop
    uint32_t drain_sequence
    Timer drain_timer
    Timer review_timer      # due: open connections are asked again, a bounded number
    Timer recall_timer      # due: revocation lists are asked about open tunnels, a bounded number
    Gone gone[1024]
    uint32_t gone_first
    uint32_t gone_last
    Key* keys
    int pending_fd          # transaction to apply between two turns, -1
    uint32_t pending_sequence

cdef inline Captured* pod_find(Worker* w, uint32_t handle) noexcept nogil:
    cdef Captured* pod = w.by_handle[handle & 255]
    while pod != NULL and pod.handle != handle:
        pod = pod.chain
    return pod
