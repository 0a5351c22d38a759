"""A gRPC server and client without generated code: `rpc.py serve PORT`, `rpc.py call TARGET TEXT`."""
from __future__ import annotations

import sys
from concurrent import futures

import grpc

METHOD = "/test.Echo/Say"


def serve(port: str) -> None:
    server = grpc.server(futures.ThreadPoolExecutor(4))
    say = grpc.unary_unary_rpc_method_handler(lambda request, _: request[::-1])
    stream = grpc.unary_stream_rpc_method_handler(lambda request, _: iter([request] * 100))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Echo", {"Say": say, "Repeat": stream}),))
    server.add_insecure_port(f"0.0.0.0:{port}")
    server.start()
    server.wait_for_termination()


def call(target: str, text: str) -> None:
    with grpc.insecure_channel(target, options=[("grpc.enable_http_proxy", 0)]) as channel:
        print(channel.unary_unary(METHOD)(text.encode(), timeout=10).decode())
        print(sum(1 for _ in channel.unary_stream("/test.Echo/Repeat")(b"x" * 1000, timeout=10)))


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        call(sys.argv[2], sys.argv[3])
