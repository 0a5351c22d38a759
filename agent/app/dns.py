"""DNS of this node's captured pods: which are served, by which sockets, and what is counted."""
from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from agent.app.events import Events
from agent.dns.forward import BUCKETS, Figures
from agent.dns.names import Hosts
from agent.dns.pod import PodDns, Who, open_pod
from agent.model.pod import CaptureSettings, LocalPod
from agent.telemetry.dns import DnsFigures

CLUSTER_DOMAIN = "cluster.local"  # of Kubernetes' service names, as the control plane writes them


class Dns:
    """`default`: pods whose annotation says nothing are served."""

    def __init__(self, hosts: Hosts, events: Events, *, default: bool) -> None:
        self._hosts, self._events, self._default = hosts, events, default
        self._pods: dict[str, PodDns] = {}  # by uid
        self._counted = Figures()

    def wanted(self, settings: CaptureSettings) -> bool:
        return self._default if settings.dns is None else settings.dns

    async def serve(self, pod: LocalPod, sockets: Callable[[], Awaitable[list[int]]]) -> bool:
        """Whether the pod's questions are answered from now on. When its sockets cannot be had, an event says why.

        Raises ConnectionError when the keeper is away.
        """
        served = self._pods.get(pod.uid)
        who = Who(pod.uid, pod.ref, pod.namespace, pod.netns)
        if served is not None and served.who == who:
            return True
        try:
            descriptors = await sockets()
            self.drop(pod.uid)
            self._pods[pod.uid] = open_pod(who, descriptors, self._hosts, CLUSTER_DOMAIN, self._counted)
        except ConnectionError:
            raise
        except OSError as error:
            self._events.add("DnsUnavailable", f"pod {pod.ref}", f"DNS is not captured: {error}; the pod asks its own resolver",
                             warning=True)
            return False
        return True

    def drop(self, uid: str) -> None:
        """Its sockets are closed here; what waits in them is the keeper's."""
        served = self._pods.pop(uid, None)
        if served is not None:
            served.close()

    def drop_all(self) -> None:
        for uid in list(self._pods):
            self.drop(uid)

    close = drop_all

    def shown(self, uid: str) -> dict[str, Any] | None:
        if (served := self._pods.get(uid)) is None:
            return None
        return {"requests": served.requests, "mesh": served.answered, "hits": served.hits, "waiting": served.waiting,
                "cached": len(served.cache), "cachedBytes": served.cache.bytes}

    def figures(self) -> DnsFigures:
        """For metrics; called from the thread that renders them."""
        counted, pods = self._counted, list(self._pods.values())
        return DnsFigures(len(pods), dict(counted.requests), counted.mesh, counted.cached, counted.upstream, dict(counted.failures),
                          dict(counted.dropped), tuple(zip(BUCKETS, counted.buckets[:-1], strict=True)), counted.buckets[-1],
                          counted.seconds, sum(one.waiting for one in pods), sum(one.cache.bytes for one in pods))
