"""`narrows keeper`: replaces itself by the lean interpreter that runs ext.keeper.keeper (no site, no environment)."""
from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import click

BOOT = "import sys; sys.path.insert(0, {!r}); from ext.keeper.keeper import main; main()"
DEFAULT_UID = 15001  # of the workers; nobody else's on a usual system, and easy to recognise in `ps`


def command_line(run_dir: Path, *options: str) -> list[str]:
    """argv of a keeper process. Raises ModuleNotFoundError when the extension is not built."""
    spec = find_spec("ext.keeper.keeper")  # found, not loaded: the agent's interpreter is not the keeper's
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("the data path is not built: run `make build`", name="ext.keeper.keeper")
    built = Path(spec.origin).resolve().parent.parent.parent
    return [sys.executable, "-I", "-S", "-c", BOOT.format(str(built)), "--run-dir", str(run_dir), *options]


@click.command()
@click.option("--run-dir", type=click.Path(file_okay=False, path_type=Path), required=True,
              help="Directory of this instance (0700); keeper.sock is made in it.")
@click.option("--workers", type=click.IntRange(1, 64), default=None, help="Default: one per core, at most 2.")
@click.option("--worker-uid", type=click.IntRange(1, 0xFFFFFFFE), default=DEFAULT_UID, show_default=True,
              help="User of the workers; must not be root's.")
@click.option("--worker-gid", type=click.IntRange(1, 0xFFFFFFFE), default=None, help="Default: the number of the user.")
@click.option("--instance", default=None, help="Name of this keeper in what it says; default: random.")
@click.option("--seccomp", type=click.Choice(("required", "off")), default="required", show_default=True,
              help="Workers under a filter of system calls; `off` is for a kernel that has none (SECURITY.md).")
@click.option("--drain", type=click.IntRange(0, 86400), default=5, show_default=True,
              help="Seconds that live connections get on SIGTERM.")
def command(run_dir: Path, **settings: str | int | None) -> None:
    """Run the keeper of a node: it holds listeners, blobs and counters, and starts the workers.

    It stays in the foreground and logs JSON lines to stderr. SIGTERM drains and ends it with 0; a second one ends it at once.
    """
    options = [word for name, value in settings.items() if value is not None
               for word in (f"--{name.replace('_', '-')}", str(value))]
    argv = command_line(run_dir, *options)
    os.execv(argv[0], argv)
