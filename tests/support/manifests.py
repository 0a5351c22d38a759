"""Small manifests for tests of the control plane: text in, objects or a mesh out."""

from __future__ import annotations

from controlplane.model.mesh import Mesh
from controlplane.sources.folder import Parsed, parse


def service(name: str, ports: str = "[{name: http, port: 80}]", ip: str = "10.96.0.10", namespace: str = "default", more: str = "") -> str:
    return f"""
---
apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: {namespace}}}
spec: {{clusterIP: "{ip}", selector: {{app: {name}}}, ports: {ports}{more}}}
"""


def pod(
    name: str,
    ip: str,
    app: str,
    *,
    labels: str = "",
    ready: str = "True",
    namespace: str = "default",
    node: str = "n1",
    meta: str = "",
    ports: str = "",
) -> str:
    return f"""
---
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: {namespace}, labels: {{app: {app}{labels}}}{meta}}}
spec: {{nodeName: {node}, serviceAccountName: sa-{app}, containers: [{{name: main, ports: [{ports}]}}]}}
status: {{phase: Running, podIPs: [{{ip: "{ip}"}}], conditions: [{{type: Ready, status: "{ready}"}}]}}
"""


def virtual_service(name: str, spec: str, namespace: str = "default", meta: str = "") -> str:
    body = "\n".join(f"  {line}" for line in spec.strip("\n").splitlines())
    return f"""
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{name: {name}, namespace: {namespace}{meta}}}
spec:
{body}
"""


def destination_rule(name: str, spec: str, namespace: str = "default", meta: str = "") -> str:
    return virtual_service(name, spec, namespace, meta).replace("kind: VirtualService", "kind: DestinationRule")


SUBSETS = """
host: reviews
subsets:
- {name: v1, labels: {version: v1}}
- {name: v2, labels: {version: v2}}
"""
REVIEWS = (
    service("reviews", "[{name: http, port: 9080}]")
    + pod("reviews-v1-0", "10.244.1.5", "reviews", labels=", version: v1")
    + pod("reviews-v2-0", "10.244.2.6", "reviews", labels=", version: v2", node="n2")
    + destination_rule("reviews", SUBSETS)
)


def good(text: str) -> Parsed:
    """Parsed manifests; fails when anything in them is refused."""
    parsed = parse("test.yaml", text)
    assert not [str(problem) for problem in parsed.problems if problem.severity == "error"]
    return parsed


def mesh_of(*texts: str) -> Mesh:
    mesh = Mesh()
    mesh.apply(good("".join(texts)).objects.values())
    return mesh
