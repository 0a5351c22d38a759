"""The lab's certificate authority: each node has a token of its own, gets the identities of its pods with it, and no others."""
from __future__ import annotations

import json
import os
import signal
import stat
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from agent.lab.place import Place
from protos.gen.istio import ca_pb2
from tests.support.authority import message, openssl_accepts
from tests.support.lab import Lab, lab
from tests.support.wait import until

pytestmark = pytest.mark.netns

POD = """\
---
apiVersion: v1
kind: Pod
metadata: {name: %s}
spec: {nodeName: %s, serviceAccountName: sa-%s, containers: [{name: m, image: x, command: [sleep, infinity]}]}
"""


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    path = tmp_path_factory.mktemp("mesh") / "mesh.yaml"
    path.write_text(POD % ("one", "n1", "one") + POD % ("two", "n2", "two"))
    with lab(path) as running:
        yield running


def ask(place: Place, node: str, account: str) -> tuple[str, list[str]]:
    """What a node's token gets for a service account: the status, and the chain."""
    token = place.token(node).read_text()
    with grpc.insecure_channel(f"unix:{place.xds}", options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        call = channel.unary_unary("/istio.v1.auth.IstioCertificateService/CreateCertificate",
                                   ca_pb2.IstioCertificateRequest.SerializeToString, ca_pb2.IstioCertificateResponse.FromString)
        try:
            asked = message(identity=f"spiffe://cluster.local/ns/default/sa/{account}")
            return "OK", list(call(asked, metadata=[("authorization", f"Bearer {token}")], timeout=10).cert_chain)
        except grpc.RpcError as error:
            return error.code().name, []


def test_a_node_gets_the_identities_of_its_own_pods_only(mesh: Lab, tmp_path: Path) -> None:
    place = Place(mesh.name)
    code, chain = ask(place, "n1", "sa-one")
    assert code == "OK" and openssl_accepts(tmp_path, chain)
    assert ask(place, "n2", "sa-two")[0] == "OK"
    assert ask(place, "n1", "sa-two")[0] == ask(place, "n2", "sa-one")[0] == "PERMISSION_DENIED"
    records = [json.loads(line) for line in (place.authority / "audit.log").read_text().splitlines()]
    assert [(one["event"], one["node"]) for one in records[-4:]] == [
        ("issued", "n1"), ("issued", "n2"), ("refused", "n1"), ("refused", "n2")]


def test_tokens_and_key_are_the_owners_alone_and_no_pod_sees_them(mesh: Lab) -> None:
    place = Place(mesh.name)
    for path in (place.token("n1"), place.token("n2"), place.tokens, place.authority / "current" / "ca-key.pem"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert mesh.exec("one", "test", "-e", str(path), check=False).returncode == 1
    mesh.exec("one", "test", "-d", "/run/narrows")  # it is there, and empty for the pod
    assert place.token("n1").read_text() != place.token("n2").read_text()
    assert place.token("n1").read_text() not in place.tokens.read_text()


def test_a_node_that_comes_later_has_a_token_too_and_a_control_plane_that_comes_back_has_the_same_root(tmp_path: Path) -> None:
    for name, node in (("one", "n1"), ("late", "n2")):
        (tmp_path / f"{name}.yaml").write_text(POD % (name, node, name))
    with lab(tmp_path / "one.yaml") as mesh:
        place = Place(mesh.name)
        mesh.apply(tmp_path / "late.yaml")
        until(lambda: ask(place, "n2", "sa-late")[0] == "OK", "the new node gets its pod's certificate", timeout=20)
        before = ask(place, "n1", "sa-one")[1][-1]
        plane, = mesh.processes("narrows control-plane")
        os.kill(plane, signal.SIGKILL)
        until(lambda: ask(place, "n1", "sa-one")[0] == "OK", "the control plane is back", timeout=20)
        assert mesh.processes("narrows control-plane") != [plane] and ask(place, "n1", "sa-one")[1][-1] == before
    assert not place.directory.exists()
