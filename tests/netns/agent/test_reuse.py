"""An address that one pod leaves and another gets: nothing of the old pod is used for the new one."""
from __future__ import annotations

import pytest

from agent import netlink
from tests.netns.agent.conftest import CAPTURED, PORT, SERVICE, VIRTUAL, Instance
from tests.support.netns import Netns
from tests.support.wait import until

pytestmark = pytest.mark.netns
OTHER = "10.96.0.11"


def counts(instance: Instance, **labels: str) -> dict[tuple[str, str, str, str], float]:
    """Requests so far by reporter, source workload, destination workload and response code."""
    found: dict[tuple[str, str, str, str], float] = {}
    for line in instance.metrics():
        if not line.startswith("istio_requests_total{"):
            continue
        have = dict(pair.split("=", 1) for pair in line[line.index("{") + 1:line.index("}")].replace('"', "").split(",") if "=" in pair)
        key = tuple(have[name] for name in ("reporter", "source_workload", "destination_workload", "response_code"))
        assert len(key) == 4
        found[key] = found.get(key, 0) + float(line.rpartition(" ")[2])
    return found


def more(instance: Instance, before: dict[tuple[str, str, str, str], float]) -> dict[tuple[str, str, str, str], float]:
    return {key: value - before.get(key, 0) for key, value in counts(instance).items() if value != before.get(key, 0)}


def replace(instance: Instance, name: str, label: str, by: str) -> Netns:
    """The pod `name` in the namespace `label` goes, as a runtime takes it away; another one gets its address."""
    node = instance.node
    old = node.pods.pop(label)
    number = int(old.ip.rpartition(".")[2])
    old.stop()
    instance.remove_pod(name)
    netlink.delete_link(node.netns.path, f"p{number}")
    netlink.delete_namespace(old.name)
    new = node.pod(by, number)
    assert (new.ip, new.path != old.path) == (old.ip, True)
    for other in (*node.pods.values(), node.netns):  # a network plugin announces the new link-layer address
        other.run("ip", "neigh", "flush", "all", check=False)
    return new


def test_a_server_with_the_address_of_one_that_is_gone_gets_its_own_requests_and_no_others(instance: Instance) -> None:
    (instance.config / "other.yaml").write_text(SERVICE.replace("name: web", "name: other").replace("app: web", "app: other")
                                                .replace(VIRTUAL, OTHER))
    instance.up()
    for _ in range(3):  # a kept connection to the old server waits in the pool
        assert instance.get() == f"served / to {instance.client.ip} 200"
    assert "200" not in instance.get(where=f"http://{OTHER}:{PORT}/")
    until(lambda: counts(instance).get(("destination", "client", "web-0", "200")) == 3, "the old server's requests are counted")

    new = replace(instance, "web-0", "server", "another")
    instance.serve(new)
    instance.pod("other-0", new)
    assert instance.shown("other-0")["captured"]
    until(lambda: instance.get(where=f"http://{OTHER}:{PORT}/").endswith(" 200"), "the new server is known", 20)
    before = counts(instance)
    for _ in range(5):
        assert instance.get(where=f"http://{OTHER}:{PORT}/") == f"served / to {instance.client.ip} 200"
    assert "200" not in instance.get(), "the old service has no endpoint, and the new pod is none of it"
    wanted = {("source", "client", "other-0", "200"): 5, ("destination", "client", "other-0", "200"): 5}
    until(lambda: wanted.items() <= (found := more(instance, before)).items() and "web-0" not in {key[2] for key in found},
          "the new server's requests are counted as its own", 10)
    assert not [key for key in more(instance, before) if key[0] == "destination" and key != ("destination", "client", "other-0", "200")]


def test_a_client_with_the_address_of_one_that_is_gone_is_itself(instance: Instance) -> None:
    instance.up()
    for _ in range(3):
        assert instance.get() == f"served / to {instance.client.ip} 200"
    until(lambda: counts(instance).get(("destination", "client", "web-0", "200")) == 3, "the old client's requests are counted")
    handle = instance.shown("client")["handle"]

    new = replace(instance, "client", "client", "somebody")
    instance.pod("caller-0", new)
    shown = instance.shown("caller-0")
    assert shown["captured"] and shown["handle"] != handle
    before = counts(instance)

    def known() -> bool:
        assert instance.get(netns=new) == f"served / to {new.ip} 200"
        return ("destination", "caller-0", "web-0", "200") in more(instance, before)

    until(known, "the new client's requests are counted as its own on both sides", 20)
    before = counts(instance)
    for _ in range(5):
        assert instance.get(netns=new) == f"served / to {new.ip} 200"
    wanted = {(reporter, "caller-0", "web-0", "200"): 5 for reporter in ("source", "destination")}
    until(lambda: more(instance, before) == wanted, "five requests of the new client, and none of the old one's", 10)


def test_a_pod_made_again_at_once_under_its_name_and_address_is_captured_anew(instance: Instance) -> None:
    instance.up()
    assert instance.get() == f"served / to {instance.client.ip} 200"
    handle = instance.shown("web-0")["handle"]
    new = replace(instance, "web-0", "server", "again")
    instance.serve(new)
    instance.pod("web-0", new)
    until(lambda: instance.turned(new) == CAPTURED, "the new namespace is captured", 20)
    until(lambda: instance.get() == f"served / to {instance.client.ip} 200", "it serves", 20)
    shown = instance.shown("web-0")
    assert shown["captured"] and shown["handle"] is not None and isinstance(handle, int)
