"""What a captured pod is told, by whom, and that it cannot tell the difference: under both backends of capture."""
from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.netns.agent.conftest import NARROWS
from tests.netns.dns.conftest import WEB, Scene, answered
from tests.support.dns import addresses, ask, ask_tcp, dnsmasq, question, udp
from tests.support.netns import Netns
from tests.support.wait import until

pytestmark = [pytest.mark.netns, pytest.mark.redirects("asks for each method itself")]

LONG = [f"--txt-record=long.example.test,{letter * 250}" for letter in "abcdefgh"]


@pytest.fixture(scope="module", autouse=True)
def upstream(shared: Scene) -> Iterator[Netns]:
    process = dnsmasq(shared.upstream, "--host-record=www.example.test,192.0.2.1,2001:db8::1,60", "--local-ttl=60", *LONG)
    yield shared.upstream
    process.kill()
    process.wait()


@pytest.mark.parametrize("connected", [True, False])
@pytest.mark.parametrize("family", [4, 6])
def test_names_of_the_mesh_are_answered_from_the_address_that_was_asked(shared: Scene, family: int, connected: bool) -> None:
    for server in (("192.0.2.99", "2001:db8::99")[family == 6], (shared.upstream.ip, shared.upstream.ip6)[family == 6]):
        for name in (WEB, "web", "web.default", "web.default.svc", f"{WEB}.default.svc.cluster.local"):
            answer = ask(shared.client, server, name, connected=connected)
            assert addresses(answer) == ["10.96.0.10"] and answer.rr[-1].ttl == 30, name
    assert addresses(ask(shared.client, "192.0.2.99", "api.shop")) == ["10.96.0.20"]


def test_a_headless_service_is_its_pods_and_a_family_that_is_missing_is_empty(shared: Scene) -> None:
    assert addresses(ask(shared.client, "192.0.2.99", "pods")) == [shared.instance.server.ip]
    assert addresses(ask(shared.client, "192.0.2.99", "both", "AAAA")) == ["fd00:96::30"]
    empty = ask(shared.client, "192.0.2.99", WEB, "AAAA")
    assert (empty.header.rcode, empty.rr, empty.header.aa) == (0, [], 1)


@pytest.mark.parametrize("connected", [True, False])
@pytest.mark.parametrize("family", [4, 6])
def test_other_names_are_the_resolvers(shared: Scene, family: int, connected: bool) -> None:
    server = (shared.upstream.ip, shared.upstream.ip6)[family == 6]
    for _ in range(2):
        assert addresses(ask(shared.client, server, "www.example.test", connected=connected)) == ["192.0.2.1"]
        assert addresses(ask(shared.client, server, "www.example.test", "AAAA", connected=connected)) == ["2001:db8::1"]
        assert ask(shared.client, server, "no.example.test", connected=connected).header.rcode == 3
        assert ask(shared.client, server, WEB, "MX", connected=connected).header.rcode == 5  # dnsmasq knows nobody to ask


def test_two_resolvers_asked_from_one_port_each_answer_for_themselves(shared: Scene) -> None:
    """As musl's resolver does."""
    with udp(shared.client) as client:
        client.settimeout(5)
        first, second = question("www.example.test"), question("web")
        client.sendto(first.pack(), (shared.upstream.ip, 53))
        client.sendto(second.pack(), ("192.0.2.98", 53))
        found = {client.recvfrom(4096)[1][0] for _ in range(2)}
    assert found == {shared.upstream.ip, "192.0.2.98"}


def test_what_does_not_fit_is_truncated_by_the_resolver_and_comes_whole_by_tcp(shared: Scene) -> None:
    server = shared.upstream.ip
    small, large = (ask(shared.client, server, "long.example.test", "TXT", edns=size) for size in (None, 4096))
    assert small.header.tc == 1
    assert large.header.tc == 0 and len(large.rr) == 8 and len(large.pack()) > 1232


@pytest.mark.parametrize("family", [4, 6])
def test_by_tcp_the_mesh_and_the_resolver_answer_on_one_connection(shared: Scene, family: int) -> None:
    server = (shared.upstream.ip, shared.upstream.ip6)[family == 6]
    answers = ask_tcp(shared.client, server, "web", "www.example.test", "no.example.test")
    found = {str(answer.q.qname): addresses(answer) for answer in answers}
    assert found == {"web.": ["10.96.0.10"], "www.example.test.": ["192.0.2.1"], "no.example.test.": []}


def test_what_came_by_tcp_is_kept_for_tcp_alone(shared: Scene) -> None:
    def shown() -> dict[str, int]:
        found: dict[str, int] = shared.instance.shown("client")["dns"]
        return found

    server, name = shared.upstream.ip, "long.example.test"
    before, (first,) = shown(), ask_tcp(shared.client, server, name, kind="TXT")
    until(lambda: shown()["cached"] > before["cached"], "the answer is kept")
    again, twice = ask_tcp(shared.client, server, name, name, kind="TXT")
    told = [sorted(str(one.rdata) for one in answer.rr) for answer in (first, again, twice)]
    assert told[0] == told[1] == told[2] and len(told[0]) == 8
    assert again.rr[0].ttl <= first.rr[0].ttl and again.header.id != twice.header.id
    assert (shown()["hits"], shown()["requests"]) == (before["hits"] + 2, before["requests"] + 3)
    assert ask(shared.client, server, name, "TXT").header.tc == 1, "by UDP it is still too long"


