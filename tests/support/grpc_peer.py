"""gRPC programs that know nothing of ours, run as processes of their own.

`python grpc_peer.py serve PORT ADDRESS...`: a server per address that answers `/echo.Echo/Who` with its address.
`python grpc_peer.py ask TARGET`: a client; reads `COUNT [HEADER=VALUE]` lines on stdin, writes how often each server answered as JSON.
"""

import json
import sys
from collections import Counter
from concurrent import futures

import grpc

METHOD = "/echo.Echo/Who"


def serve(port, addresses):
    servers = []
    for address in addresses:
        server = grpc.server(futures.ThreadPoolExecutor(2))
        handler = grpc.unary_unary_rpc_method_handler(lambda _request, _context, who=address: who.encode())
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("echo.Echo", {"Who": handler}),))
        assert server.add_insecure_port(f"{address}:{port}")
        server.start()
        servers.append(server)
    print("ready", flush=True)
    sys.stdin.read()


def ask(target):
    with grpc.insecure_channel(target) as channel:
        call = channel.unary_unary(METHOD)
        for line in sys.stdin:
            count, _, header = line.strip().partition(" ")
            found = Counter()
            metadata = [tuple(header.split("=", 1))] if header else []
            for _ in range(int(count)):
                try:
                    found[call(b"", timeout=15, metadata=metadata).decode()] += 1
                except grpc.RpcError as error:
                    found[f"{error.code().name}: {error.details()}"] += 1
            print(json.dumps(found), flush=True)


if sys.argv[1] == "serve":
    serve(sys.argv[2], sys.argv[3:])
else:
    ask(sys.argv[2])
