"""Pods and capture are a module's, the worker is each test's own."""
from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator

import pytest

from agent.capture.plan import plan
from agent.capture.reconcile import Reconciler
from agent.dataplane import blobs
from agent.model.pod import CaptureSettings
from agent.model.settings import ProxySettings
from tests.support.mesh import Mesh, Pods
from tests.support.netns import Namespaces, Node
from tests.support.worker import Worker


@pytest.fixture(scope="module")
def pods(module_namespaces: Namespaces) -> Pods:
    node = Node(module_namespaces)
    made = Pods(node.pod("client"), node.pod("server"), node.pod("other"))
    instance = uuid.uuid4().hex[:8]
    for pod in (made.client, made.server):
        asyncio.run(Reconciler(instance).apply(pod.path, plan(CaptureSettings(), (4, 6), instance)))
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
