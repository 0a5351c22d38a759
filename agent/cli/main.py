"""The `narrows` command: subcommands come from entry points and are imported only when they are called.

Exit codes are those of sysexits.h: 0 done, 64 used wrongly, 65 bad input, 69 something needed is not there, 70 our
own fault (with a traceback when NARROWS_TRACEBACK is set), 74 the output cannot be written, 77 not permitted, 78 bad
configuration; 130 on Ctrl-C.
A failure is one line that says what failed and what to do. NO_COLOR is respected; a closed pipe ends us quietly.
"""
from __future__ import annotations

import errno
import os
import sys
import traceback
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, version

import click

GROUP = "narrows.commands"

EX_USAGE, EX_DATAERR, EX_UNAVAILABLE, EX_SOFTWARE, EX_IOERR, EX_NOPERM, EX_CONFIG = 64, 65, 69, 70, 74, 77, 78

# one line each for `narrows --help`, so that help imports nothing
ABOUT = {
    "agent": "Run the agent of a node.",
    "ca": "Show the certificate authority of a control plane, and replace its root.",
    "capture": "Plan, verify or remove the capture of a pod.",
    "authz": "Say whether a connection to a pod would be let in, and which policy decides.",
    "config": "Show what is in force: services, workloads, policies, routes, clusters, endpoints, listeners, certificates.",
    "control-plane": "Run the control plane.",
    "doctor": "Check what this machine offers, and say what to do about what is missing.",
    "keeper": "Run the keeper of a node.",
    "lab": "A mesh on this machine, without Kubernetes.",
    "status": "Agents, keepers, workers and pods at a glance.",
    "validate": "Check mesh resources without applying them.",
}


class CommandError(click.ClickException):
    """A failure to be told in one line. `code` is an exit code of sysexits.h."""

    def __init__(self, message: str, code: int = EX_UNAVAILABLE) -> None:
        super().__init__(message)
        self.code = code


class LazyGroup(click.Group):
    """Finds subcommands among the entry points of GROUP and imports the one that is called."""

    def __init__(self, **settings: object) -> None:
        super().__init__(**settings)  # type: ignore[arg-type]
        self._found: dict[str, EntryPoint] | None = None

    def _entry_points(self) -> dict[str, EntryPoint]:
        if self._found is None:
            self._found = {point.name: point for point in entry_points(group=GROUP)}
        return self._found

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(self._entry_points())

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        point = self._entry_points().get(cmd_name)
        if point is None:
            return None
        loaded = point.load()
        if not isinstance(loaded, click.Command):
            raise CommandError(f"{point.value} is no command; the installation is broken", EX_SOFTWARE)
        return loaded

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, ABOUT.get(name, "")) for name in self.list_commands(ctx)])


def own_version() -> str:
    try:
        return version("narrows")
    except PackageNotFoundError:
        return "unknown (not installed)"


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(own_version(), message="narrows %(version)s")
def group() -> None:
    """Narrows: a service mesh without sidecars."""


def main() -> None:
    """Run `narrows` and exit; never returns."""
    code = run(sys.argv[1:])
    # Writing to a closed pipe (`narrows status | head`) must not be a traceback. SIGPIPE itself stays ignored: it would
    # end the agent when a peer of one of its sockets goes away.
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno != errno.EPIPE and not code:
            _say(f"the output cannot be written: {error.strerror}")
            code = EX_IOERR
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run one command line; returns the exit code. Failures are one line on stderr."""
    try:
        result = group.main(arguments, prog_name="narrows", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as end:
        return end.exit_code
    except click.exceptions.NoArgsIsHelpError as usage:
        usage.show()
        return EX_USAGE
    except click.UsageError as wrong:
        wrong.show()
        return EX_USAGE
    except CommandError as failed:
        _say(failed.format_message())
        return failed.code
    except click.ClickException as failed:
        _say(failed.format_message())
        return failed.exit_code if failed.exit_code != 1 else EX_UNAVAILABLE
    except (click.Abort, KeyboardInterrupt):
        return 130
    except PermissionError as denied:
        _say(f"{denied}. Run it as root, or as the user who owns that path.")
        return EX_NOPERM
    except OSError as failed:
        if failed.errno == errno.EPIPE:
            return 0
        if failed.filename is None and failed.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):  # stdout: files have names
            _say(f"the output cannot be written: {failed.strerror}")
            return EX_IOERR
        _say(str(failed))
        return EX_UNAVAILABLE
    except ModuleNotFoundError as missing:
        if (missing.name or "").partition(".")[0] in ("agent", "controlplane", "ext", "protos"):
            _say(f"{missing.name} is not there: the installation is incomplete. `make build` completes it.")
            return EX_UNAVAILABLE
        _say(f"the Python package {missing.name!r} is missing. `make setup` installs what Narrows needs; "
             "`narrows doctor` lists it.")
        return EX_UNAVAILABLE
    except Exception as fault:
        if os.environ.get("NARROWS_TRACEBACK"):
            traceback.print_exc()
        _say(f"{type(fault).__name__}: {fault}. This is a fault of Narrows; please report it with the output of "
             f"NARROWS_TRACEBACK=1 narrows {' '.join(arguments)}")
        return EX_SOFTWARE


def _say(message: str) -> None:
    click.echo(f"narrows: {message}", err=True)
