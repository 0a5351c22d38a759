"""The state-of-the-world session without I/O."""

from __future__ import annotations

from controlplane.model.mesh import Mesh
from controlplane.model.problems import ObjectKey
from controlplane.server.sotw import Request, Response, SotwSession
from controlplane.translate.catalog import Catalog
from controlplane.translate.names import TypeUrl
from tests.support.manifests import REVIEWS, good, pod, service

HOST = "reviews.default.svc.cluster.local"
LISTENER, EDS, WDS = TypeUrl.LISTENER, TypeUrl.ENDPOINTS, TypeUrl.ADDRESS
NAME, ALL, V1 = f"{HOST}:9080", f"outbound|9080||{HOST}", f"outbound|9080|v1|{HOST}"


class World:
    def __init__(self) -> None:
        self.mesh = Mesh()
        self.catalog = Catalog(self.mesh)
        self.session = SotwSession(self.catalog, "default")
        self.change(REVIEWS)

    def change(self, text: str, *deletes: ObjectKey) -> None:
        touched = self.mesh.apply(good(text).objects.values(), deletes)
        self.session.touch(touched.hosts, self.catalog.update(touched), touched.policies)

    def ask(self, *request: Request) -> list[Response]:
        for one in request:
            self.session.receive(one)
        return list(self.session.responses())


def names(found: list[Response]) -> list[list[str]]:
    return [[one.name for one in response.resources] for response in found]


def ack(response: Response, *wanted: str, error: str | None = None) -> Request:
    return Request(response.type_url, wanted, response.version, response.nonce, error)


def test_every_response_holds_everything_that_was_asked_for_and_exists() -> None:
    world = World()
    first = world.ask(Request(EDS, (ALL, V1, "outbound|1||x")))
    assert [sorted(one) for one in names(first)] == [sorted([V1, ALL])]
    assert world.ask(ack(first[0], ALL, V1, "outbound|1||x")) == []
    world.change(pod("x", "10.244.9.9", "reviews"))
    second = world.ask()
    assert sorted(names(second)[0]) == sorted([ALL, V1]) and second[0].version != first[0].version


def test_a_change_that_changes_nothing_for_it_sends_nothing() -> None:
    world = World()
    first = world.ask(Request(LISTENER, (NAME,)))
    world.ask(ack(first[0], NAME))
    world.change(pod("x", "10.244.9.9", "reviews") + service("other", ip="10.96.0.99"))
    assert world.ask() == []


def test_asking_for_one_more_is_answered_at_once_and_for_one_less_is_not() -> None:
    world = World()
    first = world.ask(Request(EDS, (ALL,)))[0]
    second = world.ask(ack(first, ALL, V1))
    assert sorted(names(second)[0]) == sorted([ALL, V1])
    assert world.ask(ack(second[0], V1)) == []


def test_a_change_waits_for_the_answer_to_the_last_response() -> None:
    world = World()
    first = world.ask(Request(EDS, (ALL,)))[0]
    for number in range(5):
        world.change(pod(f"x{number}", f"10.244.9.{number + 1}", "reviews"))
        assert world.ask() == []
    assert len(world.ask(ack(first, ALL))) == 1


def test_an_outdated_nonce_is_left_and_a_rejection_is_heard_and_not_answered_with_the_same() -> None:
    world = World()
    first = world.ask(Request(EDS, (ALL,)))[0]
    assert world.ask(Request(EDS, (V1,), nonce="older")) == []
    heard = world.session.receive(ack(first, ALL, error="no"))
    assert heard.rejected == "no" and list(world.session.responses()) == []
    status, _, settled = world.session.status()[EDS]
    assert (status.rejects, status.error, settled) == (1, "no", True)


def test_no_names_is_everything_at_first_and_nothing_after_names() -> None:
    world = World()
    assert len(names(world.ask(Request(WDS)))[0]) == 3
    first = world.ask(Request(EDS, (ALL,)))[0]
    assert world.ask(ack(first)) == []
    world.change(pod("x", "10.244.9.9", "reviews"))
    assert EDS not in [one.type_url for one in world.ask()]


def test_a_listener_that_went_is_missing_from_the_next_response() -> None:
    world = World()
    first = world.ask(Request(LISTENER, (NAME,)))[0]
    world.ask(ack(first, NAME))
    world.change("", ObjectKey("Service", "default", "reviews"))
    assert names(world.ask()) == [[]]
