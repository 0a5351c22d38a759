"""What a service port carries: appProtocol first, then the prefix of its name, then well-known ports. Istio's table."""
from __future__ import annotations

from controlplane.model.objects import Protocol
from controlplane.sources.fields import Fields

_NAMES = {
    "http": Protocol.HTTP, "http2": Protocol.HTTP2, "https": Protocol.TLS, "tls": Protocol.TLS, "grpc": Protocol.GRPC,
    "grpc-web": Protocol.HTTP, "tcp": Protocol.TCP, "mongo": Protocol.TCP, "mysql": Protocol.TCP, "redis": Protocol.TCP,
}
_APP = {**_NAMES, "kubernetes.io/h2c": Protocol.HTTP2, "kubernetes.io/ws": Protocol.HTTP, "kubernetes.io/wss": Protocol.TLS,
        "ws": Protocol.HTTP, "wss": Protocol.TLS, "h2c": Protocol.HTTP2}
SERVER_FIRST = frozenset({25, 53, 3306, 27017})  # SMTP, DNS, MySQL, MongoDB: sniffing would wait for the client


def declared(port: Fields, app: str, name: str, number: int) -> Protocol:
    """An unknown appProtocol is a warning and counts as not declared."""
    if app:
        if found := _APP.get(app.lower()):
            return found
        port.warn("appProtocol", f"{app!r} is not known, so the protocol is found out from the first bytes",
                  f"it may be {', '.join(sorted(_APP))}")
    lower = name.lower()
    if lower == "grpc-web" or lower.startswith("grpc-web-"):
        return Protocol.HTTP
    if found := _NAMES.get(lower.partition("-")[0]):
        return found
    return Protocol.TCP if number in SERVER_FIRST else Protocol.AUTO
