"""What policies say of an inbound connection: when it comes, and again when they change.

Who comes through a tunnel is who its certificate says (denied: 401). Without one a local pod is known by its address, since the runtime
says whose that is. What nobody proved is nobody.
"""
from ext.core.timer cimport Timer
from ext.proxy.state cimport Conn, Worker

cdef enum Permit:
    PERMIT_YES = 0
    PERMIT_NO               # `judged`, `judge` say why
    PERMIT_LATER            # the pod's workload is not known yet: held; `advance` runs when it is, or when the time is over

cdef enum:
    REVIEWS_A_TURN = 256    # some 50 us with ten policies: less than a pod's turn

cdef int permit_ask(Conn* c) noexcept nogil
# Asks, and ends the connection with a reset if the answer is no (flag DENY).
cdef int permit_enter(Conn* c) noexcept nogil

# Policies may say otherwise now: every open inbound connection is asked again, REVIEWS_A_TURN of them a turn.
cdef void permit_open(Worker* w) noexcept nogil
cdef void permit_review(Worker* w) noexcept nogil
