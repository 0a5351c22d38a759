"""Where one exchange ends and the next begins: answers of our own, and the client's connection afterwards.

    answer          status, flag and reason; the exchange is accounted here
    exchange_next   back to IDLE, with what is left in din
"""
from libc.stdint cimport uint8_t, uint16_t
from ext.core.buffer cimport buffer_used
from ext.proxy.state cimport X_FLOW, Conn

# Only the client can go on: all that it sent of its request is with the server, which has not begun to answer.
cdef inline bint awaits_body(const Conn* c) noexcept nogil:
    return c.x.state == X_FLOW and not c.x.request_done and not c.x.responding and c.x.at == c.x.fed and buffer_used(&c.uhead) == 0

# Replaces whatever was going on before a response was begun. The client's connection lives on only if its request was read whole.
cdef void answer(Conn* c, uint16_t status, uint8_t flag, uint16_t details) noexcept nogil
# A head or body that cannot be parsed: DPE, and the connection ends.
cdef void answer_malformed(Conn* c, int status) noexcept nogil
# Sends what is in dhead: True when all of it is out and the connection went on, or ended.
cdef bint answer_advance(Conn* c) noexcept nogil
cdef void exchange_next(Conn* c) noexcept nogil
# The client's connection after a response: ends at once if nothing of the client is unread, else lingers.
cdef void client_close(Conn* c) noexcept nogil
# Arms the timer of the state, if what is armed would come too late.
cdef void exchange_arm(Conn* c) noexcept nogil
