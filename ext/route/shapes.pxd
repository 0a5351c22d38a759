"""The structs of a worker's knowledge, and the one-line questions to them. No functions of their own: see tables, match, balance.

    Tables --by address--> Place --claims--> Workload (who lives there), Service (whose virtual address it is)
           --by name-----> Slot  --current-> Destination, Cluster, Workload, Service, Pod: the version in force, or NULL
           --by number---> Workload, Pod

A Slot and a Place outlive what is in them: a cluster that a route names before it came, or an endpoint whose workload
is not known yet, is a slot or a place that fills later, in O(1), without touching whoever points there.

Who may keep what. Pointers into the tables are valid until the worker's next `tables_apply`, between two turns of its
loop. To keep one longer, hold a reference: `slot_hold`, `destination_hold`, `cluster_hold` (a Route or Weighted lives
as long as its Destination, an Endpoint as long as its Cluster). What was replaced is freed when its last holder lets go.
"""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memchr
from ext.core.text cimport Span
from ext.core.arena cimport Arena
from ext.core.hash cimport Node
from ext.wire.edit cimport HeaderOp

cdef enum:
    EDITS_MAX = 128         # header edits of one direction, of a route and a weighted cluster together; more are refused

cdef enum PortProtocol:
    PROTO_AUTO = 0
    PROTO_TCP = 1
    PROTO_HTTP = 2
    PROTO_HTTP2 = 3     # opaque for now
    PROTO_GRPC = 4      # opaque for now
    PROTO_TLS = 5       # opaque

cdef enum Tunnel:           # how a workload is reached
    TUNNEL_NONE = 0
    TUNNEL_HBONE = 1

cdef enum BalancerKind:
    BALANCE_ROUND_ROBIN = 1
    BALANCE_LEAST_REQUEST = 2
    BALANCE_RANDOM = 3

cdef enum Matcher:
    MATCH_EXACT = 1
    MATCH_PREFIX = 2
    MATCH_SUFFIX = 3
    MATCH_REGEX = 4             # RE2, the whole value
    MATCH_PRESENT = 5
    MATCH_CONTAINS = 6
    MATCH_PATH_PREFIX = 7       # /a matches /a and /a/b, not /ab

# Settings of the proxy. Units are in the names; defaults and their reasons are in agent/model/settings.py.
cdef struct Settings:
    uint8_t access_log
    uint8_t pad[3]
    uint32_t detect_dial_ms             # sniffing: after so long without a byte from the client, the server is dialled too
    uint32_t detect_timeout_ms          # sniffing: after so long it is opaque TCP
    uint32_t hold_timeout_ms            # a connection waits so long for configuration, then NC
    uint32_t hold_bytes                 # and at most so many bytes of it
    uint32_t hold_connections           # and at most so many connections of a worker, of a pod as many as are free
    uint32_t request_head_timeout_ms    # from a request's first byte to the end of its head: 408
    uint32_t http_idle_timeout_ms       # downstream keep-alive connection without a request
    uint32_t stream_idle_timeout_ms     # no byte in either direction within a request or response: 408/504
    uint32_t tcp_idle_timeout_ms        # no byte in either direction
    uint32_t connect_timeout_ms         # passthrough and direct; a cluster has its own
    uint32_t head_bytes                 # 431 above
    uint32_t buffer_bytes               # per direction of a connection
    uint32_t connections_per_pod        # both directions together, each at most 3/4; see ext/proxy/accept
    uint32_t pool_idle_per_endpoint     # idle upstream connections kept per (pod, endpoint)
    uint32_t pool_idle_timeout_ms
    uint32_t buffered_bytes_per_worker
    uint32_t buffered_bytes_per_pod     # above: nothing more is read until buffers are given back
    uint32_t descriptors_per_worker     # 0: by the process' limit
    uint32_t request_body_timeout_ms    # no byte of a request's body: 408
    uint32_t tunnel_ping_ms             # between two PINGs of a tunnel
    uint32_t tunnel_pong_ms             # without the answer to one: it ends
    uint32_t tunnel_idle_ms             # a dialled tunnel without a stream: it ends
    uint32_t same_node_tunnel           # 1: a pod of the same node is reached as one of another
    uint32_t early_tunnels              # of a pod, dialled ahead and not used yet; 0: none
    uint32_t access_log_tcp             # 1: log records have LogLegs (ext/core/ring.pxd)

