"""The corpus of hostile requests, through the worker to real back ends: nobody ever disagrees about where a message ends."""
from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support import smuggling
from tests.support.backends import NAMES, Stage, stage
from tests.support.netns import Namespaces
from tests.support.smuggling import NEXT, Sent

pytestmark = pytest.mark.netns
Record = dict[str, Any]
Heard = dict[tuple[str, str], tuple[int, int]]  # (back end, case): the local ports of its connection and of the one after it
AFTER = b"GET /%s/after HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"


@pytest.fixture(scope="module")
def made(module_namespaces: Namespaces, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with stage(module_namespaces, tmp_path_factory.mktemp("strict")) as found:
        yield found


def play(stage: Stage, name: str, heard: Heard, errors: list[str]) -> None:
    for number, case in enumerate(smuggling.requests()):
        data, _ = case.marked(number)
        mark = smuggling.mark(number)
        try:
            local, _ = stage.say(name, data + (NEXT % mark if case.final != "cut" else b""), hang_up=case.final == "cut")
            later, reply = stage.say(name, AFTER % mark)
            if reply.count(b"x-seen: /%s/after" % mark) != 1:
                errors.append(f"{name} {case.name}: the next client got {reply!r}")
        except (AssertionError, OSError) as error:
            errors.append(f"{name} {case.name}: {error!r}")
            local = later = 0
        heard[name, case.name] = (local, later)


@pytest.fixture(scope="module")
def heard(made: Stage) -> Heard:
    """Every case through every back end, each back end's in order, all back ends at once."""
    found: Heard = {}
    errors: list[str] = []
    threads = [threading.Thread(target=play, args=(made, name, found, errors)) for name in NAMES]
    for one in threads:
        one.start()
    for one in threads:
        while one.is_alive():
            made.drain()
            one.join(0.05)
    made.settle()
    assert not errors, "\n".join(errors[:50])
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_back_end_reads_exactly_the_requests_that_were_counted(name: str, made: Stage, heard: Heard) -> None:
    told = by_case(made.backends.told()[name])
    wrong, refused = [], []
    for number, case in enumerate(smuggling.requests()):
        _, wanted = case.marked(number)
        wanted = wanted if case.final else [*wanted, Sent(b"GET", b"/%s/next" % smuggling.mark(number))]
        local, later = heard[name, case.name]
        found = judge(wanted, case.final, made.records(local), made.records(later), told.get(number, []),
                      Sent(b"GET", b"/%s/after" % smuggling.mark(number)))
        if found:
            wrong.append(f"{case.name}: {found}")
        if any(one["details"] == "via_upstream" and one["code"] != 200 for one in made.records(local)):
            refused.append(case.name)
    print(f"{name}: {len(smuggling.requests())} cases, {sum(map(len, told.values()))} requests read, refused by itself: {refused}")
    assert not wrong, "\n".join(wrong)


def by_case(told: list[Sent]) -> dict[int, list[Sent]]:
    found = defaultdict(list)
    for one in told:
        number = smuggling.number(one)
        assert number is not None, f"a request that belongs to no case: {one}"
        found[number].append(one)
    return found


def judge(wanted: list[Sent], final: str, records: list[Record], later: list[Record], told: list[Sent], after: Sent) -> str:
    """What is wrong, "" for nothing. A back end may refuse what we passed on (then it tells of nothing); it may not read it otherwise."""
    seen = [(one["method"], one["received"]) for one in records]
    want = [(one.method.decode(), len(one.body)) for one in wanted]
    ended = bool(records) and records[-1]["code"] != 200 and (records[-1]["details"] == "via_upstream" or records[-1]["flag"] == "UC")
    if seen[:len(want)] != (want[:len(seen)] if ended else want):
        return f"we counted {seen}, not {want}"
    answers = [(one["code"], one["flag"]) for one in records[len(want):]]
    if final.isdigit() and answers != [(int(final), "DPE")] and not (ended and len(records) <= len(want)):
        return f"we answered {answers}, not {final} DPE"
    if not final.isdigit() and len(answers) != (final == "cut") and not (ended and len(records) <= len(want)):
        return f"we counted {answers} besides"
    hosts = [one["authority"].encode("latin-1") for one in records if one["code"] == 200]
    passed = [one for one, record in zip(wanted, records, strict=False) if record["code"] == 200]
    if [one["code"] for one in later] != [200]:
        return f"the request after it was answered with {later}"
    if told != [*passed, after]:
        return f"we passed on {[*passed, after]}, the back end read {told}"
    if [one.host for one in told[:-1]] != hosts:
        return f"we passed them on to the hosts {hosts}, the back end read {[one.host for one in told]}"
    return ""
