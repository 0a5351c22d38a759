"""What is wrong with a document is said with file, line, object and what to do; nothing is silently ignored."""

from __future__ import annotations

import pytest

from controlplane.model.routing import Balancer, MatchKind, VirtualService
from controlplane.sources.folder import parse
from tests.support.manifests import destination_rule, good, service, virtual_service

ROUTE = "http:\n- route:\n  - destination: {host: reviews}\n"
HEAD = "hosts: [reviews]\n"


def said(text: str, severity: str = "error") -> list[str]:
    return [str(problem) for problem in parse("f.yaml", text).problems if problem.severity == severity]


@pytest.mark.parametrize(
    ("spec", "line", "message"),
    [
        ("http: []\n", 7, "spec.hosts is missing"),
        (HEAD, 7, "spec.http is missing"),
        ("hosts: reviews\n" + ROUTE, 7, "spec.hosts is 'reviews', a list is expected; put '- ' before it"),
        ("hosts: ['*']\n" + ROUTE, 7, "'*' is every host there is"),
        ("hosts: [10.0.0.1]\n" + ROUTE, 7, "'10.0.0.1' is an address"),
        ("hosts: ['a b']\n" + ROUTE, 7, "'a b' is no host name"),
        (HEAD + "gateways: [bookinfo]\n" + ROUTE, 8, "spec.gateways names 'bookinfo'; gateways are not supported yet"),
        (HEAD + 'exportTo: ["."]\n' + ROUTE, 8, "spec.exportTo names '.'"),
        (HEAD + "tcp: []\n" + ROUTE, 8, "spec.tcp is not supported yet"),
        (HEAD + "tls: []\n" + ROUTE, 8, "spec.tls is not supported yet"),
        (HEAD + "htp: []\n" + ROUTE, 8, "unknown field spec.htp; did you mean http?"),
        *[
            (
                HEAD + f"http:\n- {field}: {{}}\n  route: [{{destination: {{host: reviews}}}}]\n",
                9,
                f"spec.http[0].{field} is not supported yet",
            )
            for field in ("fault", "retries", "mirror", "mirrors", "rewrite", "redirect", "directResponse", "corsPolicy", "delegate")
        ],
        (HEAD + "http:\n- name: x\n", 9, "spec.http[0].route is missing"),
        (HEAD + "http:\n- route: [{destination: {}}]\n", 9, "spec.http[0].route[0].destination.host is missing"),
        (HEAD + "http:\n- route: [{weight: 100}]\n", 9, "spec.http[0].route[0].destination is missing"),
        (HEAD + "http:\n- route: [{destination: {host: '*.x'}}]\n", 9, "is a pattern; a request can only go to one host"),
        (HEAD + "http:\n- route: [{destination: {host: a, port: {number: 70000}}}]\n", 9, "1 to 65535 are expected"),
        (HEAD + "http:\n- route: [{destination: {host: a, port: {name: http}}}]\n", 9, "port.number is missing"),
        (
            HEAD + "http:\n- route:\n  - {destination: {host: a}, weight: 0}\n  - {destination: {host: b}, weight: 0}\n",
            9,
            "has only weights of 0",
        ),
        (HEAD + "http:\n- route:\n  - {destination: {host: a}, weight: -1}\n", 10, "weight is -1; 0 to"),
        (HEAD + "http:\n- route:\n  - {destination: {host: a}, weight: '5'}\n", 10, "weight is '5', a whole number is expected"),
        (
            HEAD + "http:\n- timeout: 5\n  route: [{destination: {host: a}}]\n",
            9,
            "timeout is 5, which is no duration; write a number and a unit",
        ),
        (HEAD + "http:\n- timeout: 10us\n  route: [{destination: {host: a}}]\n", 9, "at least 1ms"),
        (HEAD + "http:\n- timeout: 25h\n  route: [{destination: {host: a}}]\n", 9, "at most 24h"),
        (HEAD + "http:\n- match: [{uri: {regex: '(?=x)'}}]\n  route: [{destination: {host: a}}]\n", 9, "is not RE2"),
        (HEAD + "http:\n- match: [{uri: {exact: a, prefix: b}}]\n  route: [{destination: {host: a}}]\n", 9, "has exact and prefix"),
        (HEAD + "http:\n- match: [{uri: {prefix: ''}}]\n  route: [{destination: {host: a}}]\n", 9, "is empty, which matches everything"),
        (HEAD + "http:\n- match: [{uri: {prefix: abc}}]\n  route: [{destination: {host: a}}]\n", 9, "a path begins with '/'"),
        (HEAD + "http:\n- match: [{uri: {prefixx: /}}]\n  route: [{destination: {host: a}}]\n", 9, "did you mean prefix?"),
        (HEAD + "http:\n- match: [{uri: /x}]\n  route: [{destination: {host: a}}]\n", 9, "uri is '/x', a map is expected"),
        (HEAD + "http:\n- match: [{headers: {user: jason}}]\n  route: [{destination: {host: a}}]\n", 9, 'write user: {exact: "jason"}'),
        (HEAD + "http:\n- match: [{headers: {uri: {exact: /}}}]\n  route: [{destination: {host: a}}]\n", 9, "is no header; use match.uri"),
        (HEAD + "http:\n- match: [{headers: {'a b': {exact: x}}}]\n  route: [{destination: {host: a}}]\n", 9, "is no name of a header"),
        (HEAD + "http:\n- match: [{sourceLabels: {a: b}}]\n  route: [{destination: {host: a}}]\n", 9, "sourceLabels is not supported yet"),
        (HEAD + "http:\n- match: [{scheme: {exact: http}}]\n  route: [{destination: {host: a}}]\n", 9, "scheme is not supported yet"),
        (HEAD + "http:\n- match: [{port: 0}]\n  route: [{destination: {host: a}}]\n", 9, "port is 0; 1 to 65535"),
        (HEAD + "http:\n- headers: {request: {set: {host: x}}}\n  route: [{destination: {host: a}}]\n", 9, "changing the authority"),
        (
            HEAD + "http:\n- headers: {request: {set: {a: '%REQ(b)%'}}}\n  route: [{destination: {host: a}}]\n",
            9,
            "write %% for a percent sign",
        ),
        (HEAD + 'http:\n- headers: {request: {set: {a: "b\\nc"}}}\n  route: [{destination: {host: a}}]\n', 9, "control character"),
        (HEAD + "http:\n- headers: {request: {sett: {a: b}}}\n  route: [{destination: {host: a}}]\n", 9, "did you mean set?"),
    ],
)
def test_a_virtual_service_is_refused_by_file_and_line(spec: str, line: int, message: str) -> None:
    found = said(virtual_service("vs", spec))
    assert any(one.startswith(f"f.yaml:{line}: VirtualService default/vs: ") and message in one for one in found), found


