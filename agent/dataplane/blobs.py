"""Blobs and transactions as bytes: the encoder of what the workers decode (twins: ext/route/decode.pyx, routes.pyx).

All integers little-endian. `str` is u32 length + bytes, `list` is u32 count + items, `addr` is u8 family (4 or 6)
+ 4 or 16 bytes.

    transaction   u32 magic, u16 version, u16 flags (0), u64 id, u32 entries, u32 crc32 of all that follows, entries
    entry         u8 op, u8 kind, u16 key length, u32 payload length, u32 crc32 of payload, key, payload, zeros up to 8

    SETTINGS      list of u32, in the order of ProxySettings' fields; a decoder keeps its default for what is missing
    WORKLOAD      u32 index, u8 healthy, list addr,
                  list (u32 service index, u16 service port, u16 target port, u8 protocol),
                  u8 tunnel (0 none, 1 HBONE), str identity, list str policies
    SERVICE       u32 index, str hostname, list addr, list (u16 port, u16 target port, u8 protocol)
    DESTINATION   u8 flags (1 http, 2 tcp), if http: list vhost, if tcp: list weighted
      vhost       str name, list str domain, list route
      route       str name, match path, list named header, list named query, u32 timeout ms, edit request,
                  edit response, list weighted
      match       u8 kind, u8 flags (1 ignore case, 2 invert, 4 missing is empty), str value
      named       str name, match
      weighted    str cluster (in the scope of the key), u32 weight, edit request, edit response
      edit        list str remove, list (str, str) set, list (str, str) add
    CLUSTER       u8 balancer, u32 connect timeout ms, u32 service index, list (addr, u16 port, u32 weight, u8 healthy)
    POD           u32 handle, str workload uid, str scope, list addr, str identity (empty: none), u8 direct (1: pods of its node may be
                  connected to it inside its namespace), list u16 ports on which it is not captured inbound
    TRUST         list str root (DER), list str revocation list (DER); the key is the trust domain
    CERTIFICATE   u32 key id, u64 not before, u64 not after (s since 1970), list str certificate (DER, leaf first); the key is
                  the identity
    POLICY        u8 scope (0 all, 1 its namespace, 2 who names it), u8 action (0 allow, 1 deny), u8 dry run, list rule
      rule        list clause
      clause      list pmatch
      pmatch      list text (namespaces), list text (not), list text (principals), list text (not), list block (sources), list block (not),
                  list block (destinations), list block (not), list u16 (ports), list u16 (not), list (str, str) (accounts), list (str, str)
      text        u8 kind (exact, prefix, suffix, present), str value
      block       addr, u8 prefix length
    RESOURCE      str version, str serialized Any
    NOTE          as its writer likes

Numbers of the protocol are those of ext/core/protocol.pxd and ext/route/shapes.pxd; a test compares them.
"""
from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import astuple, dataclass
from enum import IntEnum
from zlib import crc32

from agent.model.identity import Certificate, Trust
from agent.model.policy import Match, Policy
from agent.model.routing import (
    Balancer,
    Cluster,
    Destination,
    HeaderEdit,
    MatchKind,
    NamedMatch,
    Route,
    StringMatch,
    VirtualHost,
    WeightedCluster,
)
from agent.model.settings import ProxySettings
from agent.model.workload import IPAddress, Protocol, Service, Workload

MAGIC = 0x5457524E
VERSION = 1
HEADER = struct.Struct("<IHHQII")
ENTRY = struct.Struct("<BBHII")
KEY_MAX = 0xFFFF

U8, U16, U32 = struct.Struct("<B"), struct.Struct("<H"), struct.Struct("<I")
_VALIDITY = struct.Struct("<IQQ")

ServiceIndex = Callable[[str], int]  # Service.key -> index, 0 for a service that has none


class Op(IntEnum):
    PUT = 1
    DELETE = 2


class Kind(IntEnum):
    SETTINGS = 1
    WORKLOAD = 2
    SERVICE = 3
    DESTINATION = 4
    CLUSTER = 5
    POD = 6
    POLICY = 7
    TRUST = 8
    CERTIFICATE = 9
    RESOURCE = 128
    NOTE = 129


PROTOCOLS = {
    Protocol.AUTO: 0,
    Protocol.TCP: 1,
    Protocol.HTTP: 2,
    Protocol.HTTP2: 3,
    Protocol.GRPC: 4,
    Protocol.TLS: 5,
}
BALANCERS = {Balancer.ROUND_ROBIN: 1, Balancer.LEAST_REQUEST: 2, Balancer.RANDOM: 3}
MATCHERS = {
    MatchKind.EXACT: 1,
    MatchKind.PREFIX: 2,
    MatchKind.SUFFIX: 3,
    MatchKind.REGEX: 4,
    MatchKind.PRESENT: 5,
    MatchKind.CONTAINS: 6,
    MatchKind.PATH_SEPARATED_PREFIX: 7,
}


