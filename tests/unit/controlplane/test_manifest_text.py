"""YAML is read as Kubernetes reads it, with lines, one document at a time, and nothing in it can run away."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane.sources.text import DEPTH_BOUND, Broken, Map, documents


def only(text: str) -> Any:
    found = list(documents(text))
    assert len(found) == 1, found
    return found[0]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("-7", -7),
        ("0", 0),
        ("0x1f", 31),
        ("0o17", 15),
        ("017", 15),
        ("1_000", 1000),
        ("1.5", 1.5),
        ("1e3", 1000.0),
        ("true", True),
        ("yes", True),
        ("off", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("12:30:45", "12:30:45"),
        ("2001-01-01", "2001-01-01"),
        ("=", "="),
        ("1.2.3.4", "1.2.3.4"),
        ("v1", "v1"),
        ("1h", "1h"),
        ('"1"', "1"),
        ("'true'", "true"),
        ('"yes"', "yes"),
        ("0.0.0.0/0", "0.0.0.0/0"),
        ("10s", "10s"),
        ("fd00::1", "fd00::1"),
    ],
)
def test_a_scalar_is_what_kubernetes_makes_of_it(text: str, value: object) -> None:
    found = only(f"a: {text}")["a"]
    assert found == value and type(found) is type(value)


def test_every_key_and_item_knows_its_line_in_the_file() -> None:
    first, second = documents("a: 1\n---\n# comment\nb:\n  c: 2\n  d:\n  - x\n  - y: 3\n")
    assert isinstance(first, Map) and isinstance(second, Map)
    assert (first.line, second.line, second["b"].line_of("c"), second["b"]["d"].lines) == (1, 4, 5, [7, 8])
    assert second["b"]["d"][1].line_of("y") == 8


def test_one_broken_document_costs_no_other() -> None:
    found = list(documents("a: 1\n---\nb: [1\n---\nc: 3\n---\n- no\n--- \nd: 4\n...\n"))
    assert [one if isinstance(one, Broken) else dict(one) for one in found] == [{"a": 1}, found[1], {"c": 3}, found[3], {"d": 4}]
    broken = [one for one in found if isinstance(one, Broken)]
    assert [one.line for one in broken] == [4, 7] and "broken YAML" in broken[0].message


def test_json_is_read_too_and_a_list_is_its_items() -> None:
    found = list(documents('{"kind": "List", "items": [{"kind": "A"}, {"kind": "B"}, 7]}'))
    assert [dict(one) if isinstance(one, Map) else one.message for one in found] == [
        {"kind": "A"},
        {"kind": "B"},
        "an object is expected as item of a List",
    ]


def test_a_key_that_is_there_twice_is_refused_with_both_lines() -> None:
    found = only("a: 1\nb: 2\na: 3\n")
    assert isinstance(found, Broken) and found.line == 3 and "twice (first in line 1)" in found.message


def test_anchors_and_merges_work() -> None:
    assert only("x: &base {a: 1, b: 2}\ny: {<<: *base, b: 3}\n")["y"] == {"a": 1, "b": 3}


def test_a_bomb_of_aliases_ends_with_a_problem() -> None:
    levels = "\n".join(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]" for n in range(1, 12))
    found = only(f"l0: &l0 [x]\n{levels}\n")
    assert isinstance(found, Broken) and "values in one document" in found.message


def test_nesting_is_bounded_also_when_an_alias_holds_itself() -> None:
    for text in ("a: " + "[" * (DEPTH_BOUND + 2) + "]" * (DEPTH_BOUND + 2), "a: &x [*x]"):
        found = only(text)
        assert isinstance(found, Broken) and "deeper" in found.message


@pytest.mark.parametrize(
    "text", ["a: !!python/object:os.system x", "a: !Ref b", "a: \x01", "? [a]\n: b", "a: &x\n  <<: [*x]\n", "a: 1" + "0" * 5000]
)
def test_what_kubernetes_would_not_take_is_refused_with_a_line(text: str) -> None:
    found = only(text)
    assert isinstance(found, Broken) and found.line == 1 and found.message


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.sampled_from("ab:-[]{}&*!|>'\"\n #,?%@`<0x.~\t…"), max_size=60))
def test_no_text_makes_it_fail(text: str) -> None:
    for one in documents(text):
        assert isinstance(one, Map | Broken)
