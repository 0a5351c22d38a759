"""The operator's door: HTTP on a unix socket, 0600. Reads only."""
from __future__ import annotations

import json
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from aiohttp import web
from google.protobuf import json_format

from controlplane.app.metrics import CONTENT_TYPE, Metrics
from controlplane.app.plane import Plane
from controlplane.ca.service import CertificateService
from controlplane.model.routing import DestinationRule, VirtualService
from controlplane.server.grpc_server import free_socket
from controlplane.server.hub import Client
from controlplane.translate.catalog import MAKERS
from controlplane.translate.names import SHORT, full_name, is_workload, short_name
from protos.gen.envoy.config.cluster.v3 import cluster_pb2
from protos.gen.envoy.config.endpoint.v3 import endpoint_pb2
from protos.gen.envoy.config.listener.v3 import listener_pb2
from protos.gen.envoy.config.route.v3 import route_pb2
from protos.gen.envoy.extensions.filters.http.router.v3 import router_pb2  # noqa: F401  printed inside an Any
from protos.gen.envoy.extensions.filters.network.http_connection_manager.v3 import http_connection_manager_pb2  # noqa: F401
from protos.gen.envoy.extensions.filters.network.tcp_proxy.v3 import tcp_proxy_pb2  # noqa: F401
from protos.gen.istio import workload_pb2

MESSAGES = {"lds": listener_pb2.Listener, "rds": route_pb2.RouteConfiguration, "cds": cluster_pb2.Cluster,
            "eds": endpoint_pb2.ClusterLoadAssignment}


