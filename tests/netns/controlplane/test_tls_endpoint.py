"""The control plane's port as another machine sees it: over a network of namespaces, both families, by openssl and by gRPC."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.authority import IDENTITY, TOKENS, authority, openssl_accepts, s_client, token_file
from tests.support.controlplane import START
from tests.support.manifests import REVIEWS
from tests.support.netns import Node
from tests.support.wait import until

pytestmark = pytest.mark.netns

PORT = 15012
CLIENT = """
import json, sys
import grpc
from protos.gen.istio import ca_pb2
from tests.support.authority import message
where, root, token = sys.argv[1:4]
credentials = grpc.ssl_channel_credentials(open(root, "rb").read())
with grpc.secure_channel(where, credentials, options=[("grpc.enable_http_proxy", 0)]) as channel:
    call = channel.unary_unary("/istio.v1.auth.IstioCertificateService/CreateCertificate",
                               ca_pb2.IstioCertificateRequest.SerializeToString, ca_pb2.IstioCertificateResponse.FromString)
    try:
        chain = list(call(message(), metadata=[("authorization", "Bearer " + token)], timeout=10).cert_chain)
        print(json.dumps(["OK", chain]))
    except grpc.RpcError as error:
        print(json.dumps([error.code().name, error.details()]))
"""


@pytest.fixture
def root(node: Node, tmp_path: Path) -> Path:
    """A control plane in the node's namespace, on all its addresses; its root."""
    config = tmp_path / "config"
    config.mkdir()
    (config / "all.yaml").write_text(REVIEWS)
    token_file(tmp_path / "tokens")
    options = ["--ca-dir", str(tmp_path / "ca"), "--node-tokens", str(tmp_path / "tokens")]
    options += [f"--server-name={name}" for name in ("narrows.example", node.netns.ip, node.netns.ip6)]
    with (tmp_path / "log").open("wb") as log:
        node.netns.start(*START, "control-plane", "--config", str(config), "--listen", f"[::]:{PORT}", *options, stderr=log)
    until(lambda: '"serving"' in (tmp_path / "log").read_text(), "the control plane serves", timeout=20)
    return tmp_path / "ca" / "current" / "root-cert.pem"


def test_another_machine_verifies_the_port_by_every_name_it_has(node: Node, root: Path) -> None:
    pod = node.pod("caller")
    before = ["nsenter", f"--net={pod.path}", "--"]
    for where, names in (
        (f"{node.netns.ip}:{PORT}", [["-verify_ip", node.netns.ip], ["-verify_hostname", "narrows.example"]]),
        (f"[{node.netns.ip6}]:{PORT}", [["-verify_ip", node.netns.ip6]]),
    ):
        for name in names:
            said = s_client(where, "-CAfile", root, *name, before=before)
            assert "Verify return code: 0 (ok)" in said and "ALPN protocol: h2" in said, said
    assert "IP address mismatch" in s_client(f"{node.netns.ip}:{PORT}", "-CAfile", root, "-verify_ip", "10.0.0.1", before=before)


def test_another_machine_gets_a_certificate_with_its_token_and_none_without(node: Node, root: Path, tmp_path: Path) -> None:
    pod = node.pod("caller")

    def ask(token: str, trusted: Path) -> list[str]:
        done = pod.python(CLIENT, f"{node.netns.ip}:{PORT}", str(trusted), token, cwd=Path(__file__).parents[3])
        answer: list[str] = json.loads(done.stdout)
        return answer

    code, chain = ask(TOKENS["n1"], root)
    assert code == "OK" and openssl_accepts(tmp_path, list(chain))
    records = [json.loads(line) for line in (tmp_path / "ca" / "audit.log").read_text().splitlines()]
    assert [(one["event"], one["identity"], pod.ip in one["peer"]) for one in records] == [("issued", IDENTITY, True)]
    assert ask("somebody's", root)[0] == "UNAUTHENTICATED"
    assert ask(TOKENS["n3"], root)[0] == "PERMISSION_DENIED"
    (tmp_path / "other.pem").write_bytes(authority("somebody else").pem)
    assert ask(TOKENS["n1"], tmp_path / "other.pem")[0] == "UNAVAILABLE"  # the caller does not trust us, and says nothing


def test_plaintext_is_not_answered(node: Node, root: Path) -> None:
    assert root.exists()
    url = f"http://{node.netns.ip}:{PORT}/"
    curl = ["curl", "-s", "-m", "10", "-o", "/dev/null", "-w", "%{http_code}", "--http2-prior-knowledge"]
    asked = node.pod("caller").run(*curl, url, check=False)
    assert asked.stdout == "000" and asked.returncode not in (0, 7, 28)  # neither refused by the kernel nor silent: no HTTP/2 comes
