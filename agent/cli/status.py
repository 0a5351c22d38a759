"""`narrows status`: agents, keepers, workers, pods and the control plane of this machine at a glance."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from agent.cli.admin_client import ask, instances
from agent.cli.main import EX_UNAVAILABLE, CommandError
from agent.cli.output import OUTPUT, as_json, as_table

Json = dict[str, Any]


def node_status(node: str, run_dir: Path) -> Json:
    """What one instance says of itself; `agent` is `down` with the reason when it does not answer."""
    status: Json = {"node": node, "runDir": str(run_dir)}
    try:
        info = ask(run_dir / "admin.sock", "/server_info")
        ready = ask(run_dir / "admin.sock", "/ready")
        pods = ask(run_dir / "admin.sock", "/pods")
    except CommandError as error:
        return status | {"agent": "down", "reason": error.format_message()}
    try:
        workers = ask(run_dir / "admin.sock", "/workers")
    except CommandError:
        workers = []  # the keeper is away; `keeper` below says so
    return status | {
        "agent": "ready" if ready["ready"] else "not ready",
        "missing": ready["missing"],
        "version": info["version"],
        "pid": info["pid"],
        "capture": info["capture"],
        "observation": info.get("observation", {"reason": ""}),  # an agent of a build before has none
        "podSource": info.get("podSource", {"source": "files", "stale": None}),
        "keeper": info["keeper"],
        "controlPlane": info["controlPlane"],
        "workers": workers,
        "pods": pods,
    }


@click.command()
@click.option("--name", help="Name of the lab (default: default).")
@click.option("--run-dir", type=click.Path(path_type=Path), help="Run directory of one instance.")
@OUTPUT
def command(name: str | None, run_dir: Path | None, output: str) -> int:
    """Agents, keepers, workers and pods at a glance. Exits with 69 when an agent is down or not ready."""
    nodes = [node_status(node, path) for node, path in instances(name, run_dir).items()]
    if output == "json":
        as_json({"nodes": nodes})
    else:
        as_table(("NODE", "AGENT", "KEEPER", "CONTROL PLANE", "WORKERS", "PODS", "CAPTURED", "CAPTURE"),
                 (_row(node) for node in nodes), "no node")
        pods = [(node["node"], pod["namespace"], pod["name"], ",".join(pod["ips"]), "yes" if pod["captured"] else "no",
                 pod.get("method") or "-", pod["reason"]) for node in nodes for pod in node.get("pods", ())]
        click.echo()
        as_table(("NODE", "NAMESPACE", "POD", "ADDRESS", "CAPTURED", "METHOD", "REASON"), pods, "no pods")
        for node in nodes:
            if served := [pod["dns"] for pod in node.get("pods", ()) if pod.get("dns")]:
                asked = sum(one["requests"] for one in served)
                click.echo(f"{node['node']}: DNS of {len(served)} pods is answered here, {asked} questions so far")
            if (capture := node.get("capture", {"backend": "iptables"}))["backend"] != "iptables":
                click.echo(f"{node['node']}: capture by {capture['backend'] or 'nothing'}: {capture['reason']}", err=True)
            if (stale := node.get("podSource", {}).get("stale")) is not None:
                click.echo(f"{node['node']}: the pods are those of {stale['seconds']:.0f} s ago, and stay as they are: {stale['reason']}",
                           err=True)
            if (observation := node.get("observation", {"reason": ""}))["reason"]:
                click.echo(f"{node['node']}: connections are not observed: {observation['reason']}", err=True)
            if (ebpf := node.get("capture", {}).get("ebpf", {})).get("state") == "failed":
                click.echo(f"{node['node']}: no capture by eBPF, redirects do it: {ebpf['reason']}", err=True)
            elif len(ebpf.get("directions", ())) == 1:
                click.echo(f"{node['node']}: eBPF captures {ebpf['directions'][0]} alone: {ebpf['reason']}", err=True)
            for worker in node.get("workers", ()):
                if worker.get("seccomp", "on") != "on":
                    click.echo(f"{node['node']}: worker {worker['index']} runs without its filter of system calls "
                               f"({worker['seccomp']})", err=True)
            for text in [node["reason"]] if "reason" in node else node.get("missing", ()):
                click.echo(f"{node['node']}: {text}", err=True)
    return 0 if all(node["agent"] == "ready" for node in nodes) else EX_UNAVAILABLE


def _row(node: Json) -> tuple[Any, ...]:
    if "pods" not in node:
        return node["node"], node["agent"], "?", "?", "?", "?", "?", "?"
    workers = node["workers"]
    restarts = sum(worker.get("restarts", 0) for worker in workers)
    alive = sum(worker.get("state") == "ready" for worker in workers)
    return (node["node"], node["agent"], node["keeper"]["state"], node["controlPlane"]["state"],
            f"{alive}/{len(workers)}" + (f" ({restarts} restarts)" if restarts else ""),
            len(node["pods"]), sum(pod["captured"] for pod in node["pods"]),
            by_what(node["capture"]))


def by_what(said: Json) -> str:
    """By what pods may be captured at best: `ebpf`, or out by the one and in by the other."""
    redirects = said["backend"] or "none"
    able = said.get("ebpf", {}).get("directions", ())
    egress, ingress = ("ebpf" if name in able else redirects for name in ("egress", "ingress"))
    return egress if egress == ingress else f"{egress}+{ingress}"
