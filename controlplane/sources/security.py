"""AuthorizationPolicy and PeerAuthentication -> model. Unknown fields are refused by name: a rule that says less than was written may
open what it was to close."""
from __future__ import annotations

import re
from ipaddress import ip_address, ip_network

from controlplane.model.objects import Labels, Metadata
from controlplane.model.security import Action, AuthorizationPolicy, Condition, Mode, Operation, PeerAuthentication, Rule, Source, layer7
from controlplane.sources.fields import Fields, did_you_mean

DRY_RUN = "istio.io/dry-run"
SOURCE_LAYER7 = ("requestPrincipals", "notRequestPrincipals", "remoteIpBlocks", "notRemoteIpBlocks", "trustDomains", "notTrustDomains")
OPERATION_LAYER7 = ("hosts", "notHosts", "methods", "notMethods", "paths", "notPaths")
KEYS = ("source.ip", "source.namespace", "source.principal", "destination.ip", "destination.port")
KEYS_LAYER7 = ("remote.ip", "request.auth.principal", "request.auth.audiences", "request.auth.presenter", "connection.sni",
               "source.trustDomain")
_KEY_LAYER7 = re.compile(r"(?:request\.headers|request\.auth\.claims|experimental\.envoy\.filters\.[^\[]+)\[.+\]\Z")
_PORT_KEY = re.compile(r"[0-9]{1,5}\Z")


def authorization_policy(top: Fields, meta: Metadata) -> AuthorizationPolicy | None:
    top.ignore("status")
    dry_run = _dry_run(top)
    if "spec" not in top:  # Istio: allow nothing in this namespace
        top.ignore("spec")
        return AuthorizationPolicy(meta, None, Action.ALLOW, dry_run, ())
    spec = top.fields("spec")
    if spec is None:
        return None
    selector = _selector(spec)
    unsent = ""
    action = spec.choice("action", ("ALLOW", "DENY", "AUDIT", "CUSTOM"), "ALLOW")
    if action in ("AUDIT", "CUSTOM"):
        unsent, action = f"the action {action} is not done at layer 4", "ALLOW"
    if spec.take("targetRef") is not None or spec.take("targetRefs") is not None:
        unsent = "it has targetRefs, so it is for a waypoint"
    spec.ignore("provider", "targetRef", "targetRefs")
    children = spec.list_of_fields("rules")
    rules = tuple(_rule(one, meta.key.namespace) for one in children)
    if action == "DENY" and not rules and not spec.take("rules"):
        spec.error("action", "is DENY without rules, which never denies", "add an empty rule to deny everything: rules: [{}]")
    for rule, one in zip(rules, children, strict=True):
        if unsent:
            break
        if names := layer7(rule):
            what = {"ALLOW": "the rule never allows anything here",
                    "DENY": "the rule denies without looking at that, or never where nothing else is left of it"}[action]
            one.warn("", f"names {', '.join(names)}, which layer 4 does not know; {what}", "leave it out, or give it to a waypoint")
    spec.finish()
    return AuthorizationPolicy(meta, selector, Action(action), dry_run, rules, unsent)


def peer_authentication(top: Fields, meta: Metadata) -> PeerAuthentication | None:
    top.ignore("status")
    spec = top.fields("spec")
    if spec is None:
        top.ignore("spec")
        return PeerAuthentication(meta, (), Mode.UNSET, ())
    selector = _selector(spec) or ()
    mode = _mode(spec.fields("mtls"))
    ports: dict[int, Mode] = {}
    if levels := spec.fields("portLevelMtls"):
        for name in levels.names():
            inner = levels.fields(name)
            if not _PORT_KEY.match(name) or not 0 < int(name) < 65536:
                levels.error(name, "is no port between 1 and 65535")
            elif inner is not None:
                ports[int(name)] = _mode(inner)
                if ports[int(name)] is Mode.DISABLE:
                    inner.warn("mode", "is DISABLE for one port, which is done as PERMISSIVE: tunnels are for all ports of a pod")
        if not selector:
            spec.error("portLevelMtls", "is given without selector", "ports are those of pods: say which, by their labels")
    spec.finish()
    return PeerAuthentication(meta, selector, mode, tuple(sorted(ports.items())))


# ---- parts -------------------------------------------------------------------------------------------------


def _dry_run(top: Fields) -> bool:
    metadata = top.fields("metadata")
    if metadata is None:
        return False
    value = metadata.text_map("annotations").get(DRY_RUN, ("", 0))[0]
    if value not in ("", "true", "false"):
        metadata.error("annotations", f"has {DRY_RUN}: {value!r}", '"true" or "false" is expected')
    return value == "true"


