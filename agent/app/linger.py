"""What still lives of a pod that leaves the mesh."""
from __future__ import annotations

import sys
from contextlib import suppress

from agent import netlink
from agent.capture.plan import INBOUND_PORT, OUTBOUND_PORT
from agent.model.pod import LocalPod
from agent.model.workload import IPAddress

_LIVE = frozenset({"01", "02", "03", "04", "05", "08", "09", "0B"})  # /proc/net/tcp states with a socket behind them
_OURS = frozenset({f"{OUTBOUND_PORT:04X}", f"{INBOUND_PORT:04X}"})


def open_connections(pod: LocalPod) -> int:
    """How many connections in the pod's namespace end at our listeners, or come out of a tunnel. Blocking; raises OSError.

    The second ones are known by their ends: ours has the client's address, which is not the pod's, and the other is the application's.
    A tunnel without them is nobody's connection: it ends when the pod is let go.
    """
    own = {_written(address) for address in pod.addresses}

    def count() -> int:
        found = 0
        for family in ("tcp", "tcp6"):
            with suppress(FileNotFoundError), open(f"/proc/thread-self/net/{family}") as table:
                next(table)
                for line in table:
                    _, local, remote, state, _ = line.split(maxsplit=4)
                    address, _, port = local.rpartition(":")
                    carried = remote.rpartition(":")[0] in own and address not in own
                    found += (port in _OURS or carried) and state in _LIVE
        return found
    return netlink.in_netns(pod.netns, count)


def _written(address: IPAddress) -> str:
    """As /proc/net/tcp has it: words of 32 bits in this machine's order, in hexadecimal."""
    words = (int.from_bytes(address.packed[at:at + 4], sys.byteorder) for at in range(0, len(address.packed), 4))
    return "".join(f"{word:08X}" for word in words)
