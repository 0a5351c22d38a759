from tests.support.kubernetes.fixtures import client, server

__all__ = ["client", "server"]
