"""`narrows control-plane` and `narrows validate`."""
from __future__ import annotations

import json
import re
from datetime import timedelta
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from controlplane.app.security import SecurityOptions
    from controlplane.ca.secret import SecretStore
    from protos.kubernetes.configuration import Configuration

EX_DATAERR, EX_UNAVAILABLE = 65, 69


class _Failed(click.ClickException):
    """A failure to be told in one line; `exit_code` is one of sysexits.h."""

    exit_code = EX_UNAVAILABLE


def _version() -> str:
    try:
        return package_version("narrows")
    except PackageNotFoundError:
        return "unknown"


@click.command("control-plane")
@click.option("--config", "paths", type=click.Path(path_type=Path), multiple=True,
              help="A folder of manifests, or one file. May be given several times; watched.")
@click.option("--kubernetes", is_flag=True,
              help="Follow Kubernetes' API server, as the pod that this is. An object that --config has too is that of --config.")
@click.option("--kubeconfig", type=click.Path(path_type=Path), help="Follow the API server of this kubeconfig.")
@click.option("--kube-context", default="", metavar="NAME", help="Of --kubeconfig. [default: its current context]")
@click.option("--leader-lease", "lease", metavar="NAMESPACE/NAME",
              help="Write what is wrong with Istio's objects into their status; of several replicas the one that holds this Lease does.")
@click.option("--listen", "places", required=True, multiple=True, metavar="unix:PATH|HOST:PORT",
              help="Where to serve. May be given several times. A port is TLS, and needs a certificate authority.")
@click.option("--admin", metavar="unix:PATH", help="Where to serve the admin pages.")
@click.option("--ca-dir", type=click.Path(path_type=Path), help="Where the certificate authority lives; the first start makes a root.")
@click.option("--ca-cert", type=click.Path(path_type=Path), help="Instead of --ca-dir: the authority's certificate (PEM).")
@click.option("--ca-key", type=click.Path(path_type=Path), help="Its key.")
@click.option("--ca-chain", type=click.Path(path_type=Path), help="The certificates between it and its root, if any.")
@click.option("--ca-root", type=click.Path(path_type=Path), help="The roots that are trusted.")
@click.option("--ca-secret", metavar="NAMESPACE/NAME",
              help="Instead of --ca-dir: the authority lives in this Secret; the first start makes a root. A Secret `cacerts` of that "
                   "namespace is used where there is one.")
@click.option("--trust-domain", default="cluster.local", show_default=True, help="Of every identity of the mesh.")
@click.option("--node-tokens", type=click.Path(path_type=Path), metavar="FILE",
              help="Who may call: lines `NODE sha256:HEX`, the hash of the node's token. Read again when it changes.")
@click.option("--token-review", is_flag=True,
              help="Who may call: also who brings a token of a --node-account for istio-ca that the API server accepts (TokenReview).")
@click.option("--node-account", "accounts", multiple=True, metavar="NAMESPACE/NAME",
              help="A service account that agents of nodes run as. May be given several times. Needs --token-review.")
@click.option("--certificate-lifetime", type=click.FloatRange(0, 90 * 24, min_open=True), default=24.0, show_default=True, metavar="HOURS",
              help="Of a workload's certificate, when the request says none.")
