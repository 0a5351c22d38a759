"""One real Kubernetes with controllers for all tests of this folder; each has a namespace of it, and nodes, of its own."""
from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.support.kubernetes.crds import install
from tests.support.kubernetes.kubelet import Kubelet
from tests.support.kubernetes.real import Cluster
from tests.support.netns import Namespaces
from tests.support.wait import until


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    with Cluster(controllers=True) as one:
        install(one)
        yield one


@pytest.fixture
def kubelet(cluster: Cluster, namespaces: Namespaces) -> Iterator[Callable[..., Kubelet]]:
    """Starts nodes: `kubelet()`, `kubelet(systemd=True)`."""
    with ExitStack() as stack:
        number = 0

        def start(**more: bool) -> Kubelet:
            nonlocal number
            number += 1
            name = f"n{number}-{uuid.uuid4().hex[:6]}"
            stack.callback(cluster.ask, "DELETE", f"/api/v1/nodes/{name}")
            return stack.enter_context(Kubelet(cluster, namespaces, name, number=number, **more))

        yield start


@pytest.fixture
def namespace(cluster: Cluster, kubelet: Callable[..., Kubelet]) -> Iterator[str]:
    """Gone with all that is in it before the nodes are."""
    name = f"t{uuid.uuid4().hex[:10]}"
    path = f"/api/v1/namespaces/{name}"
    cluster.kubectl("create", "namespace", name)
    until(lambda: cluster.ask("GET", f"{path}/serviceaccounts/default")[1].get("secrets"), "its account has a token", 30)
    yield name
    cluster.ask("DELETE", path)
    until(lambda: cluster.ask("GET", path)[0] == 404, "the namespace is gone", 90, 0.1)
