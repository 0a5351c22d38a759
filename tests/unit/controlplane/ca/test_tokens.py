"""Who calls: the token says on which node, and nothing else does."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from controlplane.ca.limit import Limit
from controlplane.ca.store import StoreError
from controlplane.ca.tokens import Caller, NodeTokens, TokenError, bearer
from tests.support.authority import TOKENS, token_file


async def test_a_token_stands_for_its_node(tmp_path: Path) -> None:
    tokens = NodeTokens(token_file(tmp_path / "tokens", "n1", "n2"))
    assert len(tokens) == 2
    for node in ("n1", "n2"):
        assert await tokens.caller(TOKENS[node]) == Caller(node, f"node {node}")
    for wrong in (TOKENS["n3"], "", TOKENS["n1"][:-1], TOKENS["n1"] + " ", "é" * 40):
        with pytest.raises(TokenError, match="not known here"):
            await tokens.caller(wrong)
    assert TOKENS["n1"] not in (tmp_path / "tokens").read_text()  # the file alone lets nobody in


async def test_a_changed_file_counts_at_once_and_one_that_cannot_be_used_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = token_file(tmp_path / "tokens", "n1")
    tokens = NodeTokens(path)
    fresh = token_file(tmp_path / "fresh", "n2", "n3")
    fresh.rename(path)
    assert (await tokens.caller(TOKENS["n3"])).node == "n3"
    with pytest.raises(TokenError):
        await tokens.caller(TOKENS["n1"])
    path.chmod(0o644)
    path.write_text("nonsense\n")
    assert (await tokens.caller(TOKENS["n2"])).node == "n2"
    assert "open to others" in caplog.text + str([getattr(one, "reason", "") for one in caplog.records])
    path.unlink()
    assert (await tokens.caller(TOKENS["n2"])).node == "n2"


@pytest.mark.parametrize(
    ("text", "mode", "said"),
    [
        ("n1\n", 0o600, ":1: `NODE sha256:HEX` is expected"),
        ("# x\nn1 sha256:abc\n", 0o600, ":2: `NODE sha256:HEX`"),
        ("n1 token\n", 0o600, ":1: `NODE sha256:HEX`"),
        (f"N1 sha256:{'0' * 64}\n", 0o600, ":1: `NODE sha256:HEX`"),
        (f"n1 sha256:{'0' * 64}\nn2 sha256:{'0' * 64}\n", 0o600, ":2: n2 has the token of another node"),
        (f"n1 sha256:{'0' * 64}\n", 0o640, "open to others (mode 0640); chmod 0600"),
        ("", -1, "is not there"),
    ],
)
def test_a_file_that_is_not_in_order_is_refused_at_the_start(tmp_path: Path, text: str, mode: int, said: str) -> None:
    path = tmp_path / "tokens"
    if mode >= 0:
        path.write_text(text)
        path.chmod(mode)
    with pytest.raises(StoreError, match=re.escape(said)):
        NodeTokens(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="changes owners")
def test_a_file_of_somebody_else_is_refused(tmp_path: Path) -> None:
    os.chown(token_file(tmp_path / "tokens"), 12345, 0)
    with pytest.raises(StoreError, match="owned by uid 12345"):
        NodeTokens(tmp_path / "tokens")


@pytest.mark.parametrize(
    ("metadata", "token"),
    [
        ([("user-agent", "x"), ("authorization", "Bearer abc")], "abc"),
        ([("authorization", "bearer abc")], "abc"),
        ([], None),
        (None, None),
        ([("authorization", "")], None),
        ([("authorization", "Bearer")], None),
        ([("authorization", "Bearer ")], None),
        ([("authorization", "Basic abc")], None),
        ([("authorization", "Bearer a"), ("authorization", "Bearer b")], None),
        ([("authorization", "Bearer " + "x" * 20000)], None),
        ([("authorization-bin", b"Bearer abc")], None),
    ],
)
def test_one_bearer_token_is_read(metadata: Any, token: str | None) -> None:
    if token is None:
        with pytest.raises(TokenError):
            bearer(metadata)
    else:
        assert bearer(metadata) == token


def test_a_caller_has_a_burst_then_a_rate_and_takes_nothing_from_others() -> None:
    now = [0.0]
    limit = Limit(burst=5, per_second=2, clock=lambda: now[0])
    assert [limit.take("n1") for _ in range(6)] == [0, 0, 0, 0, 0, 0.5]
    assert limit.take("n2") == 0
    now[0] = 0.5
    assert limit.take("n1") == 0 and limit.take("n1") > 0
    now[0] = 1000.0
    assert [bool(limit.take("n1")) for _ in range(6)] == [False] * 5 + [True]  # no more than the burst is saved up
