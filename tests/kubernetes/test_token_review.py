"""Tokens as the real API server makes and reviews them: what an agent's pod brings, and what becomes of it."""
from __future__ import annotations

import asyncio

import pytest

from controlplane.ca.reviews import AUDIENCE, TokenReviews
from controlplane.ca.tokens import TokenError
from controlplane.model.mesh import Mesh
from controlplane.model.objects import Pod
from controlplane.model.problems import ObjectKey
from controlplane.sources.cluster import FILE, as_map
from controlplane.sources.kinds import read
from protos.kubernetes.client import Client
from protos.kubernetes.resources import PODS
from tests.support.kubernetes.real import Cluster

pytestmark = pytest.mark.netns  # the folder's fixtures make namespaces


async def test_a_bound_token_says_the_node_of_its_pod_until_the_pod_is_deleted(cluster: Cluster, namespace: str) -> None:
    cluster.kubectl("-n", namespace, "create", "serviceaccount", "agent")
    cluster.apply(namespace, {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "agent-1"}, "spec": {
        "serviceAccountName": "agent", "nodeName": "far-away", "containers": [{"name": "main", "image": "test/none"}]}})
    mesh = Mesh()

    def find(space: str, name: str) -> Pod | None:
        found = mesh.get(ObjectKey("Pod", space, name))
        return found if isinstance(found, Pod) else None

    async with Client(cluster.configuration()) as client:
        body = await client.get(PODS, "agent-1", namespace)
        known = read(FILE, as_map(body)).object
        assert known is not None
        mesh.apply([known])
        bound = ("agent-1", body["metadata"]["uid"])
        source = TokenReviews(client.review_token, find, frozenset({f"{namespace}/agent"}))
        good = cluster.token(namespace, "agent", AUDIENCE, pod=bound)
        caller = await source.caller(good)
        assert (caller.node, caller.name) == ("far-away", f"node far-away (pod {namespace}/agent-1)")
        for token, said in ((cluster.token(namespace, "agent", pod=bound), "is not for istio-ca"),
                            (cluster.token(namespace, "agent", AUDIENCE), "not bound to a pod"),
                            (cluster.token(namespace, "default", AUDIENCE), "is none that agents of nodes run as"),
                            (good[:-8] + "AAAAAAAA", "does not accept the token")):
            with pytest.raises(TokenError, match=said):
                await source.caller(token)
        cluster.kubectl("-n", namespace, "delete", "pod", "agent-1", "--force", "--grace-period=0")

        async def refused() -> bool:
            again = TokenReviews(client.review_token, find, frozenset({f"{namespace}/agent"}))
            try:
                await again.caller(good)
            except TokenError as error:
                return "does not accept the token" in str(error)
            return False

        async with asyncio.timeout(60):  # the API server remembers what it accepted for 10 s
            while not await refused():
                await asyncio.sleep(0.5)
