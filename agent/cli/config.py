"""`narrows config`: what the agents of this machine have in force."""
from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click

from agent.cli.admin_client import ask, instances
from agent.cli.main import EX_UNAVAILABLE, CommandError
from agent.cli.output import OUTPUT, as_json, as_table

Json = dict[str, Any]
Row = tuple[Any, ...]


@click.group()
def command() -> None:
    """Show what is in force: services, workloads, policies, routes, clusters, endpoints, listeners, certificates, tunnels, DNS."""


def _services(dump: Json) -> Iterable[Row]:
    for one in dump["services"]:
        ports = ",".join(f"{port}->{target or 'by workload'}/{one['appProtocols'][port]}"
                         for port, target in one["ports"].items())
        vips = ",".join(vip.lstrip("/") for vip in one["vips"]) or "headless"
        yield one["namespace"], one["hostname"], vips, ports, len(one["endpoints"])


def _workloads(dump: Json) -> Iterable[Row]:
    for one in dump["workloads"]:
        yield (one["namespace"], one["name"], ",".join(one["workloadIps"]), one["node"], one["workloadName"],
               one["canonicalRevision"], one["status"])


def _routes(dump: Json) -> Iterable[Row]:
    for one in dump["destinations"]:
        if not one["known"]:
            yield one["scope"], one["authority"], "-", "-", "-", "unknown to the control plane"
        for host in one.get("http", ()):
            for route in host["routes"]:
                yield one["scope"], one["authority"], "http", route["name"], match_text(route["match"]), \
                    split_text(route["clusters"])
        if one.get("tcp"):
            yield one["scope"], one["authority"], "tcp", "", "", split_text(one["tcp"])


def _clusters(dump: Json) -> Iterable[Row]:
    for one in dump["clusters"]:
        yield (one["scope"], one["name"], one["balancer"], f"{one['connectTimeoutMs']} ms", len(one["endpoints"]),
               sum(end["status"] == "Healthy" for end in one["endpoints"]))


def _endpoints(dump: Json) -> Iterable[Row]:
    names = {ip: workload["name"] for workload in dump["workloads"] for ip in workload["workloadIps"]}
    for one in dump["clusters"]:
        for end in one["endpoints"]:
            yield (one["scope"], one["name"], f"{end['address']}:{end['port']}", names.get(end["address"], ""),
                   end["weight"], end["status"])


def _listeners(dump: Json) -> Iterable[Row]:
    for one in dump["listeners"]:
        yield one["kind"], one["where"], one["address"], one["state"]


def _certificates(dump: Json) -> Iterable[Row]:
    for one in dump["certificates"]:
        leaf = one["certChain"][0] if one["certChain"] else {}
        yield (one["identity"], one["state"], one["pods"], leaf.get("serialNumber", ""), leaf.get("expirationTime", ""),
               one["renewal"] or "", len(one["rootCerts"]), one["error"])


def _sections(view: str, dump: Json) -> Any:
    """What `-o json` shows of a view: a list of objects."""
    if view != "endpoints":
        return dump[VIEWS[view][0]]
    return [{"scope": one["scope"], "cluster": one["name"], **end} for one in dump["clusters"] for end in one["endpoints"]]


def match_text(match: Json) -> str:
    """One line for a person: `prefix=/ headers: end-user exact=jason`."""
    def one(part: Json) -> str:
        flags = "!" if part.get("invert") else ""
        kind, value = next((k, v) for k, v in part.items() if k not in ("name", "ignoreCase", "invert"))
        return f"{flags}{kind}={value}" + (" (any case)" if part.get("ignoreCase") else "")

    text = one(match["path"])
    for what in ("headers", "query"):
        if what in match:
            text += f" {what}: " + ", ".join(f"{part['name']} {one(part)}" for part in match[what])
    return text


def split_text(clusters: list[Json]) -> str:
    """`50% outbound|9080|v1|reviews..., 50% outbound|9080|v3|reviews...`; without shares when there is one."""
    total = sum(cluster["weight"] for cluster in clusters)
    if len(clusters) == 1 or not total:
        return ", ".join(cluster["cluster"] for cluster in clusters)
    return ", ".join(f"{100 * cluster['weight'] / total:.3g}% {cluster['cluster']}" for cluster in clusters)


def _policies(dump: Json) -> Iterable[Row]:
    for one in dump["policies"]:
        yield (one["namespace"], one["name"], one["scope"], one["action"] + (" (dry run)" if one["dryRun"] else ""), len(one["rules"]),
               "yes" if one["applies"] else "to no pod here")


