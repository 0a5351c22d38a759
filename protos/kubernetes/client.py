"""The client: one method a verb, on aiohttp. Everything is bounded in bytes and in time, and every failure is an ApiError."""
from __future__ import annotations

import asyncio
import secrets
import socket
import ssl
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any, TypeVar

import aiohttp
import msgspec
from yarl import URL

from protos.kubernetes.configuration import Configuration
from protos.kubernetes.errors import (
    ApiError,
    ConfigurationError,
    Gone,
    Malformed,
    NotFound,
    TooLarge,
    Unauthorized,
    Unreachable,
    from_answer,
)
from protos.kubernetes.objects import ApiResources, Item, Page, TokenReview, TokenReviewStatus, page
from protos.kubernetes.resources import EVENTS, TOKEN_REVIEWS, Resource

T = TypeVar("T")
ANSWER_BOUND = 64 << 20  # bytes of an answer
ERROR_BOUND = 64 << 10  # bytes of an answer that says a failure
SECONDS = 30.0  # of a request as a whole; the API server itself gives up after 60
CHUNK = 64 << 10
CONNECTIONS = 16  # per client: a watch holds one
KEEPALIVE = ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3))  # s, s, probes: a dead peer is found in 60 s
MERGE = "application/merge-patch+json"
APPLY = "application/apply-patch+yaml"  # JSON is YAML
NOTE_BOUND = 1_024  # bytes of an event's note (events/v1 counts bytes, though it says characters)
Object = Mapping[str, Any]


class Watching:
    """An accepted watch: `read` gives what comes next, b"" at the end. `path` is for messages."""

    def __init__(self, path: str, answer: aiohttp.ClientResponse) -> None:
        self.path, self._answer = path, answer

    async def read(self) -> bytes:
        """Raises Unreachable when the connection is cut, also in the middle of a line or chunk."""
        try:
            return await self._answer.content.readany()
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise Unreachable("watch", self.path, 0, "Cut", str(error) or type(error).__name__) from None


