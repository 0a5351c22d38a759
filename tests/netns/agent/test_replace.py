"""Programs replaced and agents killed while a captured pod connects: tests/bench/replace.py in small."""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bench.replace import Site, run

pytestmark = [pytest.mark.netns, pytest.mark.redirects("asks for eBPF itself")]


@pytest.fixture
def site(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Site]:
    with Site(getattr(request, "param", "ebpf"), tmp_path) as made:
        yield made


def test_no_connect_fails_or_escapes_while_programs_are_replaced_and_the_agent_is_killed(site: Site) -> None:
    done = run(site, 2_000, 64, replacements=10, kills=2)
    assert done.good, str(done)
    assert (done.made >= 2_000, done.replaced, done.kills) == (True, 12, 2)


@pytest.mark.parametrize("site", ["ebpf", "iptables"], indirect=True)
def test_what_connections_carry_both_ways_is_what_was_sent(site: Site) -> None:
    done = run(site, 300, 1 << 18)
    assert done.good and done.made >= 300, str(done)
