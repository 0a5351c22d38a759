"""By what a pod is captured: what the node and the pod ask, what can be done, and why it is not what was asked.

What a pod connects to (egress) is captured by socket hooks or by redirects, what comes to it (ingress) by redirects. Redirects are
written with iptables or nftables, whichever this node's kernel has. What hooks cannot do redirects do, so a pod is always captured.
"""
from __future__ import annotations

from dataclasses import dataclass

from agent.capture.plan import Plan
from agent.model.pod import CaptureSettings

EBPF = "ebpf"


@dataclass(frozen=True, slots=True)
class Choice:
    """`hooks`: egress by socket hooks. `why`: why redirects, although hooks were asked for. `waits`: until the pod has a cgroup."""

    hooks: bool
    why: str = ""
    waits: bool = False


@dataclass(frozen=True, slots=True)
class Way:
    """How a pod is captured. `plan` is that of its namespace; `egress` and `ingress` name methods; `choice` as it came out."""

    plan: Plan
    settings: CaptureSettings
    egress: str
    ingress: str
    choice: Choice

    @property
    def hooked(self) -> bool:
        return self.egress == EBPF

    @property
    def name(self) -> str:
        """`iptables`, or `ebpf+iptables`: what goes out by the one and what comes in by the other."""
        return self.egress if self.egress == self.ingress else f"{self.egress}+{self.ingress}"

    @property
    def reason(self) -> str:
        return f"captured; not by eBPF: {self.choice.why}" if self.choice.why else "captured"


def wants_hooks(node: str, pod: str) -> bool:
    """Whether hooks are asked for. `node` is --capture; `pod` is what its annotation says, where auto leaves it to the node."""
    return EBPF in (pod, node if pod == "auto" else "")


def backend_of(node: str) -> str:
    """What redirects are to be written with on a node with this --capture."""
    return "auto" if node == EBPF else node
