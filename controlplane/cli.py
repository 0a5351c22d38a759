"""`narrows control-plane` and `narrows validate`."""
from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from pathlib import Path

import click

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
@click.option("--config", "paths", type=click.Path(path_type=Path), multiple=True, required=True,
              help="A folder of manifests, or one file. May be given several times; watched.")
@click.option("--listen", required=True, metavar="unix:PATH|HOST:PORT",
              help="Where to serve ADS. A port is plain text: loopback only.")
@click.option("--admin", metavar="unix:PATH", help="Where to serve the admin pages.")
@click.option("--log-level", default="info", type=click.Choice(["debug", "info", "warning", "error"]), show_default=True)
def command(paths: tuple[Path, ...], listen: str, admin: str | None, log_level: str) -> None:
    """Serve the mesh's configuration over gRPC (ADS) from manifests."""
    host, colon, port = listen.rpartition(":")
    if not listen.startswith("unix:") and (not colon or not host or not port.isdecimal() or int(port) > 65535):
        raise click.UsageError(f"--listen is {listen!r}; unix:PATH or HOST:PORT is expected")
    if admin is not None and not admin.startswith("unix:"):
        raise click.UsageError(f"--admin is {admin!r}; unix:PATH is expected")
    for path in paths:
        if not path.exists():
            raise _Failed(f"--config {path} is not there; make it, or name another")
    from controlplane.app.logs import set_up
    from controlplane.app.run import run
    from controlplane.server.grpc_server import ListenError

    set_up(log_level)
    try:
        run(paths, listen, admin, _version())
    except ListenError as error:
        raise _Failed(str(error)) from None


@click.command("validate")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.pass_context
def validate(context: click.Context, files: tuple[Path, ...], output: str) -> None:
    """Check manifests (files or folders) without applying them. Exits with 65 when one would be refused."""
    from controlplane.model.mesh import Mesh
    from controlplane.model.problems import Severity
    from controlplane.sources.folder import Folder

    folder, mesh = Folder(files), Mesh()
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