class BlobError(ValueError):
    """Bytes that are not a transaction, or a value that does not fit the format. The text says which and where."""


@dataclass(frozen=True, slots=True)
class Put:
    """Set the blob of (kind, key). `kind` is a plain number so that an unknown one can be read back."""

    kind: int
    key: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class Delete:
    """Remove the blob of (kind, key); removing what is not there does nothing."""

    kind: int
    key: str


Entry = Put | Delete


# ---- transactions ------------------------------------------------------------------------------------------


def encode_transaction(txn_id: int, entries: Iterable[Entry]) -> bytes:
    """Entries in the order in which they take effect. Raises BlobError if a key or the id does not fit."""
    parts = [_entry(entry) for entry in entries]
    body = b"".join(parts)
    try:
        return HEADER.pack(MAGIC, VERSION, 0, txn_id, len(parts), crc32(body)) + body
    except struct.error as error:
        raise BlobError(f"transaction {txn_id}: {error}") from None


def _entry(entry: Entry) -> bytes:
    key = entry.key.encode()
    if len(key) > KEY_MAX:
        raise BlobError(f"{_name(entry.kind)} {entry.key[:80]}…: key of {len(key)} bytes, at most {KEY_MAX}")
    payload = entry.payload if isinstance(entry, Put) else b""
    op = Op.PUT if isinstance(entry, Put) else Op.DELETE
    size = ENTRY.size + len(key) + len(payload)
    head = ENTRY.pack(op, entry.kind, len(key), len(payload), crc32(payload))
    return b"".join((head, key, payload, bytes(-size % 8)))


def decode_transaction(data: bytes | memoryview) -> tuple[int, tuple[Entry, ...]]:
    """Id and entries, every checksum, bound and padding checked. Raises BlobError with the offset of what is wrong.

    Payloads stay bytes: what the keeper gives back is read by kind (`decode_resource`).
    """
    view = memoryview(data)
    if len(view) < HEADER.size:
        raise BlobError(f"transaction of {len(view)} bytes is shorter than its header ({HEADER.size})")
    magic, version, flags, txn_id, count, crc = HEADER.unpack_from(view)
    if magic != MAGIC:
        raise BlobError(f"not a transaction: magic {magic:#010x} instead of {MAGIC:#010x}")
    if (version, flags) != (VERSION, 0):
        raise BlobError(f"transaction of version {version}, flags {flags:#x}: expected {VERSION} and none")
    if crc32(view[HEADER.size :]) != crc:
        raise BlobError(f"transaction {txn_id}: checksum of the body differs: it was cut or changed on its way")
    entries = tuple(_iterate(view, count))
    return txn_id, entries


def _iterate(view: memoryview, count: int) -> Iterator[Entry]:
    at = HEADER.size
    for number in range(count):
        if len(view) - at < ENTRY.size:
            raise BlobError(f"entry {number} of {count} at offset {at}: cut")
        op, kind, key_size, payload_size, crc = ENTRY.unpack_from(view, at)
        key_at = at + ENTRY.size
        payload_at = key_at + key_size
        end = payload_at + payload_size
        padded = end + -end % 8
        if padded > len(view):
            raise BlobError(f"entry {number} of {count} at offset {at}: {padded - len(view)} bytes beyond the end")
        try:
            key = bytes(view[key_at:payload_at]).decode()
        except UnicodeDecodeError:
            raise BlobError(f"entry {number} of {count} at offset {at}: key is not UTF-8") from None
        payload = bytes(view[payload_at:end])
        if any(view[end:padded]):
            raise BlobError(f"{_name(kind)} {key}: padding is not zero")
        if crc32(payload) != crc:
            raise BlobError(f"{_name(kind)} {key}: checksum of the payload differs")
        if op == Op.PUT:
            yield Put(kind, key, payload)
        elif op == Op.DELETE and not payload:
            yield Delete(kind, key)
        else:
            raise BlobError(f"{_name(kind)} {key}: operation {op} with {payload_size} bytes of payload")
        at = padded
    if at != len(view):
        raise BlobError(f"{len(view) - at} bytes after the last of {count} entries")


def _name(kind: int) -> str:
    return Kind(kind).name if kind in set(Kind) else f"kind {kind}"


# ---- blobs -------------------------------------------------------------------------------------------------


def put_settings(settings: ProxySettings) -> Put:
    return _put(Kind.SETTINGS, "", lambda: _list(_u32(int(value)) for value in astuple(settings)))


