"""The HTTP side of our API server: a thread of the test's process with its own loop, on loopback.

    with ApiServer() as server:
        server.configuration()               for a client of ours
        server.store.compact()               whoever resumes gets 410
        server.cut(middle=True)              every watch breaks off in the middle of a line
        server.chaos.add("list", "pods", code=429, reason="TooManyRequests", retry_after="1", times=2)
        server.requests                      what was asked, in order
"""
from __future__ import annotations

import asyncio
import json
import ssl
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from protos.kubernetes.configuration import Configuration, Given, Source
from tests.support.kubernetes import selectors, tokens
from tests.support.kubernetes.chaos import Chaos, Fault
from tests.support.kubernetes.store import HISTORY, Refused, Store
from tests.support.kubernetes.table import TABLE, Object, Served
from tests.support.kubernetes.tokens import Token

MERGES = {"application/merge-patch+json", "application/strategic-merge-patch+json"}
APPLY = {"application/apply-patch+yaml"}
BODY_BOUND = 3 << 20
PLAIN = {"content_type": "text/plain"}


@dataclass(frozen=True)
class Request:
    verb: str
    plural: str
    namespace: str
    name: str
    subresource: str
    query: Mapping[str, str]


@dataclass(eq=False)
class _Open:
    """A watch that is being told."""

    wake: asyncio.Event
    transport: asyncio.Transport | None
    cut: bool = False
    middle: bool = False
    bookmark: bool = False


