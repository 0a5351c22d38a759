"""An API server of Kubernetes of our own, on loopback: `server.ApiServer`. No mock: tests speak HTTP with it and see what a client sees.

It has revisions, a history that ends (410), bookmarks, selectors, pages, optimistic concurrency, merge patch, server-side apply, status
subresources and token reviews, as far as we use them; `tests/unit/kubernetes/test_contract.py` says what it has in common with the real
one. What it has not: schemas and defaults of kinds, lists merged by key (they are taken whole), RBAC, admission, protobuf.
"""
