"""TRUST and CERTIFICATE: DER kept as it came, looked at only as far as its bounds; libcrypto reads it when credentials are made."""
from ext.core.text cimport Span
from ext.route.reader cimport Reader
from ext.route.shapes cimport Certificate, Trust

cdef int read_trust(Reader* r, Trust* trust) noexcept nogil
cdef int read_certificate(Reader* r, Certificate* certificate, Span identity) noexcept nogil
