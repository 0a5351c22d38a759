"""Payload of a DESTINATION: virtual hosts, routes, matches, weighted clusters, header edits."""
from ext.route.reader cimport Reader
from ext.route.shapes cimport Destination
from ext.route.slots cimport Names

cdef int read_destination(Reader* r, Destination* d) noexcept nogil
# What is in it is let go of; the memory too.
cdef void destination_free(Names* names, Destination* d) noexcept nogil