@click.option("--audit-log", type=click.Path(path_type=Path), help="Record of certificates and refusals. [default: audit.log in --ca-dir]")
@click.option("--server-name", "names", multiple=True, metavar="NAME", help="A host name or address under which agents call our ports.")
@click.option("--root-namespace", default="istio-system", show_default=True, help="Policies of this namespace are for the whole mesh.")
@click.option("--log-level", default="info", type=click.Choice(["debug", "info", "warning", "error"]), show_default=True)
def command(paths: tuple[Path, ...], kubernetes: bool, kubeconfig: Path | None, kube_context: str, lease: str | None,
            places: tuple[str, ...], admin: str | None, ca_dir: Path | None, ca_cert: Path | None,
            ca_key: Path | None, ca_chain: Path | None, ca_root: Path | None, ca_secret: str | None, trust_domain: str,
            node_tokens: Path | None, token_review: bool, accounts: tuple[str, ...], certificate_lifetime: float, audit_log: Path | None,
            names: tuple[str, ...], root_namespace: str, log_level: str) -> None:
    """Serve the mesh's configuration over gRPC (ADS) from manifests and Kubernetes, and certificates to its workloads."""
    cluster = _kubernetes(paths, kubernetes, kubeconfig, kube_context)
    if lease and cluster is None:
        raise click.UsageError("--leader-lease is in an API server; give --kubernetes or --kubeconfig")
    for place in places:
        host, colon, port = place.rpartition(":")
        if not place.startswith("unix:") and (not colon or not host or not port.isdecimal() or int(port) > 65535):
            raise click.UsageError(f"--listen is {place!r}; unix:PATH or HOST:PORT is expected")
    if admin is not None and not admin.startswith("unix:"):
        raise click.UsageError(f"--admin is {admin!r}; unix:PATH is expected")
    for path in paths:
        if not path.exists():
            raise _Failed(f"--config {path} is not there; make it, or name another")
    plugged = {"--ca-cert": ca_cert, "--ca-key": ca_key, "--ca-root": ca_root}
    if ca_dir is None and ca_secret is None and not any(plugged.values()):
        _check_without_authority(places, {"--node-tokens": node_tokens, "--token-review": token_review, "--ca-chain": ca_chain,
                                          "--audit-log": audit_log, "--server-name": names})
        security = None
    else:
        reviewed = _accounts(token_review, accounts, cluster is not None)
        store = _secret(ca_secret, ca_dir, plugged, ca_chain, cluster is not None)
        security = _security(ca_dir, plugged, ca_chain, store, node_tokens, reviewed, audit_log, trust_domain, certificate_lifetime, names)
    from controlplane.app.logs import set_up
    from controlplane.app.run import run
    from controlplane.ca.material import MaterialError
    from controlplane.ca.store import StoreError
    from controlplane.server.grpc_server import ListenError

    set_up(log_level)
    try:
        run(paths, places, admin, _version(), security, root_namespace, cluster, _named("--leader-lease", lease) if lease else None)
    except (ListenError, StoreError, MaterialError) as error:
        raise _Failed(str(error)) from None


def _kubernetes(paths: tuple[Path, ...], here: bool, kubeconfig: Path | None, context: str) -> Configuration | None:
    if here and kubeconfig:
        raise click.UsageError("--kubernetes and --kubeconfig are two API servers; give one of them")
    if context and not kubeconfig:
        raise click.UsageError("--kube-context is of a --kubeconfig; give that too")
    if not paths and not here and not kubeconfig:
        raise click.UsageError("nothing to serve; give --config, --kubernetes or --kubeconfig")
    if not here and not kubeconfig:
        return None
    from protos.kubernetes import configuration
    from protos.kubernetes.errors import ConfigurationError

    try:
        return configuration.kubeconfig(kubeconfig, context) if kubeconfig else configuration.in_cluster()
    except ConfigurationError as error:
        raise _Failed(str(error)) from None


def _check_without_authority(places: tuple[str, ...], needing: dict[str, object]) -> None:
    for name, value in needing.items():
        if value:
            raise click.UsageError(f"{name} is of no use without a certificate authority; give --ca-dir, or --ca-cert, --ca-key and "
                                   "--ca-root")
    for place in places:
        if not place.startswith("unix:"):
            raise click.UsageError(f"--listen {place}: a port is served with TLS only, for which a certificate authority is needed; give "
                                   "--ca-dir and --node-tokens. Without one, unix:PATH is served")


