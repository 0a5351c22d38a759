"""What we rely on of an API server. Our own is held to it always; a real one when NARROWS_TEST_APISERVER names it.

The variable is `built` for the one of `make test-kubernetes`, or the path of an administrator's kubeconfig. A server of one's own needs
Istio's CRDs with the status subresource, and, for the Pod, no ServiceAccount admission (`--disable-admission-plugins=ServiceAccount`); what
it has forgotten is not tried on it.
"""
from __future__ import annotations

import asyncio
import json
import os
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from protos.kubernetes.client import Client
from protos.kubernetes.configuration import Configuration, kubeconfig
from protos.kubernetes.errors import AlreadyExists, ApiError, BadRequest, Conflict, Gone, NotFound, NotServed
from protos.kubernetes.objects import Head, Key
from protos.kubernetes.resources import CONFIG_MAPS, LEASES, NAMESPACES, PODS, SERVICE_ACCOUNTS, VIRTUAL_SERVICES, Resource
from protos.kubernetes.stream import Bookmark, Changed, Failed, Stream
from tests.support.kubernetes.crds import install
from tests.support.kubernetes.real import Cluster
from tests.support.kubernetes.server import ApiServer

REAL = os.environ.get("NARROWS_TEST_APISERVER", "")
Object = dict[str, Any]


@dataclass(frozen=True)
class Server:
    configuration: Configuration
    forget: Callable[[], None] | None  # its history


@pytest.fixture(scope="module")
def real() -> Iterator[Server]:
    if REAL != "built":
        yield Server(kubeconfig(Path(REAL)), None)
        return
    with Cluster() as cluster:
        install(cluster)
        yield Server(cluster.configuration(), cluster.forget)


@pytest.fixture(params=["ours", *(["real"] if REAL else [])])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    if request.param == "real":
        yield request.getfixturevalue("real")
        return
    with ApiServer() as one:
        yield Server(one.configuration(), one.store.compact)


@pytest.fixture
def forget(server: Server) -> Callable[[], None]:
    if server.forget is None:
        pytest.skip("nobody tells somebody else's server to forget")
    return server.forget


@pytest.fixture
async def client(server: Server) -> AsyncIterator[Client]:
    async with Client(server.configuration, "contract/1") as one:
        yield one


@pytest.fixture
async def namespace(client: Client) -> AsyncIterator[str]:
    name = f"t{uuid.uuid4().hex[:12]}"
    await client.create(NAMESPACES, {"metadata": {"name": name}})
    yield name
    await client.delete(NAMESPACES, name)


def config_map(name: str, namespace: str, labels: dict[str, str] | None = None, **data: str) -> Object:
    return {"metadata": {"name": name, "namespace": namespace, "labels": labels or {}}, "data": data}


def virtual_service(name: str, namespace: str, *hosts: str) -> Object:
    route = {"route": [{"destination": {"host": "reviews"}}]}
    return {"apiVersion": VIRTUAL_SERVICES.api_version, "kind": "VirtualService", "metadata": {"name": name, "namespace": namespace},
            "spec": {"hosts": list(hosts) or ["reviews"], "http": [route]}}


def version(one: Object) -> int:
    return int(one["metadata"]["resourceVersion"])


async def watch(client: Client, resource: Resource, namespace: str, since: str, count: int, **selectors: str) -> list[tuple[str, Object]]:
    """The next `count` changes: ("put" or "delete", object)."""
    found: list[tuple[str, Object]] = []
    async with client.watch(resource, namespace, resource_version=since, seconds=30, **selectors) as watching:
        stream = Stream(watching.path, dict)
        while len(found) < count:
            data = await watching.read()
            assert data, f"the watch ended after {found}"
            for event in stream.feed(data):
                if isinstance(event, Failed):
                    raise event.error
                if isinstance(event, Changed):
                    assert event.item.value is not None
                    found.append(("delete" if event.deleted else "put", event.item.value))
    return found


async def test_an_object_that_was_made_has_a_uid_and_a_version(client: Client, namespace: str) -> None:
    made = await client.create(CONFIG_MAPS, config_map("x", namespace, a="1"), namespace)
    meta = made["metadata"]
    assert meta["uid"] and version(made) > 0 and meta["creationTimestamp"].endswith("Z") and made["kind"] == "ConfigMap"
    assert await client.get(CONFIG_MAPS, "x", namespace) == made
    assert (await client.get(CONFIG_MAPS, "x", namespace, Head)).metadata.uid == meta["uid"]


