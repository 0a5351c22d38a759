"""Which direction is to be captured by hooks: the node's choice, and the pod's, which goes first."""
from __future__ import annotations

import pytest

from agent.app.method import backend_of, wanted


@pytest.mark.parametrize(("node", "pod", "hooks"), [
    ("auto", "auto", (False, False)), ("iptables", "auto", (False, False)), ("nftables", "auto", (False, False)),
    ("ebpf", "auto", (True, True)), ("ebpf+iptables", "auto", (True, False)), ("iptables+ebpf", "auto", (False, True)),
    ("ebpf", "iptables", (False, False)), ("ebpf+iptables", "iptables", (False, False)), ("iptables+ebpf", "iptables", (False, False)),
    ("auto", "ebpf", (True, True)), ("nftables", "ebpf", (True, True)), ("iptables+ebpf", "ebpf", (True, True)),
])
def test_hooks_are_asked_for_by_direction_and_the_pod_goes_before_the_node(node: str, pod: str, hooks: tuple[bool, bool]) -> None:
    assert wanted(node, pod) == hooks


@pytest.mark.parametrize(("node", "backend"), [
    ("auto", "auto"), ("iptables", "iptables"), ("nftables", "nftables"), ("ebpf", "auto"), ("ebpf+iptables", "auto"),
    ("iptables+ebpf", "auto")])
def test_a_node_with_hooks_redirects_the_rest_with_what_its_kernel_has(node: str, backend: str) -> None:
    assert backend_of(node) == backend