@pytest.mark.parametrize(
    ("spec", "line", "message"),
    [
        ("subsets: []\n", 7, "spec.host is missing"),
        ("host: a\nworkloadSelector: {}\n", 8, "workloadSelector is not supported yet"),
        ("host: a\ntrafficPolicy: {tls: {mode: DISABLE}}\n", 8, "trafficPolicy.tls is not supported yet"),
        ("host: a\ntrafficPolicy: {outlierDetection: {}}\n", 8, "outlierDetection is not supported yet"),
        ("host: a\ntrafficPolicy: {portLevelSettings: []}\n", 8, "portLevelSettings is not supported yet"),
        ("host: a\ntrafficPolicy: {loadBalancer: {consistentHash: {}}}\n", 8, "consistentHash is not supported yet"),
        ("host: a\ntrafficPolicy: {loadBalancer: {simple: PASSTHROUGH}}\n", 8, "PASSTHROUGH is not supported yet"),
        ("host: a\ntrafficPolicy: {loadBalancer: {simple: FASTEST}}\n", 8, "is 'FASTEST'; it may be LEAST_REQUEST"),
        ("host: a\ntrafficPolicy: {connectionPool: {http: {}}}\n", 8, "connectionPool.http is not supported yet"),
        ("host: a\ntrafficPolicy: {connectionPool: {tcp: {maxConnections: 1}}}\n", 8, "maxConnections is not supported yet"),
        ("host: a\ntrafficPolicy: {connectionPool: {tcp: {connectTimeout: 0s}}}\n", 8, "connectTimeout is 0"),
        ("host: a\nsubsets:\n- {name: v1}\n- {name: v1}\n", 10, "v1 is here twice; the first is in line 9"),
        ("host: a\nsubsets: [{labels: {a: b}}]\n", 8, "subsets[0].name is missing"),
        ("host: a\nsubsets: [{name: v1, labels: {version: 1}}]\n", 8, 'version is 1, a text is expected; put it in quotes: "1"'),
        ("host: a\nsubsets: [{name: v1, trafficPolicy: {loadBalancer: {simple: PASSTHROUGH}}}]\n", 8, "PASSTHROUGH"),
    ],
)
def test_a_destination_rule_is_refused_by_file_and_line(spec: str, line: int, message: str) -> None:
    found = said(destination_rule("dr", spec))
    assert any(one.startswith(f"f.yaml:{line}: DestinationRule default/dr: ") and message in one for one in found), found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind: Service\nmetadata: {name: a}\n", "f.yaml:1: apiVersion is missing"),
        ("apiVersion: v1\nmetadata: {name: a}\n", "f.yaml:1: kind is missing"),
        ("apiVersion: v1\nkind: Service\n", "f.yaml:1: Service: metadata is missing"),
        ("apiVersion: v1\nkind: Service\nmetadata: {}\n", "f.yaml:3: Service: metadata.name is missing"),
        ("apiVersion: v1\nkind: Service\nmetadata: {name: A_B}\n", "is no name; use lower-case"),
        ("apiVersion: v1\nkind: Servise\nmetadata: {name: a}\n", "did you mean Service?"),
        ("apiVersion: v2\nkind: Service\nmetadata: {name: a}\nspec: {ports: []}\n", "apiVersion is 'v2'; Service is known as v1"),
        (
            "apiVersion: networking.istio.io/v2\nkind: VirtualService\nmetadata: {name: a}\nspec: {hosts: [a], http: []}\n",
            "known as networking.istio.io/v1, networking.istio.io/v1beta1",
        ),
        ("apiVersion: networking.istio.io/v1\nkind: Gateway\nmetadata: {name: a}\n", "Gateway is not supported yet"),
        ("apiVersion: security.istio.io/v1\nkind: RequestAuthentication\nmetadata: {name: a}\n",
         "RequestAuthentication is not supported yet"),
        (service("a", ip="10.0.0.300"), "'10.0.0.300' is no IP address"),
        (service("a", ip="127.0.0.1"), "can be no address of a pod or service"),
        (service("a", ports="[{port: 0}]"), "port is 0; 1 to 65535"),
        (service("a", ports="[{port: 80}, {port: 80}]"), "80 is here twice"),
        (service("a", more=", type: ExternalName"), "ExternalName is not supported yet"),
        (service("a", more=", ipFamilies: [IPv5]"), "neither IPv4 nor IPv6"),
        (
            "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec: {}\nstatus: {podIPs: [{ip: x}]}\n",
            "f.yaml:5: Pod default/a: status.podIPs 'x' is no IP address",
        ),
        ("apiVersion: v1\nkind: Pod\nmetadata: {name: a, labels: {a: 'b c'}}\nspec: {}\n", "which is no value of a label"),
    ],
)
def test_other_documents_are_refused_with_what_to_do(text: str, message: str) -> None:
    assert any(message in one for one in said(text)), said(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (service("a", more=", frobnicate: 1"), "unknown field spec.frobnicate; it is ignored"),
        (service("a", more=", sessionAffinity: ClientIP"), "sessionAffinity is not honoured"),
        (service("a", ports="[{port: 80, appProtocol: spdy}]"), "appProtocol 'spdy' is not known"),
        (
            virtual_service(
                "vs", HEAD + "http:\n- route:\n  - {destination: {host: a}, weight: 60}\n  - {destination: {host: b}, weight: 60}\n"
            ),
            "f.yaml:9: warning: VirtualService default/vs: spec.http[0].route has weights that add up to 120, not 100; they are taken in "
            "proportion (a.default.svc.cluster.local 50.0%, b.default.svc.cluster.local 50.0%)",
        ),
    ],
)
def test_what_still_works_is_a_warning_only(text: str, message: str) -> None:
    assert said(text) == []
    assert any(message in one for one in said(text, "warning")), said(text, "warning")


