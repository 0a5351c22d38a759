"""Where capture by eBPF cannot be: the agent redirects, serves all the same, and says which thing is missing."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from agent.capture import loader, pins
from tests.bench.replace import edited
from tests.netns.agent.conftest import Instance
from tests.netns.agent.test_ebpf import hooked, redirected, served
from tests.support.bpftool import lookups, programs
from tests.support.wait import until

pytestmark = [pytest.mark.netns, pytest.mark.redirects("asks for eBPF itself")]

REFUSE = [sys.executable, "-m", "tests.support.refuse"]
# In a mount namespace of its own, without file systems of a type: $0.
UNMOUNTED = ["unshare", "--mount", "--propagation", "private", "sh", "-c",
             'while at=$(awk -v t="$0" \'$3 == t { last = $2 } END { print last }\' /proc/self/mounts); [ -n "$at" ]; do '
             'umount -l "$at" || exit 9; done; exec "$@"']


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))


def told(instance: Instance, kind: str = "EbpfUnavailable") -> str:
    return " ".join(event["message"] for event in instance.events(kind))


def falls_back(instance: Instance) -> str:
    """What the pod's status says of it."""
    instance.up("--capture", "ebpf")
    for name, netns in (("client", instance.client), ("web-0", instance.server)):
        shown = redirected(instance, name, netns)
    assert served(instance)
    return str(shown["fallback"])


def test_a_kernel_that_refuses_bpf_is_told_and_everything_is_redirected(instance: Instance) -> None:
    """bpf(2) refused: a kernel locked down, a container without CAP_BPF."""
    instance.before = [*REFUSE, "bpf"]
    said = falls_back(instance)
    assert "not permitted" in said and "CAP_BPF" in said
    assert said in told(instance) and "SIGHUP to the agent tries again" in told(instance)
    assert instance.ask("/server_info")["capture"]["ebpf"] == {"state": "failed", "reason": said, "directions": []}


def test_an_agent_without_the_capabilities_for_bpf_says_so(instance: Instance) -> None:
    """The loader alone is without: an agent needs CAP_SYS_ADMIN to look into namespaces."""
    place = instance.run_dir / "cache"
    done = subprocess.run(["setpriv", "--bounding-set=-sys_admin,-bpf", "--inh-caps=-sys_admin,-bpf", sys.executable, "-m",
                           "agent.capture.loader", "child", "", str(place), str(loader.SOURCES), "connect4"],
                          capture_output=True, text=True, timeout=120, check=False)
    assert "not permitted" in done.stdout and "it takes root or CAP_BPF" in done.stdout, done.stdout + done.stderr


def test_without_a_bpffs_and_without_the_right_to_mount_one_everything_is_redirected(instance: Instance) -> None:
    instance.before = [*UNMOUNTED, "bpf", *REFUSE, "mount"]
    said = falls_back(instance)
    assert "no bpffs is mounted at /sys/fs/bpf, and mounting one at /run/narrows/bpf failed: Operation not permitted" in said


def test_without_a_bpffs_one_is_mounted_and_hooks_capture(instance: Instance) -> None:
    instance.before = [*UNMOUNTED, "bpf"]
    instance.up("--capture", "ebpf")
    assert hooked(instance, "client", instance.client) and served(instance)


def test_without_cgroup_v2_everything_is_redirected(instance: Instance) -> None:
    """The pods' directories are not there, as where a runtime names those of another hierarchy; the reason is the node's or the pod's."""
    instance.before = [*UNMOUNTED, "cgroup2"]
    said = falls_back(instance)
    assert "no cgroup v2 file system is mounted" in said or "is not there" in said


def test_a_foreign_program_that_allows_no_other_is_left_alone_and_the_pod_is_redirected(instance: Instance, tmp_path: Path) -> None:
    place = tmp_path / "bpf"
    place.mkdir()
    subprocess.run(["mount", "-t", "bpf", "bpf", str(place)], check=True, timeout=20)
    from tests.bpf.test_foreign import Foreign
    foreign = Foreign(place)
    try:
        foreign.attach("alone", instance.client.cgroup)
        instance.up("--capture", "ebpf")
        shown = instance.shown("client")
        assert shown["captured"] and (shown["method"], shown["egress"], shown["ingress"]) == ("iptables+ebpf", "iptables", "ebpf")
        assert "connect4" in shown["fallback"] and "`bpftool cgroup tree` shows what else is attached" in shown["fallback"]
        until(lambda: programs(instance.client.cgroup) == {"alone"}, "nothing of ours stays")
        assert served(instance) and foreign.count("alone") > 0
        assert hooked(instance, "web-0", instance.server)
        foreign.detach("alone", instance.client.cgroup)
    finally:
        foreign.close()
        subprocess.run(["umount", str(place)], check=True, timeout=20)


