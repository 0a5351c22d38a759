"""The way from Python to the tables: for tests, and for asking what a worker would answer. Workers never load it.

`Tables` holds one set of tables. What is lent out is copied into Python values, except a `Held` cluster, which keeps a
reference as a connection would.
"""
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.stdint cimport uint16_t, uint32_t, uint64_t
from ext.core.arena cimport blocks_fail_at, blocks_live
from ext.core.protocol cimport KIND_CERTIFICATE, KIND_TRUST
from ext.wire.edit cimport HeaderOp
from ext.route cimport balance, match, policy, shapes, tables
from ext.route.asked_door cimport Question, Request, address_of, edits_of, ip_of, key_of, span, text_of

MISS = "miss"           # nobody asked the control plane yet
ACTIONS = ("allow", "deny")
SCOPES = ("global", "namespace", "workload")
FIELDS = (None, "namespaces", "notNamespaces", "principals", "notPrincipals", "sourceIps", "notSourceIps", "destinationIps",
          "notDestinationIps", "destinationPorts", "notDestinationPorts", "serviceAccounts", "notServiceAccounts", "says nothing")
UNKNOWN = "unknown"     # the control plane does not know it: NC


class Refused(ValueError):
    """A transaction that was not applied; the text names kind, key and reason."""


def check(bytes data not None) -> int:
    """Would workers take this transaction? Its id, or raises Refused with the words a worker would send.

    For the agent: a resource of the control plane is tried alone before it is acknowledged, so that a bad one is refused by name
    instead of failing the transaction that it would be part of.
    """
    return Tables().load(data)


def live_blocks() -> int:
    """Blocks of memory (and compiled expressions) that this process holds for tables."""
    return blocks_live()


def fail_block(n: int) -> None:
    """The n-th block from now cannot be had, once; 0 ends that."""
    blocks_fail_at(n)


cdef class Held:
    """A reference to the version of a cluster that was in force when it was taken."""
    cdef Tables owner
    cdef shapes.Cluster* cluster

    @property
    def key(self):
        return text_of(self.cluster.scope), text_of(self.cluster.name)

    @property
    def endpoints(self):
        return [Tables.endpoint(&self.cluster.endpoints[i]) for i in range(self.cluster.n_endpoints)]

    @property
    def active(self):
        return [self.cluster.endpoints[i].load.active for i in range(self.cluster.n_endpoints)]

    def begin(self, int i):
        if not 0 <= i < <int>self.cluster.n_endpoints:
            raise IndexError(i)
        balance.endpoint_begin(&self.cluster.endpoints[i])

    def end(self, int i):
        if not 0 <= i < <int>self.cluster.n_endpoints:
            raise IndexError(i)
        balance.endpoint_end(&self.cluster.endpoints[i])

    def release(self):
        if self.cluster != NULL:
            tables.cluster_release(self.owner.t, self.cluster)
            self.cluster = NULL

    def __dealloc__(self):
        if self.cluster != NULL:
            tables.cluster_release(self.owner.t, self.cluster)


cdef class Waiting:
    """A slot that somebody waits in."""
    cdef Tables owner
    cdef shapes.Slot* slot

    @property
    def key(self):
        return key_of(self.slot)

    @property
    def state(self):
        return Tables.state(shapes.slot_destination(self.slot))

    def release(self):
        if self.slot != NULL:
            tables.slot_release(self.owner.t, self.slot)
            self.slot = NULL

    def __dealloc__(self):
        if self.slot != NULL:
            tables.slot_release(self.owner.t, self.slot)