def test_kinds_that_change_nothing_are_left_in_silence() -> None:
    for kind in ("apps/v1\nkind: Deployment", "v1\nkind: ConfigMap", "networking.k8s.io/v1\nkind: NetworkPolicy"):
        assert parse("f.yaml", f"apiVersion: {kind}\nmetadata: {{name: a}}\nspec: {{anything: 1}}\n").problems == ()


def test_every_fault_of_a_document_is_found_at_once() -> None:
    assert len(said(virtual_service("vs", "hosts: ['*', 1]\nhttp:\n- fault: {}\n  timeout: x\n"))) == 4


@pytest.mark.parametrize("version", ["v1", "v1beta1", "v1alpha3"])
def test_a_virtual_service_is_taken_whole(version: str) -> None:
    text = virtual_service(
        "vs",
        """
hosts: [reviews, ratings.prod.svc.cluster.local, "*.shop.svc.cluster.local"]
gateways: [mesh]
exportTo: ["*"]
http:
- name: jason
  timeout: 1m1.5s
  match:
  - name: m
    uri: {prefix: /api}
    ignoreUriCase: true
    method: {exact: GET}
    authority: {regex: ".*"}
    headers: {End-User: {exact: jason}, x-there: {}}
    withoutHeaders: {x-bot: {prefix: bot}}
    queryParams: {q: {exact: ""}}
    port: 9080
  headers:
    request: {set: {X-A: "1"}, add: {x-b: "100%%"}, remove: [X-C]}
    response: {remove: [x-d]}
  route:
  - destination: {host: reviews, subset: v1, port: {number: 9080}}
    headers: {request: {set: {x-e: "2"}}}
""",
    ).replace("networking.istio.io/v1\n", f"networking.istio.io/{version}\n")
    one = next(iter(good(text).objects.values()))
    assert isinstance(one, VirtualService)
    assert [host for host, _ in one.hosts] == [
        "reviews.default.svc.cluster.local",
        "ratings.prod.svc.cluster.local",
        "*.shop.svc.cluster.local",
    ]
    route = one.http[0]
    match, target = route.matches[0], route.destinations[0]
    assert (route.name, route.timeout_ms, match.port, match.ignore_uri_case) == ("jason", 61_500, 9080, True)
    assert [(name, one.kind) for name, one in match.headers] == [("end-user", MatchKind.EXACT), ("x-there", MatchKind.PRESENT)]
    assert match.query[0][1].kind is MatchKind.EXACT and match.without_headers[0][0] == "x-bot"
    assert route.headers.request.set == (("x-a", "1"),) and route.headers.request.remove == ("x-c",)
    assert route.headers.request.add == (("x-b", "100%%"),) and route.headers.response.remove == ("x-d",)
    assert (target.host, target.subset, target.port, target.weight) == ("reviews.default.svc.cluster.local", "v1", 9080, 1)