def _mode(one: Fields | None) -> Mode:
    if one is None:
        return Mode.UNSET
    mode = Mode(one.choice("mode", [str(mode) for mode in Mode], "UNSET"))
    one.finish()
    return mode


def _selector(spec: Fields) -> Labels | None:
    one = spec.fields("selector")
    if one is None:
        return None
    labels = one.labels("matchLabels")
    one.finish()
    return labels


def _rule(one: Fields, namespace: str) -> Rule:
    sources = tuple(found for child in one.list_of_fields("from") if (found := _source(child, namespace)))
    operations = tuple(made for child in one.list_of_fields("to") if (made := _operation(child)))
    conditions = tuple(_condition(child) for child in one.list_of_fields("when"))
    for key in ("from", "to", "when"):
        if key in one and not one.take(key):
            one.error(key, "is empty", "leave it out, or say who")
    one.finish()
    return Rule(sources, operations, conditions, one.place())


def _source(child: Fields, namespace: str) -> Source | None:
    one = child.fields("source", required=True)
    child.finish()
    if one is None:
        return None
    found = Source(
        _texts(one, "principals"), _texts(one, "notPrincipals"), _texts(one, "namespaces"), _texts(one, "notNamespaces"),
        _accounts(one, "serviceAccounts", namespace), _accounts(one, "notServiceAccounts", namespace),
        _blocks(one, "ipBlocks"), _blocks(one, "notIpBlocks"), _present(one, SOURCE_LAYER7))
    one.finish()
    if found == Source():
        child.error("source", "is empty", "say who, or leave `from` out for everybody")
    return found


def _operation(child: Fields) -> Operation | None:
    one = child.fields("operation", required=True)
    child.finish()
    if one is None:
        return None
    found = Operation(_ports(one, "ports"), _ports(one, "notPorts"), _present(one, OPERATION_LAYER7))
    one.finish()
    if found == Operation():
        child.error("operation", "is empty", "say what, or leave `to` out for everything")
    return found


def _condition(one: Fields) -> Condition:
    key = one.text("key", required=True)
    known = key in KEYS
    if key and not known and key not in KEYS_LAYER7 and not _KEY_LAYER7.match(key):
        one.error("key", f"is {key!r}, which is no key of a condition",
                  f"known at layer 4 are {', '.join(KEYS)}{did_you_mean(key, KEYS)}")
    read = {"source.ip": _blocks, "destination.ip": _blocks, "destination.port": _port_texts}.get(key, _texts if known else _any_texts)
    values, not_values = read(one, "values"), read(one, "notValues")
    if "values" not in one and "notValues" not in one:
        one.error("values", "is missing", "give values, notValues or both")
    one.finish()
    return Condition(key, values, not_values, not known)


def _present(one: Fields, keys: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(key for key in keys if _any_texts(one, key))


def _any_texts(one: Fields, key: str) -> tuple[str, ...]:
    return tuple(text for text, _ in one.texts(key))


def _texts(one: Fields, key: str) -> tuple[str, ...]:
    found = []
    for text, _ in one.texts(key):
        if not text or "*" in text[1:-1] or (len(text) > 1 and text[0] == text[-1] == "*"):
            one.error(key, f"has {text!r}", "a `*` may stand alone, at the begin or at the end")
        else:
            found.append(text.removeprefix("spiffe://") if "rincipal" in key else text)
            if text.startswith("spiffe://"):
                one.warn(key, f"has {text!r}", "names stand without spiffe://; it is left out")
    return tuple(found)


def _accounts(one: Fields, key: str, namespace: str) -> tuple[tuple[str, str], ...]:
    found = []
    for text, _ in one.texts(key):
        where, slash, name = text.rpartition("/")
        if not name or "*" in text or "/" in where or (slash and not where):
            one.error(key, f"has {text!r}", "write <namespace>/<service account>, or the service account alone for this namespace")
        else:
            found.append((where or namespace, name))
    return tuple(found)


def _blocks(one: Fields, key: str) -> tuple[str, ...]:
    found = []
    for text, _ in one.texts(key):
        try:
            if "/" in text:
                ip_network(text, strict=False)
            else:
                ip_address(text)
        except ValueError:
            one.error(key, f"has {text!r}, which is neither an address nor a block of them", "write 10.0.0.0/8, or one address")
        else:
            found.append(text)
    return tuple(found)


def _port_texts(one: Fields, key: str) -> tuple[str, ...]:
    found = []
    for text, _ in one.texts(key):
        if not _PORT_KEY.match(text) or not 0 < int(text) < 65536:
            one.error(key, f"has {text!r}, which is no port between 1 and 65535")
        else:
            found.append(text)
    return tuple(found)


def _ports(one: Fields, key: str) -> tuple[int, ...]:
    return tuple(int(text) for text in _port_texts(one, key))
