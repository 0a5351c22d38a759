"""What Narrows keeps for itself in the namespace of every captured pod. The twins are in ext/core/protocol.pxd and bpf/narrows.h."""
from __future__ import annotations

DNS_PORT = 15053  # UDP and TCP
SOCKET_MARK = 0x539  # SO_MARK of our sockets; an application may not set it
