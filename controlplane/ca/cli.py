"""`narrows ca`: what the authority in a folder signs with, and how its root is replaced."""
from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path

import click

EX_UNAVAILABLE = 69
HALF, WHOLE = 12.0, 24.0  # hours: a renewal is due, a certificate has ended, at the default lifetime


class _Failed(click.ClickException):
    """A failure to be told in one line; `exit_code` is one of sysexits.h."""

    exit_code = EX_UNAVAILABLE


@click.group("ca")
def command() -> None:
    """Show the certificate authority of a control plane's --ca-dir, and replace its root step by step."""


@command.command("show")
@click.argument("ca_dir", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text", show_default=True)
def show_command(ca_dir: Path, output: str) -> None:
    """What signs, who is trusted, and the next step of a rotation."""
    from controlplane.ca.authority import utc_now
    from controlplane.ca.material import MaterialError, fingerprint, name_of, show
    from controlplane.ca.rotation import step_of
    from controlplane.ca.store import Folder, StoreError

    folder, now = Folder(ca_dir), utc_now()
    try:
        material, step = folder.read(now), step_of(folder, now)
    except (StoreError, MaterialError) as error:
        raise _Failed(str(error)) from None
    if output == "json":
        roots = [{"sha256": fingerprint(root), "notAfter": show(root.not_valid_after_utc)} for root in material.roots]
        click.echo(json.dumps({"signing": fingerprint(material.certificate), "expires": show(material.not_after), "nextStep": step,
                               "roots": roots}, indent=2))
        return
    click.echo(f"signs:    {name_of(material.certificate)}, until {show(material.not_after)}")
    for root in material.roots:
        click.echo(f"trusted:  {name_of(root)}, until {show(root.not_valid_after_utc)}")
    click.echo(f"next:     {step}")


@command.command("prepare")
@click.argument("ca_dir", type=click.Path(path_type=Path))
@click.option("--trust-domain", default="cluster.local", show_default=True)
def prepare_command(ca_dir: Path, trust_domain: str) -> None:
    """First step: make a new root, and have everybody trust it too."""
    _step("prepare", ca_dir, trust_domain, 0.0)


@command.command("switch")
@click.argument("ca_dir", type=click.Path(path_type=Path))
@click.option("--wait", type=click.FloatRange(0), default=HALF, show_default=True, metavar="HOURS",
              help="Refuse sooner after `prepare`: half of the longest lifetime of a certificate.")
@click.option("--now", is_flag=True, help="Do not wait; pods whose certificates were not renewed since cannot talk to those whose were.")
def switch_command(ca_dir: Path, wait: float, now: bool) -> None:
    """Second step: sign with the new root."""
    _step("switch", ca_dir, "", 0.0 if now else wait)


@command.command("finish")
@click.argument("ca_dir", type=click.Path(path_type=Path))
@click.option("--wait", type=click.FloatRange(0), default=WHOLE, show_default=True, metavar="HOURS",
              help="Refuse sooner after `switch`: the longest lifetime of a certificate.")
@click.option("--now", is_flag=True, help="Do not wait: certificates of the old root are worth nothing as soon as others hear of it.")
def finish_command(ca_dir: Path, wait: float, now: bool) -> None:
    """Last step: trust the old root no more."""
    _step("finish", ca_dir, "", 0.0 if now else wait)


def _step(step: str, ca_dir: Path, trust_domain: str, hours: float) -> None:
    from controlplane.ca import rotation
    from controlplane.ca.authority import utc_now
    from controlplane.ca.material import MaterialError
    from controlplane.ca.store import Folder, StoreError

    folder, now, wait = Folder(ca_dir), utc_now(), timedelta(hours=hours)
    try:
        if step == "prepare":
            said = rotation.prepare(folder, trust_domain, now)
        else:
            said = (rotation.switch if step == "switch" else rotation.finish)(folder, now, wait)
    except (rotation.StepError, StoreError, MaterialError) as error:
        raise _Failed(str(error)) from None
    click.echo(said)
    click.echo("A control plane that runs follows within seconds; its nodes with their next certificates.")