cdef class Tables:
    cdef tables.Tables* t
    cdef tables.Prepared* prepared

    def __cinit__(self, uint64_t seed=1):
        self.t = tables.tables_new(seed)
        if self.t == NULL:
            raise MemoryError

    def __dealloc__(self):
        if self.prepared != NULL:
            tables.tables_abandon(self.t, self.prepared)
        if self.t != NULL:
            tables.tables_free(self.t)

    def prepare(self, bytes data not None):
        """First half of `load`: raises Refused, and nothing has changed."""
        cdef char[512] error
        if self.prepared != NULL:
            raise RuntimeError("another transaction is prepared")
        self.prepared = tables.tables_prepare(self.t, PyBytes_AS_STRING(data), <size_t>PyBytes_GET_SIZE(data), error)
        if self.prepared == NULL:
            raise Refused((<bytes>error).decode("utf-8", "replace"))

    def apply(self):
        """Second half; returns the transaction's id."""
        if self.prepared == NULL:
            raise RuntimeError("nothing is prepared")
        tables.tables_apply(self.t, self.prepared)
        self.prepared = NULL
        return self.t.last

    def abandon(self):
        if self.prepared != NULL:
            tables.tables_abandon(self.t, self.prepared)
            self.prepared = NULL

    def load(self, data):
        self.prepare(data)
        return self.apply()

    @property
    def generation(self):
        return self.t.generation

    @property
    def settings(self):
        return dict(self.t.settings, pad=None)

    @property
    def counts(self):
        n = &self.t.names
        return {"slots": n.slots.count, "places": n.places.count, "scopes": n.scopes.count, "identities": n.identities.count,
                "workloads": n.workloads.count, "services": n.services.count, "pods": n.pods.count}

    def random(self):
        return tables.tables_random(self.t)

    def trust(self, bytes trust_domain):
        """(roots, lists) or None."""
        cdef shapes.Slot* slot = tables.slot_by_key(self.t, KIND_TRUST, span(trust_domain))
        cdef shapes.Trust* trust = <shapes.Trust*>slot.current if slot != NULL else NULL
        if trust == NULL:
            return None
        return ([trust.roots[i].p[:trust.roots[i].n] for i in range(trust.n_roots)],
                [trust.lists[i].p[:trust.lists[i].n] for i in range(trust.n_lists)])

    def certificate(self, bytes identity):
        """(key, not before, not after, chain) or None."""
        cdef shapes.Slot* slot = tables.slot_by_key(self.t, KIND_CERTIFICATE, span(identity))
        cdef shapes.Certificate* one = <shapes.Certificate*>slot.current if slot != NULL else NULL
        if one == NULL:
            return None
        return one.key, one.not_before, one.not_after, [one.chain[i].p[:one.chain[i].n] for i in range(one.n_chain)]

    # ---- who is where

    def service_at(self, ip, uint16_t port):
        """(index, authority, protocol) or None."""
        cdef shapes.ServicePort* found = NULL
        cdef shapes.Address address = address_of(ip)
        cdef shapes.Service* service = tables.service_at(self.t, &address, port, &found)
        if service == NULL:
            return None
        return service.index, text_of(found.authority), found.protocol

    def service_by_address(self, ip):
        cdef shapes.Address address = address_of(ip)
        cdef shapes.Service* service = tables.service_by_address(self.t, &address)
        return service.index if service != NULL else 0

    def service_by_index(self, uint32_t index):
        cdef shapes.Service* service = tables.service_by_index(self.t, index)
        if service == NULL:
            return None
        ports = [(service.ports[i].port, service.ports[i].target_port, service.ports[i].protocol)
                 for i in range(service.n_ports)]
        addresses = [ip_of(&service.claims[i].place.address) for i in range(service.n_claims)]
        return text_of(service.hostname), addresses, ports

    def workload_by_address(self, ip):
        cdef shapes.Address address = address_of(ip)
        cdef shapes.Workload* workload = tables.workload_by_address(self.t, &address)
        return workload.index if workload != NULL else 0

    def workload_by_index(self, uint32_t index):
        cdef shapes.Workload* workload = tables.workload_by_index(self.t, index)
        if workload == NULL:
            return None
        ports = [(workload.ports[i].service, workload.ports[i].service_port, workload.ports[i].target_port,
                  workload.ports[i].protocol) for i in range(workload.n_ports)]
        addresses = [ip_of(&workload.claims[i].place.address) for i in range(workload.n_claims)]
        return bool(workload.healthy), addresses, ports

    def workload_identity(self, uint32_t index):
        """(tunnel, identity or None, names of policies) or None."""
        cdef shapes.Workload* workload = tables.workload_by_index(self.t, index)
        if workload == NULL:
            return None
        policies = [key_of(workload.policies[i]) for i in range(workload.n_policies)]
        return workload.tunnel, text_of(workload.identity.name) if workload.identity != NULL else None, policies

    def pod_identity(self, uint32_t handle):
        """The identity of a pod, None when it has none or is not known."""
        cdef shapes.Pod* pod = tables.pod_by_handle(self.t, handle)
        return text_of(pod.identity.name) if pod != NULL and pod.identity != NULL else None

    def workload_port(self, uint32_t index, uint16_t target_port):
        cdef shapes.Workload* workload = tables.workload_by_index(self.t, index)
        cdef shapes.WorkloadPort* port
        if workload == NULL:
            return None
        port = tables.workload_port(workload, target_port, 0)
        return (port.service, port.service_port, port.protocol) if port != NULL else None

    def pod_excluded(self, uint32_t handle):
        """Ports on which a pod is not captured inbound; None: it is not to be connected to directly, or not known."""
        cdef shapes.Pod* pod = tables.pod_by_handle(self.t, handle)
        if pod == NULL or not pod.direct:
            return None
        return [pod.excluded.items[i] for i in range(pod.excluded.n)]

    def pod(self, uint32_t handle):
        """(workload index, scope, addresses) or None."""
        cdef shapes.Pod* pod = tables.pod_by_handle(self.t, handle)
        if pod == NULL:
            return None
        addresses = [ip_of(&pod.claims[i].place.address) for i in range(pod.n_claims)]
        return shapes.pod_workload(pod), text_of(pod.scope.name), addresses

    # ---- what to do

    cdef shapes.Destination* destination_from(self, uint32_t handle, ip, uint16_t port) except? NULL:
        cdef shapes.ServicePort* found = NULL
        cdef shapes.Address address = address_of(ip)
        cdef shapes.Pod* pod = tables.pod_by_handle(self.t, handle)
        if pod == NULL or tables.service_at(self.t, &address, port, &found) == NULL:
            raise LookupError(f"no pod {handle} or no service at {ip}:{port}")
        return tables.destination_find(self.t, pod, found)

    @staticmethod
    cdef state(shapes.Destination* d):
        if d == NULL:
            return MISS
        kinds = (["http"] if d.has_http else []) + (["tcp"] if d.has_tcp else [])
        return "+".join(kinds) or UNKNOWN

    def destination(self, uint32_t handle, ip, uint16_t port):
        """`miss`, `unknown`, `http`, `tcp` or `http+tcp`."""
        return Tables.state(self.destination_from(handle, ip, port))

    def wait(self, uint32_t handle, ip, uint16_t port):
        cdef shapes.ServicePort* found = NULL
        cdef shapes.Address address = address_of(ip)
        cdef shapes.Pod* pod = tables.pod_by_handle(self.t, handle)
        cdef Waiting waiting = Waiting()
        if pod == NULL or tables.service_at(self.t, &address, port, &found) == NULL:
            raise LookupError(f"no pod {handle} or no service at {ip}:{port}")
        waiting.owner = self
        waiting.slot = tables.destination_wait(self.t, pod, found)
        if waiting.slot == NULL:
            raise MemoryError
        return waiting

    def route(self, uint32_t handle, ip, uint16_t port, Request request not None, uint32_t random=0):
        """What a request gets: dict of route, cluster, weight, timeout and edits; `NR` or `NC` where it ends before that."""
        cdef HeaderOp[128] ops
        cdef shapes.Destination* d = self.destination_from(handle, ip, port)
        cdef shapes.Route* route
        cdef shapes.Weighted* weighted
        if d == NULL or not d.has_http:
            return "NC"
        route = match.route_find(d, request.head)
        if route == NULL:
            return "NR"
        weighted = match.route_pick(route, random)
        n = match.request_edits(route, weighted, ops)
        requests = edits_of(ops, n)
        n = match.response_edits(route, weighted, ops)
        cluster = shapes.weighted_cluster(weighted)
        return {"route": text_of(route.name), "cluster": key_of(weighted.slot),
                "there": cluster != NULL, "timeout_ms": route.timeout_ms, "request": requests, "response": edits_of(ops, n)}

    def virtual_host(self, uint32_t handle, ip, uint16_t port, authority):
        cdef bytes raw = authority.encode()
        cdef shapes.Destination* d = self.destination_from(handle, ip, port)
        cdef shapes.VirtualHost* host
        if d == NULL:
            raise LookupError(f"no destination for {ip}:{port}")
        host = match.host_find(d, span(raw))
        return text_of(host.name) if host != NULL else None

    def tcp(self, uint32_t handle, ip, uint16_t port, uint32_t random=0):
        cdef shapes.Destination* d = self.destination_from(handle, ip, port)
        cdef shapes.Weighted* weighted = match.tcp_pick(d, random) if d != NULL else NULL
        return key_of(weighted.slot) if weighted != NULL else None

    # ---- balancing

    cdef shapes.Cluster* cluster_from(self, str key) except NULL:
        cdef bytes raw = key.encode()
        cdef shapes.Slot* slot = tables.slot_by_key(self.t, 5, span(raw))
        if slot == NULL or slot.current == NULL:
            raise LookupError(key)
        return <shapes.Cluster*>slot.current

    @staticmethod
    cdef endpoint(shapes.Endpoint* e):
        return ip_of(&e.place.address), e.port

    def cluster(self, str key):
        """(service index, connect timeout ms, balancer, [(ip, port, weight, healthy, workload index)])."""
        cdef shapes.Cluster* c = self.cluster_from(key)
        endpoints = [(*Tables.endpoint(&c.endpoints[i]), c.endpoints[i].weight, bool(c.endpoints[i].healthy),
                      shapes.endpoint_workload(&c.endpoints[i])) for i in range(c.n_endpoints)]
        return c.service, c.connect_timeout_ms, c.balancer, endpoints

    def hold(self, str key):
        cdef Held held = Held()
        held.cluster = self.cluster_from(key)
        held.owner = self
        tables.cluster_hold(held.cluster)
        return held

    def picks(self, str key, int n, exclude=None, Held version=None):
        """n endpoints, one after the other, with this table's randomness; nothing is begun. `exclude` indexes the version's
        (else the present cluster's) endpoints."""
        cdef shapes.Cluster* c = self.cluster_from(key)
        cdef shapes.Cluster* of = version.cluster if version is not None else c
        cdef shapes.Endpoint* e
        cdef shapes.Endpoint* out = NULL
        if exclude is not None:
            if not 0 <= exclude < of.n_endpoints:
                raise IndexError(exclude)
            out = &of.endpoints[<uint32_t>exclude]
        found = []
        for _ in range(n):
            e = balance.balance_pick(c, tables.tables_random(self.t), out)
            found.append(Tables.endpoint(e) if e != NULL else None)
        return found

    # ---- who may

    def authorize(self, uint32_t handle, identity, source, destination, uint16_t port):
        """May this connection to a pod be? `identity` is a SPIFFE ID, or None: nobody proved who they are.

        dict: allowed, policy and rule (that matched and so decided; None: none applies, or none that allows matched), would,
        would_policy, would_rule (the same if policies on trial were in force). LookupError: the pod or its workload is not known;
        a worker would let it wait, then deny it. ValueError: not an identity, or no address.
        """
        cdef Question q = Question(identity, source, destination, port)
        cdef policy.Verdict verdict
        cdef shapes.Pod* pod = self.judged_pod(handle)
        policy.policy_decide(self.t, <shapes.Workload*>pod.workload.current, pod.scope, &q.asked, &verdict)
        return {"allowed": bool(verdict.allowed), "policy": key_of(verdict.by) if verdict.by != NULL else None,
                "rule": verdict.rule if verdict.by != NULL else None, "would": bool(verdict.would),
                "would_policy": key_of(verdict.would_by) if verdict.would_by != NULL else None,
                "would_rule": verdict.would_rule if verdict.would_by != NULL else None}

    def explain(self, uint32_t handle, identity, source, destination, uint16_t port):
        """Every policy that applies, in the order in which they are asked: dict of policy, action, scope, dry_run, matches (the first
        rule that does, or None) and rules: per rule the clauses, per clause the matches, each None (agrees) or what does not."""
        cdef Question q = Question(identity, source, destination, port)
        cdef policy.Walk walk
        cdef const shapes.Policy* at
        cdef shapes.Pod* pod = self.judged_pod(handle)
        cdef int first
        found = []
        policy.walk_start(&walk, self.t, <shapes.Workload*>pod.workload.current, pod.scope)
        at = policy.walk_next(&walk)
        while at != NULL:
            first = policy.policy_matches(at, &q.asked)
            found.append({"policy": key_of(at.slot), "action": ACTIONS[at.action], "scope": SCOPES[at.scope], "dry_run": bool(at.dry_run),
                          "matches": first if first >= 0 else None,
                          "rules": [Tables.rule_of(&at.rules[i], q) for i in range(at.n_rules)]})
            at = policy.walk_next(&walk)
        return found

    @staticmethod
    cdef list rule_of(const shapes.PolicyRule* rule, Question q):
        cdef const shapes.PolicyClause* clause
        out = []
        for i in range(rule.n):
            clause = &rule.clauses[i]
            out.append([FIELDS[policy.match_differs(&clause.matches[k], &q.asked)] for k in range(clause.n)])
        return out

    cdef shapes.Pod* judged_pod(self, uint32_t handle) except NULL:
        cdef shapes.Pod* pod = tables.pod_by_handle(self.t, handle)
        if pod == NULL or pod.workload.current == NULL:
            raise LookupError(f"no pod {handle}, or nobody has told its workload")
        return pod

    def pod_by_address(self, ip):
        """The handle of the pod of this node that has that address, or 0."""
        cdef shapes.Address address = address_of(ip)
        cdef shapes.Pod* pod = tables.pod_by_address(self.t, &address)
        return pod.handle if pod != NULL else 0

    @property
    def judgement(self):
        """Counts transactions after which policies may decide otherwise."""
        return self.t.judgement

    @property
    def recalls(self):
        """Grows with every transaction that brings revocation lists."""
        return self.t.recalls
