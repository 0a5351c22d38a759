"""By what a pod is captured: what the node and the pod ask, what can be done, and why it is not what was asked.

What a pod connects to (egress) and what comes to it (ingress) are captured by hooks in the kernel or by redirects, each for itself.
Redirects are written with iptables or nftables, whichever this node's kernel has. What hooks cannot do redirects do, so a pod is always
captured.
"""
from __future__ import annotations

from dataclasses import dataclass

from agent.app.hooks import both
from agent.capture.plan import Plan
from agent.model.pod import CaptureSettings

EBPF = "ebpf"


@dataclass(frozen=True, slots=True)
class Choice:
    """Of each direction: whether by hooks, and why not, although they were asked for. `waits`: egress does, until the pod has a cgroup."""

    egress: bool
    ingress: bool
    why_egress: str = ""
    why_ingress: str = ""
    waits: bool = False

    @property
    def why(self) -> str:
        """"" when all is as it was asked for."""
        return both(self.why_egress, self.why_ingress)

    @property
    def missed(self) -> str:
        """What redirects capture for these reasons, in words."""
        return " and ".join(text for text, why in (("what it connects to", self.why_egress), ("what comes to it", self.why_ingress)) if why)


@dataclass(frozen=True, slots=True)
class Way:
    """How a pod is captured. `plan` is that of its namespace; `egress` and `ingress` name methods; `choice` as it came out."""

    plan: Plan
    settings: CaptureSettings
    egress: str
    ingress: str
    choice: Choice

    @property
    def name(self) -> str:
        """`ebpf`, `iptables`, or `ebpf+iptables`: what goes out by the one and what comes in by the other."""
        return self.egress if self.egress == self.ingress else f"{self.egress}+{self.ingress}"

    @property
    def reason(self) -> str:
        return f"captured; not by eBPF: {self.choice.why}" if self.choice.why else "captured"


def wanted(node: str, pod: str) -> tuple[bool, bool]:
    """Whether hooks are asked for, of what goes out and of what comes in. `node` is --capture; `pod` is what its annotation says, where
    auto leaves it to the node."""
    egress, _, ingress = (node if pod == "auto" else pod).partition("+")
    return egress == EBPF, (ingress or egress) == EBPF


def backend_of(node: str) -> str:
    """What redirects are to be written with on a node with this --capture."""
    return "auto" if EBPF in node else node
