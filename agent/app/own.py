"""Under which addresses of its own hooks know a pod: what it connects to is sent to one of the same family.

Those that its runtime names (podIPs) come first. Of a family that it does not name the namespace is asked, since redirects would
capture that family as well; one in which neither has an address is refused.
"""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from agent.model.pod import LocalPod
from agent.model.workload import IPAddress

FAMILIES = (4, 6)


@dataclass(frozen=True, slots=True)
class Own:
    """`found`: in the namespace, of families that the runtime does not name; at most one of each."""

    named: tuple[IPAddress, ...]
    found: tuple[IPAddress, ...] = ()

    @property
    def addresses(self) -> tuple[IPAddress, ...]:
        return self.named + self.found

    def shown(self) -> list[dict[str, str | None]]:
        """For the pod's status, one of each family: where what it connects to goes, who named that, and why connects are refused, or ""."""
        shown = []
        for family in FAMILIES:
            address = next((one for one in reversed(self.addresses) if one.version == family), None)
            shown.append({"family": f"IPv{family}", "address": str(address) if address else None,
                          "source": None if address is None else "namespace" if address in self.found else "podIPs",
                          "refused": "" if address else "its runtime (podIPs) names no address and its namespace has none"})
        return shown


def incomplete(pod: LocalPod) -> bool:
    """Whether its namespace is to be asked."""
    return {address.version for address in pod.addresses} != set(FAMILIES)


def own_of(pod: LocalPod, there: Iterable[IPAddress], before: Own | None = None) -> Own:
    """`there`: what its namespace has, the best first. What was chosen before is kept while it is there."""
    have = tuple(there)
    found: dict[int, IPAddress] = {}
    for address in (*(one for one in (before.found if before else ()) if one in have), *have):
        found.setdefault(address.version, address)
    named = {address.version for address in pod.addresses}
    return Own(pod.addresses, tuple(found[family] for family in sorted(found.keys() - named)))


def told(own: Own) -> str:
    """What is in force of the families that the runtime does not name, in words."""
    named = {address.version for address in own.named}
    found = {address.version: address for address in own.found}
    return "; ".join(f"what it connects to by IPv{family} goes to {found[family]} of its namespace" if family in found
                     else f"connects by IPv{family} are refused: it has no address" for family in FAMILIES if family not in named)