cdef struct Address:                    # 17 bytes; for IPv4 ip[4:] is zero. IPv4-mapped IPv6 is to be given as IPv4
    uint8_t family                      # 4 or 6
    uint8_t ip[16]                      # network order

# ---- interned names ----------------------------------------------------------------------------------------

cdef struct Slot:                       # one (kind, key); see the head of this file
    Node node                           # by key
    uint32_t refs                       # holders, the present content counting as one
    void* current                       # Destination*, Cluster*, Workload*, Service*, Pod* or Policy* by kind; NULL: not there
    void* user                          # the worker's own (who waits here); the tables never read it
    char* key                           # as in the blob's entry; NUL-terminated
    uint32_t key_len
    uint8_t kind

cdef struct Policy

cdef struct Scope:                      # `ns=<namespace>` of a pod or policy, interned
    Node node
    uint32_t refs
    Span name
    Policy* policies                    # those for every workload of the namespace

cdef struct IdentityParts:              # of `spiffe://<domain>/ns/<namespace>/sa/<account>`
    Span principal                      # all behind `spiffe://`
    Span domain
    Span namespace
    Span account

cdef struct Identity:                   # interned: the same identity is the same pointer
    Node node
    uint32_t refs
    Span name                           # whole
    IdentityParts parts                 # into name

cdef struct Place

# ---- who is where ------------------------------------------------------------------------------------------

cdef struct Claim:                      # somebody says that an address is theirs; the newest claim is the first
    Claim* next
    Claim* prev
    Place* place
    void* owner                         # Workload*, Service* or Pod*

cdef struct Place:                      # one address
    Node node
    uint32_t refs                       # claims, and endpoints that point here
    Address address
    Claim* workloads
    Claim* services
    Claim* pods

cdef struct WorkloadPort:
    uint16_t service_port
    uint16_t target_port                # the one that is listened on
    uint8_t protocol                    # PortProtocol
    uint32_t service                    # index, 0 unknown

cdef struct Workload:
    Node node                           # by index
    Arena arena
    uint32_t index
    uint8_t healthy
    uint8_t tunnel                      # Tunnel
    Identity* identity                  # NULL: none
    uint32_t n_claims
    Claim* claims
    uint32_t n_ports
    WorkloadPort* ports
    uint32_t n_policies
    Slot** policies                     # of kind POLICY: those that select it by labels

cdef struct ServicePort:
    uint16_t port
    uint16_t target_port
    uint8_t protocol
    uint32_t hash                       # of `hostname:port`
    Span authority                      # `hostname:port`

cdef struct Service:
    Node node                           # by index
    Arena arena
    uint32_t index
    Span hostname
    uint32_t n_claims
    Claim* claims
    uint32_t n_ports
    ServicePort* ports

cdef struct Ports:
    uint32_t n
    uint16_t* items

cdef struct Pod:
    Node node                           # by handle
    Arena arena
    uint32_t handle
    Slot* workload                      # of kind WORKLOAD; ask `pod_workload`
    Scope* scope
    uint32_t n_claims
    Claim* claims
    Identity* identity                  # NULL: none
    uint8_t direct                      # pods of its node may be connected to it inside its namespace
    Ports excluded                      # on which it is not captured inbound

cdef struct Trust:                      # of one trust domain: who may sign, and what was taken back
    Arena arena
    uint64_t version                    # no other Trust or Certificate of these tables has or had it
    uint32_t n_roots                    # one at least
    uint32_t n_lists
    Span* roots                         # DER
    Span* lists                         # DER

cdef struct Certificate:                # of one identity
    Arena arena
    uint64_t version
    uint32_t key                        # id of the private key, which the keeper gives or not
    uint64_t not_before                 # s since 1970
    uint64_t not_after
    uint32_t n_chain                    # one at least
    Span* chain                         # DER, leaf first

# ---- who may (ext/route/policy) ----------------------------------------------------------------------------

