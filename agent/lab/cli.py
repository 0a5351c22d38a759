"""`narrows lab`: a mesh on this machine, without Kubernetes."""
from __future__ import annotations

import functools
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from agent.lab.place import Place

EX_DATAERR, EX_UNAVAILABLE, EX_NOPERM = 65, 69, 77
DOWN_SECONDS = 30.0  # for a supervisor to end by itself; then it is killed and we clean up


class Failure(click.ClickException):
    """One line for the operator, with an exit code of sysexits.h."""

    def __init__(self, message: str, code: int = EX_UNAVAILABLE) -> None:
        super().__init__(message)
        self.__dict__["exit_code"] = code  # click declares it for the class


class PlaceType(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # generic from click 8.3 on
    name = "NAME"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Place:
        try:
            return value if isinstance(value, Place) else Place(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


NAME = click.option("--name", "place", type=PlaceType(), default="default", show_default=True, help="Name of the lab.")
POD = click.argument("pod", metavar="POD")


def _ask(work: Callable[[], Any]) -> Any:
    from agent.lab.client import LabRefused, NotUp

    try:
        return work()
    except PermissionError as error:
        raise Failure(f"{error}; run it as root", EX_NOPERM) from error
    except NotUp as error:
        raise Failure(str(error)) from error
    except LabRefused as error:
        raise Failure(str(error), EX_DATAERR) from error
    except OSError as error:
        raise Failure(str(error)) from error


@click.group()
def command() -> None:
    """A mesh on this machine, without Kubernetes, from the YAML that a cluster would get.

    A pod is [NAMESPACE/]NAME: its name, the beginning of it, or its Deployment's name.
    """


@command.command()
@click.argument("paths", metavar="PATH...", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@NAME
@click.option("--detach", is_flag=True, help="Return when the lab is ready; `down` ends it.")
@click.option("--nodes", type=click.IntRange(1, 200), help="At least (default: those that are named, or one).")
@click.option("--workers", type=click.IntRange(1, 64), help="Workers per node (default: the keeper's).")
@click.option("--access-log", type=click.Choice(["json", "text", "json-tcp", "text-tcp", "off"]), default="json", show_default=True,
              help="Format of access.log on each node, as `narrows agent --access-log`.")
@click.option("--tunnels/--no-tunnels", default=True, show_default=True,
              help="Between captured pods of two nodes: tunnels (HBONE), encrypted with the identities of both; without, plain text.")
@click.option("--same-node-tunnel", is_flag=True, help="Between captured pods of one node too, as `narrows agent --same-node-tunnel`.")
@click.option("--certificate-lifetime", type=click.FloatRange(0, 90 * 24, min_open=True), default=24.0, show_default=True, metavar="HOURS",
              help="Of the pods' certificates; they are renewed at half of it.")
@click.option("--capture", type=click.Choice(["auto", "ebpf", "ebpf+iptables", "iptables+ebpf", "iptables", "nftables"]), default="auto",
              show_default=True,
              help="auto: iptables where the kernel has its legacy tables, else nftables; ebpf: by hooks in the kernel, without NAT, where "
              "node and pod allow it, and the rest as auto does; ebpf+iptables: by hooks only what pods connect to, iptables+ebpf: only "
              "what comes to them. A pod's annotation narrows.mesh/capture (ebpf, iptables) goes before it.")
@click.option("--observe", type=click.Choice(["off", "captured", "all"]), default="off", show_default=True,
              help="Metrics of TCP connections that ended, as the kernel saw them: narrows_tcp_*; as `narrows agent --observe`.")
@click.option("--mesh/--no-mesh", default=True, help="Without: the same network, and nothing of the mesh.")
@click.option("--wait", type=click.FloatRange(0, 600), default=60.0, show_default=True,
              help="Seconds to wait for readiness.")
@click.option("--ready-fd", type=int, default=-1, hidden=True)
def up(*, paths: tuple[Path, ...], place: Place, detach: bool, nodes: int | None, workers: int | None, access_log: str,
       capture: str, tunnels: bool, same_node_tunnel: bool, certificate_lifetime: float, observe: str, mesh: bool, wait: float,
       ready_fd: int) -> int:
    """Bring a lab up from manifests: files, or folders of them."""
    if os.geteuid() != 0:
        raise Failure("the lab makes network namespaces and cgroups; run it as root", EX_NOPERM)
    from agent.lab import up as life
    from agent.lab.cleanup import LeftOver
    from agent.lab.supervisor import Options, Refused

    options = Options(nodes, workers, mesh, access_log, capture, tunnels, same_node_tunnel, certificate_lifetime, observe)
    try:
        if detach:
            if pid := life.owner(place):
                raise life.AlreadyUp(f"lab {place.name!r} is already up (pid {pid}); "
                                     f"`narrows lab down --name {place.name}` ends it")
            return life.run_detached(place, paths, options, wait)
        return life.run(place, paths, options, wait, ready_fd)
    except Refused as error:
        raise Failure(str(error), EX_DATAERR) from error
    except (life.AlreadyUp, LeftOver, LookupError) as error:
        raise Failure(str(error)) from error


@command.command()
@click.argument("paths", metavar="FILE...", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@NAME
@click.option("--wait/--no-wait", default=True, help="Wait until what is applied runs and is ready (at most 60 s).")
def apply(paths: tuple[Path, ...], place: Place, wait: bool) -> int:
    """Apply manifests to a running lab. A file with an error changes nothing."""
    from agent.lab.client import Client

    client = Client(place)
    answer = _ask(lambda: client.ask("POST", "/apply", {"paths": [str(path.resolve()) for path in paths]}))
    for text in answer["warnings"]:
        click.echo(text, err=True)
    for line in answer["changes"]:
        click.echo(line)
    return _wait(client) if wait else 0


def _wait(client: Any) -> int:
    missing = _ask(lambda: client.ask("POST", "/wait?seconds=60", seconds=90))["missing"]
    for text in missing:
        click.echo(f"not ready: {text}", err=True)
    return 1 if missing else 0


@command.command()
@click.argument("target", metavar="KIND/NAME")
@NAME
@click.option("-n", "--namespace", default="default", show_default=True)
@click.option("--wait/--no-wait", default=True, help="Wait until it is gone (at most 60 s).")
def delete(target: str, place: Place, namespace: str, wait: bool) -> int:
    """Delete an object: its pods end, its routes no longer hold."""
    from agent.lab.client import Client

    kind, slash, name = target.partition("/")
    if not slash or not kind or not name:
        raise click.UsageError(f"{target!r}: KIND/NAME is expected, as in deployment/reviews-v1")
    client = Client(place)
    wanted = {"kind": kind, "namespace": namespace, "name": name}
    for line in _ask(lambda: client.ask("POST", "/delete", wanted))["changes"]:
        click.echo(line)
    return _wait(client) if wait else 0


@command.command(context_settings={"ignore_unknown_options": True})
@POD
@click.argument("argv", metavar="-- CMD...", nargs=-1, required=True, type=click.UNPROCESSED)
@NAME
@click.option("-c", "--container", help="Which container (default: the first).")
def exec(pod: str, argv: tuple[str, ...], place: Place, container: str | None) -> None:
    """Run a command in a pod, with its namespaces, user and capabilities. The exit status is the command's."""
    from agent.lab import runtime
    from agent.lab.client import Client

    found = _ask(lambda: Client(place).pod(pod))
    chosen = _container(found, container)
    if not chosen["pid"]:
        raise Failure(f"container {chosen['name']} of {found['namespace']}/{found['name']} does not run: "
                      f"{chosen['state'] if chosen['state'] != 'waiting' else found['state']}")
    launch = runtime.exec_launch(runtime.Launch(**chosen["launch"]), chosen["pid"], list(argv),
                                 os.environ.get("TERM", ""))
    spec = runtime.spec_fd(launch)
    os.set_inheritable(spec, True)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.stdout.flush()
    os.execve(sys.executable, runtime.launcher_argv(spec), {})


def _container(found: Any, name: str | None) -> Any:
    for one in found["containers"]:
        if name is None or one["name"] == name:
            return one
    names = ", ".join(one["name"] for one in found["containers"])
    raise Failure(f"{found['namespace']}/{found['name']} has no container {name}; it has {names}", EX_DATAERR)


@command.command()
@POD
@NAME
@click.option("-f", "--follow", is_flag=True, help="Go on with what it writes from now on.")
@click.option("-c", "--container", help="Which container (default: the first).")
def logs(pod: str, place: Place, follow: bool, container: str | None) -> None:
    """Show what a pod's container wrote."""
    from agent.lab.client import Client

    path = Path(_container(_ask(lambda: Client(place).pod(pod)), container)["log"])
    older = path.with_name(path.name + ".1")
    if older.exists():
        _copy(older.read_bytes())
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        _copy(file.read())
        while follow:
            data = file.read(1 << 16)
            if data:
                _copy(data)
                continue
            time.sleep(0.2)  # a file has no event that an ordinary read could wait for
            if not path.exists():
                return  # the pod is gone
            if path.stat().st_ino != os.fstat(file.fileno()).st_ino:
                _copy(file.read())
                file.close()
                file = path.open("rb")


def _copy(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


@command.command()
@NAME
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True)
def status(place: Place, output: str) -> None:
    """Pods, where they run, whether they are ready and captured; services; processes of the mesh."""
    from agent.lab.client import Client

    found = _ask(lambda: Client(place).status())
    if output == "json":
        click.echo(json.dumps(found, indent=2))
        return
    _table(("NAMESPACE", "NAME", "NODE", "IP", "READY", "STATE", "RESTARTS", "CAPTURED", "METHOD", "REASON"),
           [(pod["namespace"], pod["name"], pod["node"], pod["ip"], "yes" if pod["ready"] else "no", pod["state"],
             pod["restarts"], "yes" if pod["captured"] else "no", pod["method"] or "-", pod["reason"])
            for pod in found["pods"]])
    click.echo()
    _table(("NAMESPACE", "SERVICE", "CLUSTER-IP", "PODS READY"),
           [(one["namespace"], one["name"], ",".join(one["clusterIPs"]) or "None", f"{one['ready']}/{one['pods']}")
            for one in found["services"]])
    if found["processes"]:
        click.echo()
        _table(("PROCESS", "PID", "RESTARTS", "LOG"),
               [(one["name"], one["pid"] or "-", one["restarts"], one["log"]) for one in found["processes"]])


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    texts = [head, *(tuple(str(cell) for cell in row) for row in rows)]
    widths = [max(len(row[index]) for row in texts) for index in range(len(head))]
    for row in texts:
        click.echo("   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@command.command()
@NAME
def events(place: Place) -> None:
    """What happened in the lab, oldest first."""
    from agent.lab.client import Client

    for event in _ask(lambda: Client(place).ask("GET", "/events")):
        click.echo(f"{time.strftime('%H:%M:%S', time.localtime(event['time']))}  {event['subject']}: {event['text']}")


@command.command()
@click.argument("node", required=False)
@NAME
def metrics(node: str | None, place: Place) -> None:
    """The metrics page of a node (of every node, one after the other, without NODE)."""
    from agent.lab.client import Client

    client = Client(place)
    nodes = [node] if node else [one["name"] for one in _ask(client.status)["nodes"]]
    for one in nodes:
        if len(nodes) > 1:
            click.echo(f"# node {one}")
        click.echo(_ask(functools.partial(client.ask, "GET", f"/metrics/{one}")), nl=False)


@command.command()
@NAME
def down(place: Place) -> None:
    """End a lab and remove everything of it, also after a crash."""
    if os.geteuid() != 0:
        raise Failure("removing namespaces and cgroups needs root", EX_NOPERM)
    from agent.lab import cleanup
    from agent.lab import up as life
    from agent.lab.client import Client, LabRefused, NotUp

    pid = life.owner(place)
    if pid:
        try:
            Client(place).ask("POST", "/down", seconds=5)
        except (NotUp, LabRefused, OSError):
            if pid > 0:
                os.kill(pid, signal.SIGTERM)  # it starts or ends just now
        deadline = time.monotonic() + DOWN_SECONDS
        while life.owner(place):
            if time.monotonic() > deadline:
                click.echo(f"the lab's supervisor (pid {pid}) does not end; it is killed", err=True)
                if pid > 0:
                    os.kill(pid, signal.SIGKILL)
                deadline = time.monotonic() + DOWN_SECONDS
            time.sleep(0.02)
    try:
        with life.locked(place):
            left = cleanup.exists(place)
            cleanup.clean(place)
    except (life.AlreadyUp, cleanup.LeftOver) as error:
        raise Failure(str(error)) from error
    click.echo(f"lab {place.name!r} is down" if pid or left else f"lab {place.name!r} was not up")
