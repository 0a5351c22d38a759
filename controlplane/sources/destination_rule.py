"""DestinationRule -> model."""
from __future__ import annotations

from controlplane.model.objects import Metadata
from controlplane.model.routing import DestinationRule, Subset
from controlplane.sources.fields import Fields
from controlplane.sources.matches import traffic_policy
from controlplane.sources.virtual_service import checked_host, export_to_all


def destination_rule(top: Fields, meta: Metadata) -> DestinationRule | None:
    top.ignore("status")
    spec = top.fields("spec", required=True)
    if spec is None:
        return None
    text = spec.text("host", required=True)
    host = checked_host(spec, "host", text, meta.key.namespace) if text else ""
    export_to_all(spec)
    spec.refuse({"workloadSelector": "it is for all clients of the host; remove it"})
    policy = traffic_policy(spec)
    subsets: dict[str, Subset] = {}
    for one in spec.list_of_fields("subsets"):
        found = Subset(one.name("name", required=True), one.labels("labels"), traffic_policy(one), one.place("name"))
        one.finish()
        if found.name in subsets:
            one.error("name", f"{found.name} is here twice", f"the first is in line {subsets[found.name].place.line}")
        elif found.name:
            subsets[found.name] = found
    spec.finish()
    return DestinationRule(meta, host, spec.place("host"), policy, tuple(subsets.values()))