async def test_what_is_there_already_or_not_at_all_is_told_apart(client: Client, namespace: str) -> None:
    await client.create(CONFIG_MAPS, config_map("x", namespace), namespace)
    with pytest.raises(AlreadyExists, match="already exists"):
        await client.create(CONFIG_MAPS, config_map("x", namespace), namespace)
    for action in (client.get(CONFIG_MAPS, "y", namespace), client.delete(CONFIG_MAPS, "y", namespace),
                   client.merge(CONFIG_MAPS, "y", namespace, {}), client.update(CONFIG_MAPS, config_map("y", namespace))):
        with pytest.raises(NotFound, match='configmaps "y" not found') as error:
            await action
        assert not isinstance(error.value, NotServed)
    for absent in (Resource("none.example", "v1", "things", "Thing"), Resource("coordination.k8s.io", "v9", "leases", "Lease"),
                   Resource("coordination.k8s.io", "v1", "things", "Thing"), Resource("networking.istio.io", "v9", "virtualservices", "V"),
                   Resource("networking.istio.io", "v1", "things", "Thing"), Resource("", "v1", "things", "Thing")):
        with pytest.raises(NotServed):
            await client.list(absent, namespace)
        assert not await client.serves(absent)
    for there in (CONFIG_MAPS, VIRTUAL_SERVICES, LEASES):
        assert await client.serves(there)
    with pytest.raises(NotFound, match="namespaces"):
        await client.create(CONFIG_MAPS, config_map("x", "nowhere-at-all"), "nowhere-at-all")


@pytest.mark.parametrize("name", ["", "Upper", "a_b", "-a", "a" * 254])
async def test_a_name_that_cannot_be_is_refused(client: Client, namespace: str, name: str) -> None:
    with pytest.raises(BadRequest):
        await client.create(CONFIG_MAPS, config_map(name, namespace), namespace)


async def test_an_object_for_another_path_is_refused(client: Client, namespace: str) -> None:
    with pytest.raises(BadRequest):
        await client.create(CONFIG_MAPS, config_map("x", "default"), namespace)
    with pytest.raises(BadRequest):
        await client.create(CONFIG_MAPS, {**config_map("x", namespace), "kind": "Secret", "apiVersion": "v1"}, namespace)


async def test_items_of_typed_lists_have_no_kind_and_custom_ones_have(client: Client, namespace: str) -> None:
    await client.create(CONFIG_MAPS, config_map("x", namespace), namespace)
    await client.create(VIRTUAL_SERVICES, virtual_service("x", namespace), namespace)
    (typed,) = [one.value for one in (await client.list(CONFIG_MAPS, namespace, labels="!none", fields="metadata.name=x")).items]
    (custom,) = [one.value for one in (await client.list(VIRTUAL_SERVICES, namespace)).items]
    assert typed is not None and "kind" not in typed and "apiVersion" not in typed
    assert custom is not None and (custom["kind"], custom["apiVersion"]) == ("VirtualService", "networking.istio.io/v1")


async def test_pages_are_one_snapshot_in_order(client: Client, namespace: str) -> None:
    for name in ("c", "a", "b"):
        await client.create(CONFIG_MAPS, config_map(name, namespace, {"t": "1"}), namespace)
    first = await client.page(CONFIG_MAPS, namespace, limit=2, labels="t=1")
    assert [one.key for one in first.items] == [Key(namespace, "a"), Key(namespace, "b")] and first.continue_
    await client.create(CONFIG_MAPS, config_map("d", namespace, {"t": "1"}), namespace)
    await client.delete(CONFIG_MAPS, "c", namespace)
    second = await client.page(CONFIG_MAPS, namespace, limit=2, labels="t=1", continue_=first.continue_)
    assert [one.key for one in second.items] == [Key(namespace, "c")] and not second.continue_
    assert second.resource_version == first.resource_version
    now = await client.list(CONFIG_MAPS, namespace, limit=1, labels="t=1")
    assert [one.key.name for one in now.items if one.key] == ["a", "b", "d"] and int(now.resource_version) > int(first.resource_version)
    with pytest.raises(BadRequest):
        await client.page(CONFIG_MAPS, namespace, continue_="nonsense")


