"""Who has an address, when two say that they do: the first, until it lets go."""
from __future__ import annotations

from agent.model.workload import IPAddress


class Claims:
    """Addresses of one kind of thing (workloads, or virtual addresses of services) and who claimed them, in order."""

    def __init__(self) -> None:
        self._claims: dict[IPAddress, list[str]] = {}
        self._of: dict[str, tuple[IPAddress, ...]] = {}

    def claim(self, owner: str, addresses: tuple[IPAddress, ...]) -> tuple[dict[IPAddress, str], set[str]]:
        """`owner` now claims exactly `addresses`.

        Returns what it does not get (address -> who has it), and the owners whose share grew by what was let go.
        """
        heirs: set[str] = set()
        for address in set(self._of.pop(owner, ())) - set(addresses):
            claimants = self._claims[address]
            had = claimants[0] == owner
            claimants.remove(owner)
            if not claimants:
                del self._claims[address]
            elif had:
                heirs.add(claimants[0])
        if addresses:
            self._of[owner] = addresses
        refused = {}
        for address in addresses:
            claimants = self._claims.setdefault(address, [])
            if owner not in claimants:
                claimants.append(owner)
            if claimants[0] != owner:
                refused[address] = claimants[0]
        return refused, heirs

    def granted(self, owner: str) -> tuple[IPAddress, ...]:
        """The addresses that `owner` claims and has, in its order."""
        return tuple(address for address in self._of.get(owner, ()) if self._claims[address][0] == owner)

    def owner(self, address: IPAddress) -> str | None:
        claimants = self._claims.get(address)
        return claimants[0] if claimants else None
