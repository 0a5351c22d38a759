"""Who speaks, to whom, and by which destination: the questions to the tables that TCP and HTTP share."""
from libc.stdint cimport uint8_t
from ext.proxy.state cimport Conn
from ext.route.shapes cimport Destination

cdef enum Found:
    FOUND = 0
    FOUND_LATER = 1         # held; `advance` runs on the commit or when the time is over
    FOUND_NONE = 2          # NC
    FOUND_FULL = 3          # UO: too many wait

# Sets the facts' indexes and `is_service` by the tables of now; the protocol (PortProtocol) declared for the original destination:
# of the service's port, or of the workload's. Again for each exchange of a long connection: workloads come and go.
cdef uint8_t identify(Conn* c) noexcept nogil
# The destination of an outbound service connection, held for the caller on FOUND.
cdef int find_destination(Conn* c, Destination** out) noexcept nogil