@pytest.mark.parametrize(("selector", "names"), [
    ("", "abc"), ("app=x", "ab"), ("app==x,tier!=1", "b"), ("app in (x, y)", "abc"), ("app notin (x)", "c"), ("tier", "a"), ("!tier", "bc"),
    ("tier notin (1)", "bc"), ("app!=x", "c"), ("app=none", "")])
async def test_labels_select(client: Client, namespace: str, selector: str, names: str) -> None:
    for name, labels in (("a", {"app": "x", "tier": "1"}), ("b", {"app": "x"}), ("c", {"app": "y"})):
        await client.create(VIRTUAL_SERVICES, {**virtual_service(name, namespace), "metadata": {"name": name, "labels": labels}}, namespace)
    found = await client.list(VIRTUAL_SERVICES, namespace, labels=selector)
    assert "".join(one.key.name for one in found.items if one.key) == names


async def test_a_selector_that_is_none_is_refused(client: Client, namespace: str) -> None:
    for labels, fields in (("a=(", ""), ("a in x", ""), ("", "spec.never=1"), ("", "nonsense")):
        with pytest.raises(BadRequest):
            await client.list(CONFIG_MAPS, namespace, labels=labels, fields=fields)


async def test_fields_select_the_pods_of_a_node(client: Client, namespace: str) -> None:
    for name, node in (("a", "n1"), ("b", "n2")):
        spec = {"nodeName": node, "containers": [{"name": "c", "image": "i"}]}
        await client.create(PODS, {"metadata": {"name": name}, "spec": spec}, namespace)
    found = await client.list(PODS, namespace, fields="spec.nodeName=n1")
    assert [one.key for one in found.items] == [Key(namespace, "a")]
    for name in "ab":
        await client.delete(PODS, name, namespace, grace_seconds=0)


async def test_who_updates_an_old_version_is_refused(client: Client, namespace: str) -> None:
    first = await client.create(CONFIG_MAPS, config_map("x", namespace, a="1"), namespace)
    second = await client.update(CONFIG_MAPS, {**first, "data": {"a": "2"}})
    assert version(second) > version(first) and second["metadata"]["uid"] == first["metadata"]["uid"]
    with pytest.raises(Conflict, match="has been modified") as error:
        await client.update(CONFIG_MAPS, {**first, "data": {"a": "3"}})
    assert not isinstance(error.value, AlreadyExists)
    with pytest.raises(Conflict):
        await client.merge(CONFIG_MAPS, "x", namespace, {"metadata": {"resourceVersion": str(version(first))}, "data": {"a": "3"}})
    assert (await client.get(CONFIG_MAPS, "x", namespace))["data"] == {"a": "2"}


async def test_a_custom_object_cannot_be_replaced_blindly(client: Client, namespace: str) -> None:
    await client.create(VIRTUAL_SERVICES, virtual_service("x", namespace), namespace)
    with pytest.raises(BadRequest, match="must be specified for an update"):
        await client.update(VIRTUAL_SERVICES, virtual_service("x", namespace, "ratings"))


async def test_writing_what_is_there_changes_nothing(client: Client, namespace: str) -> None:
    first = await client.create(CONFIG_MAPS, config_map("x", namespace, a="1"), namespace)
    assert version(await client.update(CONFIG_MAPS, first)) == version(first)
    assert version(await client.merge(CONFIG_MAPS, "x", namespace, {"data": {"a": "1", "none": None}})) == version(first)


async def test_a_merge_patch_changes_what_it_names_and_null_removes(client: Client, namespace: str) -> None:
    await client.create(CONFIG_MAPS, config_map("x", namespace, {"keep": "1", "drop": "1"}, a="1", b="2"), namespace)
    patched = await client.merge(CONFIG_MAPS, "x", namespace, {"metadata": {"labels": {"drop": None}}, "data": {"b": "3", "c": "4"}})
    assert patched["data"] == {"a": "1", "b": "3", "c": "4"} and patched["metadata"]["labels"] == {"keep": "1"}


