"""The world of connections.pyx: addresses, rules, and what the control plane said, as transactions that worker and keeper know.

    10.9.0.1   web     7001 HTTP, 7002 TCP        routes by path: see ROUTES
    10.9.0.2   auto    7003 sniffed: HTTP and TCP
    10.9.0.3   late    7001 HTTP, 7002 TCP, 7003 sniffed: nobody has told yet how
    10.9.0.4   broken  7002 TCP, refused; 7003 sniffed, refused
    10.9.0.20  a workload: 7001 HTTP, 7002 TCP    dialled itself
    10.9.1.1   the first pod: 7001 HTTP, 7002 TCP, inbound
    10.9.0.99  unknown: passed through
    10.9.2.2   the second pod: 7001 HTTP, 7002 TCP, dialled by the first: joined in memory, or by a tunnel of this worker to itself (15008)

Whatever is dialled ends at the harness' two listeners: on 7001 it takes requests, on 7002 opaque bytes. 7009 refuses, 7008 is silent.
Clients are 10.9.2.1 (of the first pod, or from outside) and 10.9.2.2 (of the second).
"""
from __future__ import annotations

import subprocess
from ipaddress import ip_address
from pathlib import Path

from agent.dataplane import blobs
from agent.model.identity import Certificate, Trust
from agent.model.policy import Action, Match, Policy, Scope
from agent.model.routing import (
    Balancer,
    Cluster,
    Destination,
    Endpoint,
    HeaderEdit,
    MatchKind,
    NamedMatch,
    Route,
    RouteMatch,
    StringMatch,
    VirtualHost,
    WeightedCluster,
)
from agent.model.settings import ProxySettings
from agent.model.workload import Protocol, Service, ServicePort, Tunnel, Workload, WorkloadPort
from tests.fuzz.identities import DOMAIN, Issued, issue

SCOPE = "ns=default"
SERVERS = ("127.0.0.2", "127.0.0.3")
ISSUED: Issued = issue("w1", "w2")  # of the first pod, and of the second; their keys are 1 and 2
REQUESTS, OPAQUE, SNIFFED, SILENT, REFUSED = 7001, 7002, 7003, 7008, 7009
SERVICES = {"web": ("10.9.0.1", 11), "auto": ("10.9.0.2", 12), "late": ("10.9.0.3", 13), "broken": ("10.9.0.4", 14)}
ROUTES = {"/none": "none", "/refused": "refused", "/silent": "silent", "/missing": "missing", "/nowhere": "nowhere"}
INDEX = {f"default/{name}.default.svc": index for name, (_, index) in SERVICES.items()}

# What capture does, in one namespace for two pods: what the worker sends has its mark. Time that the kernel keeps for what ended is
# short, since thousands of connections end each second; its buffers are small, so that a slow reader is soon seen.
MARK = "0x539"
RULES = (
    f"-t nat -A OUTPUT -p tcp -m mark --mark {MARK} -j RETURN",
    "-t nat -A OUTPUT -p tcp -s 10.9.2.2 -d 10.9.0.0/24 -j REDIRECT --to-ports 15002",
    "-t nat -A OUTPUT -p tcp -s 10.9.2.2 -d 10.9.2.0/24 -j REDIRECT --to-ports 15002",
    "-t nat -A OUTPUT -p tcp -d 10.9.2.0/24 -j REDIRECT --to-ports 15001",
    "-t nat -A OUTPUT -p tcp -d 10.9.0.0/24 -j REDIRECT --to-ports 15001",
    "-t nat -A OUTPUT -p tcp -d 10.9.1.0/24 -j REDIRECT --to-ports 15006",
    f"-t raw -A OUTPUT -p tcp -m mark --mark {MARK} -j NOTRACK",
    f"-t raw -A OUTPUT -p tcp --sport {REQUESTS}:{OPAQUE} -j NOTRACK",
    "-t raw -A OUTPUT -p tcp --sport 15008 -j NOTRACK",
    f"-A INPUT -p tcp --dport {SILENT} -j DROP",
)
LIMITS = {
    "ipv4/tcp_max_tw_buckets": "0",
    "ipv4/tcp_rmem": "4096 16384 131072",
    "ipv4/tcp_wmem": "4096 16384 131072",
    "ipv4/ip_local_port_range": "1024 29999",
    **{f"netfilter/nf_conntrack_tcp_timeout_{state}": "1" for state in ("close", "last_ack", "time_wait", "syn_sent")},
    # half of it may go on; a machine that stops for a second must not make that a packet of nobody's connection
    **{f"netfilter/nf_conntrack_tcp_timeout_{state}": "15" for state in ("close_wait", "fin_wait")},
}


def furnish_namespace() -> None:
    """Loopback, routes and rules of the network namespace that the process was started in; it must be a fresh one."""
    run("ip link set lo up")
    run("ip route add local 10.9.0.0/16 dev lo")
    works = subprocess.run(["iptables", "-t", "nat", "-L"], env={"PATH": PATH}, capture_output=True, check=False).returncode == 0
    iptables = "iptables" if works else "iptables-legacy"
    for rule in RULES:
        run(f"{iptables} {rule}")
    for name, value in LIMITS.items():
        Path("/proc/sys/net", name).write_text(value)


