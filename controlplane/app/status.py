"""What is wrong with Istio's objects, written into their status by the replica that leads: `kubectl get virtualservice -o yaml` says it.

    status.validationMessages   as Istio's analysis: level, and a type with name and code
    status.conditions           one of type narrows.mesh/Accepted with the words: False when the object is refused, True when only warned of

An object that never had problems has nothing of ours; of one that had, the condition is True, without messages (a status as a whole cannot
be taken back: API servers keep the old one then). Server-side apply under our own name, without force: where somebody else has these fields
(istiod, with its own writing of status), theirs stay, and the log says so once. What is to be written is compared with what the
object has, so whoever leads next goes on where the last one was, and nothing is written twice.
"""
from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from controlplane.app.leader import WRITE_SECONDS, Election
from controlplane.model.problems import ObjectKey, Problem, Severity
from controlplane.sources.cluster import ACCEPTED, FILE, Mark
from protos.kubernetes.client import Client
from protos.kubernetes.errors import ApiError, Conflict, NotFound

MANAGER = "narrows-control-plane"
TYPES = {Severity.ERROR: {"code": "NRW0001", "name": "Refused"}, Severity.WARNING: {"code": "NRW0002", "name": "Warned"}}
LOOK_SECONDS = 1.0  # between two looks what is to be written
PACE_SECONDS = 0.2  # at least from one write to the next: five a second, whatever becomes of a cluster's rules
RETRY_SECONDS = 60.0  # after a write that was refused
WORDS = 2_000  # characters of a condition's message
Status = dict[str, Any]

log = logging.getLogger("narrows.controlplane")


class StatusWriter:
    """`marks` are the objects as the API server has them, `problems` all that is known to be wrong. Runs until cancelled."""

    def __init__(self, client: Client, election: Election, marks: Mapping[ObjectKey, Mark],
                 problems: Callable[[], Iterable[Problem]]) -> None:
        self.written = self.refused = 0
        self._client, self._election, self._marks, self._problems = client, election, marks, problems
        self._put_off: dict[ObjectKey, tuple[Mark, float]] = {}
        self._theirs: set[ObjectKey] = set()

    async def run(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            if self._election.leading:
                await self.look()

    async def look(self) -> None:
        """Write what differs, as long as this replica leads."""
        loop = asyncio.get_running_loop()
        wrong = _by_object(self._problems())
        marks = self._marks
        self._put_off = {key: one for key, one in self._put_off.items() if marks.get(key) is one[0] and loop.time() < one[1]}
        for key, mark in list(marks.items()):
            if key in self._put_off or (not mark.status and str(key) not in wrong):
                continue
            wanted = desired(mark, wrong.get(str(key), []))
            if same(mark.status, wanted):
                continue
            if not self._election.leading:
                return
            await self._write(key, mark, wanted)
            await asyncio.sleep(PACE_SECONDS)

    async def _write(self, key: ObjectKey, mark: Mark, status: Status) -> None:
        body = {"metadata": {"name": key.name, "namespace": key.namespace}, "status": status}
        until = asyncio.get_running_loop().time() + RETRY_SECONDS
        try:
            async with asyncio.timeout(WRITE_SECONDS):
                await self._client.apply(mark.resource, body, manager=MANAGER, subresource="status")
            self.written += 1
            self._theirs.discard(key)
            until -= RETRY_SECONDS * 0.9  # the watch tells what it has now; if it does not, this is done again, which changes nothing
        except NotFound:
            pass  # it was deleted meanwhile
        except (ApiError, TimeoutError) as error:
            self.refused += 1
            if not isinstance(error, Conflict) or key not in self._theirs:
                log.warning("the status of an object cannot be written", extra={
                    "object": str(key), "reason": str(error) or "no answer in time"})
            if isinstance(error, Conflict):
                self._theirs.add(key)
        self._put_off[key] = mark, until


def desired(mark: Mark, problems: list[Problem]) -> Status:
    """Empty: nothing of ours."""
    if not problems and not mark.status:
        return {}
    errors = [one for one in problems if one.severity is Severity.ERROR]
    text = "\n".join(f"{one.message}; {one.hint}" if one.hint else one.message for one in errors or problems)
    reason = "Refused" if errors else "Warned" if problems else "Accepted"
    condition = {"type": ACCEPTED, "status": "False" if errors else "True", "reason": reason,
                 "message": text if len(text) <= WORDS else f"{text[:WORDS - 1]}…"}
    before: Status = next(iter(mark.status.get("conditions", ())), {})
    since = before.get("lastTransitionTime") if before.get("status") == condition["status"] else None
    condition["lastTransitionTime"] = since or datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    levels = sorted({one.severity for one in problems}, key=list(Severity).index)
    return {"conditions": [condition],
            "validationMessages": [{"level": str(level).upper(), "type": TYPES[level]} for level in levels]}


def same(one: Status, other: Status) -> bool:
    """But for the time, which is when the status changed and not when it was written."""
    return _timeless(one) == _timeless(other)


def _timeless(status: Status) -> Status:
    return {**status, "conditions": [{key: value for key, value in each.items() if key != "lastTransitionTime"}
                                     for each in status.get("conditions", ())]}


def _by_object(problems: Iterable[Problem]) -> dict[str, list[Problem]]:
    found: dict[str, list[Problem]] = {}
    for one in sorted(problems):
        if one.place.file == FILE and one.about:
            found.setdefault(one.about, []).append(one)
    return found