async def test_apply_makes_owns_and_takes_back(client: Client, namespace: str) -> None:
    made = await client.apply(CONFIG_MAPS, config_map("x", namespace, a="1", b="2"), manager="one")
    assert made["data"] == {"a": "1", "b": "2"}
    again = await client.apply(CONFIG_MAPS, config_map("x", namespace, a="1", b="2"), manager="one")
    assert version(again) == version(made)
    await client.apply(CONFIG_MAPS, config_map("x", namespace, c="3"), manager="two")
    after = await client.apply(CONFIG_MAPS, config_map("x", namespace, b="5"), manager="one")
    assert after["data"] == {"b": "5", "c": "3"}
    who = {(one["manager"], one["operation"]) for one in after["metadata"]["managedFields"]}
    assert who == {("one", "Apply"), ("two", "Apply")}


async def test_apply_over_what_is_another_managers_needs_force(client: Client, namespace: str) -> None:
    await client.apply(CONFIG_MAPS, config_map("x", namespace, a="1"), manager="one")
    with pytest.raises(Conflict, match=r'conflict with "one".*data\.a'):
        await client.apply(CONFIG_MAPS, config_map("x", namespace, a="2"), manager="two")
    await client.apply(CONFIG_MAPS, config_map("x", namespace, a="1"), manager="two")  # the same value is shared
    with pytest.raises(Conflict):
        await client.apply(CONFIG_MAPS, config_map("x", namespace, a="2"), manager="two")
    assert (await client.apply(CONFIG_MAPS, config_map("x", namespace, a="2"), manager="two", force=True))["data"] == {"a": "2"}
    after = await client.apply(CONFIG_MAPS, config_map("x", namespace), manager="one")  # its field is not its any more
    assert after["data"] == {"a": "2"}


async def test_who_updates_a_field_owns_it(client: Client, namespace: str) -> None:
    made = await client.apply(CONFIG_MAPS, config_map("x", namespace, a="1"), manager="one")
    await client.update(CONFIG_MAPS, {**made, "data": {"a": "2"}})
    with pytest.raises(Conflict, match="contract"):
        await client.apply(CONFIG_MAPS, config_map("x", namespace, a="1"), manager="one")


async def test_an_annotation_is_applied_without_touching_others(client: Client, namespace: str) -> None:
    """As the agent tells a pod's outcome."""
    await client.create(CONFIG_MAPS, {"metadata": {"name": "x", "annotations": {"user": "1"}}, "data": {"a": "1"}}, namespace)
    status = {"metadata": {"name": "x", "namespace": namespace, "annotations": {"narrows.mesh/status": "captured"}}}
    after = await client.apply(CONFIG_MAPS, status, manager="narrows-agent", force=True)
    assert after["metadata"]["annotations"] == {"user": "1", "narrows.mesh/status": "captured"} and after["data"] == {"a": "1"}
    status["metadata"].pop("annotations")
    after = await client.apply(CONFIG_MAPS, status, manager="narrows-agent")
    assert after["metadata"]["annotations"] == {"user": "1"}


async def test_a_status_is_written_by_its_own_door(client: Client, namespace: str) -> None:
    made = await client.create(VIRTUAL_SERVICES, {**virtual_service("x", namespace), "status": {"conditions": []}}, namespace)
    assert "status" not in made and made["metadata"]["generation"] == 1
    told = await client.update(VIRTUAL_SERVICES, {**made, "spec": {"hosts": ["other"]}, "status": {"observedGeneration": 1}},
                               subresource="status")
    assert told["status"] == {"observedGeneration": 1} and told["spec"] == made["spec"] and told["metadata"]["generation"] == 1
    body = {"metadata": {"name": "x", "namespace": namespace}, "status": {"validationMessages": []}}
    told = await client.apply(VIRTUAL_SERVICES, body, manager="narrows", subresource="status")
    assert told["status"] == {"observedGeneration": 1, "validationMessages": []}
    told = await client.merge(VIRTUAL_SERVICES, "x", namespace, {"spec": {"hosts": ["ratings"]}, "status": {"observedGeneration": 7}})
    assert told["status"]["observedGeneration"] == 1 and told["spec"]["hosts"] == ["ratings"] and told["metadata"]["generation"] == 2