def put_workload(index: int, workload: Workload, service_index: ServiceIndex) -> Put:
    """`index` is the workload's number in counters, given once and never again."""

    def payload() -> bytes:
        ports = _list(
            _u32(service_index(port.service)) + _port(port.service_port, port.target_port, port.protocol)
            for port in workload.ports
        )
        return b"".join((_u32(index), _u8(workload.healthy), _addresses(workload.addresses), ports, _u8(workload.tunnel),
                         _str(workload.identity), _list(map(_str, workload.policies))))

    return _put(Kind.WORKLOAD, workload.uid, payload)


def put_service(index: int, service: Service) -> Put:
    def payload() -> bytes:
        ports = _list(_port(port.port, port.target_port, port.protocol) for port in service.ports)
        return b"".join((_u32(index), _str(service.hostname), _addresses(service.addresses), ports))

    return _put(Kind.SERVICE, service.key, payload)


def put_destination(destination: Destination) -> Put:
    def payload() -> bytes:
        http, tcp = destination.http, destination.tcp
        parts = [_u8((http is not None) | (tcp is not None) << 1)]
        if http is not None:
            parts.append(_list(map(_virtual_host, http)))
        if tcp is not None:
            parts.append(_list(map(_weighted, tcp)))
        return b"".join(parts)

    return _put(Kind.DESTINATION, destination.key, payload)


def put_unknown_destination(scope: str, authority: str) -> Put:
    """The control plane does not know this destination: 503, flag NC."""
    return put_destination(Destination(scope, authority, None, None))


def put_cluster(cluster: Cluster, service_index: ServiceIndex) -> Put:
    def payload() -> bytes:
        service = service_index(cluster.service)
        head = _u8(BALANCERS[cluster.balancer]) + _u32(cluster.connect_timeout_ms) + _u32(service)
        return head + _list(
            _address(endpoint.address) + _u16(endpoint.port) + _u32(endpoint.weight) + _u8(endpoint.healthy)
            for endpoint in cluster.endpoints
        )

    return _put(Kind.CLUSTER, cluster.key, payload)


def put_pod(pod_uid: str, handle: int, workload_uid: str, scope: str, addresses: tuple[IPAddress, ...],
            identity: str = "", excluded: tuple[int, ...] | None = None) -> Put:
    """`handle` is the number under which keeper and workers know the pod; `workload_uid` is Workload.uid; `identity` a SPIFFE ID.

    `excluded`: ports on which it is not captured inbound; None: nobody is connected to it inside its namespace, the pod's own rules decide.
    """
    return _put(Kind.POD, pod_uid, lambda: b"".join(
        (_u32(handle), _str(workload_uid), _str(scope), _addresses(addresses), _str(identity), _u8(excluded is not None),
         _list(map(_u16, excluded or ())))))


def put_trust(trust: Trust) -> Put:
    return _put(Kind.TRUST, trust.trust_domain, lambda: _list(map(_bytes, trust.roots)) + _list(map(_bytes, trust.lists)))


def decode_trust(put: Put) -> Trust:
    """What `put_trust` was given. Raises BlobError."""
    roots, at = _read_list(put, 0)
    lists, at = _read_list(put, at)
    _read_end(put, at)
    return Trust(put.key, roots, lists)


def put_certificate(certificate: Certificate) -> Put:
    return _put(Kind.CERTIFICATE, certificate.identity, lambda: _VALIDITY.pack(
        certificate.key, certificate.not_before, certificate.not_after) + _list(map(_bytes, certificate.chain)))


def decode_certificate(put: Put) -> Certificate:
    """What `put_certificate` was given. Raises BlobError."""
    if len(put.payload) < _VALIDITY.size:
        raise BlobError(f"{_name(put.kind)} {put.key}: cut at byte 0")
    key, not_before, not_after = _VALIDITY.unpack_from(put.payload)
    chain, at = _read_list(put, _VALIDITY.size)
    _read_end(put, at)
    return Certificate(put.key, key, not_before, not_after, chain)


def put_policy(policy: Policy) -> Put:
    """Its key is `namespace/name`."""
    return _put(Kind.POLICY, policy.key, lambda: b"".join((
        _u8(policy.scope), _u8(policy.action), _u8(policy.dry_run),
        _list(_list(_list(map(_policy_match, clause)) for clause in rule) for rule in policy.rules))))


def put_resource(type_url: str, name: str, version: str, body: bytes) -> Put:
    """A resource of the control plane as it was accepted; the keeper alone keeps it, for the next agent."""
    return _put(Kind.RESOURCE, f"{type_url}\n{name}", lambda: _str(version) + _bytes(body))


def decode_resource(put: Put) -> tuple[str, str, str, bytes]:
    """The four arguments of put_resource again. Raises BlobError."""
    type_url, newline, name = put.key.partition("\n")
    if put.kind != Kind.RESOURCE or not newline:
        raise BlobError(f"{_name(put.kind)} {put.key}: not a resource")
    version, at = _read_bytes(put, 0)
    body, at = _read_bytes(put, at)
    _read_end(put, at)
    try:
        return type_url, name, version.decode(), body
    except UnicodeDecodeError:
        raise BlobError(f"RESOURCE {put.key}: version is not UTF-8") from None