def _tunnels(dump: Json) -> Iterable[Row]:
    for one in dump["tunnels"]:
        yield (one["pod"] or "(gone)", one["direction"], one["state"], one["identity"], one["peer"], one["address"], one["streams"],
               f"{one['ageSeconds']:.0f} s", one["bytes"], one["peerCertificateExpiration"] or "")
    if dump["tunnelsNotShown"]:
        yield (f"and {dump['tunnelsNotShown']} more", *[""] * 9)


def _dns(dump: Json) -> Iterable[Row]:
    for one in dump["dns"]:
        if not one["captured"]:
            yield one["namespace"], one["pod"], "its resolver", *("",) * 6
            continue
        yield (one["namespace"], one["pod"], "the mesh, then its resolver", one["requests"], one["mesh"], one["hits"], one["waiting"],
               one["cached"], one["cachedBytes"])


VIEWS: dict[str, tuple[str, Callable[[Json], Iterable[Row]], tuple[str, ...]]] = {
    "services": ("services", _services, ("NAMESPACE", "HOST", "ADDRESS", "PORTS", "ENDPOINTS")),
    "workloads": ("workloads", _workloads,
                  ("NAMESPACE", "NAME", "ADDRESS", "NODE", "WORKLOAD", "REVISION", "STATUS")),
    "routes": ("destinations", _routes, ("CLIENTS", "DESTINATION", "KIND", "ROUTE", "MATCH", "TO")),
    "clusters": ("clusters", _clusters, ("CLIENTS", "CLUSTER", "BALANCER", "CONNECT", "ENDPOINTS", "HEALTHY")),
    "endpoints": ("clusters", _endpoints, ("CLIENTS", "CLUSTER", "ENDPOINT", "WORKLOAD", "WEIGHT", "STATUS")),
    "policies": ("policies", _policies, ("NAMESPACE", "NAME", "SCOPE", "ACTION", "RULES", "APPLIES")),
    "listeners": ("listeners", _listeners, ("KIND", "WHERE", "ADDRESS", "STATE")),
    "certificates": ("certificates", _certificates,
                     ("IDENTITY", "STATE", "PODS", "SERIAL", "UNTIL", "RENEWAL", "ROOTS", "ERROR")),
    "tunnels": ("tunnels", _tunnels,
                ("POD", "DIRECTION", "STATE", "IDENTITY", "PEER", "ADDRESS", "STREAMS", "AGE", "BYTES", "PEER UNTIL")),
    "dns": ("dns", _dns, ("NAMESPACE", "POD", "ANSWERED BY", "QUESTIONS", "MESH", "CACHE", "WAITING", "KEPT", "BYTES KEPT")),
}
HELP = {
    "dns": "Who answers the DNS questions of captured pods; how many there were, how many of these were names of the mesh or in the pod's "
           "cache, how many wait for a resolver, and what the cache holds. Names of the mesh: `narrows config services`.",
    "tunnels": "The HBONE tunnels that are open: who to whom, what they carry, until when their certificates hold. "
               "A second old; at most 1,024 of each worker.",
}
EMPTY = {
    "routes": "none yet: routes come when a captured pod first talks to a destination",
    "clusters": "none yet: clusters come with the routes that name them",
    "endpoints": "none yet: endpoints come with the routes that name them",
    "listeners": "none: no pod of this node is captured",
    "certificates": "none: no pod of this node is captured",
    "tunnels": "none: no connection of this node's pods goes by one now",
    "dns": "none: no pod of this node is captured",
}


def _add(view: str) -> None:
    _, rows, heads = VIEWS[view]

    @command.command(view, help=HELP.get(view, f"The {view} that are in force."))
    @click.option("--name", help="Name of the lab (default: default).")
    @click.option("--node", help="Only this node.")
    @click.option("--run-dir", type=click.Path(path_type=Path), help="Run directory of one instance.")
    @OUTPUT
    def show(name: str | None, node: str | None, run_dir: Path | None, output: str) -> None:
        found = instances(name, run_dir)
        if node is not None:
            if node not in found:
                raise CommandError(f"no node {node!r}; there are {', '.join(found)}", EX_UNAVAILABLE)
            found = {node: found[node]}
        dumps = {one: ask(path / "admin.sock", "/config_dump") for one, path in found.items()}
        if output == "json":
            as_json({one: _sections(view, dump) for one, dump in dumps.items()})
            return
        # nodes know the same services and workloads: the column is told only where it says something
        table = [(one, *row) for one, dump in dumps.items() for row in rows(dump)]
        as_table(("NODE", *heads), table, EMPTY.get(view, "none"))


for _view in VIEWS:
    _add(_view)
