"""Readiness probes, sent from the node with the address that capture knows and lets pass (169.254.7.127)."""
from __future__ import annotations

import asyncio
import contextlib
import http.client
import socket
import ssl
from collections.abc import Awaitable, Callable

from agent import netlink
from agent.lab.place import PROBE_SOURCE_4, PROBE_SOURCE_6
from agent.lab.spec import Probe, ProbeKind
from agent.model.workload import IPAddress

MAX_HEAD = 16 << 10  # bytes of an answer that are looked at; the status line is enough

Exec = Callable[[tuple[str, ...], float], Awaitable[int]]


async def once(probe: Probe, node_namespace: str, address: IPAddress, execute: Exec) -> str:
    """Probe once. "" if the container is ready, else why not. `execute` runs a command in it and returns its status."""
    try:
        if probe.kind is ProbeKind.EXEC:
            status = await execute(probe.command, probe.timeout)
            return "" if status == 0 else f"{' '.join(probe.command)} ended with {status}"
        return await asyncio.to_thread(_ask, probe, node_namespace, address)
    except TimeoutError:
        return f"no answer within {probe.timeout:g} s"
    except OSError as error:
        return f"{_what(probe, address)}: {error.strerror or error}"


def _what(probe: Probe, address: IPAddress) -> str:
    return f"{probe.kind} {address} port {probe.port}" + (f" {probe.path}" if probe.kind is ProbeKind.HTTP else "")


def _ask(probe: Probe, node_namespace: str, address: IPAddress) -> str:
    source = PROBE_SOURCE_4 if address.version == 4 else PROBE_SOURCE_6
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    plug = netlink.in_netns(node_namespace, lambda: socket.socket(family, socket.SOCK_STREAM))
    with contextlib.closing(plug):
        plug.settimeout(probe.timeout)
        plug.bind((str(source), 0))
        plug.connect((str(address), probe.port))
        if probe.kind is ProbeKind.TCP:
            return ""
        if probe.scheme == "HTTPS":  # as the kubelet: the certificate is not looked at
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            plug = context.wrap_socket(plug)
        connection = http.client.HTTPConnection(str(address), probe.port)
        connection.sock = plug
        try:
            connection.putrequest("GET", probe.path, skip_host=any(name.lower() == "host" for name, _ in probe.headers),
                                  skip_accept_encoding=True)
            for name, value in (("User-Agent", "narrows-lab-probe"), ("Connection", "close"), *probe.headers):
                connection.putheader(name, value)
            connection.endheaders()
            status = connection.getresponse().status
        except (http.client.HTTPException, ValueError) as error:
            return f"{_what(probe, address)}: no HTTP answer ({type(error).__name__}: {error})"
    return "" if 200 <= status < 400 else f"{_what(probe, address)}: answered {status}"