async def test_only_the_very_object_is_deleted(client: Client, namespace: str) -> None:
    made = await client.create(CONFIG_MAPS, config_map("x", namespace), namespace)
    with pytest.raises(Conflict):
        await client.delete(CONFIG_MAPS, "x", namespace, uid=str(uuid.uuid4()))
    with pytest.raises(Conflict):
        await client.delete(CONFIG_MAPS, "x", namespace, resource_version="1")
    await client.delete(CONFIG_MAPS, "x", namespace, uid=made["metadata"]["uid"], resource_version=made["metadata"]["resourceVersion"])
    with pytest.raises(NotFound):
        await client.get(CONFIG_MAPS, "x", namespace)


async def test_annotations_of_a_pod_may_be_written_by_its_status_which_changes_nothing_that_it_runs(client: Client, namespace: str) -> None:
    spec = {"nodeName": "n1", "containers": [{"name": "c", "image": "before"}]}
    made = await client.create(PODS, {"metadata": {"name": "x"}, "spec": spec}, namespace)
    told = {"metadata": {"uid": made["metadata"]["uid"], "annotations": {"narrows.mesh/status": "{}"}},
            "spec": {"containers": [{"name": "c", "image": "after"}]}}
    await client.merge(PODS, "x", namespace, told, subresource="status")
    found = await client.get(PODS, "x", namespace)
    assert found["metadata"]["annotations"]["narrows.mesh/status"] == "{}"
    assert found["spec"]["containers"][0]["image"] == "before"
    with pytest.raises(BadRequest, match="field is immutable"):
        await client.merge(PODS, "x", namespace, {"metadata": {"uid": str(uuid.uuid4())}}, subresource="status")
    await client.delete(PODS, "x", namespace, grace_seconds=0)


async def test_a_pod_of_a_node_is_there_until_its_kubelet_lets_it_go(client: Client, namespace: str) -> None:
    spec: Object = {"containers": [{"name": "c", "image": "i"}], "terminationGracePeriodSeconds": 20}
    made = await client.create(PODS, {"metadata": {"name": "x"}, "spec": {**spec, "nodeName": "n1"}}, namespace)
    await client.delete(PODS, "x", namespace)
    ((_, told),) = await watch(client, PODS, namespace, str(version(made)), 1)
    assert told["metadata"]["deletionTimestamp"] and told["metadata"]["deletionGracePeriodSeconds"] == 20
    assert (await client.get(PODS, "x", namespace))["metadata"]["uid"] == made["metadata"]["uid"]
    with pytest.raises(Conflict):
        await client.delete(PODS, "x", namespace, uid=str(uuid.uuid4()), grace_seconds=0)
    await client.delete(PODS, "x", namespace, uid=made["metadata"]["uid"], grace_seconds=0)
    await client.create(PODS, {"metadata": {"name": "y"}, "spec": spec}, namespace)
    await client.delete(PODS, "y", namespace)  # no node has it
    for name in "xy":
        with pytest.raises(NotFound):
            await client.get(PODS, name, namespace)


async def test_an_object_with_a_finalizer_is_there_until_it_is_taken_off(client: Client, namespace: str) -> None:
    made = await client.create(CONFIG_MAPS, {"metadata": {"name": "x", "finalizers": ["narrows.mesh/t"]}}, namespace)
    await client.delete(CONFIG_MAPS, "x", namespace)
    ending = await client.get(CONFIG_MAPS, "x", namespace)
    assert ending["metadata"]["deletionTimestamp"] and version(ending) > version(made)
    await client.merge(CONFIG_MAPS, "x", namespace, {"metadata": {"finalizers": None}})
    with pytest.raises(NotFound):
        await client.get(CONFIG_MAPS, "x", namespace)


async def test_a_watch_tells_what_follows_a_list_in_order(client: Client, namespace: str) -> None:
    await client.create(CONFIG_MAPS, config_map("before", namespace, {"t": "1"}), namespace)
    since = (await client.list(CONFIG_MAPS, namespace)).resource_version
    await client.create(CONFIG_MAPS, config_map("x", namespace, {"t": "1"}, a="1"), namespace)
    await client.merge(CONFIG_MAPS, "x", namespace, {"data": {"a": "2"}})
    await client.delete(CONFIG_MAPS, "x", namespace)
    told = await watch(client, CONFIG_MAPS, namespace, since, 3, labels="t=1")
    assert [(what, one["metadata"]["name"], one.get("data")) for what, one in told] == [
        ("put", "x", {"a": "1"}), ("put", "x", {"a": "2"}), ("delete", "x", {"a": "2"})]
    versions = [version(one) for _, one in told]
    assert versions == sorted(set(versions)) and versions[0] > int(since)
    assert all(one["kind"] == "ConfigMap" for _, one in told)
    resumed = await watch(client, CONFIG_MAPS, namespace, str(versions[0]), 2, labels="t=1")
    assert resumed == told[1:]


