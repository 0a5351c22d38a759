"""The corpus of hostile answers: a server says them, the worker passes on what is sound, and real clients read that alike."""
from __future__ import annotations

import json
import re
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import h11
import pytest

from tests.support import smuggling
from tests.support.backends import BACK, FRONT, PEERS, Stage, program, stage
from tests.support.capture import ByHand
from tests.support.mesh import VIP, Origin, read_message, response
from tests.support.netns import Namespaces
from tests.support.smuggling import NEXT, Answer

pytestmark = pytest.mark.netns
Reading = tuple[list[tuple[int, bytes]], str]  # answers to the request and to the one behind it; "cut" if the first is not whole
NEXT_ANSWER = (200, b"next")


def hostile(connection: socket.socket) -> None:
    """Says the bytes of the case that is asked for, and what is right to all else. Closes where the case leaves no other end."""
    while True:
        seen = read_message(connection)
        number, last = re.match(r"\S+ /c([0-9a-f]{3})/(\w+)", seen.first).groups()  # type: ignore[union-attr]
        if last != "a":
            connection.sendall(response(b"next"))
            continue
        case = smuggling.responses()[int(number, 16)]
        connection.sendall(case.bytes)
        if case.final in ("503", "close", "cut") or case.name in ("response-http-0.9",):
            return


@pytest.fixture(scope="module")
def made(module_namespaces: Namespaces, by_hand: ByHand, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with stage(module_namespaces, by_hand, tmp_path_factory.mktemp("strict"), with_backends=False) as found:
        origin = Origin(found.outside, BACK["origin"], hostile)
        yield found
        origin.errors[:] = [error for error in origin.errors if not isinstance(error, ConnectionError)]
        origin.close()


def expected(case: Answer) -> Reading:
    seen = list(case.seen)
    if case.final in ("502", "503"):
        seen.append((int(case.final), b"Bad Gateway" if case.final == "502" else b"Service Unavailable"))
        if case.ask == b"HEAD":
            seen[-1] = (seen[-1][0], b"")
    if case.final in ("close", "cut"):
        return seen, case.final
    return [*seen, NEXT_ANSWER], ""


def read_by_h11(case: Answer, data: bytes) -> Reading:
    h, found, told = h11.Connection(h11.CLIENT), [], False
    for method in (case.ask, b"GET"):
        h.send(h11.Request(method=method, target="/", headers=[("host", "h")]))
        h.send(h11.EndOfMessage())
        if not told:
            h.receive_data(data)
            h.receive_data(b"")
            told = True
        status, body = 0, b""
        while True:
            try:
                event = h.next_event()
            except h11.RemoteProtocolError:
                return found, "cut"
            if isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                found.append((status, body))
                break
            elif isinstance(event, h11.ConnectionClosed) or event is h11.NEED_DATA:
                return found, "close"
        if h.our_state is not h11.DONE or h.their_state is not h11.DONE:
            break
        h.start_next_cycle()
    return found, "" if len(found) == 2 else "close"


def test_a_client_reads_what_the_corpus_says_and_the_next_answer_behind_it(made: Stage) -> None:
    wrong = []
    for number, case in enumerate(smuggling.responses()):
        mark = smuggling.mark(number)
        asked = b"%s /%s/a HTTP/1.1\r\nHost: h\r\n\r\n" % (case.ask, mark)
        _, data = made.say("origin", asked + NEXT % mark)
        if (found := read_by_h11(case, data)) != expected(case):
            wrong.append(f"{case.name}: h11 reads {found}, not {expected(case)} in {data!r}")
    assert not wrong, "\n".join(wrong)


def test_curl_reads_the_same(made: Stage) -> None:
    """Both requests on one connection of curl's, where it is kept."""
    def ask(number: int) -> str:
        case = smuggling.responses()[number]
        base = f"http://{VIP}:{FRONT['origin']}/{smuggling.mark(number).decode()}/"
        same = ["-s", "-m", "10", "-w", "\\n%{http_code} %{exitcode}\\n"]
        done = subprocess.run(["nsenter", f"--net={made.client.path}", "curl", *same, *(["-I"] if case.ask == b"HEAD" else []), base + "a",
                               "--next", *same, base + "next"], capture_output=True, check=False, timeout=30)
        first, second = re.findall(rb"(?:^|\n)(\d{3}) (\d+)(?=\n)", done.stdout)[-2:]
        seen, final = expected(case)
        body = seen[0][1] if case.ask == b"GET" and final != "cut" else b""
        sound = first == (b"%d" % seen[0][0], b"0") if final != "cut" else first[1] != b"0"
        if not sound or second != (b"200", b"0") or body not in done.stdout:
            return f"{case.name}: curl reads {done.stdout!r}, not {seen} {final}"
        return ""

    with ThreadPoolExecutor(4) as pool:
        wrong = [one for one in pool.map(ask, range(len(smuggling.responses()))) if one]
    assert not wrong, "\n".join(wrong)


def test_node_reads_the_same(made: Stage) -> None:
    words = [f"{case.ask.decode()}:/{smuggling.mark(number).decode()}/" for number, case in enumerate(smuggling.responses())]
    told = made.client.run(program("node"), str(PEERS / "client.js"), VIP, str(FRONT["origin"]), *words, timeout=60).stdout
    wrong = []
    for case, line in zip(smuggling.responses(), told.splitlines(), strict=True):
        (status, body, whole), following = json.loads(line)
        seen, final = expected(case)
        sound = (status, body.encode("latin-1"), whole) == (*seen[0], True) if final != "cut" else not whole
        if not sound or following != [200, "next", True]:
            wrong.append(f"{case.name}: node reads {line}, not {seen} {final}")
    assert not wrong, "\n".join(wrong)