def test_config_dns_shows_who_answers_and_what_is_kept(shared: Scene) -> None:
    ask(shared.client, "192.0.2.99", "web")
    argv = [*NARROWS, "config", "dns", "--run-dir", str(shared.instance.run_dir)]
    (rows,) = json.loads(subprocess.run([*argv, "-o", "json"], capture_output=True, text=True, check=True, timeout=60).stdout).values()
    (row,) = [one for one in rows if one["pod"] == "client"]
    assert row["captured"] and row == {"namespace": "default", "pod": "client", "captured": True, **shared.instance.shown("client")["dns"]}
    assert row["requests"] >= row["mesh"] + row["hits"] and row["mesh"] >= 1
    text = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60).stdout
    assert "the mesh, then its resolver" in text and "QUESTIONS" in text


def test_the_c_librarys_resolver_finds_the_mesh_and_the_rest(shared: Scene, tmp_path_factory: pytest.TempPathFactory) -> None:
    conf = tmp_path_factory.mktemp("etc") / "resolv.conf"
    conf.write_text(f"nameserver {shared.upstream.ip}\nsearch default.svc.cluster.local svc.cluster.local cluster.local\noptions ndots:5\n")

    def getent(name: str) -> set[str]:
        script = 'mount --bind "$1" /etc/resolv.conf && exec getent ahosts "$2"'
        done = shared.client.run("unshare", "--mount", "sh", "-c", script, "sh", str(conf), name, check=False)
        return {line.split()[0] for line in done.stdout.splitlines()}

    assert getent("web") == getent("web.default") == getent(WEB) == {"10.96.0.10"}
    assert getent("both") == {"10.96.0.30", "fd00:96::30"}
    assert getent("www.example.test") == {"192.0.2.1", "2001:db8::1"}
    assert getent("no.example.test") == set()


def test_a_resolver_whose_port_is_closed_refuses_and_one_that_is_not_there_is_silent(shared: Scene) -> None:
    """As it would be without us: the pod that is not captured sees the same."""
    for pod in (shared.client, shared.upstream):
        for server in (shared.instance.server.ip, shared.instance.server.ip6):  # nobody listens at 53 there
            with pytest.raises(ConnectionRefusedError):
                ask(pod, server, "www.example.test")
            with pytest.raises(OSError):
                ask_tcp(pod, server, "www.example.test")
        with pytest.raises(TimeoutError):
            ask(pod, "192.0.2.77", "www.example.test", timeout=1)


def test_hostile_bytes_are_not_answered_and_do_no_harm(shared: Scene) -> None:
    before = shared.metric("narrows_dns_dropped_total")
    code = """
import os, socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for number in range(400):
    s.sendto(os.urandom(number), (sys.argv[1], 53))
s.sendto(b"", (sys.argv[1], 53))
for number in range(20):
    t = socket.create_connection((sys.argv[1], 53))
    t.sendall(os.urandom(number * 7))
    t.close()
"""
    shared.client.run(sys.executable, "-c", code, "192.0.2.99")
    until(lambda: answered(shared), "what fills the pod's sockets passes, and it is answered")
    assert addresses(ask_tcp(shared.client, shared.upstream.ip, "web")[0]) == ["10.96.0.10"]
    assert shared.metric("narrows_dns_dropped_total") > before


def test_a_pods_own_address_and_its_localhost_are_left_alone(shared: Scene) -> None:
    for server in (shared.client.ip, "127.0.0.1"):
        with udp(shared.client) as client, pytest.raises(ConnectionRefusedError):
            client.settimeout(5)
            client.connect((server, 53))
            client.send(question("web").pack())
            client.recv(4096)


def test_the_proxys_port_cannot_be_reached_from_elsewhere(shared: Scene) -> None:
    with udp(shared.upstream) as other, pytest.raises(ConnectionRefusedError):
        other.settimeout(5)
        other.connect((shared.client.ip, 15053))
        other.send(question("web").pack())
        other.recv(4096)


def test_what_was_asked_is_counted(shared: Scene) -> None:
    names = ("istio_dns_requests_total", "istio_dns_upstream_requests_total", "narrows_dns_mesh_answers_total")
    before = [shared.metric(name) for name in names]
    ask(shared.client, shared.upstream.ip, "web")
    ask(shared.client, shared.upstream.ip, "fresh.example.test")
    assert [shared.metric(name) - was for name, was in zip(names, before, strict=True)] == [2, 1, 1]
    assert shared.instance.shown("client")["dns"]["requests"] > 0
