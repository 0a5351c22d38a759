"""`narrows agent`: the agent of one node. The composition root of the agent's rooms; see agent.py."""
from __future__ import annotations

import os
from pathlib import Path

import click


@click.command()
@click.option("--run-dir", type=click.Path(path_type=Path, file_okay=False), required=True,
              help="Directory of this instance: keeper.sock, admin.sock, pods/, access.log.")
@click.option("--node", "--node-name", "node", required=True, help="Name of this node; with --kubernetes as the API server has it.")
@click.option("--kubernetes", is_flag=True, help="Follow this node's pods at Kubernetes' API server, as the pod that this is (default: the "
              "files in pods/ of --run-dir). Needs the node's processes (hostPID), to find pods' networks.")
@click.option("--kubeconfig", type=click.Path(path_type=Path, dir_okay=False),
              help="The same by the API server of this kubeconfig, also with --kubernetes.")
@click.option("--kube-context", default="", metavar="NAME", help="Of --kubeconfig. [default: its current context]")
@click.option("--xds", required=True, metavar="unix:PATH|HOST:PORT", help="Where the control plane serves ADS.")
@click.option("--cluster-id", "cluster", default="Kubernetes", show_default=True, help="Part of every workload's uid.")
@click.option("--trust-domain", default="cluster.local", show_default=True, help="Of the identities of this node's pods.")
@click.option("--ca", metavar="unix:PATH|HOST:PORT", help="Where certificates are signed (default: the control plane of --xds).")
@click.option("--ca-token", type=click.Path(path_type=Path, dir_okay=False),
              help="Token for control plane and CA, read anew for each call. Sent over TLS or a unix socket only.")
@click.option("--ca-root", type=click.Path(path_type=Path, dir_okay=False),
              help="Roots (PEM) of control plane and CA over a network, read anew for each connection; without: no TLS.")
@click.option("--ca-crl", type=click.Path(path_type=Path, dir_okay=False),
              help="Revocation lists (PEM) of the trust domain; followed, the last good ones stay.")
@click.option("--metrics-address", help="Address for metrics and readiness (default: all).")
@click.option("--metrics-port", type=click.IntRange(1, 65535), default=15020, show_default=True)
@click.option("--readiness-port", type=click.IntRange(1, 65535), default=15021, show_default=True)
@click.option("--same-node-tunnel", is_flag=True,
              help="Reach pods of this node as those of others (default: inside their namespaces, without a tunnel).")
@click.option("--early-tunnels", type=click.IntRange(0, 1024), default=8, show_default=True,
              help="Of a pod: tunnels dialled before anything needs them, and not used yet. 0: none is.")
@click.option("--access-log", type=click.Choice(["json", "text", "json-tcp", "text-tcp", "off"]), default="json", show_default=True,
              help="Format of access.log; -tcp: with round trips and retransmissions of the TCP connections on both sides.")
@click.option("--capture", type=click.Choice(["auto", "ebpf", "ebpf+iptables", "iptables+ebpf", "iptables", "nftables"]), default="auto",
              show_default=True,
              help="auto: iptables where the kernel has its legacy tables, else nftables; ebpf: by hooks in the kernel, without NAT, where "
              "node and pod allow it, and the rest as auto does; ebpf+iptables: by hooks only what pods connect to, iptables+ebpf: only "
              "what comes to them. A pod's annotation narrows.mesh/capture (ebpf, iptables) goes before it.")
@click.option("--observe", type=click.Choice(["off", "captured", "all"]), default="off", show_default=True,
              help="Have the kernel tell of TCP connections that ended, for metrics of round trips and retransmissions (eBPF): the "
              "proxy's of captured pods; all: of the node's other pods too.")
@click.option("--observe-pairs", type=click.IntRange(1, 100_000), default=500, show_default=True,
              help="So many sets of labels (who called whom); what comes later is counted as `other`.")
@click.option("--dns-capture/--no-dns-capture", default=False, show_default=True,
              help="Answer the DNS questions of captured pods; what the mesh does not know goes to the resolver that the pod asked. "
                   "While no agent runs they wait. A pod's annotation ambient.istio.io/dns-capture goes first.")
@click.option("--idle", "idle_seconds", type=click.FloatRange(1, 86400), default=600, show_default=True,
              help="Seconds after which the routes of a destination that nobody talks to are dropped.")
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="info", show_default=True)
def command(log_level: str, kubernetes: bool, kubeconfig: Path | None, kube_context: str, **options: object) -> int:
    """Run the agent of a node.

    It reads from the keeper what is in force, follows pods and the control plane, and sends differences. SIGTERM ends
    it and leaves the data path serving; SIGHUP looks at everything again; SIGUSR1 reopens access.log.
    """
    # before grpc is imported: we exec children and never fork on, so its fork handlers have nothing to do but write
    # lines that are no JSON to our log; why a stream ended we say ourselves
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from agent.app import logs
    from agent.app.run import run
    from protos.kubernetes import configuration
    from protos.kubernetes.errors import ConfigurationError

    if kube_context and not kubeconfig:
        raise click.UsageError("--kube-context is of a --kubeconfig; give that too")
    server = None
    try:
        if kubeconfig or kubernetes:
            server = configuration.kubeconfig(kubeconfig, kube_context) if kubeconfig else configuration.in_cluster()
    except ConfigurationError as error:
        click.echo(f"narrows: {error}" + ("" if kubeconfig else " (--kubeconfig)"), err=True)
        return os.EX_CONFIG
    logs.set_up(log_level)
    return run({"kubernetes": server, **options})
