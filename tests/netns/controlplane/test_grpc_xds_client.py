"""grpcio's own xDS client as oracle: it walks LDS, RDS, CDS and EDS of our control plane and calls real servers as the routes say."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.controlplane import START
from tests.support.grpc_client import Client
from tests.support.manifests import REVIEWS, SUBSETS, destination_rule, virtual_service
from tests.support.netns import Namespaces, Netns
from tests.support.wait import until

pytestmark = pytest.mark.netns

HOST = "reviews.default.svc.cluster.local"
PORT = 9080
V1, V2 = "10.244.1.5", "10.244.2.6"
PEER = str(Path(__file__).parent.parent.parent / "support" / "grpc_peer.py")
# gRPC's C core does not know LEAST_REQUEST, our default
RULE = destination_rule("reviews", SUBSETS + "trafficPolicy: {loadBalancer: {simple: ROUND_ROBIN}}\n")
MANIFESTS = REVIEWS.partition("\n---\napiVersion: networking")[0] + RULE


@pytest.fixture
def netns(namespaces: Namespaces) -> Netns:
    made = namespaces.make("ads")
    made.run("ip", "link", "set", "lo", "up")
    for address in (V1, V2):
        made.run("ip", "address", "add", f"{address}/32", "dev", "lo")
    return made


@pytest.fixture
def config(netns: Netns, tmp_path: Path) -> Path:
    folder = tmp_path / "config"
    folder.mkdir()
    (folder / "all.yaml").write_text(MANIFESTS)
    with (tmp_path / "log").open("wb") as log:
        netns.start(*START, "control-plane", "--config", str(folder), "--listen", f"unix:{tmp_path}/xds.sock", stderr=log)
    until(lambda: '"serving"' in (tmp_path / "log").read_text(), "the control plane serves", timeout=20)
    server = netns.start(sys.executable, PEER, "serve", str(PORT), V1, V2, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True)
    assert server.stdout is not None and server.stdout.readline() == "ready\n"
    return folder


@pytest.fixture
def client(netns: Netns, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    bootstrap = tmp_path / "bootstrap.json"
    bootstrap.write_text(
        json.dumps(
            {
                "xds_servers": [
                    {"server_uri": f"unix:{tmp_path}/xds.sock", "channel_creds": [{"type": "insecure"}], "server_features": ["xds_v3"]}
                ],
                "node": {"id": "oracle", "metadata": {"NAMESPACE": "default"}},
            }
        )
    )
    monkeypatch.setenv("GRPC_XDS_BOOTSTRAP", str(bootstrap))
    yield Client(
        netns.start(sys.executable, PEER, "ask", f"xds:///{HOST}:{PORT}", stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    )


def apply(config: Path, spec: str) -> None:
    (config / ".vs.tmp").write_text(virtual_service("reviews", spec))
    (config / ".vs.tmp").rename(config / "vs.yaml")


def both_called(client: Client) -> None:
    """Its connections come up one after the other, and the first one takes the first calls."""
    until(lambda: client.ask(4).keys() == {V1, V2}, "both are called")


def test_a_host_without_rules_is_balanced_over_its_ready_pods(client: Client) -> None:
    both_called(client)
    found = client.ask(40)
    assert found.keys() == {V1, V2} and abs(found[V1] - found[V2]) <= 4


def test_routes_by_header_weight_and_subset_are_followed_and_shifted_live(client: Client, config: Path) -> None:
    apply(
        config,
        """
hosts: [reviews]
http:
- match: [{headers: {end-user: {exact: jason}}}]
  route: [{destination: {host: reviews, subset: v2}}]
- route:
  - {destination: {host: reviews, subset: v1}, weight: 90}
  - {destination: {host: reviews, subset: v2}, weight: 10}
""",
    )
    until(lambda: client.ask(20, "end-user=jason") == {V2: 20}, "jason gets v2")
    shares = client.ask(1000)
    assert shares.keys() == {V1, V2} and 60 <= shares[V2] <= 140  # 10 %: 100 with a deviation of 9.5
    apply(config, "hosts: [reviews]\nhttp: [{route: [{destination: {host: reviews, subset: v1}}]}]")
    until(lambda: client.ask(20, "end-user=jason") == {V1: 20}, "everything goes to v1")
    (config / "vs.yaml").unlink()
    until(lambda: client.ask(20).keys() == {V1, V2}, "without rules all pods are used again")


def test_a_pod_that_is_not_ready_any_more_gets_nothing_and_no_call_fails(client: Client, config: Path) -> None:
    both_called(client)
    (config / "all.yaml").write_text(MANIFESTS.replace('"True"', '"False"', 1))
    seen: list[dict[str, int]] = []
    until(lambda: seen.append(client.ask(20)) or seen[-1] == {V2: 20}, "only the ready pod is called")
    assert {who for counts in seen for who in counts} <= {V1, V2}


def test_a_service_that_goes_is_gone_for_the_client_and_found_again_when_it_comes_back(client: Client, config: Path) -> None:
    both_called(client)
    (config / "all.yaml").unlink()
    gone = until(lambda: next((text for text in client.ask(1) if text.startswith("UNAVAILABLE")), ""), "the client is told that it went")
    assert HOST in gone
    (config / "all.yaml").write_text(MANIFESTS)
    until(lambda: set(client.ask(4)) == {V1, V2}, "it is called again", timeout=30)
