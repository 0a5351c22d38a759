"""Asking `narrows validate` about mesh resources before they are applied.

The validator reads files; what it shall not judge (Pods, Deployments) is blanked out, line by line, so that the
lines it names are those of the user's file.
"""
from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from agent.lab.manifest import Map, Problem, Source
from agent.lab.objects import MESH_GROUPS
from agent.lab.runtime import narrows

SECONDS = 30.0
CONTEXT_KINDS = ("Service", "Namespace")  # what mesh resources refer to


def _for_mesh(body: dict[str, object]) -> bool:
    return str(body.get("apiVersion", "")).rpartition("/")[0].endswith(MESH_GROUPS)


async def validate(sources: Sequence[Source], config: Path | None = None) -> list[Problem]:
    """Problems of the mesh resources in `sources`. `config`: the folder of what is in force already, their context."""
    chosen = [source for source in sources if any(_for_mesh(document.body) for document in source.documents)]
    if not chosen:
        return []
    with tempfile.TemporaryDirectory(prefix="narrows-validate-") as folder:
        shown, context = _prepare(Path(folder), sources, config)
        process = await asyncio.create_subprocess_exec(
            *narrows("validate", *shown, *context, "-o", "json"), stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE)
        try:
            out, err = await asyncio.wait_for(process.communicate(), SECONDS)
        except TimeoutError:
            process.kill()
            await process.wait()
            return [Problem(chosen[0].path, 0, f"narrows validate did not answer within {SECONDS:g} s")]
    return _problems(out, err, process.returncode or 0, shown, chosen)


def _prepare(folder: Path, sources: Sequence[Source], config: Path | None) -> tuple[dict[str, str], list[str]]:
    """Write the files to judge: which path stands for which file of the user, and the paths of their context.

    What is in force and is defined anew in `sources` is no context, it is replaced.
    """
    shown: dict[str, str] = {}
    replaced = set()
    for index, source in enumerate(sources):
        path = folder / f"{index}.yaml"
        path.write_text(_blanked(source))
        shown[str(path)] = source.path
        replaced |= {_config_name(document.body) for document in source.documents}
    context = sorted(path for path in config.glob("*.yaml")) if config else []
    return shown, [str(path) for path in context if path.name not in replaced and not path.name.startswith("pod.")]


def _config_name(body: Map) -> str:
    """The file that holds this object in the lab's config folder (`Supervisor` writes it)."""
    meta = body.get("metadata")
    given = meta if isinstance(meta, dict) else {}
    if body.get("kind") == "Namespace":
        return f"namespace.{given.get('name')}.yaml"
    return f"{str(body.get('kind')).lower()}.{given.get('namespace', 'default')}.{given.get('name')}.yaml"


def _blanked(source: Source) -> str:
    lines = source.text.splitlines()
    for document in source.documents:
        if not _for_mesh(document.body) and document.body.get("kind") not in CONTEXT_KINDS:
            for number in range(document.first - 1, min(document.last, len(lines))):
                if not lines[number].startswith("---"):
                    lines[number] = ""
    return "\n".join(lines) + "\n"


def _problems(out: bytes, err: bytes, status: int, shown: dict[str, str], chosen: list[Source]) -> list[Problem]:
    try:
        told = json.loads(out)
        items = told["problems"] if isinstance(told, dict) else told
        return [Problem(shown[item["file"]], int(item.get("line") or 0), _text(item),
                        item.get("severity", "error") == "error")
                for item in items if item["file"] in shown]
    except (ValueError, KeyError, TypeError):
        said = (err or out).decode(errors="replace").strip()[-500:]
        return [Problem(chosen[0].path, 0, f"narrows validate ended with {status} and no readable answer: {said}")]


def _text(item: dict[str, object]) -> str:
    """What the control plane says: object, message, hint."""
    about = f"{item['object']}: " if item.get("object") else ""
    return f"{about}{item['message']}" + (f"; {item['hint']}" if item.get("hint") else "")
