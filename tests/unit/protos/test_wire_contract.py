"""Our .proto files say on the wire what upstream's say, and the generated code is current."""

from __future__ import annotations

import base64
import importlib
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pb2, json_format

from protos import generate
from protos.gen.envoy.config.cluster.v3 import cluster_pb2
from protos.gen.envoy.config.core.v3 import core_pb2
from protos.gen.envoy.config.endpoint.v3 import endpoint_pb2
from protos.gen.envoy.config.listener.v3 import listener_pb2
from protos.gen.envoy.config.route.v3 import route_pb2
from protos.gen.envoy.extensions.filters.http.router.v3 import router_pb2
from protos.gen.envoy.extensions.filters.network.http_connection_manager.v3 import http_connection_manager_pb2
from protos.gen.envoy.extensions.filters.network.tcp_proxy.v3 import tcp_proxy_pb2
from protos.gen.envoy.service.discovery.v3 import discovery_pb2
from protos.gen.istio import ca_pb2, security_pb2, workload_pb2
from tests.support import xds_oracle


def modules() -> list[Any]:
    return [importlib.import_module(f"protos.gen.{source[: -len('.proto')].replace('/', '.')}_pb2") for source in generate.sources()]


def filled(message: Any, depth: int = 0) -> Any:
    """Sets every field of `message`, the last of each oneof, to something that is not its default."""
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            kind = field.message_type.fields_by_name["value"]
            if kind.message_type is None:
                value["key"] = "value"
            elif kind.message_type.full_name == "google.protobuf.Struct":
                value["key"].update({"a": "b"})
        elif field.message_type is not None:
            inner = value.add() if field.is_repeated else value
            name = field.message_type.full_name
            if name == "google.protobuf.Any":
                inner.Pack(router_pb2.Router())
            elif name == "google.protobuf.Struct":
                inner.update({"NAMESPACE": "default"})
            elif depth < 9:
                inner.SetInParent() if not field.is_repeated else None
                filled(inner, depth + 1)
        else:
            sample = {
                field.CPPTYPE_STRING: b"\x0a\x00\x00\x01" if field.type == field.TYPE_BYTES else f"the {field.name}",
                field.CPPTYPE_BOOL: True,
                field.CPPTYPE_ENUM: 1,
            }.get(field.cpp_type, 7)
            if field.is_repeated:
                value.append(sample)
            else:
                setattr(message, field.name, sample)
    return message


def test_the_generated_code_is_current() -> None:
    assert generate.differences() == [], "run `python -m protos.generate`"


def test_generated_code_imports_generated_code_only_from_its_own_package() -> None:
    for path in generate.GEN.rglob("*.py"):
        for line in path.read_text().splitlines():
            if line.startswith(("from ", "import ")):
                assert line.startswith(("from protos.gen.", "from google.protobuf")), f"{path}: {line}"


def test_every_message_field_enum_and_method_is_upstreams() -> None:
    files = []
    for module in modules():
        if module.DESCRIPTOR.package.startswith("istio."):
            continue
        proto = descriptor_pb2.FileDescriptorProto()
        module.DESCRIPTOR.CopyToProto(proto)
        files.append(base64.b64encode(proto.SerializeToString()).decode())
    answer = xds_oracle.ask({"compare": files})
    assert answer["wrong"] == []
    assert answer["seen"] > 150  # it really looked


def test_the_oracle_finds_a_wrong_field_number() -> None:
    proto = descriptor_pb2.FileDescriptorProto()
    endpoint_pb2.DESCRIPTOR.CopyToProto(proto)
    proto.message_type[0].field[0].number = 9
    answer = xds_oracle.ask({"compare": [base64.b64encode(proto.SerializeToString()).decode()]})
    assert len(answer["wrong"]) == 1 and "Endpoint.address" in answer["wrong"][0]


def test_an_independent_decoder_reads_every_field_of_every_resource_and_request() -> None:
    types = [
        discovery_pb2.DiscoveryRequest,
        discovery_pb2.DiscoveryResponse,
        discovery_pb2.DeltaDiscoveryRequest,
        discovery_pb2.DeltaDiscoveryResponse,
        core_pb2.ConfigSource,
        core_pb2.Metadata,
        listener_pb2.Listener,
        route_pb2.RouteConfiguration,
        cluster_pb2.Cluster,
        endpoint_pb2.ClusterLoadAssignment,
        http_connection_manager_pb2.HttpConnectionManager,
        tcp_proxy_pb2.TcpProxy,
    ]
    ours = [filled(one()) for one in types]
    asked = [[one.DESCRIPTOR.full_name, base64.b64encode(one.SerializeToString()).decode()] for one in ours]
    answers = xds_oracle.ask({"decode": asked})["messages"]
    assert len(answers) == len(ours)
    for one, answer in zip(ours, answers, strict=True):
        assert answer["unknown"] == []
        assert answer["json"] == json_format.MessageToDict(one, preserving_proto_field_name=True)
        assert type(one).FromString(base64.b64decode(answer["bytes"])) == one