class Admin:
    """Serves `plane` at a unix socket."""

    def __init__(self, plane: Plane, metrics: Metrics, authority: CertificateService | None = None) -> None:
        self._plane = plane
        self._authority = authority
        self._metrics = metrics
        self._runner: web.AppRunner | None = None
        self._path: Path | None = None

    async def start(self, path: Path) -> None:
        """Raises ListenError when the place is taken."""
        free_socket(path)
        app = web.Application()
        pages: dict[str, Callable[[web.Request], Awaitable[web.Response]]] = {
            "/ready": self._ready, "/metrics": self._metrics_page, "/debug/problems": self._problems,
            "/debug/syncz": self._syncz, "/debug/connections": self._connections, "/debug/registryz": self._registryz,
            "/debug/configz": self._configz, "/debug/resources": self._resources, "/debug/ca": self._ca,
        }
        for where, page in pages.items():
            app.router.add_get(where, page)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        mask = os.umask(0o177)
        try:
            await web.UnixSite(self._runner, str(path)).start()
        finally:
            os.umask(mask)
        self._path = path

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    # -- pages ------------------------------------------------------------------------------------------------------

    async def _ready(self, _: web.Request) -> web.Response:
        """200 once the configuration was read; problems in it do not matter."""
        return web.Response(text="ready\n" if self._plane.loaded else "reading\n", status=200 if self._plane.loaded else 503)

    async def _metrics_page(self, _: web.Request) -> web.Response:
        return web.Response(body=self._metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    async def _problems(self, _: web.Request) -> web.Response:
        return _json({"generation": self._plane.generation, "problems": [one.as_json() for one in self._plane.problems()]})

    async def _connections(self, _: web.Request) -> web.Response:
        return _json({"connections": [
            {"client": one.number, "node": one.node, "peer": one.peer, "scope": one.scope, "protocol": one.protocol,
             "since": one.since} for one in self._plane.hub]})

    async def _syncz(self, _: web.Request) -> web.Response:
        """Per client and type: SYNCED, STALE (something is under way) or NACKED, with the client's words."""
        return _json({"clients": [{"client": one.number, "node": one.node, "scope": one.scope, "protocol": one.protocol,
                                   "types": _types(one)} for one in self._plane.hub]})

    async def _registryz(self, _: web.Request) -> web.Response:
        """Services, and the pods behind them, as they are published."""
        mesh = self._plane.mesh
        return _json({
            "services": [{
                "hostname": one.hostname, "namespace": one.meta.key.namespace, "addresses": [str(ip) for ip in one.addresses],
                "ports": [{"name": port.name, "port": port.port, "targetPort": port.target, "protocol": str(port.protocol)}
                          for port in one.ports],
                "pods": [pod.uid for pod in mesh.pods_of(one)], "slices": [str(each.meta.key) for each in mesh.slices(one)],
                "place": str(one.meta.place)} for one in sorted(mesh.services(), key=lambda one: one.hostname)],
            "workloads": [_address(self._plane, name) for name in self._plane.catalog.addresses() if is_workload(name)]})

    async def _configz(self, _: web.Request) -> web.Response:
        """Every object that is held, with its place, and whether it is in force."""
        found = []
        for one in self._plane.mesh.objects():
            key = one.meta.key
            entry: dict[str, Any] = {"kind": key.kind, "namespace": key.namespace, "name": key.name, "place": str(one.meta.place),
                                     "inForce": self._plane.mesh.in_force(key)}
            if isinstance(one, VirtualService):
                entry["hosts"] = [host for host, _ in one.hosts]
            elif isinstance(one, DestinationRule):
                entry |= {"host": one.host, "subsets": [subset.name for subset in one.subsets]}
            found.append(entry)
        return _json({"generation": self._plane.generation,
                      "objects": sorted(found, key=lambda one: (one["kind"], one["namespace"], one["name"]))})

    async def _resources(self, request: web.Request) -> web.Response:
        """What was asked for of layer 7, as sent: ?type=lds|rds|cds|eds."""
        only = request.query.get("type", "")
        if only and only not in MESSAGES:
            return _json({"error": f"type is {only!r}; it may be {', '.join(MESSAGES)}"}, 400)
        found = []
        for wanted in list(self._plane.catalog):
            short = SHORT[wanted.type_url]
            if (only and short != only) or wanted.type_url not in MAKERS:
                continue
            made = self._plane.catalog.resource(wanted)
            name = short_name(wanted.type_url, wanted.host, wanted.port, wanted.subset)
            found.append({"type": short, "name": full_name(wanted.type_url, name, wanted.scope) if wanted.xdstp else name,
                          "scope": wanted.scope, "version": made.version if made else "",
                          "resource": json_format.MessageToDict(MESSAGES[short].FromString(made.content)) if made else None})
        return _json({"resources": sorted(found, key=lambda one: (str(one["type"]), str(one["name"])))})


    async def _ca(self, _: web.Request) -> web.Response:
        """The certificate authority: what signs, who is trusted, what was issued and refused."""
        if self._authority is None:
            return _json({"error": "this control plane has no certificate authority; see --ca-dir"}, 404)
        return _json(self._authority.status())


def _types(client: Client) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for url, (status, names, settled) in client.session.status().items():
        state = "NACKED" if status.error else "SYNCED" if settled else "STALE"
        found[url.rpartition("/")[2]] = {
            "status": state, "names": names, "responses": status.responses, "resources": status.resources,
            "rejects": status.rejects, "sent": status.sent_nonce, "acked": status.acked_nonce, "error": status.error}
    return found


def _address(plane: Plane, name: str) -> dict[str, Any]:
    made = plane.catalog.address(name)
    assert made is not None
    found: dict[str, Any] = json_format.MessageToDict(workload_pb2.Address.FromString(made.content))
    pod = plane.mesh.pod(name)
    if pod is not None and "workload" in found:
        found["workload"]["addresses"] = [str(ip) for ip in pod.addresses]  # raw bytes say nothing to a person
    workload: dict[str, Any] = found.get("workload", found)
    return workload


def _json(value: object, status: int = 200) -> web.Response:
    return web.Response(text=json.dumps(value, indent=2) + "\n", content_type="application/json", status=status)
