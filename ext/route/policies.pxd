"""POLICY payloads to structs; see decode. What `policy` takes for granted is checked here: kinds, prefixes, names."""
from ext.route.reader cimport Reader
from ext.route.shapes cimport Policy, Slot
from ext.route.slots cimport Names

# 0, or -1 with a reason; policy_free afterwards in either case.
cdef int read_policy(Reader* r, Policy* policy, const Slot* slot) noexcept nogil
cdef void policy_free(Names* names, Policy* policy) noexcept nogil