cdef enum PolicyScope:                  # numbers of istio.security.Scope and Action
    SCOPE_GLOBAL = 0
    SCOPE_NAMESPACE = 1
    SCOPE_WORKLOAD = 2                  # those workloads that name it

cdef enum PolicyAction:
    ACTION_ALLOW = 0
    ACTION_DENY = 1

cdef struct TextMatch:
    uint8_t kind                        # MATCH_EXACT, MATCH_PREFIX, MATCH_SUFFIX, MATCH_PRESENT
    Span value

cdef struct TextMatches:
    uint32_t n
    TextMatch* items

cdef struct Block:                      # of addresses
    Address address
    uint8_t bits

cdef struct Blocks:
    uint32_t n
    Block* items

cdef struct Account:
    Span namespace
    Span account

cdef struct Accounts:
    uint32_t n
    Account* items

cdef struct PolicyMatch:                # [0] one of them must agree, unless there is none; [1] none of them may
    TextMatches[2] namespaces
    TextMatches[2] principals
    Blocks[2] sources
    Blocks[2] destinations
    Ports[2] ports
    Accounts[2] accounts
    uint8_t empty                       # says nothing: never agrees

cdef struct PolicyClause:
    uint32_t n
    PolicyMatch* matches                # any; none: agrees

cdef struct PolicyRule:
    uint32_t n
    PolicyClause* clauses               # all

cdef struct Policy:
    Arena arena
    Policy* next                        # in its Scope's list, or the one for all
    Policy* prev
    const Slot* slot                    # for its name; as long as it is in force
    Scope* namespace                    # held
    uint8_t scope                       # PolicyScope
    uint8_t action                      # PolicyAction
    uint8_t dry_run
    uint32_t n_rules
    PolicyRule* rules                   # any; none: never matches

# ---- what to do with it ------------------------------------------------------------------------------------

cdef struct Load:                       # of one endpoint; survives its cluster's replacement (same address and port)
    uint32_t refs
    uint32_t active                     # connections (TCP) and requests (HTTP) in flight from this worker

cdef struct Endpoint:
    Place* place
    Load* load
    uint16_t port
    uint8_t healthy
    uint32_t weight                     # >= 1

cdef struct Cluster:
    Arena arena
    uint32_t refs
    uint32_t service                    # index that metrics name, 0 unknown
    Span name                           # `outbound|9080|v1|reviews.default.svc.cluster.local`
    Span scope
    uint8_t balancer                    # BalancerKind
    uint8_t even                        # all ready endpoints weigh the same
    uint32_t connect_timeout_ms
    uint32_t n_endpoints
    Endpoint* endpoints
    # the balancer's own (balance.pyx)
    uint32_t n_ready
    uint32_t turn
    uint32_t* ready                     # indexes of healthy endpoints, ascending
    uint64_t ready_weight
    uint64_t* upto                      # running sum of weights, beside `ready`
    uint32_t* heap                      # positions in `ready`, earliest deadline first; only if uneven and in turn
    uint64_t* deadline                  # beside `ready`

cdef struct Weighted:
    Slot* slot                          # of kind CLUSTER; ask `weighted_cluster`
    uint32_t weight
    uint32_t n_request
    uint32_t n_response
    HeaderOp* request
    HeaderOp* response

cdef struct ValueMatch:
    uint8_t kind                        # Matcher
    uint8_t ignore_case
    uint8_t invert
    uint8_t missing_is_empty            # an absent header is matched as the empty string
    Span value                          # lower case if ignore_case
    void* regex                         # ext/route/re2_shim.h

cdef enum Special:
    SPECIAL_NONE = 0            # a header like any other
    SPECIAL_METHOD = 1
    SPECIAL_AUTHORITY = 2       # also for `host`
    SPECIAL_SCHEME = 3
    SPECIAL_PATH = 4            # with its query

cdef struct NamedMatch:
    Span name                           # headers: lower case
    uint8_t special                     # Special
    ValueMatch match

cdef struct Route:
    Span name
    ValueMatch path
    uint32_t n_headers
    uint32_t n_query
    NamedMatch* headers
    NamedMatch* query
    uint32_t timeout_ms                 # 0 none; whole request
    uint32_t n_clusters
    Weighted* clusters
    uint64_t total_weight               # > 0
    uint32_t n_request
    uint32_t n_response
    HeaderOp* request
    HeaderOp* response

