"""Payloads to structs (twin: agent/dataplane/blobs.py, where the format is written down).

Everything is checked here: bounds, numbers, texts, and what the data path takes for granted (weights add up, header names are
tokens, regular expressions compile). Names and addresses are interned on the way, which changes no answer.
"""
from libc.stdint cimport uint8_t
from ext.core.text cimport Span
from ext.route.shapes cimport Settings, Slot
from ext.route.slots cimport Names

cdef void settings_default(Settings* settings) noexcept nogil
# 0, or -1 with a reason (reader.REASON_BYTES). What the blob does not have keeps its default.
cdef int settings_decode(Span payload, Settings* settings, char* reason) noexcept nogil

# The content of a slot by its kind (Workload*, Service*, Destination*, Cluster*, Pod*), held once; or NULL with a reason.
cdef void* content_decode(Names* names, const Slot* slot, Span payload, char* reason) noexcept nogil
# Lets go of it once; frees what nobody holds any more.
cdef void content_drop(Names* names, uint8_t kind, void* content) noexcept nogil
