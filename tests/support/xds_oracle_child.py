"""Runs in the oracle's environment, knows nothing of ours. Reads one question on stdin, writes the answer to stdout.

`compare`: descriptors of ours (base64 of FileDescriptorProtos) against its own; the answer lists every difference.
`decode`: messages (name, base64); the answer has each as JSON, the field numbers it does not know, and its own encoding.
"""
import base64
import importlib
import json
import sys

from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory, unknown_fields

MODULES = """
envoy.service.discovery.v3.discovery_pb2 envoy.service.discovery.v3.ads_pb2
envoy.config.core.v3.base_pb2 envoy.config.core.v3.address_pb2 envoy.config.core.v3.config_source_pb2
envoy.config.core.v3.health_check_pb2
envoy.config.endpoint.v3.endpoint_pb2 envoy.config.endpoint.v3.endpoint_components_pb2
envoy.config.cluster.v3.cluster_pb2
envoy.config.listener.v3.listener_pb2 envoy.config.listener.v3.api_listener_pb2
envoy.config.listener.v3.listener_components_pb2
envoy.config.route.v3.route_pb2 envoy.config.route.v3.route_components_pb2
envoy.extensions.filters.network.http_connection_manager.v3.http_connection_manager_pb2
envoy.extensions.filters.network.tcp_proxy.v3.tcp_proxy_pb2 envoy.extensions.filters.http.router.v3.router_pb2
envoy.type.matcher.v3.string_pb2 envoy.type.matcher.v3.regex_pb2 envoy.type.v3.percent_pb2 google.rpc.status_pb2
"""
POOL = descriptor_pool.Default()


def shape(field, typename):
    """A field as tuple: number, label, type, type name, oneof."""
    return [field.number, field.label, field.type, typename, field.proto3_optional]


def fields_of(message):
    oneofs = [one.name for one in message.oneof_decl]
    return {field.name: [*shape(field, field.type_name), oneofs[field.oneof_index] if field.HasField("oneof_index") else ""]
            for field in message.field}


def compare(files):
    wrong, seen = [], 0

    def message(name, ours):
        nonlocal seen
        try:
            theirs = descriptor_pb2.DescriptorProto()
            POOL.FindMessageTypeByName(name).CopyToProto(theirs)
        except KeyError:
            wrong.append(f"{name}: upstream has no such message")
            return
        their_fields = fields_of(theirs)
        for field, own in fields_of(ours).items():
            seen += 1
            if field not in their_fields:
                wrong.append(f"{name}.{field}: upstream has no such field")
            elif own != their_fields[field]:
                wrong.append(f"{name}.{field}: ours {own}, upstream {their_fields[field]}")
        for nested in ours.nested_type:
            message(f"{name}.{nested.name}", nested)
        for one in ours.enum_type:
            enum(f"{name}.{one.name}", one)

    def enum(name, ours):
        nonlocal seen
        try:
            theirs = {value.name: value.number for value in POOL.FindEnumTypeByName(name).values}
        except KeyError:
            wrong.append(f"{name}: upstream has no such enum")
            return
        for value in ours.value:
            seen += 1
            if theirs.get(value.name) != value.number:
                wrong.append(f"{name}.{value.name}: ours {value.number}, upstream {theirs.get(value.name)}")

    for text in files:
        ours = descriptor_pb2.FileDescriptorProto.FromString(base64.b64decode(text))
        for one in ours.message_type:
            message(f"{ours.package}.{one.name}", one)
        for one in ours.enum_type:
            enum(f"{ours.package}.{one.name}", one)
        for service in ours.service:
            theirs = POOL.FindServiceByName(f"{ours.package}.{service.name}")
            for method in service.method:
                seen += 1
                other = descriptor_pb2.MethodDescriptorProto()
                theirs.methods_by_name[method.name].CopyToProto(other)
                other.ClearField("options")
                if other != method:
                    wrong.append(f"{ours.package}.{service.name}.{method.name}: ours {method}, upstream {other}")
    return {"wrong": wrong, "seen": seen}


def unknown(message, where=""):
    found = [f"{where}#{field.field_number}" for field in unknown_fields.UnknownFieldSet(message)]
    for field, value in message.ListFields():
        if field.type != field.TYPE_MESSAGE or field.message_type.GetOptions().map_entry:
            continue
        for part in value if field.is_repeated else [value]:
            found += unknown(part, f"{where}.{field.name}")
            if field.message_type.full_name == "google.protobuf.Any" and part.type_url:
                inner = message_factory.GetMessageClass(POOL.FindMessageTypeByName(part.TypeName()))()
                part.Unpack(inner)
                found += unknown(inner, f"{where}.{field.name}<{part.TypeName()}>")
    return found


def decode(messages):
    answer = []
    for name, text in messages:
        message = message_factory.GetMessageClass(POOL.FindMessageTypeByName(name))()
        message.ParseFromString(base64.b64decode(text))
        answer.append({"json": json_format.MessageToDict(message, preserving_proto_field_name=True),
                       "unknown": unknown(message),
                       "bytes": base64.b64encode(message.SerializeToString(deterministic=True)).decode()})
    return {"messages": answer}


def main():
    for module in MODULES.split():
        importlib.import_module(module)
    question = json.load(sys.stdin)
    json.dump(compare(question["compare"]) if "compare" in question else decode(question["decode"]), sys.stdout)


main()
