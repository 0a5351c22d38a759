"""Names, places, variables and who asks for the mesh: decisions that need no machine."""
from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path

import pytest

from agent.lab import runtime, schedule
from agent.lab.manifest import Problem, parse
from agent.lab.place import PODS_PER_NODE, NodeAddresses, Place
from agent.lab.pods import asks_for_mesh
from agent.lab.spec import Container, EnvVar, Namespace, PodTemplate
from agent.lab.validate import _blanked
from agent.netlink.cgroup import find_cgroup2


def test_nodes_are_those_that_are_named_and_as_many_as_asked_for() -> None:
    assert schedule.default_nodes([], None) == ["n1"]
    assert schedule.default_nodes(["n2", "n2", "edge"], None) == ["edge", "n2"]
    assert schedule.default_nodes(["n2"], 3) == ["n2", "n1", "n3"]


def test_pods_go_where_fewest_are() -> None:
    assert schedule.choose({"n1": 2, "n2": 1, "n3": 1}) == "n2"


def test_an_address_is_not_given_again_soon_and_never_twice() -> None:
    used: set[int] = set()
    last = 1
    for _ in range(PODS_PER_NODE):
        last = schedule.free_number(used, last)
        assert last not in used
        used.add(last)
    assert used == set(range(2, 252))
    with pytest.raises(schedule.NoRoom):
        schedule.free_number(used, last)
    assert schedule.free_number(used - {2, 7}, 3) == 7


def test_addresses_of_a_node_come_from_its_number() -> None:
    own = NodeAddresses(17)
    assert own.pod(5, (4, 6)) == (ip_address("10.244.17.5"), ip_address("fd00:10:244:11::5"))
    assert (str(own.gateway_4), str(own.gateway_6)) == ("10.244.17.1", "fd00:10:244:11::1")


@pytest.mark.parametrize("name", ["", "A", "a.b", "-a", "a/b", "x" * 41, "a b", "..", "ä"])
def test_a_name_that_could_leave_its_place_is_no_name_of_a_lab(name: str) -> None:
    with pytest.raises(ValueError, match="cannot name a lab"):
        Place(name)


def test_one_labs_prefix_is_no_other_labs() -> None:
    assert not Place("a-b").pod_netns("x", "y").startswith(Place("a").netns_prefix)
    assert len(Place("a").pod_netns("n" * 63, "p" * 253)) < 255


def test_cgroup2_is_found_where_it_is_mounted(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text("tmpfs /sys/fs/cgroup tmpfs rw 0 0\ncgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n"
                      "cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n")
    assert find_cgroup2(mounts) == Path("/sys/fs/cgroup/unified")
    mounts.write_text("tmpfs / tmpfs rw 0 0\n")
    with pytest.raises(LookupError, match="no cgroup v2"):
        find_cgroup2(mounts)


def test_variables_are_expanded_as_kubernetes_does() -> None:
    env = {"A": "1", "B": "2"}
    assert runtime.expand("$(A)-$(B)-$(C)-$$(A)-$A", env) == "1-2-$(C)-$(A)-$A"


def test_a_container_gets_its_variables_in_order_and_fields_of_its_pod() -> None:
    env = (EnvVar("A", "1"), EnvVar("B", "$(A)2"), EnvVar("IP", field_path="status.podIP"),
           EnvVar("V", field_path="metadata.labels['version']"), EnvVar("N", field_path="spec.nodeName"))
    container = Container("m", ("x", "$(B)"), env, "/", None, None, (), (), None)
    template = PodTemplate({"version": "v1"}, {}, "", "default", (container,))
    context = runtime.PodContext("ns", "p", "uid", "n1", "172.31.0.1", (ip_address("10.0.0.1"),), template)
    launch = runtime.container_launch(container, context, cgroup=Path("/c"), netns="/n", files=Path("/f"))
    assert launch.argv == ["x", "12"]
    assert {key: launch.env[key] for key in ("A", "B", "IP", "V", "N", "HOSTNAME")} == {
        "A": "1", "B": "12", "IP": "10.0.0.1", "V": "v1", "N": "n1", "HOSTNAME": "p"}
    assert launch.isolate
    assert (launch.uid, launch.gid) == (0, 0)


@pytest.mark.parametrize(("pod", "label", "namespace", "wanted"), [
    (None, None, None, False), (None, None, "enabled", True), ("disabled", None, "enabled", False),
    ("enabled", None, None, True), (None, "ambient", None, True), (None, "none", "enabled", False),
    ("yes please", None, None, True),  # odd: the agent must say what it makes of it before anything runs
])
def test_whoever_asks_for_the_mesh_waits_for_it(pod: str | None, label: str | None, namespace: str | None,
                                                wanted: bool) -> None:
    template = PodTemplate({} if label is None else {"istio.io/dataplane-mode": label},
                           {} if pod is None else {"narrows.mesh/intercept": pod}, "", "default", ())
    around = Namespace("default", {}, {} if namespace is None else {"narrows.mesh/intercept": namespace})
    assert asks_for_mesh(template, around) is wanted


def test_a_log_is_bounded_and_keeps_the_newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "LOG_BYTES", 100)
    log = runtime.Log(tmp_path / "log")
    for number in range(50):
        log.write(b"line %03d\n" % number)
    log.close()
    assert (tmp_path / "log").read_bytes().endswith(b"line 049\n")
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 200


def test_the_validator_sees_mesh_resources_on_the_lines_of_the_users_file() -> None:
    text = ("# head\napiVersion: v1\nkind: Pod\nmetadata: {name: p}\n---\n"
            "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {name: v}\n---\n"
            "apiVersion: v1\nkind: Service\nmetadata: {name: s}\n")
    source = parse("f.yaml", "/", text)
    lines, before = _blanked(source).splitlines(), text.splitlines()
    assert len(lines) == len(before)
    assert lines[1:4] == ["", "", ""]
    assert lines[4:] == before[4:]


def test_a_problem_reads_as_file_line_and_text() -> None:
    assert str(Problem("a.yaml", 3, "odd")) == "a.yaml:3: odd"
    assert str(Problem("a.yaml", 0, "odd", error=False)) == "a.yaml: warning: odd"


