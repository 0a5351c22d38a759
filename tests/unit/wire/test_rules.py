"""docs/http1.md says what the corpus holds: every rule has its cases, every case its rule, and the statuses and Envoy's answers agree."""
from __future__ import annotations

import re
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from tests.support.smuggling import Case, by_name, responses

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "http1.md").read_text()
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if re.match(r"\| .*`.*\|$", line)]
REQUESTS = [row for row in ROWS if len(row) == 5]
RESPONSES = [row for row in ROWS if len(row) == 4]


def named(cell: str, names: list[str]) -> list[str]:
    words = re.findall(r"`([^`]+)`", cell)
    lost = [word for word in words if not any(fnmatchcase(name, word) for name in names)]
    assert not lost, f"no case is called {lost}"
    return [name for name in names if any(fnmatchcase(name, word) for word in words)]


def of_envoy(cases: list[Case]) -> str:
    """How a row tells of Envoy: whether it refuses what it gets directly, with what, and how many of the row's cases."""
    refused = [case.envoy.split()[1] for case in cases if not case.envoy.endswith("-")]
    if not refused:
        return "reads it" if any(int(case.envoy.split()[0]) for case in cases) else "waits"
    statuses = ", ".join(sorted(set(refused)))
    return statuses if len(refused) == len(cases) else f"{statuses}: {len(refused)} of {len(cases)}"


@pytest.mark.parametrize("row", REQUESTS, ids=lambda row: row[0])
def test_a_rule_says_what_its_cases_hold(row: list[str]) -> None:
    cases = [by_name()[name] for name in named(row[4], list(by_name()))]
    assert set(re.findall(r"\b[45]\d\d\b", row[3])) == {case.final for case in cases if case.final.isdigit()}
    assert row[2] == of_envoy(cases)


def test_every_case_has_its_rule() -> None:
    assert len(REQUESTS) > 40 and len(RESPONSES) > 8
    told = {name for row in REQUESTS for name in named(row[4], list(by_name()))}
    assert set(by_name()) == told
    names = [one.name for one in responses()]
    assert set(names) == {name for row in RESPONSES for name in named(row[3], names)}