# Istio's API has no package to compare with: numbers as in its workload.proto and authorization.proto, written down a second time
WORKLOAD_API = {
    "Address": "workload=1 service=2",
    "Workload": "name=1 namespace=2 addresses=3 network=4 tunnel_protocol=5 trust_domain=6 service_account=7 waypoint=8 node=9 "
    "canonical_name=10 canonical_revision=11 workload_type=12 workload_name=13 native_tunnel=14 "
    "authorization_policies=16 status=17 cluster_id=18 network_gateway=19 uid=20 hostname=21 services=22 "
    "application_tunnel=23 locality=24 network_mode=25 extensions=26 capacity=27",
    "Service": "name=1 namespace=2 hostname=3 addresses=4 ports=5 subject_alt_names=6 waypoint=7 load_balancing=8 ip_families=9 "
    "extensions=10 canonical=11 ingress_use_waypoint=12 weighted_waypoints=13 visibility=14",
    "Port": "service_port=1 target_port=2 app_protocol=3",
    "PortList": "ports=1",
    "NetworkAddress": "network=1 address=2 length=3",
    "NamespacedHostname": "namespace=1 hostname=2",
    "GatewayAddress": "hostname=1 address=2 hbone_mtls_port=3",
    "LoadBalancing": "routing_preference=1 mode=2 health_policy=3",
    "ApplicationTunnel": "protocol=1 port=2",
    "Locality": "region=1 zone=2 subzone=3",
    "Extension": "name=1 config=2",
    "WeightedWaypoint": "destination=1 weight=2",
}
WORKLOAD_ENUMS = {
    "AppProtocol": "UNKNOWN HTTP11 HTTP2 GRPC TCP TLS",
    "TunnelProtocol": "NONE HBONE LEGACY_ISTIO_MTLS",
    "WorkloadStatus": "HEALTHY UNHEALTHY",
    "WorkloadType": "DEPLOYMENT CRONJOB POD JOB",
    "IPFamilies": "AUTOMATIC IPV4_ONLY IPV6_ONLY DUAL",
    "NetworkMode": "STANDARD HOST_NETWORK",
}


def test_the_certificate_service_has_istios_fields_and_method() -> None:
    messages = {name: {f"{one.name}={one.number}:{one.type}" for one in message.fields}
                for name, message in ca_pb2.DESCRIPTOR.message_types_by_name.items()}
    text, int64, inner = descriptor_pb2.FieldDescriptorProto.TYPE_STRING, descriptor_pb2.FieldDescriptorProto.TYPE_INT64, 11
    assert messages == {
        "IstioCertificateRequest": {f"csr=1:{text}", f"validity_duration=3:{int64}", f"metadata=4:{inner}"},
        "IstioCertificateResponse": {f"cert_chain=1:{text}"},
    }
    (service,) = ca_pb2.DESCRIPTOR.services_by_name.values()
    assert service.full_name == "istio.v1.auth.IstioCertificateService"
    assert [method.name for method in service.methods] == ["CreateCertificate"]


SECURITY_API = {
    "Authorization": "name=1 namespace=2 scope=3 action=4 rules=5 dry_run=6",
    "Rule": "clauses=1",
    "Clause": "matches=2",
    "Match": "namespaces=1 not_namespaces=2 principals=3 not_principals=4 source_ips=5 not_source_ips=6 destination_ips=7 "
    "not_destination_ips=8 destination_ports=9 not_destination_ports=10 service_accounts=11 not_service_accounts=12",
    "Address": "address=1 length=2",
    "StringMatch": "exact=1 prefix=2 suffix=3 presence=4",
    "ServiceAccountMatch": "namespace=1 service_account=2",
}
SECURITY_ENUMS = {"Scope": "GLOBAL NAMESPACE WORKLOAD_SELECTOR", "Action": "ALLOW DENY"}


def test_policies_have_istios_field_numbers_and_enums() -> None:
    found = {name: {f"{one.name}={one.number}" for one in message.fields}
             for name, message in security_pb2.DESCRIPTOR.message_types_by_name.items()}
    assert found == {name: set(fields.split()) for name, fields in SECURITY_API.items()}
    assert {name: " ".join(value.name for value in sorted(enum.values, key=lambda value: value.number))
            for name, enum in security_pb2.DESCRIPTOR.enum_types_by_name.items()} == SECURITY_ENUMS


@pytest.mark.parametrize("message", sorted(WORKLOAD_API))
def test_the_workload_api_has_istios_field_numbers(message: str) -> None:
    fields = workload_pb2.DESCRIPTOR.message_types_by_name[message].fields
    assert {f"{one.name}={one.number}" for one in fields} == set(WORKLOAD_API[message].split())


def test_the_workload_api_has_istios_messages_and_enums() -> None:
    assert set(workload_pb2.DESCRIPTOR.message_types_by_name) == set(WORKLOAD_API)
    assert {
        name: " ".join(value.name for value in sorted(enum.values, key=lambda value: value.number))
        for name, enum in workload_pb2.DESCRIPTOR.enum_types_by_name.items()
    } == WORKLOAD_ENUMS


def test_a_workload_is_the_bytes_that_ztunnel_expects() -> None:
    port = workload_pb2.Port(service_port=80, target_port=8080, app_protocol=workload_pb2.HTTP11)
    one = workload_pb2.Address(
        workload=workload_pb2.Workload(
            uid="u", name="n", addresses=[b"\x0a\x00\x00\x01"], services={"d/h": workload_pb2.PortList(ports=[port])}
        )
    )
    inner = b"\x0a\x01n\x1a\x04\x0a\x00\x00\x01\xa2\x01\x01u\xb2\x01\x10\x0a\x03d/h\x12\x09\x0a\x07\x08\x50\x10\x90\x3f\x18\x01"
    assert one.SerializeToString(deterministic=True) == b"\x0a" + bytes([len(inner)]) + inner


def test_every_source_is_generated() -> None:
    assert {Path(module.__file__).stem for module in modules()} == {f"{Path(source).stem}_pb2" for source in generate.sources()}
