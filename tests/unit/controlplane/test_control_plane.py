"""The process end to end: manifests in, gRPC out over a unix socket, and what an operator sees."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import stat
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from prometheus_client.parser import text_string_to_metric_families

from controlplane.translate.names import TypeUrl
from protos.gen.envoy.config.endpoint.v3 import endpoint_pb2
from protos.gen.envoy.service.discovery.v3 import discovery_pb2
from tests.support.authority import token_file
from tests.support.controlplane import START, ControlPlane, control_plane
from tests.support.manifests import REVIEWS, pod, service, virtual_service
from tests.support.wait import until

AUTHORITY = ["--ca-dir", "{tmp}/ca", "--node-tokens", "{tmp}/t"]
HOST = "reviews.default.svc.cluster.local"
METHOD = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources"
SECONDS = 10.0


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    with control_plane(tmp_path_factory.mktemp("plane"), REVIEWS) as made:
        yield made


class Stream:
    """A delta stream that acknowledges what it is told."""

    def __init__(self, call: Any) -> None:
        self._call = call

    async def write(self, **fields: Any) -> None:
        await self._call.write(discovery_pb2.DeltaDiscoveryRequest(**fields))

    async def read(self, error: str = "") -> Any:
        async with asyncio.timeout(SECONDS):
            answer = await self._call.read()
        assert answer is not grpc.aio.EOF, await self._call.details()
        request = discovery_pb2.DeltaDiscoveryRequest(type_url=answer.type_url, response_nonce=answer.nonce)
        if error:
            request.error_detail.message = error
        await self._call.write(request)
        return answer

    async def ask(self, type_url: TypeUrl, *names: str, scope: str = "default") -> Any:
        full = [name if "/" in name else f"xdstp:///{type_url.rpartition('/')[2]}/{name}?ns={scope}" for name in names]
        await self.write(type_url=type_url, resource_names_subscribe=full)
        return await self.read()


@asynccontextmanager
async def stream(plane: ControlPlane, node: str = "n1", held: dict[str, str] | None = None) -> AsyncIterator[Stream]:
    async with grpc.aio.insecure_channel(plane.listen, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        call = channel.stream_stream(
            METHOD,
            request_serializer=discovery_pb2.DeltaDiscoveryRequest.SerializeToString,
            response_deserializer=discovery_pb2.DeltaDiscoveryResponse.FromString,
        )()
        made = Stream(call)
        await made.write(type_url=TypeUrl.ADDRESS, node={"id": node}, initial_resource_versions=held or {})
        yield made
        call.cancel()


def addresses(answer: Any) -> list[str]:
    one = endpoint_pb2.ClusterLoadAssignment.FromString(answer.resources[0].resource.value)
    return [end.endpoint.address.socket_address.address for group in one.endpoints for end in group.lb_endpoints]


async def test_a_client_walks_from_addresses_to_endpoints(plane: ControlPlane) -> None:
    async with stream(plane) as one:
        first = await one.read()
        assert next(found.name for found in first.resources) == f"default/{HOST}" and len(first.resources) >= 3
        for type_url, name in (
            (TypeUrl.LISTENER, f"{HOST}:9080"),
            (TypeUrl.ROUTE, f"{HOST}:9080"),
            (TypeUrl.CLUSTER, f"outbound|9080|v1|{HOST}"),
        ):
            answer = await one.ask(type_url, name)
            assert [found.resource.type_url for found in answer.resources] == [type_url]
        assert addresses(await one.ask(TypeUrl.ENDPOINTS, f"outbound|9080|v1|{HOST}")) == ["10.244.1.5"]


async def test_a_change_of_a_file_reaches_every_client_that_follows_it(plane: ControlPlane) -> None:
    async with stream(plane, "a") as one, stream(plane, "b") as two:
        for client in (one, two):
            await client.read()
            await client.ask(TypeUrl.ENDPOINTS, f"outbound|9080|v2|{HOST}")
        plane.apply("more.yaml", pod("reviews-v2-1", "10.244.2.7", "reviews", labels=", version: v2"))
        for client in (one, two):
            told = {answer.type_url: answer for answer in [await client.read(), await client.read()]}
            assert [found.name for found in told[TypeUrl.ADDRESS].resources] == ["Kubernetes//Pod/default/reviews-v2-1"]
            assert addresses(told[TypeUrl.ENDPOINTS]) == ["10.244.2.6", "10.244.2.7"]
        (plane.config / "more.yaml").unlink()
        told = {answer.type_url: answer for answer in [await one.read(), await one.read()]}
        assert list(told[TypeUrl.ADDRESS].removed_resources) == ["Kubernetes//Pod/default/reviews-v2-1"]


async def test_broken_manifests_change_nothing_and_are_said_with_file_and_line(plane: ControlPlane) -> None:
    good = virtual_service("reviews", "hosts: [reviews]\nhttp: [{route: [{destination: {host: reviews, subset: v1}}]}]")
    async with stream(plane) as one:
        await one.read()
        await one.ask(TypeUrl.ROUTE, f"{HOST}:9080")
        plane.apply("vs.yaml", good)
        assert b"outbound|9080|v1|" in (await one.read()).resources[0].resource.value
        plane.apply("vs.yaml", good.replace("http:", "fault: {}\n  http:"))
        plane.apply("wild.yaml", "a: [b\n---\nkind: Nonsense\napiVersion: v1\nmetadata: {name: x}\n")
        problems = until(
            lambda: [f"{item['file']}:{item['line']}: {item['message']}" for item in plane.debug("problems")["problems"]],
            "the problems are told",
        )
        until(lambda: len(plane.debug("problems")["problems"]) == 3, "all three are told")
        problems = [
            f"{Path(item['file']).name}:{item['line']}: {item['severity']}: {item['message']}"
            for item in plane.debug("problems")["problems"]
        ]
        assert problems[0].startswith("vs.yaml:8: error: unknown field spec.fault")
        assert [text.split(": ")[0] for text in problems[1:]] == ["wild.yaml:2", "wild.yaml:3"]
        assert plane.debug("problems")["problems"][0]["hint"].endswith("the last good version stays in force")
        (plane.config / "wild.yaml").unlink()
        plane.apply("vs.yaml", good.replace("v1}", "v2}"))  # the next thing the client hears of: nothing came in between
        assert b"outbound|9080|v2|" in (await one.read()).resources[0].resource.value
        until(lambda: plane.debug("problems")["problems"] == [], "no problem is left")
        (plane.config / "vs.yaml").unlink()
        await one.read()


async def test_a_rejection_is_shown_with_the_agents_words_and_counted(plane: ControlPlane) -> None:
    async with stream(plane, "rejecting") as one:
        await one.read()
        await one.write(type_url=TypeUrl.ENDPOINTS, resource_names_subscribe=[f"outbound|9080||{HOST}"])
        await one.read(error="outbound|9080: not for me")

        def shown() -> dict[str, Any] | None:
            types = next(client["types"] for client in plane.debug("syncz")["clients"] if client["node"] == "rejecting")
            found: dict[str, Any] | None = types.get("envoy.config.endpoint.v3.ClusterLoadAssignment")
            return found if found and found["status"] == "NACKED" else None

        found = until(shown, "the rejection is shown")
        assert (found["error"], found["rejects"], found["names"]) == ("outbound|9080: not for me", 1, 1)
        assert any(line.get("reason") == "outbound|9080: not for me" and line["node"] == "rejecting" for line in plane.lines())
        assert samples(plane)["pilot_total_xds_rejects", "eds"] >= 1


def samples(plane: ControlPlane) -> dict[tuple[str, str], float]:
    return {
        (one.name, one.labels.get("type", one.labels.get("severity", ""))): one.value
        for family in text_string_to_metric_families(plane.get("/metrics")[1])
        for one in family.samples
    }


async def test_metrics_and_pages_say_what_is_there(plane: ControlPlane) -> None:
    async with stream(plane, "seen") as one:
        await one.read()
        await one.ask(TypeUrl.CLUSTER, f"outbound|9080||{HOST}")
        found = samples(plane)
        assert (found["pilot_services", ""], found["pilot_virt_services", ""], found["narrows_pods", ""]) == (1, 0, 2)
        assert found["pilot_xds", ""] >= 1 and found["pilot_xds_pushes", "wds"] >= 1 and found["pilot_xds_pushes", "cds"] >= 1
        assert plane.get("/ready") == (200, "ready\n")
        assert plane.debug("registryz")["services"][0]["hostname"] == HOST
        assert [item["subsets"] for item in plane.debug("configz")["objects"] if item["kind"] == "DestinationRule"] == [["v1", "v2"]]
        assert "seen" in [item["node"] for item in plane.debug("connections")["connections"]]
        kinds = {item["type"] for item in plane.debug("resources?type=cds")["resources"]}
        assert kinds == {"cds"} and plane.get("/debug/resources?type=x")[0] == 400


def test_its_sockets_are_their_owners_alone(plane: ControlPlane) -> None:
    for path in (plane.socket, plane.admin):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_ISSOCK(path.stat().st_mode)


def test_it_ends_with_zero_when_told_and_takes_its_sockets_along(tmp_path: Path) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        with control_plane(tmp_path, REVIEWS) as plane:
            assert plane.end(number) == 0
        assert not plane.socket.exists() and not plane.admin.exists()


async def test_a_client_is_told_that_it_ends_and_after_a_restart_gets_only_what_differs(tmp_path: Path) -> None:
    with control_plane(tmp_path, REVIEWS) as plane:
        async with stream(plane) as one:
            held = {found.name: found.version for found in (await one.read()).resources}
            ending = asyncio.create_task(asyncio.to_thread(plane.end))
            with pytest.raises(grpc.aio.AioRpcError, match="the control plane ends; connect again") as told:
                await one.read()
            assert told.value.code() is grpc.StatusCode.UNAVAILABLE and await ending == 0
        plane.apply("all.yaml", REVIEWS.replace("version: v2", "version: v3", 1))
        await asyncio.to_thread(plane.start)
        async with stream(plane, held=held) as one:
            assert [found.name for found in (await one.read()).resources] == ["Kubernetes//Pod/default/reviews-v2-0"]


def test_sockets_of_one_that_was_killed_are_taken_over_and_those_of_a_living_one_are_not(tmp_path: Path) -> None:
    with control_plane(tmp_path, REVIEWS) as plane:
        assert plane.end(signal.SIGKILL) == -signal.SIGKILL and plane.socket.exists()
        plane.start()
        second = subprocess.run(
            [*START, "control-plane", "--config", str(plane.config), "--listen", f"unix:{plane.socket}"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert second.returncode == 69 and f"another process serves {plane.socket}" in second.stderr
        assert plane.get("/ready")[0] == 200


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--config", "/nowhere", "--listen", "unix:{tmp}/x"], 69, "--config /nowhere is not there"),
        (["--config", "{tmp}", "--listen", "nonsense"], 64, "unix:PATH or HOST:PORT is expected"),
        (["--config", "{tmp}", "--listen", "unix:{tmp}/x", "--admin", "127.0.0.1:1"], 64, "unix:PATH is expected"),
        (["--config", "{tmp}", "--listen", "unix:{tmp}/gone/x"], 69, "is no folder"),
        (["--config", "{tmp}", "--listen", "unix:{tmp}/file"], 69, "is there and is no socket"),
        (["--config", "{tmp}", "--listen", "127.0.0.1:{port}"], 64, "a port is served with TLS only"),
        (["--config", "{tmp}", "--listen", "127.0.0.1:{port}", *AUTHORITY], 69, "cannot listen at 127.0.0.1:{port}"),
        (["--config", "{tmp}", "--listen", "unix:{tmp}/x", "--node-tokens", "{tmp}/t"], 64, "is of no use without a certificate authority"),
        (["--config", "{tmp}", "--listen", "unix:{tmp}/x", "--ca-dir", "{tmp}/ca"], 64, "a certificate authority needs --node-tokens"),
        (["--config", "{tmp}", "--listen", "unix:{tmp}/x", "--ca-cert", "{tmp}/c"], 64, "--ca-cert needs --ca-key, --ca-root too"),
        (["--config", "{tmp}", "--listen", "unix:{tmp}/x", *AUTHORITY, "--ca-key", "{tmp}/k"], 64, "are two authorities"),
        (["--config", "{tmp}", "--listen", "unix:{tmp}/x", *AUTHORITY, "--trust-domain", "A B"], 64, "'A B' is no trust domain"),
        (["--config", "{tmp}", "--listen", "unix:{tmp}/x", *AUTHORITY, "--server-name", "a:1"], 64, "'a:1'; a host name or an address"),
        (["--config", "{tmp}", "--listen", "unix:{tmp}/x", *AUTHORITY, "--certificate-lifetime", "2161"], 64, "0<x<=2160"),
        (["--config", "{tmp}", "--listen", "unix:{tmp}/x", "--ca-dir", "{tmp}/ca", "--node-tokens", "{tmp}/file"], 69, "is open to others"),
        (["--config", "{tmp}", "--listen", "unix:{tmp}/x", "--ca-dir", "{tmp}/file", "--node-tokens", "{tmp}/t"], 69, "file is no folder"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(tmp_path: Path, arguments: list[str], code: int, said: str) -> None:
    (tmp_path / "file").write_text("")
    token_file(tmp_path / "t")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        fill = {"tmp": str(tmp_path), "port": str(taken.getsockname()[1])}
        done = subprocess.run(
            [*START, "control-plane", *(one.format(**fill) for one in arguments)], capture_output=True, text=True, timeout=60, check=False
        )
    assert done.returncode == code and said.format(**fill) in done.stderr, done.stderr


# -- narrows validate -----------------------------------------------------------------------------------------------


def validate(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*START, "validate", *arguments], capture_output=True, text=True, timeout=60, check=False)


def test_validate_accepts_what_would_be_applied(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(REVIEWS)
    done = validate(str(tmp_path))
    assert (done.returncode, done.stdout) == (0, "") and "4 objects, 0 errors, 0 warnings" in done.stderr


def test_validate_says_file_line_object_and_what_to_do_and_ends_with_65(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        service("a", ip="10.96.0.1")
        + service("b", ip="10.96.0.1")
        + virtual_service("vs", "hosts: [a]\nhttp: [{mirror: {}, route: [{destination: {host: a}}]}]")
    )
    done = validate(str(tmp_path / "a.yaml"))
    assert done.returncode == 65
    assert done.stdout.splitlines() == [
        f"{tmp_path}/a.yaml:11: Service default/b: its address 10.96.0.1 is already that of Service default/a ({tmp_path}/a.yaml:5); it is "
        "not in force; give one of them another address",
        f"{tmp_path}/a.yaml:20: VirtualService default/vs: spec.http[0].mirror is not supported yet; remove it",
    ]
    told = json.loads(validate(str(tmp_path / "a.yaml"), "-o", "json").stdout)
    assert (told["objects"], told["errors"], told["warnings"]) == (2, 2, 0)
    assert told["problems"][1] == {
        "severity": "error",
        "file": f"{tmp_path}/a.yaml",
        "line": 20,
        "object": "VirtualService default/vs",
        "message": "spec.http[0].mirror is not supported yet",
        "hint": "remove it",
    }


def test_validate_lets_warnings_pass_and_a_missing_file_not(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(virtual_service("vs", "hosts: [gone]\nhttp: [{route: [{destination: {host: gone}}]}]"))
    done = validate(str(tmp_path / "a.yaml"))
    assert done.returncode == 0 and "warning: VirtualService default/vs: names the host gone.default.svc.cluster.local" in done.stdout
    assert validate(str(tmp_path / "b.yaml")).returncode == 65
