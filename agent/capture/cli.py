"""`narrows capture plan|verify|clean`: look at capture and take it away by hand, without an agent."""
from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any, TypeVar

import click

from agent import netlink
from agent.capture import pins, unhook
from agent.capture.ingress import IngressError
from agent.capture.nft import script
from agent.capture.plan import Plan, plan
from agent.capture.reconcile import BACKENDS, CaptureError, Reconciler
from agent.capture.verify import Hooks, Pod
from agent.model.pod import CaptureSettings, Network
from agent.model.workload import address_of

F = TypeVar("F", bound=Callable[..., Any])
PORT = click.IntRange(1, 65535)


class NetworkType(click.ParamType[Any]):
    """A CIDR; `*` is every address."""

    name = "cidr"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "*" or not isinstance(value, str):
            return value
        try:
            return ip_network(value)
        except ValueError as error:
            self.fail(f"{error}; expected a network like 10.0.0.0/8 or fd00::/8", param, ctx)


WAYS = {"ebpf": (True, True), "ebpf+iptables": (True, False), "iptables+ebpf": (False, True)}  # by hooks: egress, ingress


def settings_options(command: F) -> F:
    """What a pod's annotations would say, as options."""
    for option in reversed((
        click.option("--instance", default="default", show_default=True,
                     help="Instance whose chains are meant: an agent's is its run directory."),
        click.option("--exclude-outbound-port", "outbound_ports", type=PORT, multiple=True, metavar="PORT"),
        click.option("--exclude-inbound-port", "inbound_ports", type=PORT, multiple=True, metavar="PORT"),
        click.option("--exclude-outbound-range", "excluded", type=NetworkType(), multiple=True, metavar="CIDR"),
        click.option("--include-outbound-range", "included", type=NetworkType(), multiple=True, metavar="CIDR",
                     help="Capture these destinations alone; `*` (the default) is all."),
    )):
        command = option(command)
    return command


@click.group("capture")
def command() -> None:
    """Rules that turn a pod's connections to the proxy."""


@command.command("plan")
@click.option("--pod-ip", "addresses", multiple=True, metavar="IP", help="The pod's addresses give the families.")
@click.option("--nftables", is_flag=True, help="As input for `nft -f`.")
@settings_options
def plan_command(*, addresses: tuple[str, ...], nftables: bool, instance: str, **asked: Any) -> None:
    """Print the rules of a pod, as input for iptables-restore --noflush. Changes nothing."""
    try:
        families = {ip_address(text).version for text in addresses} or {4, 6}
    except ValueError as error:
        raise click.BadParameter(f"{error}; expected the pod's address", param_hint="--pod-ip") from error
    made = plan(_settings(**asked), families, instance)
    if nftables:
        click.echo(script(made.tables, made.prefix), nl=False)
        return
    click.echo("\n".join(f"# IPv{family}\n{made.text(family)}" for family in sorted(families)), nl=False)


@command.command("verify")
@click.option("--netns", required=True, metavar="PATH", help="The pod's network namespace.")
@click.option("--capture", "way", type=click.Choice(("auto", *WAYS, *BACKENDS[1:])), default="auto", show_default=True,
              help="As `narrows agent` has it; auto: in each direction what stands, and rules where nothing does.")
@click.option("--cgroup", metavar="DIR", help="The pod's cgroup, if no pod file of the instance says it.")
@click.option("--dns", is_flag=True, help="The pod's questions go to the DNS proxy.")
@settings_options
def verify_command(*, netns: str, way: str, cgroup: str | None, dns: bool, instance: str, **asked: Any) -> None:
    """Compare what is in force of a pod with the plan: rules, and socket hooks with their links, maps, routes and sysctls. Ends with 1 and
    a line per difference when they differ."""
    settings = replace(_settings(**asked), dns=dns)

    async def run() -> tuple[list[str], tuple[bool, bool]]:
        families = await asyncio.to_thread(netlink.families, netns)
        pod = _pod(Path(instance), netns)
        hooks = await asyncio.to_thread(Hooks, replace(pod, cgroup=cgroup) if cgroup else pod, pins.found(instance))
        out, inward = WAYS[way] if way in WAYS else hooks.stands() if way == "auto" else (False, False)
        made: Plan = plan(settings, families, instance, redirect=not out, hooks=out, inbound=not inward, dns=dns)
        backend = way if way in BACKENDS else "auto"
        found = list(await Reconciler(instance, backend=backend).verify(netns, made))
        if out:
            found += [wrong.text("egress") for wrong in await asyncio.to_thread(hooks.egress, settings)]
        if inward:
            found += [wrong.text("ingress") for wrong in await asyncio.to_thread(hooks.ingress, settings)]
        return found, (out, inward)

    try:
        differences, hooked = asyncio.run(run())
    except (CaptureError, netlink.NetlinkError) as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        raise click.ClickException(f"{netns}: {error.strerror}; this needs root") from error
    for text in differences:
        click.echo(text)
    if differences:
        if any(hooked):
            click.echo("A running agent repairs this within seconds (`narrows events` has it as Repaired), or says in `narrows status` why "
                       f"not; without one, `narrows capture clean --netns {netns}` takes capture off.")
        sys.exit(1)
    by = [direction for direction, is_hooked in zip(("egress", "ingress"), hooked, strict=True) if is_hooked]
    click.echo(f"{netns}: as planned" + (f", {' and '.join(by)} by socket hooks" if by else ""))


