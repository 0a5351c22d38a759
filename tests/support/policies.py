"""What policies promise, as data: one row a promise. And a second, naive reading of the same rules, for random ones."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from random import Random
from typing import Any

from agent.dataplane import blobs
from agent.model.policy import Action, Match, Policy, Rule, Scope
from agent.model.routing import MatchKind, StringMatch
from agent.model.workload import Protocol, Workload, WorkloadPort, spiffe
from ext.route import door

POD, WORKLOAD, NAMESPACE = 7, "Kubernetes//Pod/shop/cart-0", "shop"
CLIENT, SERVER = "10.0.1.5", "10.0.2.6"
WEB = spiffe("cluster.local", "web", "front")  # the usual client
STRICT = "istio-system/istio_converted_static_strict"


@dataclass(frozen=True, slots=True)
class Asked:
    who: str | None = WEB
    source: str = CLIENT
    destination: str = SERVER
    port: int = 8080


def text(value: str) -> StringMatch:
    """As it is written in an AuthorizationPolicy."""
    if value == "*":
        return StringMatch(MatchKind.PRESENT, "")
    if value.startswith("*"):
        return StringMatch(MatchKind.SUFFIX, value[1:])
    return StringMatch(MatchKind.PREFIX, value[:-1]) if value.endswith("*") else StringMatch(MatchKind.EXACT, value)


def match(**fields: Sequence[Any]) -> Match:
    """Field names of Match, with values as they are written."""
    made: dict[str, Any] = {}
    for name, values in fields.items():
        kind = name.removeprefix("not_")
        if kind in ("namespaces", "principals"):
            made[name] = tuple(map(text, values))
        elif kind in ("sources", "destinations"):
            made[name] = tuple(ip_network(value, strict=False) for value in values)
        else:
            made[name] = tuple(values)
    return Match(**made)


def rule(**fields: Sequence[Any]) -> Rule:
    """One clause with one match."""
    return ((match(**fields),),)


def policy(action: Action, *rules: Rule, name: str = "p", namespace: str = NAMESPACE, scope: Scope = Scope.NAMESPACE,
           dry_run: bool = False) -> Policy:
    return Policy(namespace, name, scope, action, rules, dry_run)


def allow(*rules: Rule, **more: Any) -> Policy:
    return policy(Action.ALLOW, *rules, **more)


def deny(*rules: Rule, **more: Any) -> Policy:
    return policy(Action.DENY, *rules, **more)


def static_strict() -> Policy:
    return deny(rule(not_principals=["*"]), name="istio_converted_static_strict", namespace="istio-system", scope=Scope.WORKLOAD)


def tables(policies: Iterable[Policy], named: Sequence[str] = ()) -> door.Tables:
    """A worker that knows the policies, and the pod of SERVER whose workload names some of them."""
    made = door.Tables()
    made.load(blobs.encode_transaction(1, [*map(blobs.put_policy, policies), *server(named)]))
    return made


def server(named: Sequence[str] = ()) -> list[blobs.Put]:
    workload = Workload(
        WORKLOAD, "cart-0", NAMESPACE, (ip_address(SERVER),), "n1", "cart", "cluster.local", "cart", "pod", "cart", "v1", "Kubernetes",
        True, (WorkloadPort("shop/cart", 80, 8080, Protocol.TCP),), policies=tuple(named))
    pod = blobs.put_pod("pod", POD, WORKLOAD, f"ns={NAMESPACE}", (ip_address(SERVER),), workload.identity)
    return [blobs.put_workload(1, workload, lambda _: 0), pod]


# ---- promises --------------------------------------------------------------------------------------------------------

ALLOWED, DENIED = True, False
NOBODY = Asked(who=None)
EMPTY: Rule = ()  # matches always
Row = tuple[str, tuple[Policy, ...], tuple[str, ...], Asked, bool, str | None]


def one(promise: str, policies: Policy | tuple[Policy, ...], asked: Asked, verdict: bool, by: str | None = None,
        named: tuple[str, ...] = ()) -> Row:
    return promise, policies if isinstance(policies, tuple) else (policies,), named, asked, verdict, by


P = "shop/p"
TWO = ((match(namespaces=["web"]), match(namespaces=["app"])), (match(ports=[8080]),))  # from web or app, to 8080

ROWS: list[Row] = [
    # which policies, and in which order
    one("without any policy everything is allowed", (), Asked(), ALLOWED),
    one("without any policy nobody is allowed too", (), NOBODY, ALLOWED),
    one("an ALLOW that matches allows", allow(EMPTY), Asked(), ALLOWED, P),
    one("an ALLOW without rules allows nothing", allow(), Asked(), DENIED),
    one("an ALLOW that does not match leaves all denied", allow(rule(ports=[1])), Asked(), DENIED),
    one("a DENY that matches denies", deny(EMPTY), Asked(), DENIED, P),
    one("a DENY without rules denies nothing", deny(), Asked(), ALLOWED),
    one("a DENY that does not match denies nothing", deny(rule(ports=[1])), Asked(), ALLOWED),
    one("a DENY alone does not ask for an ALLOW", deny(rule(ports=[1])), Asked(port=2), ALLOWED),
    one("DENY comes before ALLOW", (allow(EMPTY, name="a"), deny(EMPTY, name="d")), Asked(), DENIED, "shop/d"),
    one("DENY comes before ALLOW whichever came first", (deny(EMPTY, name="d"), allow(EMPTY, name="a")), Asked(), DENIED, "shop/d"),
    one("a DENY that does not match leaves the ALLOW to decide", (deny(rule(ports=[1]), name="d"), allow(EMPTY, name="a")), Asked(),
        ALLOWED,
        "shop/a"),
    one("of several ALLOW one is enough", (allow(name="a"), allow(rule(ports=[8080]), name="b")), Asked(), ALLOWED, "shop/b"),
    one("of several ALLOW none is not", (allow(name="a"), allow(rule(ports=[1]), name="b")), Asked(), DENIED),
    one("of several DENY one is enough", (deny(name="a"), deny(rule(ports=[8080]), name="b")), Asked(), DENIED, "shop/b"),
    one("a policy for all applies", deny(EMPTY, scope=Scope.GLOBAL, namespace="istio-system"), Asked(), DENIED, "istio-system/p"),
    one("a policy of the namespace applies", deny(EMPTY), Asked(), DENIED, P),
    one("a policy of another namespace does not", deny(EMPTY, namespace="web"), Asked(), ALLOWED),
    one("a policy of the client's namespace does not", deny(EMPTY, namespace="web"), Asked(), ALLOWED),
    one("a policy of a namespace whose name begins alike does not", deny(EMPTY, namespace="shop2"), Asked(), ALLOWED),
    one("a policy that the workload names applies", deny(EMPTY, scope=Scope.WORKLOAD), Asked(), DENIED, P, (P,)),
    one("a policy with a selector that it does not name does not", deny(EMPTY, scope=Scope.WORKLOAD), Asked(), ALLOWED),
    one("a policy of another namespace that it names applies", deny(EMPTY, scope=Scope.WORKLOAD, namespace="x"), Asked(), DENIED, "x/p",
        ("x/p",)),
    one("a name that nobody knows is passed over", allow(EMPTY, scope=Scope.WORKLOAD), Asked(), ALLOWED, P, ("shop/gone", P)),
    one("only names that nobody knows: as without policies", (), Asked(), ALLOWED, None, ("shop/gone",)),
    one("an ALLOW for all counts for every namespace", allow(scope=Scope.GLOBAL, namespace="istio-system"), Asked(), DENIED),
    one("an ALLOW of the workload opens what one of the namespace closes", (allow(name="n"), allow(EMPTY, name="w", scope=Scope.WORKLOAD)),
        Asked(), ALLOWED, "shop/w", ("shop/w",)),
    one("a DENY for all beats an ALLOW of the workload", (deny(EMPTY, name="g", scope=Scope.GLOBAL), allow(EMPTY, scope=Scope.WORKLOAD)),
        Asked(), DENIED, "shop/g", (P,)),
    # rules, clauses, matches
    one("an empty rule matches everything", deny(EMPTY), NOBODY, DENIED, P),
    one("a rule with an empty clause matches", deny(((),)), Asked(), DENIED, P),
    one("an empty match never agrees", deny(((match(),),)), Asked(), ALLOWED),
    one("an empty match in what allows allows nothing", allow(((match(),),)), Asked(), DENIED),
    one("beside an empty match another one counts", deny(((match(), match(ports=[8080])),)), Asked(), DENIED, P),
    one("any rule is enough", deny(rule(ports=[1]), rule(ports=[8080])), Asked(), DENIED, P),
    one("all clauses must agree", deny(TWO), Asked(port=1), ALLOWED),
    one("the first of two sources is enough", deny(TWO), Asked(), DENIED, P),
    one("the second of two sources is enough", deny(TWO), Asked(who=spiffe("td", "app", "x")), DENIED, P),
    one("neither of two sources", deny(TWO), Asked(who=spiffe("td", "db", "x")), ALLOWED),
    one("fields of a match must all agree", deny(rule(namespaces=["web"], ports=[1])), Asked(), ALLOWED),
    one("fields of a match that all agree match", deny(rule(namespaces=["web"], ports=[8080])), Asked(), DENIED, P),
    one("what must and what must not, of one field", deny(rule(namespaces=["w*"], not_namespaces=["web"])), Asked(), ALLOWED),
    one("what must, and what must not does not", deny(rule(namespaces=["w*"], not_namespaces=["wab"])), Asked(), DENIED, P),
    # principals
    one("a principal by its name", allow(rule(principals=["cluster.local/ns/web/sa/front"])), Asked(), ALLOWED, P),
    one("a principal is not compared with spiffe://", allow(rule(principals=[WEB])), Asked(), DENIED),
    one("another service account is another principal", allow(rule(principals=["cluster.local/ns/web/sa/back"])), Asked(), DENIED),
    one("another trust domain is another principal", allow(rule(principals=["cluster.local/ns/web/sa/front"])),
        Asked(who=spiffe("example.org", "web", "front")), DENIED),
    one("a principal by its beginning", allow(rule(principals=["cluster.local/ns/web/*"])), Asked(), ALLOWED, P),
    one("a beginning does not reach into another name", allow(rule(principals=["cluster.local/ns/we/*"])), Asked(), DENIED),
    one("a beginning begins behind spiffe://", allow(rule(principals=["spiffe*"])), Asked(), DENIED),
    one("a principal by its end", allow(rule(principals=["*/sa/front"])), Asked(), ALLOWED, P),
    one("an end that differs", allow(rule(principals=["*/sa/fron"])), Asked(), DENIED),
    one("an end longer than the principal", allow(rule(principals=["*" + "x" * 300])), Asked(), DENIED),
    one("a whole principal as its end", allow(rule(principals=["*cluster.local/ns/web/sa/front"])), Asked(), ALLOWED, P),
    one("any principal", allow(rule(principals=["*"])), Asked(), ALLOWED, P),
    one("nobody is no principal", allow(rule(principals=["*"])), NOBODY, DENIED),
    one("nobody does not agree with a beginning that is empty", deny(((Match(principals=(StringMatch(MatchKind.PREFIX, ""),)),),)), NOBODY,
        ALLOWED),
    one("somebody agrees with a beginning that is empty", deny(((Match(principals=(StringMatch(MatchKind.PREFIX, ""),)),),)), Asked(),
        DENIED, P),
    one("one of several principals", allow(rule(principals=["a/ns/b/sa/c", "cluster.local/ns/web/sa/front"])), Asked(), ALLOWED, P),
    one("letters count", allow(rule(principals=["cluster.local/ns/Web/sa/front"])), Asked(), DENIED),
    one("not this principal", deny(rule(not_principals=["cluster.local/ns/web/sa/front"])), Asked(), ALLOWED),
    one("not another principal", deny(rule(not_principals=["cluster.local/ns/web/sa/back"])), Asked(), DENIED, P),
    one("nobody is not this principal", deny(rule(not_principals=["cluster.local/ns/web/sa/front"])), NOBODY, DENIED, P),
    one("not any principal: nobody alone", deny(rule(not_principals=["*"])), NOBODY, DENIED, P),
    one("not any principal: not somebody", deny(rule(not_principals=["*"])), Asked(), ALLOWED),
    one("not by beginning", deny(rule(not_principals=["cluster.local/ns/web/*"])), Asked(), ALLOWED),
    # namespaces
    one("a namespace by its name", allow(rule(namespaces=["web"])), Asked(), ALLOWED, P),
    one("another namespace", allow(rule(namespaces=["webs"])), Asked(), DENIED),
    one("a namespace by its beginning", allow(rule(namespaces=["w*"])), Asked(), ALLOWED, P),
    one("a namespace by its end", allow(rule(namespaces=["*eb"])), Asked(), ALLOWED, P),
    one("any namespace", allow(rule(namespaces=["*"])), Asked(), ALLOWED, P),
    one("nobody is in no namespace", allow(rule(namespaces=["*"])), NOBODY, DENIED),
    one("nobody is not in this namespace", allow(rule(namespaces=["web"])), NOBODY, DENIED),
    one("a namespace does not ask for the trust domain", allow(rule(namespaces=["web"])), Asked(who=spiffe("other", "web", "x")),
        ALLOWED, P),
    one("not this namespace", deny(rule(not_namespaces=["web"])), Asked(), ALLOWED),
    one("not another namespace", deny(rule(not_namespaces=["app"])), Asked(), DENIED, P),
    one("nobody is not in any namespace", deny(rule(not_namespaces=["web", "app"])), NOBODY, DENIED, P),
    one("the account is not the namespace", allow(rule(namespaces=["front"])), Asked(), DENIED),
    # service accounts
    one("a service account of a namespace", allow(rule(service_accounts=[("web", "front")])), Asked(), ALLOWED, P),
    one("the same name in another namespace", allow(rule(service_accounts=[("app", "front")])), Asked(), DENIED),
    one("another name in the same namespace", allow(rule(service_accounts=[("web", "back")])), Asked(), DENIED),
    one("a service account of another trust domain", allow(rule(service_accounts=[("web", "front")])),
        Asked(who=spiffe("other", "web", "front")), ALLOWED, P),
    one("nobody has no service account", allow(rule(service_accounts=[("web", "front")])), NOBODY, DENIED),
    one("not this service account", deny(rule(not_service_accounts=[("web", "front")])), Asked(), ALLOWED),
    one("nobody has not this service account", deny(rule(not_service_accounts=[("web", "front")])), NOBODY, DENIED, P),
    one("one of several service accounts", allow(rule(service_accounts=[("a", "b"), ("web", "front")])), Asked(), ALLOWED, P),
    # blocks of addresses
    one("one source address", allow(rule(sources=[CLIENT])), Asked(), ALLOWED, P),
    one("another source address", allow(rule(sources=["10.0.1.6"])), Asked(), DENIED),
    one("a block of whole bytes", allow(rule(sources=["10.0.0.0/8"])), Asked(), ALLOWED, P),
    one("a block that ends within a byte", allow(rule(sources=["10.0.0.0/15"])), Asked(), ALLOWED, P),
    one("the last address of a block", allow(rule(sources=["10.0.1.0/29"])), Asked(source="10.0.1.7"), ALLOWED, P),
    one("the first address behind a block", allow(rule(sources=["10.0.1.0/29"])), Asked(source="10.0.1.8"), DENIED),
    one("the last address before a block", allow(rule(sources=["10.0.1.8/29"])), Asked(source="10.0.1.7"), DENIED),
    one("every IPv4 address", allow(rule(sources=["0.0.0.0/0"])), Asked(), ALLOWED, P),
    one("every IPv4 address is no IPv6 address", allow(rule(sources=["0.0.0.0/0"])), Asked(source="fd00::1"), DENIED),
    one("every IPv6 address is no IPv4 address", allow(rule(sources=["::/0"])), Asked(), DENIED),
    one("an IPv6 block", allow(rule(sources=["fd00:10::/33"])), Asked(source="fd00:10:7fff::1"), ALLOWED, P),
    one("outside of an IPv6 block by one bit", allow(rule(sources=["fd00:10::/33"])), Asked(source="fd00:10:8000::1"), DENIED),
    one("one IPv6 address", allow(rule(sources=["fd00::1"])), Asked(source="fd00::1"), ALLOWED, P),
    one("IPv4 in IPv6 is IPv4", allow(rule(sources=["10.0.1.0/24"])), Asked(source="::ffff:10.0.1.5"), ALLOWED, P),
    one("one of several blocks", allow(rule(sources=["192.168.0.0/16", "10.0.0.0/8"])), Asked(), ALLOWED, P),
    one("not from this block", deny(rule(not_sources=["10.0.0.0/8"])), Asked(), ALLOWED),
    one("not from another block", deny(rule(not_sources=["192.168.0.0/16"])), Asked(), DENIED, P),
    one("from a block but not from a part of it", allow(rule(sources=["10.0.0.0/8"], not_sources=["10.0.1.0/24"])), Asked(), DENIED),
    one("from a block and not from another part", allow(rule(sources=["10.0.0.0/8"], not_sources=["10.0.9.0/24"])), Asked(), ALLOWED, P),
    one("nobody has an address", allow(rule(sources=["10.0.0.0/8"])), NOBODY, ALLOWED, P),
    one("a destination address", allow(rule(destinations=[SERVER])), Asked(), ALLOWED, P),
    one("another destination address", allow(rule(destinations=["10.0.2.7"])), Asked(), DENIED),
    one("not this destination", deny(rule(not_destinations=["10.0.2.0/24"])), Asked(), ALLOWED),
    one("not another destination", deny(rule(not_destinations=["10.0.3.0/24"])), Asked(), DENIED, P),
    # ports
    one("a port", allow(rule(ports=[8080])), Asked(), ALLOWED, P),
    one("another port", allow(rule(ports=[80])), Asked(), DENIED),
    one("one of several ports", allow(rule(ports=[80, 443, 8080])), Asked(), ALLOWED, P),
    one("the lowest port", allow(rule(ports=[1])), Asked(port=1), ALLOWED, P),
    one("the highest port", allow(rule(ports=[65535])), Asked(port=65535), ALLOWED, P),
    one("not this port", deny(rule(not_ports=[8080])), Asked(), ALLOWED),
    one("not another port", deny(rule(not_ports=[80, 81])), Asked(), DENIED, P),
    one("none of several ports", deny(rule(not_ports=[80, 8080])), Asked(), ALLOWED),
    # what PeerAuthentication becomes
    one("STRICT denies nobody", static_strict(), NOBODY, DENIED, STRICT, (STRICT,)),
    one("STRICT lets everybody else in", static_strict(), Asked(), ALLOWED, None, (STRICT,)),
    one("STRICT only where it is named", static_strict(), NOBODY, ALLOWED),
    one("STRICT but for a port: elsewhere", deny(((match(not_principals=["*"]),), (match(not_ports=[9090]),))), NOBODY, DENIED, P),
    one("STRICT but for a port: there", deny(((match(not_principals=["*"]),), (match(not_ports=[9090]),))), Asked(who=None, port=9090),
        ALLOWED),
    one("PERMISSIVE but for a port: elsewhere", deny(((match(not_principals=["*"]),), (match(ports=[9090]),))), NOBODY, ALLOWED),
    one("PERMISSIVE but for a port: there", deny(((match(not_principals=["*"]),), (match(ports=[9090]),))), Asked(who=None, port=9090),
        DENIED, P),
    one("an ALLOW does not open what STRICT closes", (static_strict(), allow(EMPTY)), NOBODY, DENIED, STRICT, (STRICT,)),
    # on trial
    one("a DENY on trial denies nothing", deny(EMPTY, dry_run=True), Asked(), ALLOWED),
    one("an ALLOW on trial closes nothing", allow(dry_run=True), Asked(), ALLOWED),
    one("an ALLOW on trial opens nothing", (allow(name="a"), allow(EMPTY, name="b", dry_run=True)), Asked(), DENIED),
    one("a DENY in force beside one on trial denies", (deny(EMPTY, name="a"), deny(EMPTY, name="b", dry_run=True)), Asked(), DENIED,
        "shop/a"),
]


# ---- the same once more, as the documentation says it: slow, and by other means --------------------------------------


def agrees(one: Match, asked: Asked) -> bool:
    if one == Match():
        return False
    parts = asked.who.split("/") if asked.who else None  # spiffe: '' domain ns NAMESPACE sa ACCOUNT

    def said(value: StringMatch, text: str) -> bool:
        return {MatchKind.EXACT: text == value.value, MatchKind.PREFIX: text.startswith(value.value),
                MatchKind.SUFFIX: text.endswith(value.value), MatchKind.PRESENT: text != ""}[value.kind]

    def inside(block: Any, address: str) -> bool:
        found = ip_address(address)
        return (getattr(found, "ipv4_mapped", None) or found) in block

    tests: dict[str, Any] = {
        "namespaces": lambda value: said(value, parts[4] if parts else ""),
        "principals": lambda value: parts is not None and said(value, "/".join(parts[2:])),
        "sources": lambda value: inside(value, asked.source),
        "destinations": lambda value: inside(value, asked.destination),
        "ports": lambda value: value == asked.port,
        "service_accounts": lambda value: parts is not None and (parts[4], parts[6]) == value,
    }
    for name, test in tests.items():
        must, must_not = getattr(one, name), getattr(one, f"not_{name}")
        if (must and not any(map(test, must))) or any(map(test, must_not)):
            return False
    return True


def matches(policy: Policy, asked: Asked) -> bool:
    return any(all(not clause or any(agrees(match, asked) for match in clause) for clause in rule) for rule in policy.rules)


def allowed(policies: Iterable[Policy], asked: Asked) -> bool:
    """Of policies that all apply and are all in force."""
    held = list(policies)
    if any(one.action is Action.DENY and matches(one, asked) for one in held):
        return False
    opening = [one for one in held if one.action is Action.ALLOW]
    return not opening or any(matches(one, asked) for one in opening)


# ---- random ones -----------------------------------------------------------------------------------------------------


def some_text(random: Random, principal: bool, wire: bool) -> StringMatch:
    kind = random.choice((MatchKind.EXACT, MatchKind.PREFIX, MatchKind.SUFFIX, MatchKind.PRESENT))
    values = ["td/ns/a", "/sa/b", "td/ns/a/sa/b", "td/ns/ab/sa/a", "td/ns/b/"] if principal else ["a", "ab", "b"]
    if not wire:  # an expression on a certificate cannot say what agrees with nobody
        values.append("")
    return StringMatch(kind, "" if kind is MatchKind.PRESENT else random.choice(values))


def some_match(random: Random, wire: bool) -> Match:
    """Fields are few, so that many agree."""
    def few(make: Callable[[], Any]) -> tuple[Any, ...]:
        return tuple(make() for _ in range(random.choice((0, 0, 0, 0, 1, 2))))

    def block() -> Any:
        if not wire and random.random() < 0.3:
            return ip_network((f"fd00::{random.randrange(4):x}", random.choice((0, 64, 126, 127, 128))), strict=False)
        return ip_network((f"10.0.0.{random.randrange(1, 9)}", random.choice((0, 8, 24, 29, 30, 31, 32))), strict=False)

    made: list[Any] = []
    for make in (lambda: some_text(random, False, wire), lambda: some_text(random, True, wire), block, block,
                 lambda: random.randrange(1, 5), lambda: (random.choice("ab"), random.choice("ab"))):
        made += [few(make), few(make)]
    return Match(*made)


def some_policy(random: Random, number: int, *, wire: bool = False) -> Policy:
    """A policy of the namespace. `wire`: one that Envoy's RBAC filter can express, for IPv4."""
    def clause() -> tuple[Match, ...]:
        return tuple(some_match(random, wire) for _ in range(random.choice((0, 1, 1, 2))))

    rules = tuple(tuple(clause() for _ in range(random.choice((0, 1, 2, 2)))) for _ in range(random.choice((0, 1, 2))))
    return Policy(NAMESPACE, f"p{number}", Scope.NAMESPACE, random.choice(list(Action)), rules)


def some_question(random: Random, *, wire: bool = False) -> Asked:
    who = random.choice((None, spiffe("td", random.choice(("a", "ab", "b")), random.choice(("a", "b")))))
    four = f"10.0.0.{random.randrange(1, 9)}"
    return Asked(who, four if wire or random.random() < 0.6 else f"fd00::{random.randrange(4):x}", f"10.0.0.{random.randrange(1, 9)}",
                 random.randrange(1, 5))
