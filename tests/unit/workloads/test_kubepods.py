"""Which pod a process is of, by its cgroup: the forms of kubelet and runtimes, and what only looks like them."""
from __future__ import annotations

import pytest

from agent.workloads.kubepods import Place, place_of

UID = "4d2f7a3e-0c1b-4f6e-9a55-1f0c7d9be001"
BARE = UID.replace("-", "_")
OTHER = "99999999-0c1b-4f6e-9a55-1f0c7d9be001"
ID = "3f" * 32
HASH = "0a1b2c3d4e5f60718293a4b5c6d7e8f9"  # a static pod's
SLICE = f"kubepods-burstable-pod{BARE}.slice"


@pytest.mark.parametrize(("path", "directory"), [
    (f"/kubepods/burstable/pod{UID}/{ID}", f"/kubepods/burstable/pod{UID}"),
    (f"/kubepods/besteffort/pod{UID}/{ID}", f"/kubepods/besteffort/pod{UID}"),
    (f"/kubepods/pod{UID}/{ID}", f"/kubepods/pod{UID}"),  # guaranteed
    (f"/kubepods/pod{UID}", f"/kubepods/pod{UID}"),
    (f"/kubelet/kubepods/burstable/pod{UID}/{ID}", f"/kubelet/kubepods/burstable/pod{UID}"),  # kind
    (f"/kubepods/burstable/pod{UID}/{ID}/init.scope", f"/kubepods/burstable/pod{UID}"),  # systemd in a container
    (f"/kubepods.slice/kubepods-burstable.slice/{SLICE}/cri-containerd-{ID}.scope", f"/kubepods.slice/kubepods-burstable.slice/{SLICE}"),
    (f"/kubepods.slice/kubepods-burstable.slice/{SLICE}/crio-{ID}.scope", f"/kubepods.slice/kubepods-burstable.slice/{SLICE}"),
    (f"/kubepods.slice/kubepods-burstable.slice/{SLICE}/crio-{ID}.scope/container", f"/kubepods.slice/kubepods-burstable.slice/{SLICE}"),
    (f"/kubepods.slice/kubepods-pod{BARE}.slice/docker-{ID}.scope", f"/kubepods.slice/kubepods-pod{BARE}.slice"),
    (f"/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice/kubelet-kubepods-besteffort-pod{BARE}.slice/"
     f"cri-containerd-{ID}.scope",
     f"/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice/kubelet-kubepods-besteffort-pod{BARE}.slice"),
    (f"/system.slice/containerd.service/{SLICE}:cri-containerd:{ID}", ""),
    (f"/{SLICE}:cri-containerd:{ID}", ""),
])
def test_every_form_names_the_pod(path: str, directory: str) -> None:
    assert place_of(f"0::{path}\n") == Place(UID, directory)
    assert place_of(f"4:cpu,cpuacct:{path}\n1:name=systemd:{path}\n") == Place(UID)  # version 1 has no directory for hooks
    assert place_of(f"4:memory:{path}\n0::/\n") == Place(UID)  # hybrid, containers in version 1 alone
    assert place_of(f"4:memory:{path}\n1:name=systemd:/init.scope\n0::{path}\n") == Place(UID, directory)


def test_a_static_pod_is_named_by_its_hash() -> None:
    assert place_of(f"0::/kubepods/besteffort/pod{HASH}/{ID}\n") == Place(HASH, f"/kubepods/besteffort/pod{HASH}")
    directory = f"/kubepods.slice/kubepods-pod{HASH}.slice"
    assert place_of(f"0::{directory}/crio-{ID}.scope") == Place(HASH, directory)


@pytest.mark.parametrize("path", [
    "/", "/init.scope", "/system.slice/kubelet.service", "/user.slice/user-1000.slice/session-1.scope", "/kubepods", "/kubepods/burstable",
    f"/docker/{ID}", f"/pod{UID}/{ID}", f"/burstable/pod{UID}", f"/kubepods/other/pod{UID}",
    f"/kubepods/burstable/Pod{UID}", f"/podkubepods/pod{UID}", f"/{SLICE}", f"/other.slice/{SLICE}/x", f"/kubepods.slice/{SLICE}/x",
    f"/home.slice/{SLICE}:cri-containerd:{ID}",
    f"/user.slice/user-1000.slice/user@1000.service/kubepods/pod{UID}/x",  # users name what is below their service
    f"/user.slice/user-1000.slice/user@1000.service/kubepods.slice/kubepods-burstable.slice/{SLICE}/x",
    f"/../../kubepods/burstable/pod{UID}/{ID}", f"/../pod{UID}",  # outside of the reader's cgroup namespace
    f"/user.slice/a\v0::/kubepods/pod{UID}/x", f"/user.slice/a\u20280::/kubepods/pod{UID}/x", f"/a\r0::/kubepods\r/pod{UID}",
    f"kubepods/burstable/pod{UID}", f"/kubepods/burstable/pod{'x' * 300}",
])
def test_what_only_looks_like_a_pod_is_none(path: str) -> None:
    assert place_of(f"0::{path}\n") is None


def test_what_a_pod_makes_below_its_own_directory_is_its_own() -> None:
    for inner in (f"kubepods/burstable/pod{OTHER}", f"kubepods.slice/kubepods-pod{OTHER.replace('-', '_')}.slice/crio-{ID}.scope"):
        assert place_of(f"0::/kubepods/burstable/pod{UID}/{ID}/{inner}") == Place(UID, f"/kubepods/burstable/pod{UID}")


def test_hierarchies_that_name_different_pods_name_none() -> None:
    assert place_of(f"4:cpu:/kubepods/pod{UID}/{ID}\n3:memory:/kubepods/pod{OTHER}/{ID}\n0::/kubepods/pod{UID}/{ID}\n") is None


def test_no_text_is_an_error() -> None:
    for text in ("", "\n", ":::", "0", "0::", "0:", f"x:y:/kubepods/pod{UID}", "0::/kubepods/pod", "\0\0", "0::" + "/kubepods/pod" * 9):
        found = place_of(text)
        assert found is None or found.uid == UID
