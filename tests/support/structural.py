"""What Kubernetes' API server makes of an object by a structural schema (apiextensions.k8s.io/v1): what it refuses, and what it drops.

Only the words that our schemas use; any other word is an error of the schema, not something to be passed over.
"""
from __future__ import annotations

from typing import Any

TYPES: dict[str, type | tuple[type, ...]] = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}
KEEP = "x-kubernetes-preserve-unknown-fields"
WORDS = {"type", "properties", "additionalProperties", "items", "required", "enum", "minimum", "maximum", "minLength", "maxLength",
         "nullable", "description", KEEP}


def faults_of_schema(schema: dict[str, Any], path: str = "") -> list[str]:
    """Why a schema is not structural ("Specifying a structural schema" of the CRD documentation). Empty: it is."""
    found = [f"{path}: unknown word {word}" for word in schema if word not in WORDS]
    if "type" not in schema and not schema.get(KEEP):
        found.append(f"{path}: has no type")
    if "properties" in schema and "additionalProperties" in schema:
        found.append(f"{path}: has properties and additionalProperties")
    if schema.get("type") == "array" and "items" not in schema:
        found.append(f"{path}: an array without items")
    found += [f"{path}: requires {name}, which it does not have" for name in schema.get("required", ()) if name not in schema["properties"]]
    for name, inner in schema.get("properties", {}).items():
        found += faults_of_schema(inner, f"{path}.{name}")
    for word in ("additionalProperties", "items"):
        if word in schema:
            found += faults_of_schema(schema[word], f"{path}.{word}")
    return found


def admitted(schema: dict[str, Any], value: Any, path: str = "") -> tuple[Any, list[str]]:
    """The value as it would be stored (pruned, as the server does before it validates), and why it would be refused."""
    if value is None:
        return None, [] if schema.get("nullable") or "type" not in schema else [f"{path}: null"]
    kind = schema.get("type")
    if kind is not None and (not isinstance(value, TYPES[kind]) or (kind == "integer" and isinstance(value, bool))):
        return value, [f"{path}: {value!r} is no {kind}"]
    found: list[str] = []
    if "enum" in schema and value not in schema["enum"]:
        found.append(f"{path}: {value!r} is none of {schema['enum']}")
    if not schema.get("minimum", value) <= value <= schema.get("maximum", value) if kind == "integer" else False:
        found.append(f"{path}: {value} is out of bounds")
    if kind == "string" and not schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value)):
        found.append(f"{path}: {value!r} has the wrong length")
    if kind == "array":
        items = [admitted(schema["items"], item, f"{path}[{number}]") for number, item in enumerate(value)]
        return [item for item, _ in items], found + [fault for _, faults in items for fault in faults]
    if kind != "object":
        return value, found
    stored = {}
    for name, inner in value.items():
        below = schema.get("properties", {}).get(name, schema.get("additionalProperties"))
        if below is None:
            if schema.get(KEEP):
                stored[name] = inner
        elif inner is not None or below.get("nullable") or "type" not in below:  # else null is taken out
            stored[name], faults = admitted(below, inner, f"{path}.{name}")
            found += faults
    found += [f"{path}: {name} is missing" for name in schema.get("required", ()) if name not in stored]
    return stored, found
