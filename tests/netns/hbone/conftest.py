"""The pods and the worker of tests/netns/proxy."""
from tests.netns.proxy.conftest import mesh, pods

__all__ = ["mesh", "pods"]