cdef struct RouteGroup:                 # routes whose path has the same text
    Span text
    uint32_t hash
    uint32_t chain                      # next group of the bucket + 1, 0 none
    uint32_t first                      # route + 1
    uint32_t last

cdef struct RouteIndex:                 # ext/route/index
    uint32_t mask                       # heads - 1
    uint32_t n_groups
    uint32_t first_other                # route + 1: those that are in no group
    uint32_t longest                    # bytes of a group's text
    uint32_t* heads                     # group + 1, 0 none
    RouteGroup* groups
    uint32_t* next                      # of each route: the next of its group + 1, 0 none
    uint64_t lengths[16]                # bit n: there is a text of n bytes

cdef struct VirtualHost:
    Span name
    uint32_t n_routes
    Route* routes
    RouteIndex* index                   # NULL: so few that they are asked in turn

cdef struct Domain:
    Span text                           # lower case, without the star
    uint32_t host                       # index of the virtual host

cdef struct Regex:                      # what a destination's end has to free
    Regex* next
    void* program

cdef struct Destination:                # one (scope, host:port)
    Arena arena
    uint32_t refs
    # neither of the two: the control plane does not know it (NC)
    uint8_t has_http                    # a route table (perhaps an empty one: NR)
    uint8_t has_tcp                     # weighted clusters for opaque bytes
    uint32_t n_hosts
    VirtualHost* hosts
    uint32_t n_exact                    # by length and text
    uint32_t n_suffix                   # longest first
    uint32_t n_prefix                   # longest first
    Domain* exact
    Domain* suffix
    Domain* prefix
    VirtualHost* any                    # domain `*`, or NULL
    uint32_t n_tcp
    Weighted* tcp
    uint64_t total_tcp
    Regex* regexes

# ---- small things both sides of the room need

# `host:80` and `[::1]:80` without the port; a bare IPv6 address (two colons, no brackets) is left alone.
cdef inline Span host_without_port(Span host) noexcept nogil:
    cdef uint32_t i = host.n
    while i > 0 and c'0' <= host.p[i - 1] <= c'9':
        i -= 1
    if i > 0 and host.p[i - 1] == c':' and (i == 1 or host.p[i - 2] == c']' or memchr(host.p, c':', i - 1) == NULL):
        host.n = i - 1
    return host

# ---- questions that need no search -------------------------------------------------------------------------

cdef inline uint32_t place_workload(const Place* place) noexcept nogil:
    return (<Workload*>place.workloads.owner).index if place.workloads != NULL else 0

# Index of the workload behind an endpoint, 0 unknown: the present answer, also when the workload came after the cluster.
cdef inline uint32_t endpoint_workload(const Endpoint* endpoint) noexcept nogil:
    return place_workload(endpoint.place)

# Where to dial an endpoint: a dual-stack workload by the family that the client dialled, whichever the endpoint names; its other
# addresses are the workload's claims. Else the endpoint's own.
cdef inline const Address* endpoint_address(const Endpoint* endpoint, uint8_t family) noexcept nogil:
    cdef const Place* place = endpoint.place
    cdef const Workload* workload
    cdef uint32_t i
    if place.address.family != family and place.workloads != NULL:
        workload = <const Workload*>place.workloads.owner
        for i in range(workload.n_claims):
            if workload.claims[i].place.address.family == family:
                return &workload.claims[i].place.address
    return &place.address

cdef inline uint32_t pod_workload(const Pod* pod) noexcept nogil:
    return (<Workload*>pod.workload.current).index if pod.workload.current != NULL else 0

# The cluster in force under that name, or NULL: it has not come (NC).
cdef inline Cluster* weighted_cluster(const Weighted* weighted) noexcept nogil:
    return <Cluster*>weighted.slot.current

# In force in that slot, or NULL: not asked for yet (MISS). Neither has_http nor has_tcp: unknown to the control plane (NC).
cdef inline Destination* slot_destination(const Slot* slot) noexcept nogil:
    return <Destination*>slot.current
