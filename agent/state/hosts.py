"""Host names of the mesh and their addresses, for those who ask by name. A change costs what it changes."""
from __future__ import annotations

from agent.model.workload import IPAddress, Service, Workload


class Hosts:
    """Services by host name, and the workloads behind those that have no virtual address."""

    def __init__(self) -> None:
        self._services: dict[str, dict[str, Service]] = {}  # host in lower case -> namespace -> service
        self._endpoints: dict[str, dict[str, Workload]] = {}  # service key -> workload uid -> workload

    def addresses(self, host: str, namespace: str) -> tuple[IPAddress, ...]:
        """Of the service of that name (lower case, no final dot), as a client in `namespace` is to see it; () when there is none.

        Of several services of a name the client's own namespace's is meant, else the first by namespace that has addresses. A wildcard
        (`*.example.com`) holds for every name below it that no longer one and no exact one holds for. Without virtual addresses it is its
        healthy workloads.
        """
        name, rest = host, host
        while True:
            if services := self._services.get(name):
                for service in ([services[namespace]] if namespace in services else [services[key] for key in sorted(services)]):
                    if found := service.addresses or self._behind(service):
                        return found
                return ()
            _, dot, rest = rest.partition(".")
            if not dot:
                return ()
            name = f"*.{rest}"

    def _behind(self, service: Service) -> tuple[IPAddress, ...]:
        workloads = self._endpoints.get(service.key, {}).values()
        return tuple(dict.fromkeys(address for one in workloads if one.healthy for address in one.addresses))

    def put_service(self, service: Service) -> None:
        self._services.setdefault(service.hostname.lower(), {})[service.namespace] = service

    def remove_service(self, service: Service) -> None:
        services = self._services.get(service.hostname.lower(), {})
        services.pop(service.namespace, None)
        if not services:
            self._services.pop(service.hostname.lower(), None)

    def change_workload(self, before: Workload | None, after: Workload | None) -> None:
        """None: it was not there, or is no more."""
        old = {port.service for port in before.ports} if before else set()
        new = {port.service for port in after.ports} if after else set()
        for key in old - new:
            if before is not None and (workloads := self._endpoints.get(key)) is not None:
                workloads.pop(before.uid, None)
                if not workloads:
                    del self._endpoints[key]
        if after is not None:
            for key in new:
                self._endpoints.setdefault(key, {})[after.uid] = after
