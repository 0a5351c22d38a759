"""The control plane beside an API server: agents come with the tokens of their pods, for certificates and for the mesh."""
from __future__ import annotations

import json
from pathlib import Path

import grpc
import pytest
from click.testing import CliRunner

from controlplane.cli import command
from tests.support.authority import IDENTITY, bearer, node_token, openssl_accepts, token_file
from tests.support.cluster import kubeconfig, put
from tests.support.controlplane import control_plane
from tests.support.kubernetes.server import ApiServer
from tests.support.manifests import REVIEWS
from tests.support.mesh_client import Ended, addresses, channel, create, refused

Code = grpc.StatusCode


def brought(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


async def test_agents_are_let_in_by_their_pods_tokens_and_nobody_while_these_cannot_be_reviewed(server: ApiServer, tmp_path: Path) -> None:
    put(server, REVIEWS)
    token_file(tmp_path / "tokens")
    more = ["--kubeconfig", str(kubeconfig(server, tmp_path)), "--ca-dir", str(tmp_path / "ca"), "--token-review", "--node-account",
            "narrows/agent", "--node-tokens", str(tmp_path / "tokens")]
    here, away, late = (node_token(server, pod=f"agent-{node}", node=node) for node in ("n1", "n3", "n1"))
    web = node_token(server, account="default/sa-reviews", node="n1")
    with control_plane(tmp_path, more=more, ports=["127.0.0.1:0"]) as plane:
        async with channel(plane, tls=True) as one:
            assert openssl_accepts(tmp_path, await create(one, metadata=brought(here)))
            assert await create(one, metadata=bearer("n1"))  # as before
            code, said = await refused(one, metadata=brought(away))
            assert code is Code.PERMISSION_DENIED and f"node n3 (pod narrows/agent-n3) may not have a certificate for {IDENTITY}" in said
            code, said = await refused(one, metadata=brought(web))
            assert code is Code.UNAUTHENTICATED and "default/sa-reviews is none that agents of nodes run as" in said
            assert len(await addresses(one, brought(here), "n1")) >= 3
            for token, node, code, said in ((web, "", Code.UNAUTHENTICATED, "is none that agents"),
                                            (here, "n2", Code.PERMISSION_DENIED, "the token is that of the node n1")):
                with pytest.raises(Ended) as told:
                    await addresses(one, brought(token), node)
                assert told.value.args[0] is code and said in told.value.args[1]
            server.stop()
            for _ in range(2):
                code, said = await refused(one, metadata=brought(late))
                assert code is Code.UNAVAILABLE and "cannot be reviewed now; ask again" in said
            with pytest.raises(Ended) as told:
                await addresses(one, brought(late))
            assert told.value.args[0] is Code.UNAVAILABLE
            assert await create(one, metadata=bearer("n1"))
        records = [json.loads(line) for line in (tmp_path / "ca" / "audit.log").read_text().splitlines()]
        assert [(one["event"], one.get("code"), one.get("reason"), one["node"]) for one in records[:4]] == [
            ("issued", None, None, "n1"), ("issued", None, None, "n1"), ("refused", "PERMISSION_DENIED", "impersonation", "n3"),
            ("refused", "UNAUTHENTICATED", "token", "")]
        assert ("UNAVAILABLE", "review") in {(one.get("code"), one.get("reason")) for one in records}
        shown = plane.debug("ca")
        assert shown["refused"]["review"] == 2 and shown["refused"]["token"] == 1
        log = plane.log.read_text()
        assert "tokens cannot be reviewed" in log and not any(token in log + str(records) for token in (here, away, late, web))


@pytest.mark.parametrize(("options", "said"), [
    (["--token-review", "--ca-dir", "x"], "needs --node-account"), (["--token-review"], "is of no use without a certificate authority"),
    (["--node-account", "a/b", "--ca-dir", "x"], "is of no use without --token-review"),
    (["--token-review", "--node-account", "a/b", "--ca-dir", "x"], "asks an API server; give --kubernetes or --kubeconfig"),
    (["--token-review", "--node-account", "ab", "--ca-dir", "x", "--kubeconfig", "{kube}"], "'ab'; NAMESPACE/NAME is expected")])
def test_options_that_do_not_fit_are_told(server: ApiServer, tmp_path: Path, options: list[str], said: str) -> None:
    given = [one.format(kube=kubeconfig(server, tmp_path)) for one in options]
    done = CliRunner().invoke(command, ["--config", str(tmp_path), "--listen", "unix:/none", *given])
    assert done.exit_code == 2 and said in done.output, done.output