async def test_what_leaves_a_selector_is_deleted_for_who_watches_by_it(client: Client, namespace: str) -> None:
    since = (await client.list(CONFIG_MAPS, namespace)).resource_version
    await client.create(CONFIG_MAPS, config_map("x", namespace, {"app": "other"}), namespace)
    for app in ("mine", "other", "mine"):
        await client.merge(CONFIG_MAPS, "x", namespace, {"metadata": {"labels": {"app": app}}})
    told = await watch(client, CONFIG_MAPS, namespace, since, 3, labels="app=mine")
    assert [what for what, _ in told] == ["put", "delete", "put"]
    assert version(told[0][1]) < version(told[1][1]) < version(told[2][1])


async def test_a_watch_ends_when_it_was_asked_to(client: Client, namespace: str) -> None:
    since = (await client.list(CONFIG_MAPS, namespace)).resource_version
    async with client.watch(CONFIG_MAPS, namespace, resource_version=since, seconds=1) as watching:
        stream, data = Stream(watching.path, dict), b"-"
        while data:
            data = await watching.read()
            assert not any(isinstance(event, Failed | Changed) for event in stream.feed(data.strip(b"-")))


async def test_a_watch_from_long_ago_is_gone(client: Client, namespace: str) -> None:
    with pytest.raises(Gone) as error:
        await watch(client, VIRTUAL_SERVICES, namespace, "1", 1)  # from before their definition: also a new server remembers no more
    assert error.value.reason in ("Expired", "Gone")


async def test_a_watch_from_the_future_is_silent(client: Client, namespace: str) -> None:
    """What a server restored from a backup does to who knows more than it: hence reflectors ask where it is."""
    ahead = int((await client.list(CONFIG_MAPS, namespace)).resource_version) + 1_000_000
    async with client.watch(CONFIG_MAPS, namespace, resource_version=str(ahead), seconds=4) as watching:
        await client.create(CONFIG_MAPS, config_map("x", namespace), namespace)
        stream, told = Stream(watching.path, dict), []
        while data := await watching.read():
            told += stream.feed(data)
    assert told == []


async def test_a_token_that_is_none_is_nobodys(client: Client) -> None:
    told = await client.review_token("nonsense", ["istio-ca"])
    assert not told.authenticated and not told.user.username


async def token(client: Client, namespace: str, account: str, seconds: int, *audiences: str, pod: Object | None = None) -> str:
    spec: Object = {"audiences": list(audiences), "expirationSeconds": seconds}
    if pod is not None:
        meta = pod["metadata"]
        spec["boundObjectRef"] = {"apiVersion": "v1", "kind": "Pod", "name": meta["name"], "uid": meta["uid"]}
    body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec}
    path = SERVICE_ACCOUNTS.path(namespace, account, "token")
    return str(json.loads(await client._ask("create", "POST", path, body))["status"]["token"])


async def test_a_token_is_for_its_audience_and_says_account_and_pod(client: Client, namespace: str) -> None:
    account = await client.create(SERVICE_ACCOUNTS, {"metadata": {"name": "web"}}, namespace)
    spec = {"serviceAccountName": "web", "containers": [{"name": "c", "image": "i"}]}
    pod = await client.create(PODS, {"metadata": {"name": "web-0"}, "spec": spec}, namespace)
    one = await token(client, namespace, "web", 3600, "istio-ca", pod=pod)
    told = await client.review_token(one, ["istio-ca"])
    assert told.authenticated and told.user.username == f"system:serviceaccount:{namespace}:web" and told.audiences == ["istio-ca"]
    assert told.user.uid == account["metadata"]["uid"]
    assert set(told.user.groups or ()) == {"system:serviceaccounts", f"system:serviceaccounts:{namespace}", "system:authenticated"}
    assert told.user.extra == {"authentication.kubernetes.io/pod-name": ["web-0"],
                               "authentication.kubernetes.io/pod-uid": [pod["metadata"]["uid"]]}
    assert (await client.review_token(one, ["other", "istio-ca"])).audiences == ["istio-ca"]
    for audiences in (["other"], []):  # none: for the API server itself
        assert not (await client.review_token(one, audiences)).authenticated
    with pytest.raises(BadRequest, match="10 minutes"):
        await token(client, namespace, "web", 60, "istio-ca")
    with pytest.raises(NotFound, match='serviceaccounts "other" not found'):
        await token(client, namespace, "other", 600, "istio-ca")


