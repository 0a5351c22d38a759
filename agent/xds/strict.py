"""What of Envoy's messages, and of policies, this version honours, as data: anything else that is set is refused by name, not ignored.

A route with a mirror that is silently not mirrored is worse than a route that is refused with a reason. `HONOURED` lists
per message the fields that the decoder reads, `HARMLESS` those whose value changes nothing for us, with the reason.
"""
from __future__ import annotations

from typing import Any

from google.protobuf import unknown_fields
from google.protobuf.descriptor import FieldDescriptor

HONOURED: dict[str, frozenset[str]] = {name: frozenset(fields.split()) for name, fields in {
    "istio.security.Authorization": "name namespace scope action rules dry_run",
    "istio.security.Rule": "clauses",
    "istio.security.Clause": "matches",
    "istio.security.Match":
        "namespaces not_namespaces principals not_principals source_ips not_source_ips destination_ips not_destination_ips "
        "destination_ports not_destination_ports service_accounts not_service_accounts",
    "istio.security.Address": "address length",
    "istio.security.StringMatch": "exact prefix suffix presence",
    "istio.security.ServiceAccountMatch": "namespace service_account",
    "envoy.config.listener.v3.Listener": "name api_listener default_filter_chain",
    "envoy.config.listener.v3.ApiListener": "api_listener",
    "envoy.config.listener.v3.FilterChain": "name filters",
    "envoy.config.listener.v3.Filter": "name typed_config",
    "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager":
        "rds route_config http_filters",
    "envoy.extensions.filters.network.http_connection_manager.v3.Rds": "route_config_name",
    "envoy.extensions.filters.network.http_connection_manager.v3.HttpFilter": "name typed_config",
    "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy": "cluster weighted_clusters",
    "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy.WeightedCluster": "clusters",
    "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy.WeightedCluster.ClusterWeight": "name weight",
    "envoy.config.route.v3.RouteConfiguration": "name virtual_hosts",
    "envoy.config.route.v3.VirtualHost": "name domains routes",
    "envoy.config.route.v3.Route":
        "name match route request_headers_to_add request_headers_to_remove response_headers_to_add "
        "response_headers_to_remove",
    "envoy.config.route.v3.RouteMatch":
        "prefix path safe_regex path_separated_prefix case_sensitive headers query_parameters",
    "envoy.config.route.v3.RouteAction": "cluster weighted_clusters timeout",
    "envoy.config.route.v3.WeightedCluster": "clusters",
    "envoy.config.route.v3.WeightedCluster.ClusterWeight":
        "name weight request_headers_to_add request_headers_to_remove response_headers_to_add "
        "response_headers_to_remove",
    "envoy.config.route.v3.HeaderMatcher":
        "name string_match present_match invert_match treat_missing_header_as_empty exact_match prefix_match "
        "suffix_match contains_match safe_regex_match",
    "envoy.config.route.v3.QueryParameterMatcher": "name string_match present_match",
    "envoy.type.matcher.v3.StringMatcher": "exact prefix suffix safe_regex contains ignore_case",
    "envoy.type.matcher.v3.RegexMatcher": "regex",
    "envoy.config.core.v3.HeaderValueOption": "header append append_action",
    "envoy.config.core.v3.HeaderValue": "key value",
    "envoy.config.cluster.v3.Cluster":
        "name type eds_cluster_config connect_timeout lb_policy load_assignment metadata",
    "envoy.config.cluster.v3.Cluster.EdsClusterConfig": "service_name",
    "envoy.config.endpoint.v3.ClusterLoadAssignment": "cluster_name endpoints",
    "envoy.config.endpoint.v3.LocalityLbEndpoints": "lb_endpoints priority",
    "envoy.config.endpoint.v3.LbEndpoint": "endpoint health_status load_balancing_weight",
    "envoy.config.endpoint.v3.Endpoint": "address",
    "envoy.config.core.v3.Address": "socket_address",
    "envoy.config.core.v3.SocketAddress": "address port_value",
}.items()}

