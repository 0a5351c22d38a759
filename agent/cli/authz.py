"""`narrows authz check`: what policies say of a connection, by the very code of the workers."""
from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import click

from agent.cli.admin_client import ask, instances
from agent.cli.main import EX_UNAVAILABLE, CommandError
from agent.cli.output import OUTPUT, as_json

Json = dict[str, Any]


@click.group()
def command() -> None:
    """Say whether a connection to a pod would be let in, and which policy decides."""


@command.command()
@click.argument("pod", metavar="[NAMESPACE/]POD")
@click.option("--from", "identity", metavar="IDENTITY", help="spiffe://... of the client (default: nobody, as without a tunnel).")
@click.option("--to", required=True, metavar="IP:PORT", help="An address of the pod, and the port that it listens on.")
@click.option("--source", metavar="IP", help="Address of the client, where policies look at it (default: 0.0.0.0 or ::).")
@click.option("--name", help="Name of the lab (default: default).")
@click.option("--run-dir", type=click.Path(path_type=Path), help="Run directory of one instance.")
@OUTPUT
def check(pod: str, identity: str | None, to: str, source: str | None, name: str | None, run_dir: Path | None, output: str) -> int:
    """Ask the agent of the pod's node. Exits with 0 when the connection would be let in, with 1 when it would be denied."""
    namespace, _, short = pod.rpartition("/")
    about = f"/{quote(namespace or 'default', safe='')}/{quote(short, safe='')}"
    query = urlencode({key: value for key, value in (("to", to), ("from", identity), ("source", source)) if value})
    for directory in instances(name, run_dir).values():
        socket = directory / "admin.sock"
        if any((one["namespace"], one["name"]) == (namespace or "default", short) for one in ask(socket, "/pods")):
            answer = ask(socket, f"/authz{about}?{query}")
            if output == "json":
                as_json(answer)
            else:
                for line in explain(answer):
                    click.echo(line)
            return 0 if answer["allowed"] else 1
    raise CommandError(f"no node here has the pod {namespace or 'default'}/{short}; `narrows status` lists pods", EX_UNAVAILABLE)


def explain(answer: Json) -> list[str]:
    """The verdict, then every policy that applies with what agrees and what does not."""
    if answer["policy"] is not None:
        why = f"rule {answer['rule']} of {answer['policy']} matches"
    else:
        why = "no policy that allows applies" if answer["allowed"] else "policies that allow apply, and none of them matches"
    lines = [f"{'allowed' if answer['allowed'] else 'DENIED'}: {why}"]
    if answer["allowed"] and not answer["would"]:
        by = f"rule {answer['would_rule']} of {answer['would_policy']}" if answer["would_policy"] else "no policy that allows matches then"
        lines.append(f"would be denied if policies on trial were in force: {by}")
    for one in answer["applies"]:
        trial = ", dry run" if one["dry_run"] else ""
        says = f"rule {one['matches']} matches" if one["matches"] is not None else "does not match"
        lines.append(f"  {one['action']:5} {one['policy']} ({one['scope']}{trial}): {says}")
        if one["matches"] is None and not one["rules"]:
            lines.append("          it has no rules")
        for number, rule in enumerate(one["rules"]):
            if one["matches"] is None or number <= one["matches"]:
                lines += [f"          rule {number}: {text}" for text in _differences(rule)]
    lines += [f"  {key}: the workload names it, and the control plane has not sent it" for key in answer["missing"]]
    return lines


def _differences(rule: list[list[str | None]]) -> list[str]:
    """What of a rule does not agree: one line a clause; nothing for a rule that matches."""
    return [f"{' and '.join(sorted({str(match) for match in clause}))} {'differs' if len(set(clause)) == 1 else 'differ'}"
            for clause in rule if clause and None not in clause]