def test_a_pod_whose_cgroup_was_made_again_is_captured_in_the_new_one(instance: Instance) -> None:
    instance.up("--capture", "ebpf")
    assert hooked(instance, "client", instance.client) and served(instance)
    before = os.stat(instance.client.cgroup).st_ino
    os.rmdir(instance.client.cgroup)
    until(lambda: "is gone" in told(instance, "Repaired") or "is not there" in instance.shown("client")["reason"], "it is told", 30)
    Path(instance.client.cgroup).mkdir()
    until(lambda: hooked(instance, "client", instance.client), "captured by hooks again", 30)
    assert os.stat(instance.client.cgroup).st_ino != before
    assert served(instance)
    (mine,) = pins.found(str(instance.run_dir))
    assert not list(mine.links.glob(f"{before}_*"))


def test_a_keeper_whose_listeners_cannot_be_had_has_redirects_for_what_comes_in_until_the_next_one(instance: Instance) -> None:
    instance.up("--capture", "iptables")
    assert served(instance)
    instance.kill("agent")
    instance.before = [*REFUSE, "pidfd_getfd"]
    instance.start_agent("--capture", "ebpf")
    instance.ready()
    for name, netns in (("client", instance.client), ("web-0", instance.server)):
        shown = instance.shown(name)
        assert (shown["method"], shown["egress"], shown["ingress"]) == ("ebpf+iptables", "ebpf", "iptables"), shown
        assert "no listener on port 15006 is known" in shown["fallback"] and "it takes CAP_SYS_PTRACE" in shown["fallback"]
        assert "--to-ports 15006" in netns.iptables_save() and lookups(netns) == 0
    assert {event["about"] for event in instance.events("CaptureFallback")} == {"pod default/client", "pod default/web-0"}
    assert 'narrows_capture_methods{direction="ingress",method="iptables"} 2.0' in instance.metrics()
    assert served(instance)
    instance.kill("keeper")  # the next one's are seen when they are made
    instance.start_keeper()
    until(lambda: hooked(instance, "web-0", instance.server) and hooked(instance, "client", instance.client), "captured by hooks", 30)
    until(lambda: served(instance), "served again")


def test_pins_that_are_not_roots_are_not_adopted_and_pods_change_to_redirects(instance: Instance) -> None:
    instance.up("--capture", "ebpf")
    assert served(instance)
    instance.kill("agent")
    (mine,) = pins.found(str(instance.run_dir))
    os.chown(mine.maps / "pods", 12_345, -1)
    assert "pods belongs to uid 12345" in falls_back_again(instance)


def falls_back_again(instance: Instance) -> str:
    instance.start_agent("--capture", "ebpf")
    instance.ready()
    redirected(instance, "web-0", instance.server)
    said = redirected(instance, "client", instance.client)["fallback"]
    assert served(instance)
    return str(said)


def test_programs_of_another_tag_are_replaced_by_who_adopts_them(instance: Instance, tmp_path: Path) -> None:
    instance.up("--capture", "ebpf")
    assert served(instance)  # what a service is, is asked for when it is used first
    instance.kill("agent")
    (mine,) = pins.found(str(instance.run_dir))

    def tags() -> list[str]:
        run = instance.node.netns.run
        ids = [one["id"] for one in json.loads(run("bpftool", "-j", "cgroup", "show", instance.client.cgroup).stdout)]
        return sorted(json.loads(run("bpftool", "-j", "prog", "show", "id", str(number)).stdout)["tag"] for number in ids)

    ours = tags()
    loader.load(mine, tmp_path / "cache", sources=edited(tmp_path / "sources"))
    assert not set(ours) & set(tags()) and len(ours) >= 6
    assert served(instance)
    instance.start_agent("--capture", "ebpf")
    instance.ready()
    assert tags() == ours
    assert hooked(instance, "client", instance.client) and served(instance)
