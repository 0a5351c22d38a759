"""Payload of a CLUSTER: balancer, endpoints, and what its endpoints have in flight already."""
from ext.core.text cimport Span
from ext.route.reader cimport Reader
from ext.route.shapes cimport Cluster
from ext.route.slots cimport Names

# `old` (or NULL) is the version in force: endpoints that stay keep their Load.
cdef int read_cluster(Reader* r, Cluster* c, Span key, const Cluster* old) noexcept nogil
# What is in it is let go of; the memory too.
cdef void cluster_free(Names* names, Cluster* c) noexcept nogil
