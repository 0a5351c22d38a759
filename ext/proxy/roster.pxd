"""The tunnels of this worker, written into its shared memory each second for whoever asks (`narrows config tunnels`)."""
from ext.proxy.state cimport Worker

cdef void roster_write(Worker* w) noexcept nogil