PATH = "/usr/sbin:/usr/bin:/sbin:/bin"


def run(command: str) -> None:
    """Without the sanitizers that this process was started with."""
    done = subprocess.run(command.split(), env={"PATH": PATH}, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"fuzz: {command}: {done.stderr.strip()}")


def service(name: str) -> blobs.Put:
    address, index = SERVICES[name]
    ports = (ServicePort(REQUESTS, REQUESTS, Protocol.HTTP), ServicePort(OPAQUE, OPAQUE, Protocol.TCP),
             ServicePort(SNIFFED, OPAQUE, Protocol.AUTO))
    return blobs.put_service(index, Service("default", f"{name}.default.svc", name, (ip_address(address),), ports))


def workload(index: int, address: str, tunnel: Tunnel = Tunnel.NONE) -> blobs.Put:
    ports = (WorkloadPort("default/web.default.svc", REQUESTS, REQUESTS, Protocol.HTTP),
             WorkloadPort("default/web.default.svc", OPAQUE, OPAQUE, Protocol.TCP))
    made = Workload(f"w{index}", f"w{index}", "default", (ip_address(address),), "n1", f"w{index}", DOMAIN, f"w{index}", "pod",
                    "w", "v1", "c1", True, ports, tunnel=tunnel)
    return blobs.put_workload(index, made, INDEX.__getitem__)


def cluster(name: str, *endpoints: tuple[str, int], balancer: Balancer = Balancer.LEAST_REQUEST) -> blobs.Put:
    made = Cluster(SCOPE, name, "default/web.default.svc", balancer, 10_000,
                   tuple(Endpoint(ip_address(address), port) for address, port in endpoints))
    return blobs.put_cluster(made, lambda key: INDEX.get(key, 0))


def to(name: str, match: MatchKind = MatchKind.PREFIX, value: str = "/", *, timeout_ms: int = 0,
       edit: HeaderEdit | None = None, headers: tuple[NamedMatch, ...] = ()) -> Route:
    change = edit or HeaderEdit()
    return Route(f"to-{name}", RouteMatch(StringMatch(match, value), headers), (WeightedCluster(name, 1, change, change),), timeout_ms)


def destination(name: str, port: int, web: str = "web", opaque: str = "opaque") -> blobs.Put:
    edit = HeaderEdit(("x-removed",), (("x-set", "1"),), (("x-added", "2"),))
    routes = (*(to(target, MatchKind.EXACT, path) for path, target in ROUTES.items()),
              to(web, MatchKind.PATH_SEPARATED_PREFIX, "/timeout", timeout_ms=1000), to(web, MatchKind.PREFIX, "/edit", edit=edit),
              to(web, headers=(NamedMatch("x-debug", StringMatch(MatchKind.REGEX, "o[nf]+")),)), to(web))
    hosts = (VirtualHost("only", ("only.example",), (to(web, MatchKind.EXACT, "/only"),)), VirtualHost("all", ("*",), routes))
    http = hosts if port != OPAQUE else None
    tcp = (WeightedCluster(opaque, 3), WeightedCluster("opaque-too", 1)) if port != REQUESTS else None
    return blobs.put_destination(Destination(SCOPE, f"{name}.default.svc:{port}", http, tcp))


def pods(excluded: tuple[int, ...] | None = ()) -> tuple[blobs.Put, ...]:
    first, second = ISSUED.leaves
    return (blobs.put_pod("p1", 1, "w1", SCOPE, (ip_address("10.9.1.1"), ip_address("10.9.2.1")), first.identity, excluded),
            blobs.put_pod("p2", 2, "w2", SCOPE, (ip_address("10.9.2.2"),), second.identity, excluded))


def certificates() -> tuple[blobs.Put, ...]:
    return tuple(blobs.put_certificate(Certificate(leaf.identity, number, 0, 1 << 40, (leaf.certificate,)))
                 for number, leaf in enumerate(ISSUED.leaves, 1))


def trust(*lists: bytes) -> blobs.Put:
    return blobs.put_trust(Trust(DOMAIN, (ISSUED.root,), lists))


def policy(name: str, action: Action, *matches: Match, dry_run: bool = False) -> blobs.Put:
    """For both pods. Without a match it is for everybody."""
    return blobs.put_policy(Policy("default", name, Scope.NAMESPACE, action, (((matches,) if matches else ()),), dry_run))