def _pod(run_dir: Path, netns: str) -> Pod:
    """What the pod file of this namespace says, if the instance is a run directory and has one."""
    for path in sorted((run_dir / "pods").glob("*.json")):
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            pod = json.loads(path.read_text())
            if pod["narrows"]["netns"] == netns:
                return Pod(netns, str(pod["narrows"].get("cgroup") or ""),
                           tuple(address_of(str(one["ip"])) for one in pod.get("status", {}).get("podIPs", ())))
    return Pod(netns)


@command.command("clean")
@click.option("--netns", "paths", multiple=True, metavar="PATH", help="A pod's network namespace; may be repeated.")
@click.option("--run-dir", type=click.Path(exists=True, file_okay=False, path_type=Path),
              help="Every pod of an instance: its run directory, with pods/*.json.")
@click.option("--instance", help="Only the chains of this instance (an agent's is its run directory); "
              "without it those of every instance.")
@click.option("--below", metavar="DIR",
              help="BPF programs, links and maps of every instance whose run directory is in this one, which may be gone.")
def clean_command(paths: tuple[str, ...], run_dir: Path | None, instance: str | None, below: str | None) -> None:
    """Remove every chain, rule and route of ours; of a namespace also the BPF links that capture what it connects to, of an instance that
    is named all its BPF programs, links and maps.

    Ends with 1 when a namespace could not be cleaned.
    """
    wanted = list(dict.fromkeys([*paths, *(_namespaces(run_dir) if run_dir is not None else [])]))
    named = instance if instance is not None else str(run_dir) if run_dir is not None else None
    if not wanted and named is None and below is None:
        raise click.UsageError("name a namespace with --netns, or an instance by --instance or its directory with --run-dir")
    failed = _unhook(paths, named)
    failed = asyncio.run(_clean(wanted, instance)) or failed
    if named is not None and not paths:
        failed = _unpin(pins.found(named)) or failed
    if below is not None:
        failed = _unpin(pins.found(f"{below.rstrip('/')}/", below=True)) or failed
    if failed:
        sys.exit(1)


async def _clean(paths: Iterable[str], instance: str | None) -> bool:
    reconciler, failed = Reconciler(instance), False
    for path in paths:
        try:
            outcome = await reconciler.remove(path)
        except CaptureError as error:
            click.echo(f"{path}: {error}", err=True)
            failed = True
            continue
        click.echo(f"{path}: " + (f"removed {', '.join(outcome.changed)}" if outcome.changed else "nothing of ours"))
    return failed


def _unhook(paths: Iterable[str], instance: str | None) -> bool:
    """End the capture of these namespaces by socket hooks, of one instance or of every one."""
    failed = False
    for path in paths:
        try:
            gone = unhook.unhook(path, pins.found(instance))
        except (OSError, IngressError) as error:
            click.echo(f"{path}: {error}; this needs root", err=True)
            failed = True
            continue
        if gone:
            click.echo(f"{path}: removed {', '.join(gone)}")
    return failed


def _unpin(those: Iterable[pins.Pins]) -> bool:
    """Programs leave their cgroups with the pins of their links."""
    failed = False
    for one in those:
        try:
            pins.clean(one)
            click.echo(f"{one.root}: removed")
        except OSError as error:
            click.echo(f"{one.root}: {error.strerror}; this needs root", err=True)
            failed = True
    pins.unmount()
    return failed


def _settings(outbound_ports: Iterable[int], inbound_ports: Iterable[int], excluded: Iterable[Network | str],
              included: Iterable[Network | str]) -> CaptureSettings:
    ranges = [network for network in excluded if not isinstance(network, str)]
    chosen = list(included)
    return CaptureSettings(
        tuple(sorted(set(outbound_ports))), tuple(sorted(set(inbound_ports))), tuple(ranges),
        None if not chosen or "*" in chosen else tuple(network for network in chosen if not isinstance(network, str)))


def _namespaces(run_dir: Path) -> list[str]:
    """Namespaces that the pod files of an instance name; a file that cannot be read is reported and passed over."""
    found = []
    for path in sorted((run_dir / "pods").glob("*.json")):
        try:
            found.append(str(json.loads(path.read_text())["narrows"]["netns"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            click.echo(f"{path}: not a pod file ({type(error).__name__}: {error}); passed over", err=True)
    return found