class Client:
    """Use it as `async with`. Reads tokens and CA again as they change; never follows a redirect (a token would go along)."""

    def __init__(self, configuration: Configuration, user_agent: str = "narrows", *, seconds: float = SECONDS,
                 answer_bound: int = ANSWER_BOUND) -> None:
        self.configuration = configuration
        self._agent, self._seconds, self._bound = user_agent, seconds, answer_bound
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Client:
        connector = aiohttp.TCPConnector(limit=0, limit_per_host=0, ttl_dns_cache=10)
        self._session = aiohttp.ClientSession(connector=connector, headers={"User-Agent": self._agent, "Accept": "application/json"},
                                              read_bufsize=CHUNK, auto_decompress=True, trust_env=False)
        self._turn = asyncio.Semaphore(CONNECTIONS)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    # -- reading ----------------------------------------------------------------------------------------------------

    async def get(self, resource: Resource, name: str, namespace: str = "", kind: type[T] = dict) -> T:  # type: ignore[assignment]
        path = resource.path(namespace, name)
        return _decode("get", path, await self._ask("get", "GET", path), kind)

    async def page(self, resource: Resource, namespace: str = "", kind: type[T] = dict, *, limit: int = 0,  # type: ignore[assignment]
                   continue_: str = "", labels: str = "", fields: str = "", resource_version: str = "") -> Page[T]:
        """A part of a list. `limit` 0 is all; `labels` and `fields` are selectors as kubectl takes them. Raises Gone when `continue_`
        has ended: list anew."""
        path = resource.path(namespace)
        query = {"limit": str(limit) if limit else "", "continue": continue_, "labelSelector": labels, "fieldSelector": fields,
                 "resourceVersion": "" if continue_ else resource_version}
        body = await self._ask("list", "GET", path, query=query)
        try:
            return await _in_turns(page, body, kind)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise Malformed("list", path, 200, "", f"no list: {error}") from None

    async def list(self, resource: Resource, namespace: str = "", kind: type[T] = dict, *, limit: int = 500,  # type: ignore[assignment]
                   labels: str = "", fields: str = "") -> Page[T]:
        """All pages as one, in memory."""
        for again in (True, False):
            items: list[Item[T]] = []
            continue_ = ""
            try:
                while True:
                    one = await self.page(resource, namespace, kind, limit=limit if again else 0, continue_=continue_, labels=labels,
                                          fields=fields)
                    items += one.items
                    if not one.continue_:
                        return Page(items, one.resource_version)
                    continue_ = one.continue_
            except Gone:
                if not again:
                    raise
        raise AssertionError("unreachable")

    @asynccontextmanager
    async def watch(self, resource: Resource, namespace: str = "", *, resource_version: str, seconds: int, labels: str = "",
                    fields: str = "") -> AsyncIterator[Watching]:
        """A watch that the server ends after `seconds`. Its bytes are for `stream.Stream`; how long to wait for them is the caller's."""
        path = resource.path(namespace)
        query = {"watch": "1", "allowWatchBookmarks": "true", "resourceVersion": resource_version, "timeoutSeconds": str(seconds),
                 "labelSelector": labels, "fieldSelector": fields}
        answer = await self._send("watch", "GET", path, query, None, "", self._seconds, stream=True)
        try:
            if answer.status != 200:
                if answer.status == 401 and self.configuration.token is not None:
                    self.configuration.token.forget()  # for the next try, which is the caller's
                raise await self._failure("watch", path, answer)
            _keep_alive(answer)
            yield Watching(path, answer)
        finally:
            answer.close()  # not given back: a stream that was not read to its end cannot be used again

    async def serves(self, resource: Resource) -> bool:
        """Whether the server has the resource in this version (API concepts, "Discovery")."""
        path = f"/apis/{resource.api_version}" if resource.group else f"/api/{resource.version}"
        try:
            found = _decode("discover", path, await self._ask("discover", "GET", path), ApiResources)
        except NotFound:
            return False
        return any(one.name == resource.plural for one in found.resources or ())

    # -- writing ----------------------------------------------------------------------------------------------------

    async def create(self, resource: Resource, body: Object, namespace: str = "") -> dict[str, Any]:
        path = resource.path(namespace)
        return _decode("create", path, await self._ask("create", "POST", path, body), dict)

    async def update(self, resource: Resource, body: Object, *, subresource: str = "") -> dict[str, Any]:
        """Replace. With metadata.resourceVersion raises Conflict when somebody else was first."""
        path = _path_of(resource, body, subresource)
        return _decode("update", path, await self._ask("update", "PUT", path, body), dict)

    async def merge(self, resource: Resource, name: str, namespace: str, patch: Object, *, subresource: str = "") -> dict[str, Any]:
        """JSON merge patch (RFC 7396): null removes."""
        path = resource.path(namespace, name, subresource)
        return _decode("patch", path, await self._ask("patch", "PATCH", path, patch, media=MERGE), dict)

    async def apply(self, resource: Resource, body: Object, *, manager: str, force: bool = False, subresource: str = "") -> dict[str, Any]:
        """Server-side apply: what `body` has is `manager`'s, what it had and has no more is removed. Raises Conflict when a field is
        somebody else's and `force` was not given."""
        path = _path_of(resource, body, subresource)
        query = {"fieldManager": manager, "force": "true" if force else ""}
        whole = {"apiVersion": resource.api_version, "kind": resource.kind, **body}
        return _decode("apply", path, await self._ask("apply", "PATCH", path, whole, media=APPLY, query=query), dict)

    async def delete(self, resource: Resource, name: str, namespace: str = "", *, uid: str = "", resource_version: str = "",
                     grace_seconds: int | None = None) -> None:
        """With `uid` or `resource_version` only that very object: raises Conflict when it is another."""
        path = resource.path(namespace, name)
        conditions = {key: value for key, value in (("uid", uid), ("resourceVersion", resource_version)) if value}
        options: dict[str, Any] = {"apiVersion": "v1", "kind": "DeleteOptions"}
        if conditions:
            options["preconditions"] = conditions
        if grace_seconds is not None:
            options["gracePeriodSeconds"] = grace_seconds
        await self._ask("delete", "DELETE", path, options)

    async def review_token(self, token: str, audiences: Sequence[str] = ()) -> TokenReviewStatus:
        """Who a token is of. Not authenticated also when the server did not say that it is for one of `audiences`: a server that knows no
        audiences answers without them (TokenReviewStatus.audiences), and a token for somebody else must not do here."""
        path = TOKEN_REVIEWS.path()
        body = {"apiVersion": TOKEN_REVIEWS.api_version, "kind": TOKEN_REVIEWS.kind, "spec": {"token": token, "audiences": list(audiences)}}
        found = _decode("create", path, await self._ask("create", "POST", path, body), TokenReview).status
        if found.authenticated and audiences and not set(audiences) & set(found.audiences or ()):
            return TokenReviewStatus(error=f"the token is not for {' or '.join(audiences)}")
        return found

    async def tell(self, regarding: Object, *, reason: str, note: str, action: str, controller: str, instance: str,
                   warning: bool = False) -> dict[str, Any]:
        """An Event (events.k8s.io/v1) about an object: `regarding` has apiVersion, kind, name, namespace, uid."""
        namespace = regarding.get("namespace") or "default"  # of what has no namespace, events are in `default`
        body = {"apiVersion": EVENTS.api_version, "kind": EVENTS.kind,
                "metadata": {"name": f"{regarding['name'][:230]}.{secrets.token_hex(8)}", "namespace": namespace},
                "eventTime": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"), "reportingController": controller,
                "reportingInstance": instance[:128], "action": action, "reason": reason, "regarding": dict(regarding),
                "note": _cut(note), "type": "Warning" if warning else "Normal"}
        return await self.create(EVENTS, body, namespace)

    # -- inside -----------------------------------------------------------------------------------------------------

    async def _ask(self, verb: str, method: str, path: str, body: Object | None = None, *, media: str = "application/json",
                   query: Mapping[str, str] | None = None) -> bytes:
        """The body of a successful answer. A token that is refused is read again and tried once more."""
        for again in (True, False):
            try:
                async with self._turn, asyncio.timeout(self._seconds):
                    answer = await self._send(verb, method, path, query or {}, body, media, self._seconds)
                    try:
                        if answer.status not in (200, 201, 202):
                            raise await self._failure(verb, path, answer)
                        return await _whole(verb, path, answer, self._bound)
                    finally:
                        answer.release()
            except TimeoutError:
                raise Unreachable(verb, path, 0, "Timeout", f"no whole answer within {self._seconds:g} s") from None
            except (aiohttp.ClientError, OSError, ValueError) as error:
                raise Unreachable(verb, path, 0, "Cut", str(error) or type(error).__name__) from None
            except Unauthorized:
                if not again or self.configuration.token is None:
                    raise
                self.configuration.token.forget()
        raise AssertionError("unreachable")

    async def _send(self, verb: str, method: str, path: str, query: Mapping[str, str], body: Object | None, media: str, seconds: float, *,
                    stream: bool = False) -> aiohttp.ClientResponse:
        """The answer's head. Raises Unreachable."""
        if self._session is None:
            raise RuntimeError("the client is used outside of its `async with`")
        try:
            headers = {"Content-Type": media} if body is not None else {}
            if (token := self.configuration.bearer()) is not None:
                headers["Authorization"] = f"Bearer {token}"
            tls: ssl.SSLContext | bool = self.configuration.tls() or True
        except ConfigurationError as error:
            raise Unreachable(verb, path, 0, "Configuration", str(error), advice="correct it; it is read again") from None
        url = URL(self.configuration.server + path, encoded=True).with_query({key: value for key, value in query.items() if value})
        try:
            async with asyncio.timeout(seconds):
                return await self._session.request(
                    method, url, headers=headers, data=None if body is None else msgspec.json.encode(body), ssl=tls, allow_redirects=False,
                    server_hostname=self.configuration.server_name or None,
                    timeout=aiohttp.ClientTimeout(total=None if stream else seconds, sock_connect=10))
        except TimeoutError:
            raise Unreachable(verb, path, 0, "Timeout", f"no answer within {seconds:g} s") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise Unreachable(verb, path, 0, "Unreachable", str(error) or type(error).__name__) from None

    async def _failure(self, verb: str, path: str, answer: aiohttp.ClientResponse) -> ApiError:
        try:
            async with asyncio.timeout(self._seconds):
                body = await answer.content.read(ERROR_BOUND)
                while len(body) < ERROR_BOUND and (more := await answer.content.read(ERROR_BOUND - len(body))):
                    body += more
        except (aiohttp.ClientError, OSError, TimeoutError):
            body = b""
        answer.close()
        return from_answer(verb, path, answer.status, body, answer.headers.get("Retry-After"))


