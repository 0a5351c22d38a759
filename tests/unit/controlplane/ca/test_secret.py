"""The authority in a Secret: who makes it, who reads it, what wins, and what becomes of it when the Secret or the API server goes."""
from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
from click.testing import CliRunner

from controlplane.ca.authority import Authority
from controlplane.ca.material import Material, MaterialError
from controlplane.ca.secret import SecretStore
from controlplane.ca.store import StoreError
from controlplane.cli import command
from protos.kubernetes.client import Client
from protos.kubernetes.errors import Unavailable
from protos.kubernetes.resources import SECRETS
from tests.support.authority import Pair, authority, bearer, openssl_accepts, token_file
from tests.support.cluster import kubeconfig, put
from tests.support.controlplane import ControlPlane
from tests.support.kubernetes.server import ApiServer
from tests.support.manifests import REVIEWS
from tests.support.mesh_client import channel, create
from tests.support.wait import until_async

SPACE, NAME = "kube-system", "istio-ca-secret"
NOW = datetime.now(UTC)


def write(server: ApiServer, name: str, data: Mapping[str, bytes]) -> None:
    served = server.store.served["", "v1", "secrets"]
    server.store.apply(served, SPACE, name, {"apiVersion": "v1", "kind": "Secret", "metadata": {}, "data": {
        key: base64.b64encode(value).decode() for key, value in data.items()}}, "test", force=True)


def delete(server: ApiServer, name: str) -> None:
    server.store.delete(server.store.served["", "v1", "secrets"], SPACE, name)


def files(one: Pair, root: Pair | None = None) -> dict[str, bytes]:
    return {"ca-cert.pem": one.pem, "ca-key.pem": one.key_pem, "root-cert.pem": (root or one).pem, "cert-chain.pem": one.pem}


async def started(client: Client, name: str = NAME) -> SecretStore:
    one = SecretStore(SPACE, name)
    await one.open(client, "cluster.local", NOW)
    return one


def material(one: SecretStore) -> Material:
    return one.read(datetime.now(UTC))


async def test_of_many_first_starts_one_makes_the_root_and_all_sign_with_it(server: ApiServer, client: Client) -> None:
    server.chaos.add("create", "secrets", seconds=0.3)  # all have seen that there is none by then
    stores = [SecretStore(SPACE, NAME) for _ in range(5)]
    made = await asyncio.gather(*(one.open(client, "prod.example", NOW) for one in stores))
    assert sorted(made) == [False] * 4 + [True] and len(server.asked("create", "secrets")) == 5
    assert len({material(one).certificate for one in stores}) == 1
    kept = await client.get(SECRETS, NAME, SPACE)
    assert kept["type"] == "istio.io/ca-root" and {"ca-cert.pem", "ca-key.pem"} <= kept["data"].keys()
    assert material(await started(client)).certificate == material(stores[0]).certificate  # the next start
    assert server.asked("create", "secrets")[5:] == []


async def test_a_plugged_in_secret_wins_but_not_over_one_that_signs_already(server: ApiServer, client: Client) -> None:
    own = await started(client)
    root = authority("root")
    between = authority("between", root)
    write(server, "cacerts", files(between, root))
    await own.look(client)
    assert own.where == f"the Secret {SPACE}/{NAME}" and material(own).certificate != between.certificate
    fresh = await started(client)
    assert fresh.where == f"the Secret {SPACE}/cacerts" and material(fresh).certificate == between.certificate
    assert material(fresh).roots == (root.certificate,) and len(material(fresh).above_pem) == 2
    delete(server, NAME)
    assert material(await started(client)).certificate == between.certificate and len(server.asked("create", "secrets")) == 1


async def test_a_change_is_followed_and_what_cannot_be_used_changes_nothing(server: ApiServer, client: Client) -> None:
    store = await started(client)
    one = Authority(store)
    before, second = one.material.certificate, authority("second")
    write(server, NAME, {"ca-key.pem": second.key_pem})  # of another than the certificate
    await store.look(client)
    assert not one.refresh() and "is not that of the authority's certificate" in one.problem and one.material.certificate == before
    write(server, NAME, {"ca-key.pem": b"", "ca-cert.pem": b""})
    await store.look(client)
    assert not one.refresh() and "has no ca-cert.pem and no ca-key.pem" in one.problem
    write(server, NAME, files(second))
    server.chaos.add("get", "secrets", code=503, reason="ServiceUnavailable", times=2)
    await store.look(client)
    await store.look(client)
    assert not one.refresh() and one.material.certificate == before  # as long as nobody answers
    await store.look(client)
    assert one.refresh() and one.problem == "" and one.material.certificate == second.certificate
    delete(server, NAME)
    await store.look(client)
    assert not one.refresh() and "was deleted; put it back" in one.problem and one.material.certificate == second.certificate
    write(server, NAME, files(second))
    await store.look(client)
    assert not one.refresh() and one.problem == ""


