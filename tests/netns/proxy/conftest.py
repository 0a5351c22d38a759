"""Pods and capture are a module's, the worker is each test's own."""
from __future__ import annotations

from collections.abc import Iterator

import pytest

from agent.dataplane import blobs
from agent.model.settings import ProxySettings
from tests.support.capture import ByHand
from tests.support.mesh import Mesh, Pods
from tests.support.netns import Namespaces, Node
from tests.support.worker import Worker


@pytest.fixture(scope="module")
def pods(module_namespaces: Namespaces, by_hand: ByHand) -> Pods:
    node = Node(module_namespaces)
    made = Pods(node.pod("client"), node.pod("server"), node.pod("other"))
    by_hand(made.client, made.server)
    return made


@pytest.fixture
def mesh(pods: Pods) -> Iterator[Mesh]:
    with Worker() as worker:
        made = Mesh(pods, worker)
        worker.commit(blobs.put_settings(ProxySettings()))
        made.attach()
        try:
            yield made
            assert not worker.ended(), f"the worker died: status {worker.status}"
        finally:
            for one in made.sockets:
                one.close()
            for origin in made.origins:
                origin.close()
