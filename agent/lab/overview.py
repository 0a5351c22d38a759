"""What a lab shows of itself: status, events, and the pod that a name means."""
from __future__ import annotations

import asyncio
from typing import Any

from agent.lab.place import NodeAddresses
from agent.lab.pods import LabPod
from agent.lab.supervisor import Refused, Supervisor


async def status(lab: Supervisor) -> dict[str, Any]:
    """Everything that `narrows lab status` shows."""
    said: dict[tuple[str, str], dict[str, Any]] = {}
    if lab.options.mesh:
        for answer in await asyncio.gather(*(lab.admins.pods(node) for node in lab.nodes)):
            said |= answer
    pods = []
    for key, pod in sorted(lab.pods.items()):
        told = said.get(key, {})
        why = "the lab runs without a mesh" if not lab.options.mesh else "its agent does not know it (yet)"
        pods.append({
            "namespace": key[0], "name": key[1], "node": pod.node, "ip": str(pod.addresses[0]),
            "ips": [str(address) for address in pod.addresses], "ready": pod.ready, "state": pod.state(),
            "restarts": sum(container.restarts for container in pod.containers), "workload": pod.owner or pod.name,
            "captured": bool(told.get("captured", False)), "reason": told.get("reason", why),
            "method": told.get("method") or ""})
    nodes = [{"name": name, "address": str(NodeAddresses(number).fabric_4), "netns": lab.place.node_netns(name),
              "runDir": str(lab.place.node(name))} for name, number in lab.nodes.items()]
    return {
        "name": lab.place.name, "mesh": lab.options.mesh, "began": lab.began, "nodes": nodes, "pods": pods,
        "services": [{"namespace": item.service.namespace, "name": item.service.name,
                      "clusterIPs": [str(address) for address in item.addresses], "headless": item.service.headless,
                      "ready": len(item.serving), "pods": len(item.members)} for item in lab.exposed()],
        "processes": [{"name": process.name, "pid": process.pid, "restarts": process.restarts,
                       "log": str(process.log)}
                      for process in lab.processes]}


async def all_events(lab: Supervisor) -> list[dict[str, Any]]:
    """What happened in the lab and on its nodes, oldest first."""
    found = list(lab.events)
    if lab.options.mesh:
        for node, told in zip(lab.nodes, await asyncio.gather(*(lab.admins.events(node) for node in lab.nodes)),
                              strict=True):
            found += [{"time": one["time"], "subject": f"{node}: {one['about']}",
                       "text": one["message"].removeprefix(f"{one['about']}: ")} for one in told]
    return sorted(found, key=lambda one: one["time"])


def find(lab: Supervisor, ref: str) -> LabPod:
    """The pod that `[NAMESPACE/]NAME` means: its name, its Deployment's, or the beginning of one name."""
    namespace, _, name = ref.rpartition("/")
    living = [pod for pod in lab.pods.values() if not pod.terminating]
    if namespace:
        inside = [pod for pod in living if pod.namespace.name == namespace]
    else:
        inside = [pod for pod in living if pod.namespace.name == "default"] or living
        if not any(pod.name.startswith(name) for pod in inside):
            inside = living
    for match in ([pod for pod in inside if pod.name == name], [pod for pod in inside if pod.owner == name],
                  [pod for pod in inside if pod.name.startswith(name)]):
        if match:
            if len(match) > 1 and len({pod.owner or pod.name for pod in match}) > 1:
                raise Refused(f"{ref} may be {', '.join(sorted(pod.ref for pod in match))}; give more of the name")
            return sorted(match, key=lambda pod: (not pod.ready, pod.name))[0]
    raise Refused(f"there is no pod {ref}; there are {', '.join(sorted(pod.ref for pod in living)) or 'none'}")
