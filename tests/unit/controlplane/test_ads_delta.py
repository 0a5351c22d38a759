"""The delta session without I/O: what a client is told, when, and what is never told twice."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest

from agent.xds.session import Resource as AgentResource
from agent.xds.session import Response as AgentResponse
from agent.xds.session import Session as AgentSession
from agent.xds.tree import NAMED
from controlplane.model.mesh import Mesh
from controlplane.model.problems import ObjectKey
from controlplane.server.delta import OPEN_BOUND, DeltaSession, Request, Response
from controlplane.server.session import NAMES_BOUND, SessionError
from controlplane.translate.catalog import Catalog
from controlplane.translate.names import TypeUrl, parse
from tests.support.manifests import REVIEWS, good, pod, service, virtual_service

HOST = "reviews.default.svc.cluster.local"
LISTENER, EDS, CDS, WDS = TypeUrl.LISTENER, TypeUrl.ENDPOINTS, TypeUrl.CLUSTER, TypeUrl.ADDRESS
NAME, CLUSTER = f"{HOST}:9080", f"outbound|9080|v1|{HOST}"
V1 = "Kubernetes//Pod/default/reviews-v1-0"


class World:
    """A mesh, its catalog, and sessions that hear of every change."""

    def __init__(self, text: str = REVIEWS) -> None:
        self.mesh = Mesh()
        self.catalog = Catalog(self.mesh)
        self.sessions: list[DeltaSession] = []
        self.put(text)

    def join(self, scope: str = "default") -> DeltaSession:
        self.sessions.append(DeltaSession(self.catalog, scope))
        return self.sessions[-1]

    def put(self, text: str) -> None:
        self.apply(list(good(text).objects.values()), [])

    def delete(self, *keys: ObjectKey) -> None:
        self.apply([], keys)

    def apply(self, puts: Iterable[object], deletes: Iterable[ObjectKey]) -> None:
        touched = self.mesh.apply(puts, deletes)  # type: ignore[arg-type]
        addresses = self.catalog.update(touched)
        for session in self.sessions:
            session.touch(touched.hosts, addresses, touched.policies)


def names(response: Response) -> tuple[list[str], list[str]]:
    return [one.name for one in response.resources], list(response.removed)


def ask(session: DeltaSession, *requests: Request) -> list[Response]:
    """Requests in, what is due out; everything is acknowledged."""
    for request in requests:
        session.receive(request)
    found = list(session.responses())
    for response in found:
        session.receive(Request(response.type_url, nonce=response.nonce))
    return found


def test_a_first_request_without_names_is_for_every_address_services_first() -> None:
    found = ask(World().join(), Request(WDS))
    assert [names(one) for one in found] == [([f"default/{HOST}", V1, "Kubernetes//Pod/default/reviews-v2-0"], [])]


def test_an_empty_mesh_is_said_to_be_empty() -> None:
    assert [names(one) for one in ask(World("").join(), Request(WDS))] == [([], [])]


def test_a_wildcard_of_layer_seven_is_nothing_because_that_is_on_demand() -> None:
    assert [names(one) for one in ask(World().join(), Request(LISTENER))] == [([], [])]


def test_what_was_asked_for_comes_under_the_name_it_was_asked_by() -> None:
    full = f"xdstp:///envoy.config.listener.v3.Listener/{NAME}?ns=shop"
    session = World().join()
    assert [names(one) for one in ask(session, Request(LISTENER, (NAME, full)))] == [([NAME, full], [])]


def test_what_does_not_exist_is_said_to_be_removed_at_once_and_comes_when_it_exists() -> None:
    world = World()
    session = world.join()
    assert [names(one) for one in ask(session, Request(LISTENER, ("new.default.svc.cluster.local:80", "nonsense")))] == [
        ([], ["new.default.svc.cluster.local:80", "nonsense"])
    ]
    world.put(service("new", ip="10.96.0.30"))
    assert [names(one) for one in ask(session)] == [(["new.default.svc.cluster.local:80"], [])]


def test_a_change_sends_only_what_differs() -> None:
    world = World()
    session = world.join()
    ask(session, Request(WDS), Request(LISTENER, (NAME,)), Request(CDS, (CLUSTER,)), Request(EDS, (CLUSTER,)))
    world.put(pod("reviews-v1-0", "10.244.1.5", "reviews", labels=", version: v1", ready="False"))
    assert [(one.type_url, *names(one)) for one in ask(session)] == [(WDS, [V1], []), (EDS, [CLUSTER], [])]
    world.put(REVIEWS + virtual_service("vs", "hosts: [reviews]\nhttp: [{route: [{destination: {host: reviews}}]}]"))
    ask(session)
    world.delete(ObjectKey("VirtualService", "default", "vs"))
    assert ask(session) == []  # routes changed; nobody here follows them


def test_ten_changes_before_the_client_reads_are_one_and_a_change_back_is_none() -> None:
    world = World()
    session = world.join()
    ask(session, Request(EDS, (CLUSTER,)))
    for ready in ["False", "True"] * 5:
        world.put(pod("reviews-v1-0", "10.244.1.5", "reviews", labels=", version: v1", ready=ready))
    assert ask(session) == []
    for number in range(10):
        world.put(pod(f"x{number}", f"10.244.7.{number + 1}", "reviews", labels=", version: v1"))
    assert len(ask(session)) == 1


def test_a_removed_object_is_told_once() -> None:
    world = World()
    session = world.join()
    ask(session, Request(WDS), Request(LISTENER, (NAME,)))
    world.delete(ObjectKey("Service", "default", "reviews"), ObjectKey("Pod", "default", "reviews-v1-0"))
    told = {one.type_url: names(one) for one in ask(session)}
    assert told == {WDS: (["Kubernetes//Pod/default/reviews-v2-0"], [f"default/{HOST}", V1]), LISTENER: ([], [NAME])}
    world.put(pod("other", "10.244.3.3", "other"))
    assert [names(one) for one in ask(session)] == [(["Kubernetes//Pod/default/other"], [])]


def test_a_new_stream_gets_only_what_differs_from_what_it_holds() -> None:
    world = World()
    first = ask(world.join(), Request(WDS))[0]
    held = {one.name: one.made.version for one in first.resources} | {"default/vanished": "1"}
    assert [names(one) for one in ask(world.join(), Request(WDS, held=held))] == [([], ["default/vanished"])]
    held[V1] = "older"
    assert [names(one) for one in ask(world.join(), Request(WDS, held=held))] == [([V1], ["default/vanished"])]
    version = ask(world.join(), Request(EDS, (CLUSTER,)))[0].resources[0].made.version
    resumed = ask(
        world.join(), Request(EDS, (CLUSTER, f"outbound|1||{HOST}"), held={CLUSTER: version, f"outbound|1||{HOST}": "1", "other": "1"})
    )
    assert [names(one) for one in resumed] == [([], [f"outbound|1||{HOST}"])]


def test_what_is_not_followed_any_more_is_not_sent_and_asking_again_sends_again() -> None:
    world = World()
    session = world.join()
    ask(session, Request(EDS, (CLUSTER,)))
    assert ask(session, Request(EDS, unsubscribe=(CLUSTER,))) == []
    world.put(pod("x", "10.244.7.1", "reviews", labels=", version: v1"))
    assert ask(session) == []
    assert [names(one) for one in ask(session, Request(EDS, (CLUSTER,)))] == [([CLUSTER], [])]
    assert [names(one) for one in ask(session, Request(EDS, (CLUSTER,)))] == [([CLUSTER], [])]  # the protocol wants an answer


def test_addresses_can_be_followed_by_name_and_the_wildcard_given_up() -> None:
    world = World()
    session = world.join()
    assert next(names(one) for one in ask(session, Request(WDS, ("*",), ("*",))))[1] == []
    session = world.join()
    assert [names(one) for one in ask(session, Request(WDS, (V1, "default/none")))] == [([V1], ["default/none"])]
    assert len(ask(session, Request(WDS, ("*",)))[0].resources) == 2  # it has V1
    ask(session, Request(WDS, unsubscribe=("*",)))
    world.put(pod("x", "10.244.7.1", "reviews") + pod("reviews-v1-0", "10.244.1.5", "reviews", ready="False"))
    assert [names(one) for one in ask(session)] == [([V1], [])]


def test_a_rejected_resource_is_not_sent_again_until_it_changes_and_the_words_are_kept() -> None:
    world = World()
    session = world.join()
    session.receive(Request(EDS, (CLUSTER,)))
    response = next(session.responses())
    heard = session.receive(Request(EDS, nonce=response.nonce, error="endpoint 1: bad"))
    assert heard.rejected == "endpoint 1: bad"
    status, followed, settled = session.status()[EDS]
    assert (status.rejects, status.error, followed, settled) == (1, "endpoint 1: bad", 1, True)
    assert list(session.responses()) == []
    world.put(pod("x", "10.244.7.1", "reviews", labels=", version: v1"))
    assert len(ask(session)) == 1 and session.status()[EDS][0].error == ""


def test_a_nonce_of_another_stream_counts_for_nothing_but_its_subscriptions_do() -> None:
    session = World().join()
    assert session.receive(Request(EDS, (CLUSTER,), nonce="from before", error="old")).rejected is None
    assert [names(one) for one in session.responses()] == [([CLUSTER], [])]


def test_a_client_that_acknowledges_nothing_gets_no_more_than_the_bound_and_then_everything() -> None:
    world = World()
    session = world.join()
    session.receive(Request(WDS))
    sent = list(session.responses())
    for number in range(40):
        world.put(pod(f"x{number}", f"10.244.7.{number + 1}", "reviews"))
        sent += session.responses()
    assert len(sent) == OPEN_BOUND
    for response in sent:
        session.receive(Request(WDS, nonce=response.nonce))
    rest = list(session.responses())
    assert sum(len(one.resources) for one in [*sent, *rest]) == 3 + 40 and len(rest) == 1


def test_a_large_answer_comes_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("controlplane.server.delta.RESPONSE_BYTES", 100)
    found = ask(World().join(), Request(WDS))
    assert len(found) > 1 and sum(len(one.resources) for one in found) == 3


def test_an_unknown_type_is_answered_that_there_is_nothing() -> None:
    session = World().join()
    assert [names(one) for one in ask(session, Request("type.googleapis.com/istio.security.Authorization"))] == [([], [])]
    assert [names(one) for one in ask(session, Request("t/X", ("a",)))] == [([], ["a"])]


def test_subscriptions_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert NAMES_BOUND >= 100_000
    monkeypatch.setattr("controlplane.server.session.NAMES_BOUND", 2)
    with pytest.raises(SessionError, match="more than 2 subscriptions"):
        World().join().receive(Request(EDS, ("a", "b", "c")))


def test_malformed_names_are_told_with_their_reason() -> None:
    heard = World().join().receive(Request(LISTENER, ("nonsense", NAME)))
    assert len(heard.malformed) == 1 and "'nonsense' is not of the form <host>:<port>" in heard.malformed[0]


@pytest.mark.parametrize("seed", range(12))
def test_our_agents_session_ends_with_exactly_what_there_is_whatever_happens(seed: int) -> None:
    """Two state machines against each other: random changes of mesh and wishes, lost streams, rejected resources, late answers."""
    rng = random.Random(seed)
    world = World()
    texts = [
        pod(f"p{n}", f"10.244.0.{n + 1}", "reviews", labels=f", version: v{n % 3}", ready=ready)
        for n in range(5)
        for ready in ("True", "False")
    ]
    texts += [service(f"s{n}", f"[{{name: http, port: {port}}}]", ip=f"10.96.1.{n}") for n in range(3) for port in (80, 81)]
    objects = [one for text in texts for one in good(text).objects.values()]
    every = {
        url: [f"xdstp:///{url.rpartition('/')[2]}/{short}?ns=default" for short in shorts]
        for url, shorts in {
            LISTENER: [NAME, "s0.default.svc.cluster.local:80", "s1.default.svc.cluster.local:81", "none:1"],
            CDS: [CLUSTER, f"outbound|9080|v9|{HOST}"],
            EDS: [CLUSTER, f"outbound|9080||{HOST}"],
        }.items()
    }
    agent = AgentSession([WDS], NAMED)
    server: DeltaSession | None = None
    to_server: list[Request] = []
    to_agent: list[AgentResponse] = []
    open_updates: list[tuple[object, dict[str, str]]] = []

    def send(requests: Iterable[object]) -> None:
        for one in requests:
            to_server.append(
                Request(
                    one.type_url,
                    tuple(one.subscribe),
                    tuple(one.unsubscribe),  # type: ignore[attr-defined]
                    dict(one.initial_versions),
                    one.nonce,
                    one.error or None,
                )
            )  # type: ignore[attr-defined]

    def pump(reject: float) -> None:
        assert server is not None
        while to_server and rng.random() < 0.9:
            server.receive(to_server.pop(0))
        for response in server.responses():
            to_agent.append(
                AgentResponse(
                    response.type_url,
                    response.nonce,
                    tuple(AgentResource(response.type_url, one.name, one.made.version, one.made.content) for one in response.resources),
                    response.removed,
                )
            )
        while to_agent and rng.random() < 0.9:
            update = agent.received(to_agent.pop(0))
            if update is not None:
                bad = {one.name: "bad" for one in update.changed if rng.random() < reject}
                open_updates.append((update, bad))
        while open_updates and rng.random() < 0.8:
            update, bad = open_updates.pop(0)
            answer = agent.settled(update, bad)  # type: ignore[arg-type]
            if answer is not None:
                send([answer])

    def connect() -> None:
        nonlocal server
        server = world.join()
        to_server.clear()
        to_agent.clear()
        send(agent.opened())

    def disconnect() -> None:
        nonlocal server
        assert server is not None
        world.sessions.remove(server)
        agent.closed()
        open_updates.clear()
        to_server.clear()
        to_agent.clear()

    connect()
    for _ in range(120):
        what = rng.random()
        if what < 0.35:
            world.apply(rng.sample(objects, rng.randrange(3)), [one.meta.key for one in rng.sample(objects, rng.randrange(2))])
        elif what < 0.55:
            url = rng.choice([LISTENER, CDS, EDS])
            more, less = (rng.sample(every[url], rng.randrange(len(every[url]) + 1)) for _ in "ab")
            send(agent.want(url, more, less))
        elif what < 0.6:
            disconnect()
            connect()
        else:
            pump(0.1)
    disconnect()  # what was rejected is asked for again on the next stream
    connect()
    for _ in range(60):
        pump(0.0)
    assert not to_server and not to_agent and not open_updates
    assert agent.held(WDS) == {name: made.version for name in world.catalog.addresses() if (made := world.catalog.address(name))}
    for url in (LISTENER, CDS, EDS):
        assert agent.held(url) == {
            name: made.version for name in agent.wanted(url) if (made := world.catalog.resource(parse(url, name, "x")))
        }
