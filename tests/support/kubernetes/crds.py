"""Istio's kinds on a real API server, as deploy/daemonset/crds defines them."""
from __future__ import annotations

from pathlib import Path

from protos.kubernetes import resources
from tests.support.kubernetes.real import Cluster
from tests.support.wait import until

FOLDER = Path(__file__).resolve().parent.parent.parent.parent / "deploy/daemonset/crds"
ISTIO = (resources.VIRTUAL_SERVICES, resources.DESTINATION_RULES, resources.PEER_AUTHENTICATIONS, resources.AUTHORIZATION_POLICIES)


def install(cluster: Cluster) -> None:
    """Make them as a user would, and wait until they are served."""
    cluster.kubectl("create", "-k", str(FOLDER))
    until(lambda: all(cluster.ask("GET", one.path())[0] == 200 for one in ISTIO), "Istio's kinds are served", 60, 0.1)