def base() -> tuple[blobs.Entry, ...]:
    a, b = SERVERS
    return (
        blobs.put_settings(ProxySettings()), *pods(),
        trust(), *certificates(),
        workload(1, "10.9.1.1"), workload(2, "10.9.2.2", Tunnel.HBONE), workload(3, "10.9.0.20"), workload(4, a), workload(5, b),
        *(service(name) for name in SERVICES),
        cluster("web", (a, REQUESTS), (b, REQUESTS)), cluster("opaque", (a, OPAQUE)), cluster("opaque-too", (b, OPAQUE)), cluster("none"),
        cluster("refused", (a, REFUSED)), cluster("silent", (a, SILENT)), cluster("nowhere", ("192.0.2.1", REQUESTS)),
        destination("web", REQUESTS), destination("web", OPAQUE), destination("auto", SNIFFED),
        destination("broken", OPAQUE, "refused", "refused"), destination("broken", SNIFFED, "web", "refused"),
    )


def delete(kind: blobs.Kind, *keys: str) -> tuple[blobs.Entry, ...]:
    return tuple(blobs.Delete(kind, key) for key in keys)


def changes() -> list[tuple[blobs.Entry, ...]]:
    """What a script may commit, by its number: append only, since inputs of the corpus name them. FORGETS and QUIET are such numbers."""
    b = SERVERS[1]
    first = ISSUED.leaves[0]
    late = [f"late.default.svc:{port}" for port in (REQUESTS, OPAQUE, SNIFFED)]
    ports = (REQUESTS, OPAQUE, SNIFFED)
    return [
        base(),
        (cluster("web", (b, REQUESTS), balancer=Balancer.ROUND_ROBIN), cluster("opaque", (b, OPAQUE), balancer=Balancer.RANDOM)),
        (cluster("web"), cluster("opaque"), cluster("opaque-too")),
        tuple(blobs.put_unknown_destination(SCOPE, f"web.default.svc:{port}") for port in ports),
        delete(blobs.Kind.DESTINATION, *(f"{SCOPE}|web.default.svc:{port}" for port in ports), f"{SCOPE}|auto.default.svc:{SNIFFED}"),
        tuple(destination("late", port) for port in ports),
        tuple(blobs.put_unknown_destination(SCOPE, key) for key in late),
        delete(blobs.Kind.DESTINATION, *(f"{SCOPE}|{key}" for key in late)),
        delete(blobs.Kind.SERVICE, *INDEX),
        delete(blobs.Kind.WORKLOAD, "w1", "w2", "w3", "w4", "w5"),
        delete(blobs.Kind.POD, "p1"),
        pods(),
        (blobs.put_settings(ProxySettings()),),
        (blobs.put_settings(ProxySettings(access_log=False)),),
        (blobs.put_settings(ProxySettings(connections_per_pod=2, hold_connections=1, pool_idle_per_endpoint=1)),),
        (blobs.put_settings(ProxySettings(buffered_bytes_per_worker=98_304, buffered_bytes_per_pod=49_152)),),
        (blobs.put_settings(ProxySettings(descriptors_per_worker=9, head_bytes=512, hold_bytes=16, buffer_bytes=16_384)),),
        (blobs.put_settings(ProxySettings(pool_idle_per_endpoint=0, stream_idle_timeout_ms=700, tcp_idle_timeout_ms=900,
                                          request_head_timeout_ms=300, request_body_timeout_ms=400, hold_timeout_ms=200)),),
        delete(blobs.Kind.CLUSTER, f"{SCOPE}|web", f"{SCOPE}|opaque"),
        (policy("nobody", Action.DENY),),
        (policy("first", Action.ALLOW, Match(principals=(StringMatch(MatchKind.EXACT, first.identity.removeprefix("spiffe://")),),
                                             ports=(REQUESTS,))),),
        (policy("trial", Action.DENY, dry_run=True),),
        delete(blobs.Kind.POLICY, *(f"default/{name}" for name in ("nobody", "first", "trial"))),
        (blobs.put_settings(ProxySettings(same_node_tunnel=True)),),
        (trust(ISSUED.revoked),),
        (trust(),),
        certificates(),
        delete(blobs.Kind.CERTIFICATE, first.identity),
        delete(blobs.Kind.TRUST, DOMAIN),
        (cluster("web", ("10.9.2.2", REQUESTS)), cluster("opaque", ("10.9.2.2", OPAQUE))),
        pods(None),
        (workload(2, "10.9.2.2"),),
        (cluster("web", ("10.9.2.2", REQUESTS), (b, REQUESTS)),),
        (blobs.put_settings(ProxySettings(same_node_tunnel=True, tunnel_ping_ms=500, tunnel_pong_ms=700, tunnel_idle_ms=900)),),
        (blobs.put_settings(ProxySettings(same_node_tunnel=True, connections_per_pod=2, buffered_bytes_per_pod=196_608)),),
    ]


QUIET = frozenset({13})         # of these: what is not logged
FORGETS = frozenset({8, 9})     # series of those who are gone go too
DENIES = frozenset({19})        # nobody comes in any more
JUDGES = frozenset({19, 20, 21, 22})    # policies alone
CALM = frozenset({21, 22, 23, 26, 29, 32, 33})     # in force before the first connection, they disturb none


def transactions() -> list[bytes]:
    """`changes` as the keeper sends them; the id, bytes 8 to 16, is for whoever sends it."""
    return [blobs.encode_transaction(1, entries) for entries in changes()]