def put_note(key: str, body: bytes) -> Put:
    """What an agent wants to find again after its restart; the keeper alone keeps it."""
    return Put(Kind.NOTE, key, body)


def _put(kind: Kind, key: str, payload: Callable[[], bytes]) -> Put:
    try:
        return Put(kind, key, payload())
    except (struct.error, UnicodeEncodeError) as error:
        raise BlobError(f"{kind.name} {key}: a value does not fit: {error}") from None


# ---- parts -------------------------------------------------------------------------------------------------


def _virtual_host(host: VirtualHost) -> bytes:
    return _str(host.name) + _list(map(_str, host.domains)) + _list(map(_route, host.routes))


def _route(route: Route) -> bytes:
    return b"".join(
        (
            _str(route.name),
            _match(route.match.path),
            _list(map(_named, route.match.headers)),
            _list(map(_named, route.match.query)),
            _u32(route.timeout_ms),
            _edit(route.request),
            _edit(route.response),
            _list(map(_weighted, route.clusters)),
        )
    )


def _match(match: StringMatch, missing_is_empty: bool = False) -> bytes:
    flags = match.ignore_case | match.invert << 1 | missing_is_empty << 2
    return _u8(MATCHERS[match.kind]) + _u8(flags) + _str(match.value)


def _named(named: NamedMatch) -> bytes:
    return _str(named.name) + _match(named.match, named.missing_is_empty)


def _weighted(weighted: WeightedCluster) -> bytes:
    return b"".join((_str(weighted.cluster), _u32(weighted.weight), _edit(weighted.request), _edit(weighted.response)))


def _edit(edit: HeaderEdit) -> bytes:
    return b"".join((_list(map(_str, edit.remove)), _list(map(_pair, edit.set)), _list(map(_pair, edit.add))))


def _pair(pair: tuple[str, str]) -> bytes:
    return _str(pair[0]) + _str(pair[1])


def _policy_match(one: Match) -> bytes:
    texts = (one.namespaces, one.not_namespaces, one.principals, one.not_principals)
    blocks = (one.sources, one.not_sources, one.destinations, one.not_destinations)
    return b"".join((
        *(_list(_u8(MATCHERS[text.kind]) + _str(text.value) for text in many) for many in texts),
        *(_list(_address(block.network_address) + _u8(block.prefixlen) for block in many) for many in blocks),
        *(_list(map(_u16, many)) for many in (one.ports, one.not_ports)),
        *(_list(map(_pair, many)) for many in (one.service_accounts, one.not_service_accounts))))


def _port(port: int, target_port: int, protocol: Protocol) -> bytes:
    return _u16(port) + _u16(target_port) + _u8(PROTOCOLS[protocol])


def _addresses(addresses: Iterable[IPAddress]) -> bytes:
    return _list(map(_address, addresses))


def _address(address: IPAddress) -> bytes:
    return _u8(address.version) + address.packed


def _list(items: Iterable[bytes]) -> bytes:
    parts = list(items)
    return _u32(len(parts)) + b"".join(parts)


def _str(text: str) -> bytes:
    return _bytes(text.encode())


def _bytes(data: bytes) -> bytes:
    return U32.pack(len(data)) + data


def _u8(value: int) -> bytes:
    return U8.pack(value)


def _u16(value: int) -> bytes:
    return U16.pack(value)


def _u32(value: int) -> bytes:
    return U32.pack(value)


def _read_bytes(put: Put, at: int) -> tuple[bytes, int]:
    start = at + U32.size
    if start > len(put.payload):
        raise BlobError(f"{_name(put.kind)} {put.key}: cut at byte {at}")
    end = start + U32.unpack_from(put.payload, at)[0]
    if end > len(put.payload):
        raise BlobError(f"{_name(put.kind)} {put.key}: {end - len(put.payload)} bytes beyond the end")
    return put.payload[start:end], end


def _read_list(put: Put, at: int) -> tuple[tuple[bytes, ...], int]:
    if at + U32.size > len(put.payload):
        raise BlobError(f"{_name(put.kind)} {put.key}: cut at byte {at}")
    count, at = U32.unpack_from(put.payload, at)[0], at + U32.size
    items = []
    for _ in range(count):
        item, at = _read_bytes(put, at)
        items.append(item)
    return tuple(items), at


def _read_end(put: Put, at: int) -> None:
    if at != len(put.payload):
        raise BlobError(f"{_name(put.kind)} {put.key}: {len(put.payload) - at} bytes too many")