async def test_a_secret_that_holds_no_authority_is_refused_at_the_start_without_showing_its_key(server: ApiServer, client: Client) -> None:
    pair, other = authority("one"), authority("other")
    for data, error, said in (({"ca-cert.pem": pair.pem}, StoreError, "has no ca-key.pem"),
                              ({**files(pair), "ca-key.pem": other.key_pem}, MaterialError, "is not that of"),
                              ({**files(pair), "ca-key.pem": b"secret " + pair.key_pem[40:]}, MaterialError, "cannot be read")):
        write(server, NAME, data)
        with pytest.raises(error) as told:
            material(await started(client))
        assert said in str(told.value) and not any(line in str(told.value) for line in pair.key_pem.decode().splitlines())
        delete(server, NAME)
    served = server.store.served["", "v1", "secrets"]
    server.store.create(served, SPACE, {"metadata": {"name": NAME}, "data": {"ca-key.pem": "?", "ca-cert.pem": "?"}}, "test")
    with pytest.raises(StoreError, match="is no base64"):
        await started(client)


async def test_without_an_answer_nothing_is_made(server: ApiServer, client: Client) -> None:
    server.chaos.add("get", "secrets", code=503, reason="ServiceUnavailable")
    with pytest.raises(Unavailable):
        await started(client)
    assert not server.asked("create", "secrets")


async def test_two_control_planes_sign_with_one_root_across_restarts_and_wait_for_the_api_server(server: ApiServer, tmp_path: Path) -> None:
    put(server, REVIEWS)
    refusing = server.chaos.add("get", "secrets", code=503, reason="ServiceUnavailable")
    folders = [tmp_path / "a", tmp_path / "b"]

    def options(folder: Path) -> list[str]:
        folder.mkdir()
        token_file(folder / "tokens")
        return ["--kubeconfig", str(kubeconfig(server, folder)), "--ca-secret", f"{SPACE}/{NAME}", "--node-tokens", str(folder / "tokens"),
                "--audit-log", str(folder / "audit.log")]

    planes = [ControlPlane(folder, more=options(folder)) for folder in folders]
    with processes(planes):
        starting = asyncio.create_task(asyncio.to_thread(planes[0].start))
        await until_async(lambda: "the authority's Secret cannot be had yet" in logged(planes[0]), "it says why it waits", timeout=60)
        server.chaos.stop(refusing)
        await starting
        await asyncio.to_thread(planes[1].start)
        chains = [await certificate(one) for one in planes]
        assert chains[0][-1] == chains[1][-1] and all(openssl_accepts(tmp_path, chain) for chain in chains)
        await asyncio.to_thread(planes[1].end)
        await asyncio.to_thread(planes[1].start)
        assert (await certificate(planes[1]))[-1] == chains[0][-1]
        assert planes[1].debug("ca")["where"] == f"the Secret {SPACE}/{NAME}"
    kept = server.store.get(server.store.served["", "v1", "secrets"], SPACE, NAME)["data"]["ca-key.pem"]
    for folder in folders:
        text = (folder / "log").read_text() + (folder / "audit.log").read_text()
        assert "PRIVATE" not in text and kept[60:100] not in text


async def certificate(plane: ControlPlane) -> list[str]:
    async with channel(plane, tls=False) as asked:
        return await create(asked, metadata=bearer("n1"))


def logged(plane: ControlPlane) -> str:
    return plane.log.read_text() if plane.log.exists() else ""


@contextmanager
def processes(planes: list[ControlPlane]) -> Iterator[None]:
    """Gone after the body."""
    try:
        yield
    finally:
        for one in planes:
            if one.process is not None and one.process.poll() is None:
                one.process.kill()
                one.process.wait(10)


@pytest.mark.parametrize(("options", "said"), [
    (["--ca-dir", "x"], "--ca-secret and --ca-dir are two authorities"), ([], "is in an API server"),
    (["--kubeconfig", "{kube}", "--node-tokens", "x"], "--ca-secret needs --audit-log FILE")])
def test_options_that_do_not_fit_are_told(server: ApiServer, tmp_path: Path, options: list[str], said: str) -> None:
    given = [one.format(kube=kubeconfig(server, tmp_path)) for one in options]
    done = CliRunner().invoke(command, ["--config", str(tmp_path), "--listen", "unix:/none", "--ca-secret", "a/b", *given])
    assert done.exit_code == 2 and said in done.output, done.output