async def _whole(verb: str, path: str, answer: aiohttp.ClientResponse, bound: int) -> bytes:
    parts, size = [], 0
    async for part in answer.content.iter_any():
        size += len(part)
        if size > bound:
            answer.close()
            raise TooLarge(verb, path, answer.status, "TooLarge", f"more than {bound} bytes")
        parts.append(part)
    return b"".join(parts)


async def _in_turns(decode: Any, body: bytes, kind: type[T]) -> Page[T]:
    """A large list is decoded in a thread: the loop also has watches, probes and xDS to serve."""
    if len(body) < 1 << 20:
        return decode(body, kind)  # type: ignore[no-any-return]
    return await asyncio.to_thread(decode, body, kind)


def _decode(verb: str, path: str, body: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Malformed(verb, path, 200, "", str(error)) from None


def _cut(note: str) -> str:
    data = note.encode()
    return note if len(data) <= NOTE_BOUND else data[:NOTE_BOUND - 3].decode(errors="ignore") + "…"


def _path_of(resource: Resource, body: Object, subresource: str) -> str:
    meta = body.get("metadata") or {}
    return resource.path(meta.get("namespace", ""), meta.get("name", ""), subresource)


def _keep_alive(answer: aiohttp.ClientResponse) -> None:
    """A node that vanished sends no end: the kernel asks. Not over a transport that is no socket."""
    transport = answer.connection.transport if answer.connection else None
    sock = transport.get_extra_info("socket") if transport else None
    if sock is None:
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEPALIVE:
        sock.setsockopt(socket.IPPROTO_TCP, option, value)