async def is_refused(client: Client, one: str) -> None:
    """A real server hears of what ended a moment later, and keeps a yes for 10 s."""
    async with asyncio.timeout(60):
        while (await client.review_token(one, ["istio-ca"])).authenticated:
            await asyncio.sleep(0.2)


async def test_a_token_ends_with_its_pod_and_its_account(client: Client, namespace: str) -> None:
    await client.create(SERVICE_ACCOUNTS, {"metadata": {"name": "web"}}, namespace)
    spec = {"serviceAccountName": "web", "containers": [{"name": "c", "image": "i"}]}
    pod = await client.create(PODS, {"metadata": {"name": "web-0"}, "spec": spec}, namespace)
    bound, free = await token(client, namespace, "web", 3600, "istio-ca", pod=pod), await token(client, namespace, "web", 3601, "istio-ca")
    await client.delete(PODS, "web-0", namespace, grace_seconds=0)
    await is_refused(client, bound)
    assert (await client.review_token(free, ["istio-ca"])).authenticated
    await client.delete(SERVICE_ACCOUNTS, "web", namespace)
    await is_refused(client, free)


async def test_a_page_from_long_ago_is_gone(client: Client, namespace: str, forget: Callable[[], None]) -> None:
    for name in "ab":
        await client.create(CONFIG_MAPS, config_map(name, namespace), namespace)
    first = await client.page(CONFIG_MAPS, namespace, limit=1)
    await client.create(CONFIG_MAPS, config_map("c", namespace), namespace)
    forget()
    with pytest.raises(Gone) as error:
        await client.page(CONFIG_MAPS, namespace, limit=1, continue_=first.continue_)
    assert error.value.reason == "Expired"


async def test_a_watch_is_told_how_far_it_is_by_what_it_does_not_want(client: Client, namespace: str) -> None:
    since = (await client.list(CONFIG_MAPS, namespace)).resource_version
    async with client.watch(CONFIG_MAPS, namespace, resource_version=since, seconds=6, labels="t=1") as watching:
        other = await client.create(CONFIG_MAPS, config_map("x", namespace), namespace)
        stream, told = Stream(watching.path, dict), []
        while data := await watching.read():
            told += stream.feed(data)
    assert told and all(isinstance(one, Bookmark) for one in told), told
    assert int(told[-1].resource_version) >= version(other)


async def test_what_is_too_large_is_refused(client: Client, namespace: str) -> None:
    with pytest.raises(BadRequest, match="Too long"):
        await client.create(CONFIG_MAPS, config_map("x", namespace, a="x" * 1_100_000), namespace)
    with pytest.raises(BadRequest, match="Request entity too large"):
        await client.create(CONFIG_MAPS, config_map("x", namespace, a="x" * 3_200_000), namespace)
    with pytest.raises(ApiError, match="request is too large"):  # for what keeps it; how the server says so has changed over time
        await client.create(VIRTUAL_SERVICES, virtual_service("x", namespace, "x" * 2_000_000), namespace)


async def test_an_event_is_taken(client: Client, namespace: str) -> None:
    made = await client.tell({"apiVersion": "v1", "kind": "Pod", "name": "x", "namespace": namespace, "uid": "u"}, reason="Captured",
                             note="é" * 5_000, action="Capture", controller="narrows.mesh/agent", instance="n1", warning=True)
    assert made["reason"] == "Captured" and made["type"] == "Warning" and len(made["note"].encode()) in (1_023, 1_024)
    assert made["regarding"]["name"] == "x" and made["eventTime"].endswith("Z")
