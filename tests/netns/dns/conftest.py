"""A node whose agent answers the DNS questions of its pods, and a resolver beside it."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager

import dnslib
import pytest

from tests.netns.agent.conftest import Instance
from tests.support.dns import addresses, ask, reply
from tests.support.netns import Namespaces, Netns
from tests.support.wait import until

# beside `web` of the instance: one in another namespace, one without virtual address, one of both families, one for all below a name
SERVICES = """
apiVersion: v1
kind: Service
metadata: {name: api, namespace: shop}
spec: {clusterIP: 10.96.0.20, selector: {app: api}, ports: [{name: http, port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: pods, namespace: default}
spec: {clusterIP: None, selector: {app: web}, ports: [{name: http, port: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: both, namespace: default}
spec:
  clusterIP: 10.96.0.30
  clusterIPs: [10.96.0.30, "fd00:96::30"]
  ipFamilies: [IPv4, IPv6]
  ipFamilyPolicy: RequireDualStack
  selector: {app: web}
  ports: [{name: http, port: 80}]
"""
SOA = "example.test. 60 SOA ns.example.test. root.example.test. 1 3600 600 86400 60"
CAPTURE = "ambient.istio.io/dns-capture"
WEB = "web.default.svc.cluster.local"


class Scene:
    """`client` is captured with its DNS; `upstream` is where its resolver runs."""

    def __init__(self, instance: Instance) -> None:
        self.instance = instance
        self.client = instance.client
        self.upstream: Netns = instance.node.pod("upstream")
        (instance.config / "services.yaml").write_text(SERVICES)

    def up(self, *options: str) -> None:
        self.instance.up("--dns-capture", *options)
        self.captured()

    def captured(self, name: str = "client") -> None:
        until(lambda: self.instance.shown(name)["dns"] is not None, f"the DNS of {name} is captured")

    def metric(self, name: str) -> float:
        """All series of a metric together."""
        return sum(float(line.rpartition(" ")[2]) for line in self.instance.metrics() if line.split("{")[0].split(" ")[0] == name)


def answered(scene: Scene) -> bool:
    """Whether the client is told the mesh's names at once."""
    try:
        return addresses(ask(scene.client, "192.0.2.99", "web", timeout=1)) == ["10.96.0.10"]
    except OSError:
        return False


def plain(asked: dnslib.DNSRecord) -> bytes:
    """A resolver that knows every host but `no.`: 192.0.2.5."""
    name = str(asked.q.qname)
    if name.startswith("no."):
        return reply(asked, rcode=3, soa=SOA)
    if asked.q.qtype != 1:
        return reply(asked, soa=SOA)
    return reply(asked, f"{name} 60 A 192.0.2.5")


@pytest.fixture
def scene(instance: Instance) -> Scene:
    return Scene(instance)


@pytest.fixture
def instance(namespaces: Namespaces) -> Iterator[Instance]:
    with closing(Instance(namespaces)) as made:
        yield made


@contextmanager
def staged(*options: str) -> Iterator[Scene]:
    """A scene whose agent has these options, for more than one test."""
    with ExitStack() as stack:
        made = Instance(stack.enter_context(closing(Namespaces())))
        stack.callback(made.close)
        one = Scene(made)
        one.up(*options)
        yield one


@pytest.fixture(scope="module", params=["iptables", "nftables", "ebpf"])
def shared(request: pytest.FixtureRequest) -> Iterator[Scene]:
    """For tests that only ask."""
    with staged("--capture", request.param) as one:
        yield one