def _security(ca_dir: Path | None, plugged: dict[str, Path | None], chain: Path | None, store: SecretStore | None,
              tokens: Path | None, accounts: frozenset[str], audit: Path | None, trust_domain: str, hours: float,
              names: tuple[str, ...]) -> SecurityOptions:
    from controlplane.app.security import SecurityOptions
    from controlplane.ca.identity import IdentityError, check_trust_domain
    from controlplane.ca.store import Files, Folder

    given = [name for name, value in plugged.items() if value is not None]
    if ca_dir is not None and (given or chain):
        raise click.UsageError(f"--ca-dir and {given[0] if given else '--ca-chain'} are two authorities; give one of them")
    if ca_dir is None and store is None and len(given) < len(plugged):
        raise click.UsageError(f"{given[0]} needs {', '.join(name for name in plugged if name not in given)} too")
    if tokens is None and not accounts:
        raise click.UsageError("a certificate authority needs --node-tokens FILE or --token-review: it signs for nobody whose node it does "
                               "not know")
    if ca_dir is None and audit is None:
        raise click.UsageError(f"{'--ca-secret' if store else '--ca-cert'} needs --audit-log FILE: every certificate is recorded")
    try:
        check_trust_domain(trust_domain)
    except IdentityError as error:
        raise click.UsageError(f"--trust-domain: {error}") from None
    for name in names:
        if not _is_host(name):
            raise click.UsageError(f"--server-name is {name!r}; a host name or an address is expected, without a port")
    cert, key, root = plugged["--ca-cert"], plugged["--ca-key"], plugged["--ca-root"]
    source = store or (Files(key, cert, chain, root) if key and cert and root else Folder(ca_dir or Path()))
    log = audit if audit is not None else Path(source.where) / "audit.log"
    return SecurityOptions(source, tokens, log, trust_domain, timedelta(hours=hours), names, accounts)


def _secret(text: str | None, ca_dir: Path | None, plugged: dict[str, Path | None], chain: Path | None,
            cluster: bool) -> SecretStore | None:
    if text is None:
        return None
    given = [name for name, value in ({"--ca-dir": ca_dir} | plugged | {"--ca-chain": chain}).items() if value is not None]
    if given:
        raise click.UsageError(f"--ca-secret and {given[0]} are two authorities; give one of them")
    if not cluster:
        raise click.UsageError("--ca-secret is in an API server; give --kubernetes or --kubeconfig")
    from controlplane.ca.secret import SecretStore

    return SecretStore(*_named("--ca-secret", text))


def _named(option: str, text: str) -> tuple[str, str]:
    namespace, _, name = text.partition("/")
    label, subdomain = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", r"[a-z0-9]([-.a-z0-9]{0,251}[a-z0-9])?"
    if not re.fullmatch(label, namespace) or not re.fullmatch(subdomain, name):
        raise click.UsageError(f"{option} is {text!r}; NAMESPACE/NAME is expected")
    return namespace, name


def _accounts(reviewed: bool, accounts: tuple[str, ...], cluster: bool) -> frozenset[str]:
    if not reviewed and accounts:
        raise click.UsageError("--node-account is of no use without --token-review")
    if reviewed and not accounts:
        raise click.UsageError("--token-review needs --node-account NAMESPACE/NAME: who is let in may ask for every account of its node")
    if reviewed and not cluster:
        raise click.UsageError("--token-review asks an API server; give --kubernetes or --kubeconfig")
    for one in accounts:
        _named("--node-account", one)
    return frozenset(accounts)


def _is_host(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return re.fullmatch(r"(?!-)[A-Za-z0-9-]{1,63}(\.[A-Za-z0-9-]{1,63})*", name) is not None and len(name) <= 253
    return True


@click.command("validate")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.option("--root-namespace", default="istio-system", show_default=True, help="Policies of this namespace are for the whole mesh.")
@click.pass_context
def validate(context: click.Context, files: tuple[Path, ...], output: str, root_namespace: str) -> None:
    """Check manifests (files or folders) without applying them. Exits with 65 when one would be refused."""
    from controlplane.model.mesh import Mesh
    from controlplane.model.problems import Severity
    from controlplane.sources.folder import Folder

    folder, mesh = Folder(files), Mesh(root_namespace)
    changes = folder.refresh()
    mesh.apply(changes.puts)
    problems = sorted({*folder.problems(), *mesh.problems()})
    errors = sum(problem.severity is Severity.ERROR for problem in problems)
    if output == "json":
        click.echo(json.dumps({"objects": len(mesh), "errors": errors, "warnings": len(problems) - errors,
                               "problems": [problem.as_json() for problem in problems]}, indent=2))
    else:
        for problem in problems:
            click.echo(str(problem))
        click.echo(f"{len(mesh)} objects, {errors} errors, {len(problems) - errors} warnings", err=True)
    if errors:
        context.exit(EX_DATAERR)
