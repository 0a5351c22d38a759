"""Bookinfo in the mesh: requests split as the routes say, counted on both sides, and shifted live."""
from __future__ import annotations

import collections
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.lab import Lab, lab
from tests.support.wait import until

pytestmark = pytest.mark.netns
BOOKINFO = Path(__file__).resolve().parents[3] / "examples" / "bookinfo"

# One process, one connection per request: asks reviews N times and prints the version that answered.
ASK = """
import http.client, json, sys
for _ in range(int(sys.argv[1])):
    c = http.client.HTTPConnection("reviews", 9080, timeout=5)
    c.request("GET", "/reviews/0", headers={"end-user": sys.argv[2]} if len(sys.argv) > 2 else {})
    r = c.getresponse()
    print(json.loads(r.read())["version"] if r.status == 200 else r.status)
    c.close()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy to edit: commands run in their manifest's folder."""
    return Path(shutil.copytree(BOOKINFO, tmp_path_factory.mktemp("bookinfo") / "bookinfo"))


@pytest.fixture(scope="module")
def bookinfo(folder: Path) -> Iterator[Lab]:
    with lab(folder / "bookinfo.yaml", folder / "destination-rules.yaml") as running:
        yield running


def ask(mesh: Lab, requests: int, *user: str, pod: str = "sleep") -> dict[str, int]:
    out = mesh.exec(pod, "/usr/bin/python3", "-c", ASK, str(requests), *user).stdout
    return dict(collections.Counter(out.split()))


def route(mesh: Lab, name: str, settled: dict[str, int], *user: str) -> None:
    """Applies an exercise and waits until ten requests of one user all see what only the new route gives."""
    mesh.apply(BOOKINFO / f"{name}.yaml")
    until(lambda: set(ask(mesh, 10, *user)) == set(settled), f"{name} is in force: {settled}", interval=0.2)


def counted(mesh: Lab, reporter: str) -> dict[str, float]:
    seen: dict[str, float] = collections.defaultdict(float)
    for name, labels, value in mesh.samples():
        if (name == "istio_requests_total" and labels["reporter"] == reporter and labels["source_workload"] == "sleep"
                and labels["destination_service_name"] == "reviews" and labels["response_code"] == "200"):
            seen[labels["destination_version"]] += value
    return dict(seen)


def test_without_a_route_every_version_answers(bookinfo: Lab) -> None:
    assert set(ask(bookinfo, 60)) == {"v1", "v2", "v3"}


def test_all_to_v1(bookinfo: Lab) -> None:
    route(bookinfo, "reviews-all-v1", {"v1": 10})
    assert ask(bookinfo, 50) == {"v1": 50}


def test_jason_alone_sees_v2(bookinfo: Lab) -> None:
    route(bookinfo, "reviews-jason-v2", {"v2": 10}, "jason")
    assert ask(bookinfo, 30, "jason") == {"v2": 30}
    assert ask(bookinfo, 30) == {"v1": 30}
    assert ask(bookinfo, 30, "mary") == {"v1": 30}


def test_three_hundred_requests_split_evenly_and_both_sides_count_them(bookinfo: Lab) -> None:
    route(bookinfo, "reviews-50-v1-50-v3", {"v1": 5, "v3": 5})
    until(lambda: counted(bookinfo, "source") == counted(bookinfo, "destination"), "both sides settled")
    before = {side: counted(bookinfo, side) for side in ("source", "destination")}
    seen = ask(bookinfo, 300)
    assert set(seen) == {"v1", "v3"}
    assert 105 <= seen["v1"] <= 195  # 150 +- 45: five standard deviations
    for side in ("source", "destination"):
        grown = {version: before[side].get(version, 0) + n for version, n in seen.items()}
        until(lambda side=side, grown=grown: {v: counted(bookinfo, side)[v] for v in grown} == grown,
              f"{side} counted {seen}")


def test_the_control_pod_bypasses_the_route_and_is_counted_by_nobody_as_a_source(bookinfo: Lab) -> None:
    route(bookinfo, "reviews-all-v1", {"v1": 10})
    assert set(ask(bookinfo, 60, pod="sleep-uncaptured")) == {"v1", "v2", "v3"}
    assert bookinfo.total("istio_requests_total", reporter="source", source_workload="sleep-uncaptured") == 0


def test_a_canary_takes_about_a_tenth(bookinfo: Lab) -> None:
    bookinfo.apply(BOOKINFO / "reviews-canary-10.yaml")
    until(lambda: "v3" in ask(bookinfo, 40), "the canary is in force", interval=0.2)
    seen = ask(bookinfo, 300)
    assert set(seen) == {"v1", "v3"}
    assert 8 <= seen["v3"] <= 60


def test_the_page_is_whole(bookinfo: Lab) -> None:
    page = bookinfo.exec("sleep", "curl", "-sS", "-m", "10", "http://productpage:9080/productpage").stdout
    assert page.count("<html") == 1
    assert "Reviewer" in page or "reviewer" in page


def annotate(mesh: Lab, folder: Path, value: str) -> None:
    """The control pod's manifest with another value of its annotation, applied to the running pod."""
    document = next(d for d in (folder / "bookinfo.yaml").read_text().split("\n---\n") if "name: sleep-uncaptured" in d)
    edited = folder / "edited.yaml"
    edited.write_text(document.replace("narrows.mesh/intercept: disabled", f"narrows.mesh/intercept: {value}"))
    mesh.run("apply", str(edited), check=value != "perhaps")


def test_a_running_pod_joins_and_leaves_the_mesh_by_its_annotation(bookinfo: Lab, folder: Path) -> None:
    def counted() -> float:
        return bookinfo.total("istio_requests_total", reporter="source", source_workload="sleep-uncaptured")

    address = bookinfo.pod("sleep-uncaptured")["ip"]
    annotate(bookinfo, folder, "enabled")
    until(lambda: bookinfo.pod("sleep-uncaptured")["captured"], "captured once annotated")
    assert sum(ask(bookinfo, 5, pod="sleep-uncaptured").values()) == 5
    until(lambda: counted() == 5, "its requests are counted")
    annotate(bookinfo, folder, "disabled")
    until(lambda: not bookinfo.pod("sleep-uncaptured")["captured"], "not captured any more")
    assert set(ask(bookinfo, 60, pod="sleep-uncaptured")) == {"v1", "v2", "v3"}
    assert counted() == 5
    assert bookinfo.pod("sleep-uncaptured")["ip"] == address, "the pod was not made again"


def test_a_malformed_annotation_is_refused_with_its_name_and_changes_nothing(bookinfo: Lab, folder: Path) -> None:
    try:
        annotate(bookinfo, folder, "perhaps")
        until(lambda: "perhaps" in bookinfo.pod("sleep-uncaptured")["reason"], "the reason names the value")
        seen = bookinfo.pod("sleep-uncaptured")
        assert "narrows.mesh/intercept" in seen["reason"]
        assert not seen["captured"]
    finally:
        annotate(bookinfo, folder, "disabled")