@pytest.mark.parametrize(
    ("name", "balancer"),
    [
        ("LEAST_CONN", Balancer.LEAST_REQUEST),
        ("LEAST_REQUEST", Balancer.LEAST_REQUEST),
        ("ROUND_ROBIN", Balancer.ROUND_ROBIN),
        ("RANDOM", Balancer.RANDOM),
        ("UNSPECIFIED", None),
    ],
)
def test_a_balancer_is_taken_by_istios_name(name: str, balancer: Balancer | None) -> None:
    one = next(iter(good(destination_rule("dr", f"host: a\ntrafficPolicy: {{loadBalancer: {{simple: {name}}}}}\n")).objects.values()))
    assert one.policy.balancer is balancer  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("port", "protocol"),
    [
        ("{name: http, port: 1}", "http"),
        ("{name: http-web, port: 1}", "http"),
        ("{name: http2-x, port: 1}", "http2"),
        ("{name: grpc, port: 1}", "grpc"),
        ("{name: grpc-web-x, port: 1}", "http"),
        ("{name: https, port: 1}", "tls"),
        ("{name: tls-x, port: 1}", "tls"),
        ("{name: tcp-x, port: 1}", "tcp"),
        ("{name: redis, port: 1}", "tcp"),
        ("{name: web, port: 1}", "auto"),
        ("{port: 1}", "auto"),
        ("{port: 3306}", "tcp"),
        ("{name: mail, port: 25}", "tcp"),
        ("{name: http-x, port: 25}", "http"),
        ("{name: tcp-x, port: 1, appProtocol: http}", "http"),
        ("{port: 1, appProtocol: kubernetes.io/h2c}", "http2"),
        ("{port: 1, appProtocol: HTTP}", "http"),
        ("{port: 1, appProtocol: kubernetes.io/ws}", "http"),
        ("{name: httpx, port: 1}", "auto"),
    ],
)
def test_the_protocol_of_a_port_is_declared_as_in_istio(port: str, protocol: str) -> None:
    one = next(iter(good(service("a", ports=f"[{port}]")).objects.values()))
    assert [str(found.protocol) for found in one.ports] == [protocol]  # type: ignore[union-attr]


def test_udp_ports_are_not_of_the_mesh() -> None:
    one = next(iter(good(service("dns", ports="[{name: dns, port: 53, protocol: UDP}, {name: tcp, port: 53}]")).objects.values()))
    assert [found.name for found in one.ports] == ["tcp"]  # type: ignore[union-attr]
