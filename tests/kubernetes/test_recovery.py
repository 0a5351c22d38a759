"""The API server goes and comes back, also with an older past: the control plane serves on, and ends with what the server has."""
from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.controlplane import ControlPlane, control_plane
from tests.support.kubernetes.crds import install
from tests.support.kubernetes.real import Cluster
from tests.support.wait import until

pytestmark = pytest.mark.timeout(400)
LATE = 120.0  # s; a reflector tries again after 30 s at most, and believes an older list when it has seen it five times


@pytest.fixture(scope="module")
def mine() -> Iterator[Cluster]:
    with Cluster() as cluster:
        install(cluster)
        yield cluster


@pytest.fixture
def plane(mine: Cluster, tmp_path: Path) -> Iterator[ControlPlane]:
    with control_plane(tmp_path, more=["--kubeconfig", str(mine.kubeconfig)]) as made:
        yield made


def make(cluster: Cluster, name: str) -> None:
    body = {"metadata": {"name": name}, "spec": {"selector": {"app": name}, "ports": [{"name": "http", "port": 80}]}}
    status, told = cluster.ask("POST", "/api/v1/namespaces/default/services", body)
    assert status == 201, told


def services(plane: ControlPlane) -> set[str]:
    return {one["hostname"].partition(".")[0] for one in plane.debug("registryz")["services"]} - {"kubernetes"}


def stale(plane: ControlPlane) -> int:
    return plane.get("/debug/problems")[1].count("is not followed")


def test_a_server_that_was_away_is_followed_again(mine: Cluster, plane: ControlPlane) -> None:
    make(mine, "before")
    until(lambda: services(plane) == {"before"}, "it is served", 30)
    mine.stop()
    until(lambda: stale(plane) == 10, "every kind says that it is stale", LATE)
    assert services(plane) == {"before"}
    mine.start()
    make(mine, "after")
    until(lambda: services(plane) == {"before", "after"}, "what came after", LATE)
    until(lambda: stale(plane) == 0, "nothing is stale", LATE)
    for name in ("before", "after"):
        mine.kubectl("delete", "service", name)
    until(lambda: services(plane) == set(), "they are gone", 30)


def test_a_server_that_was_restored_from_a_backup_is_believed_in_the_end(mine: Cluster, plane: ControlPlane, tmp_path: Path) -> None:
    make(mine, "old")
    mine.stop()
    shutil.copytree(mine.data, tmp_path / "backup")
    mine.start()
    make(mine, "lost")
    for number in range(20):  # the past that is lost is longer than what the server writes as it starts
        mine.ask("POST", "/api/v1/namespaces/default/configmaps", {"metadata": {"name": f"c{number}"}})
    mine.kubectl("delete", "service", "old")
    until(lambda: services(plane) == {"lost"}, "what is there before", LATE)
    mine.stop()
    shutil.rmtree(mine.data)
    shutil.copytree(tmp_path / "backup", mine.data)
    mine.start()
    until(lambda: services(plane) == {"old"}, "what the backup has", LATE)
    make(mine, "new")
    until(lambda: services(plane) == {"old", "new"}, "what came after", LATE)