HARMLESS: dict[str, frozenset[str]] = {name: frozenset(fields.split()) for name, fields in {
    # names of statistics, and what only Envoy's own listener sockets and codecs know
    "envoy.config.listener.v3.Listener": "stat_prefix traffic_direction metadata",
    "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager": "stat_prefix codec_type",
    # of a filter that we do not know it would say that it may be left out; it is refused all the same
    "envoy.extensions.filters.network.http_connection_manager.v3.HttpFilter": "is_optional",
    "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy": "stat_prefix",
    "envoy.config.route.v3.Route": "metadata decorator stat_prefix",
    # on demand a cluster always comes later; a Host is matched without its port, for the port was dialled
    "envoy.config.route.v3.RouteConfiguration": "validate_clusters ignore_port_in_host_matching",
    "envoy.config.route.v3.VirtualHost": "include_request_attempt_count",  # adds a header to retries; there are none
    # where to ask: always here, over this stream (ADS)
    "envoy.extensions.filters.network.http_connection_manager.v3.Rds": "config_source",
    "envoy.config.cluster.v3.Cluster.EdsClusterConfig": "eds_config",
    # total of the weights: Envoy computes it too
    "envoy.config.route.v3.WeightedCluster": "total_weight",
    "envoy.type.matcher.v3.RegexMatcher": "google_re2",  # the engine; ours is RE2
    "envoy.config.cluster.v3.Cluster": "alt_stat_name least_request_lb_config",
    "envoy.config.endpoint.v3.ClusterLoadAssignment": "policy",
    # where an endpoint is; locality comes with workloads, and locality weights need a setting we do not take
    "envoy.config.endpoint.v3.LocalityLbEndpoints": "locality load_balancing_weight",
    "envoy.config.endpoint.v3.LbEndpoint": "metadata",
    "envoy.config.endpoint.v3.Endpoint": "hostname",
    "envoy.config.core.v3.SocketAddress": "protocol",
    "envoy.config.core.v3.HeaderValueOption": "keep_empty_value",
}.items()}
# Names of fields that our messages leave out, for the error that refuses them (Envoy's v3 API reference).
NAMES: dict[str, dict[int, str]] = {
    "envoy.config.route.v3.Route": {3: "redirect", 7: "direct_response", 13: "typed_per_filter_config",
                                    18: "non_forwarding_action"},
    "envoy.config.route.v3.RouteAction": {
        2: "cluster_header", 5: "prefix_rewrite", 6: "host_rewrite_literal", 7: "auto_host_rewrite", 9: "retry_policy",
        13: "rate_limits", 15: "hash_policy", 17: "cors", 24: "idle_timeout", 25: "upgrade_configs",
        28: "max_stream_duration", 30: "request_mirror_policies", 32: "regex_rewrite"},
    "envoy.config.route.v3.VirtualHost": {4: "require_tls", 7: "request_headers_to_add", 8: "cors",
                                          10: "response_headers_to_add", 16: "retry_policy"},
    "envoy.config.route.v3.RouteConfiguration": {4: "response_headers_to_add", 6: "request_headers_to_add", 9: "vhds"},
    "envoy.config.cluster.v3.Cluster": {10: "circuit_breakers", 19: "outlier_detection", 23: "ring_hash_lb_config",
                                        24: "transport_socket", 43: "transport_socket_matches", 8: "health_checks"},
}
NESTED_BOUND = 32  # messages within messages; Envoy's deepest of those above is 9


class Refused(ValueError):
    """A resource that this version cannot honour; the text is for an operator."""


def check(message: Any, where: str = "", depth: int = 0) -> None:
    """Raises Refused when `message`, or a message in it, sets what is neither honoured nor harmless."""
    name = message.DESCRIPTOR.full_name
    honoured = HONOURED.get(name)
    if honoured is None:
        return  # a wrapper, a duration, an Any: read whole by the decoder, or not at all
    if depth > NESTED_BOUND:
        raise Refused(f"{where}: nested more than {NESTED_BOUND} messages deep")
    harmless = HARMLESS.get(name, frozenset())
    short = name.rpartition(".")[2]
    unknown = unknown_fields.UnknownFieldSet(message)
    if len(unknown):
        number = unknown[0].field_number
        said = NAMES.get(name, {}).get(number, f"field number {number}")
        raise Refused(f"{where + '.' if where else ''}{said} of {short} is not supported")
    for field, value in message.ListFields():
        if field.name in harmless:
            continue
        path = f"{where}.{field.name}" if where else field.name
        if field.name not in honoured:
            raise Refused(f"{path} of {short} is not supported")
        if field.type != FieldDescriptor.TYPE_MESSAGE:
            continue
        for number, part in enumerate(value if _repeated(field) else [value]):
            check(part, f"{path}[{getattr(part, 'name', '') or number}]" if _repeated(field) else path, depth + 1)


def _repeated(field: Any) -> bool:
    try:
        return bool(field.is_repeated)
    except AttributeError:  # protobuf before 6.31
        return bool(field.label == FieldDescriptor.LABEL_REPEATED)