class ApiServer:
    def __init__(self, table: Iterable[Served] = TABLE, *, history: int = HISTORY, tls: ssl.SSLContext | None = None,
                 host: str = "127.0.0.1") -> None:
        self.store, self.chaos = Store(table, history), Chaos()
        self.tokens: dict[str, Token] = {}
        self.authorize = False  # only bearers of `tokens` may ask
        self.audience_aware = True
        self.requests: list[Request] = []
        self.port = 0
        self._host, self._tls = host, tls
        self._watches: set[_Open] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="api-server", daemon=True)
        self._ready, self._failed = threading.Event(), False

    def __enter__(self) -> ApiServer:
        self._thread.start()
        assert self._ready.wait(30) and not self._failed, "the API server did not start"
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Connections are refused from now on."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(30)
            assert not self._thread.is_alive()

    @property
    def url(self) -> str:
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"{'https' if self._tls else 'http'}://{host}:{self.port}"

    def configuration(self, token: str = "", ca: Source | None = None) -> Configuration:
        return Configuration(self.url, token=Given(token.encode()) if token else None, ca=ca)

    @property
    def watches(self) -> int:
        """How many are open."""
        return len(self._watches)

    def cut(self, *, middle: bool = False) -> None:
        """Break off every watch, without an end; `middle`: after half a line."""
        self._each(lambda one: (setattr(one, "cut", True), setattr(one, "middle", middle)))

    def bookmark(self) -> None:
        """Every watch gets one now."""
        self._each(lambda one: setattr(one, "bookmark", True))

    def asked(self, verb: str, plural: str) -> list[Request]:
        return [one for one in list(self.requests) if (one.verb, one.plural) == (verb, plural)]

    # -- inside -----------------------------------------------------------------------------------------------------

    def _each(self, change: Any) -> None:
        def there() -> None:
            for one in self._watches:
                change(one)
                one.wake.set()
        self._loop.call_soon_threadsafe(there)

    def _wake(self) -> None:
        self._each(lambda _: None)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        app = web.Application(client_max_size=BODY_BOUND)
        app.router.add_route("*", "/{path:.*}", self._serve)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
        try:
            self._loop.run_until_complete(runner.setup())
            site = web.TCPSite(runner, self._host, 0, ssl_context=self._tls)
            self._loop.run_until_complete(site.start())
            self.port = runner.addresses[0][1]
            self.store.listeners.add(self._wake)
        except BaseException:
            self._failed = True
            raise
        finally:
            self._ready.set()
        self._loop.run_forever()
        self.store.listeners.discard(self._wake)
        for one in list(self._watches):
            one.cut = True
            one.wake.set()
        self._loop.run_until_complete(runner.cleanup())
        self._loop.close()

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        try:
            self._authenticate(request)
            return await self._route(request)
        except Refused as refused:
            return _status(refused)
        except selectors.SelectorError as error:
            return _status(Refused(400, "BadRequest", str(error)))
        except web.HTTPRequestEntityTooLarge:
            return _status(Refused(413, "RequestEntityTooLarge", f"Request entity too large: limit is {BODY_BOUND}"))
        except (ValueError, UnicodeDecodeError) as error:
            return _status(Refused(400, "BadRequest", f"the body or a parameter is not valid: {error}"))

    def _authenticate(self, request: web.Request) -> None:
        given = request.headers.get("Authorization", "")
        if self.authorize and given.removeprefix("Bearer ") not in self.tokens:
            raise Refused(401, "Unauthorized", "Unauthorized")

    async def _route(self, request: web.Request) -> web.StreamResponse:
        parts = request.path.strip("/").split("/")
        if parts[0] == "api" and len(parts) >= 2:
            group, rest = "", parts[1:]
        elif parts[0] == "apis" and len(parts) >= 3:
            group, rest = parts[1], parts[2:]
        else:
            return self._discover(parts)
        version, rest = rest[0], rest[1:]
        if not rest:
            self.requests.append(Request("discover", f"{group}/{version}", "", "", "", {}))
            fault = self.chaos.of("discover", f"{group}/{version}")
            answer = await self._fault(request, fault)
            return self._discover(parts) if answer is None else answer
        if group == "authentication.k8s.io" and rest == ["tokenreviews"] and request.method == "POST":
            self.requests.append(Request("create", "tokenreviews", "", "", "", {}))
            answer = await self._fault(request, self.chaos.of("create", "tokenreviews"))
            if answer is not None:
                return answer
            told = tokens.review(self.store, self.tokens, json.loads(await request.read()), self.audience_aware)
            return web.json_response(told, status=201)
        namespace = ""
        if rest[0] == "namespaces" and len(rest) > 2 and rest[2] not in ("status", "finalize"):
            namespace, rest = rest[1], rest[2:]
        served = self.store.served.get((group, version, rest[0]))
        if served is None or len(rest) > 3 or (namespace and not served.resource.namespaced):
            if any(one.resource.group == group and not one.custom for one in self.store.served.values()):
                return _status(Refused(404, "NotFound", "the server could not find the requested resource"))
            return web.Response(status=404, text="404 page not found\n", **PLAIN)
        name, subresource = [*rest[1:], "", ""][:2]
        watching = request.query.get("watch") in ("1", "true")
        verb = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete",
                "GET": "get" if name else "watch" if watching else "list"}.get(request.method, "")
        self.requests.append(Request(verb, rest[0], namespace, name, subresource, dict(request.query)))
        fault = self.chaos.of(verb, rest[0])
        if (answer := await self._fault(request, fault)) is not None:
            return answer
        if verb == "watch":
            return await self._watch(request, served, namespace)
        if verb == "list":
            revision = fault.revision if fault else None
            asked = request.query.get("resourceVersion", "")
            if asked not in ("", "0") and int(asked) > self.store.revision:
                raise Refused(504, "Timeout", f"Too large resource version: {asked}, current: {self.store.revision}", retryAfterSeconds=1)
            return web.json_response(self.store.page(served, namespace, self._selector(request, served),
                                                     int(request.query.get("limit", "0")), request.query.get("continue", ""), revision))
        if served.resource.namespaced and not namespace:
            return _status(Refused(405, "MethodNotAllowed", "the server does not allow this method on the requested resource"))
        return await self._object(request, verb, served, namespace, name, subresource)

    async def _fault(self, request: web.Request, fault: Fault | None) -> web.Response | None:
        if fault is None:
            return None
        if fault.seconds:
            await asyncio.sleep(fault.seconds)
        if fault.drop:
            assert request.transport is not None
            request.transport.abort()
            raise asyncio.CancelledError
        if fault.refused is not None:
            return _status(fault.refused, fault.retry_after)
        if fault.text is not None or fault.large:
            return web.Response(body=fault.text or b"x" * fault.large, content_type="application/json")
        return None

    async def _object(self, request: web.Request, verb: str, served: Served, namespace: str, name: str, subresource: str) -> web.Response:
        store, query = self.store, request.query
        manager = query.get("fieldManager") or request.headers.get("User-Agent", "unknown").partition("/")[0]
        if verb == "get":
            return web.json_response(store.get(served, namespace, name))
        data, media = await request.read(), request.content_type
        if verb in ("create", "update") and media != "application/json":
            raise Refused(415, "UnsupportedMediaType", f"the body of the request was in an unknown format: {media}")
        body = json.loads(data) if data else {}
        if verb == "create" and (served.resource.plural, subresource) == ("serviceaccounts", "token"):
            return web.json_response(tokens.request(store, self.tokens, namespace, name, body), status=201)
        if verb == "create":
            return web.json_response(store.create(served, namespace, body, manager), status=201)
        if verb == "update":
            return web.json_response(store.update(served, namespace, name, body, manager, subresource))
        if verb == "delete":
            return web.json_response(store.delete(served, namespace, name, body))
        if verb == "patch" and media in APPLY:
            if not query.get("fieldManager"):
                raise Refused(422, "Invalid", "PatchOptions is invalid: fieldManager: Required value: is required for apply patch")
            found, made = store.apply(served, namespace, name, body, manager, query.get("force") == "true", subresource)
            return web.json_response(found, status=201 if made else 200)
        if verb == "patch" and media in MERGES and not (served.custom and media.startswith("application/strategic")):
            return web.json_response(store.merge(served, namespace, name, body, manager, subresource))
        return _status(Refused(415, "UnsupportedMediaType", f"the body of the request was in an unknown format: {media}"))

    def _selector(self, request: web.Request, served: Served) -> selectors.Selector:
        labels = selectors.labels(request.query.get("labelSelector", ""))
        fields = selectors.fields(request.query.get("fieldSelector", ""), served)
        return lambda one: labels(one) and fields(one)

    # -- watches ----------------------------------------------------------------------------------------------------

    async def _watch(self, request: web.Request, served: Served, namespace: str) -> web.StreamResponse:
        selector = self._selector(request, served)
        asked, bookmarks = request.query.get("resourceVersion", ""), request.query.get("allowWatchBookmarks") in ("1", "true")
        seconds = float(request.query.get("timeoutSeconds", "1800"))
        at = self.store.revision if asked in ("", "0") else int(asked)
        if self.chaos.gone_as_status:
            self.store.since(served, at)

        def wanted(one: Object | None) -> bool:
            return one is not None and (not namespace or one["metadata"].get("namespace") == namespace) and selector(one)

        answer = web.StreamResponse(headers={"Content-Type": "application/json"})
        answer.enable_chunked_encoding()
        await answer.prepare(request)
        open_ = _Open(asyncio.Event(), request.transport)
        self._watches.add(open_)
        end = self._loop.time() + seconds
        bookmark = self._loop.time() + self.chaos.bookmark_seconds
        try:
            if asked in ("", "0"):
                for one in self.store.snapshot(served, at).values():
                    if wanted(one):
                        await _tell(answer, "ADDED", one)
            while True:
                open_.wake.clear()
                if open_.cut:
                    return await self._break(answer, open_)
                now = self._loop.time()
                if not self.chaos.silent:
                    try:
                        at = await self._changes(answer, served, at, wanted)
                    except Refused as refused:
                        await _tell(answer, "ERROR", refused.status())
                        return answer
                    known = at <= self.store.revision
                    if bookmarks and known and (now >= bookmark or now >= end or open_.bookmark):
                        open_.bookmark, bookmark = False, now + self.chaos.bookmark_seconds
                        await _tell(answer, "BOOKMARK", {
                            "kind": served.resource.kind, "apiVersion": served.resource.api_version,
                            "metadata": {"resourceVersion": str(at), "creationTimestamp": None}})
                    if now >= end:
                        return answer
                try:
                    async with asyncio.timeout(max(0.0, min(end, bookmark) - self._loop.time()) if not self.chaos.silent else None):
                        await open_.wake.wait()
                except TimeoutError:
                    continue
        finally:
            self._watches.discard(open_)

    async def _changes(self, answer: web.StreamResponse, served: Served, at: int, wanted: Any) -> int:
        """What comes after `at`; an object that leaves what is selected was deleted, for who watches."""
        with self.store.lock:
            changes, revision = self.store.since(served, at), max(at, self.store.revision)  # from the future: silence until it is there
        for change in changes:
            before, after = wanted(change.before), wanted(change.after)
            version = {"resourceVersion": str(change.revision)}
            if after:
                await _tell(answer, "MODIFIED" if before else "ADDED", change.after)
            elif before:
                assert change.before is not None
                last = change.after or change.before
                await _tell(answer, "DELETED", {**last, "metadata": {**last["metadata"], **version}})
        return revision

    async def _break(self, answer: web.StreamResponse, open_: _Open) -> web.StreamResponse:
        if open_.middle:
            await answer.write(b'{"type":"MODIFIED","object":{"kind":"P')
            await asyncio.sleep(0)
        if open_.transport is not None:
            open_.transport.close() if open_.middle else open_.transport.abort()  # close: what was written arrives
        raise asyncio.CancelledError

    # -- others -----------------------------------------------------------------------------------------------------

    def _discover(self, parts: list[str]) -> web.Response:
        groups: dict[str, set[str]] = {}
        for group, version, _ in self.store.served:
            groups.setdefault(group, set()).add(version)
        if parts == ["version"]:
            return web.json_response({"major": "1", "minor": "32", "gitVersion": "v1.32.0-narrows"})
        if parts in (["readyz"], ["livez"], ["healthz"]):
            return web.Response(text="ok", **PLAIN)
        if parts == ["api"]:
            return web.json_response({"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []})
        if parts == ["apis"]:
            return web.json_response({"kind": "APIGroupList", "apiVersion": "v1", "groups": [
                {"name": group, "versions": [{"groupVersion": f"{group}/{one}", "version": one} for one in sorted(versions)],
                 "preferredVersion": {"groupVersion": f"{group}/{max(versions)}", "version": max(versions)}}
                for group, versions in sorted(groups.items()) if group]})
        group, version = ("", parts[1]) if parts[0] == "api" and len(parts) == 2 else (parts[1], parts[2]) if len(parts) == 3 else ("", "")
        found = [one for one in self.store.served.values() if (one.resource.group, one.resource.version) == (group, version)]
        if not found:
            return web.Response(status=404, text="404 page not found\n", **PLAIN)
        verbs = ["create", "delete", "get", "list", "patch", "update", "watch"]
        head = {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": found[0].resource.api_version}
        return web.json_response({**head, "resources": [
            {"name": one.resource.plural, "singularName": one.resource.kind.lower(), "namespaced": one.resource.namespaced,
             "kind": one.resource.kind, "verbs": verbs} for one in found]})


async def _tell(answer: web.StreamResponse, kind: str, one: Object | None) -> None:
    await answer.write(json.dumps({"type": kind, "object": one}).encode() + b"\n")


def _status(refused: Refused, retry_after: str | None = None) -> web.Response:
    headers = {"Retry-After": retry_after} if retry_after else {}
    return web.json_response(refused.status(), status=refused.code, headers=headers)
