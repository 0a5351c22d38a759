"""See permit.pxd."""
from libc.stdint cimport uint8_t, uint32_t
from ext.core.protocol cimport LISTEN_OUTBOUND
from ext.core.shm cimport DETAIL_RBAC, DETAIL_UNKNOWN_WORKLOAD, FLAG_DENY
from ext.core.text cimport Span
from ext.core.timer cimport timer_init, timer_set
from ext.proxy.account cimport account_begin_tcp
from ext.proxy.conn cimport conn_end
from ext.proxy.held cimport held_wait_slot
from ext.proxy.state cimport C_HELD, C_HTTP, C_LINGER, JUDGED_DENIED, JUDGED_DRY, JUDGED_NOTHING, Captured
from ext.proxy.tunnel cimport conn_peer
from ext.route.policy cimport Asked, Verdict, policy_decide
from ext.route.shapes cimport Address, IdentityParts, Pod, Slot, Workload
from ext.route.slots cimport identity_split
from ext.route.tables cimport identity_hold, identity_of, pod_by_address, pod_by_handle, slot_hold, slot_release


cdef void keep(Conn* c, const Slot* by, uint32_t rule, uint8_t judged) noexcept nogil:
    cdef Slot* slot = <Slot*>by
    if slot != NULL:
        slot_hold(slot)
    if c.judge != NULL:
        slot_release(c.w.tables, c.judge)
    c.judge = slot
    c.judge_rule = rule
    c.judged = judged


cdef int decide(Conn* c, const Pod* pod) noexcept nogil:
    cdef Asked asked
    cdef Verdict verdict
    asked.who = &c.peer.parts if c.peer != NULL else NULL
    asked.source = <const Address*>&c.client
    asked.destination = <const Address*>&c.target
    asked.port = c.target.port
    policy_decide(c.w.tables, <const Workload*>pod.workload.current, pod.scope, &asked, &verdict)
    if not verdict.allowed:
        keep(c, verdict.by, verdict.rule, JUDGED_DENIED)
        return PERMIT_NO
    if not verdict.would:
        c.w.stats.policy_dry_denied += c.judged != JUDGED_DRY
        keep(c, verdict.would_by, verdict.would_rule, JUDGED_DRY)
    else:
        keep(c, NULL, 0, JUDGED_NOTHING)
    return PERMIT_YES


cdef int permit_ask(Conn* c) noexcept nogil:
    cdef const Pod* pod = pod_by_handle(c.w.tables, c.pod.handle)
    cdef Pod* source
    cdef Span who
    cdef IdentityParts parts
    if pod == NULL:
        return PERMIT_NO
    if pod.workload.current == NULL:
        if not c.unconfigured and held_wait_slot(c, pod.workload) == 0:
            return PERMIT_LATER
        return PERMIT_NO
    c.unconfigured = 0
    if c.tunnel != NULL and c.peer == NULL:
        who = conn_peer(c)
        c.peer = identity_of(c.w.tables, who) if identity_split(who, &parts) == 0 else NULL
        if c.peer == NULL:
            return PERMIT_NO
    if c.peer == NULL and not c.w.tables.settings.same_node_tunnel:     # then certificates prove it, and an address proves nothing
        source = pod_by_address(c.w.tables, <const Address*>&c.client)
        if source != NULL and source.identity != NULL:
            identity_hold(source.identity)
            c.peer = source.identity
    return decide(c, pod)


cdef int permit_enter(Conn* c) noexcept nogil:
    cdef int answer = permit_ask(c)
    if answer == PERMIT_LATER:
        c.state = C_HELD
    elif answer == PERMIT_NO:
        deny(c)
    return answer


cdef void deny(Conn* c) noexcept nogil:
    c.w.stats.policy_denied += 1
    c.refusal = 401
    if c.state != C_HTTP and c.state != C_LINGER:
        account_begin_tcp(c)
    conn_end(c, FLAG_DENY, DETAIL_RBAC if c.judged == JUDGED_DENIED else DETAIL_UNKNOWN_WORKLOAD, True)


# ---- again, when policies change -----------------------------------------------------------------------------------------------

cdef void review(Conn* c) noexcept nogil:
    """Who waits for the workload is asked when that comes. A pod that is not known any more has left the mesh: what it has may finish."""
    cdef const Pod* pod = pod_by_handle(c.w.tables, c.pod.handle)
    if c.kind == LISTEN_OUTBOUND or c.state == C_HELD or pod == NULL:
        return
    if pod.workload.current != NULL and decide(c, pod) == PERMIT_YES:
        return
    c.w.stats.policy_cut += 1
    deny(c)


cdef void on_review(Timer* timer) noexcept nogil:
    cdef Worker* w = <Worker*>timer.owner
    cdef Captured* pod = w.first_pod
    cdef Conn* c
    cdef int left = REVIEWS_A_TURN
    while pod != NULL and left > 0:     # what ends on the way keeps its memory until the turn's end
        while left > 0 and pod.review != NULL:
            c = pod.review
            pod.review = c.next
            left -= 1
            review(c)
        if left > 0:
            pod = pod.next
    if left == 0:
        timer_set(&w.loop.timers, &w.review_timer, w.loop.now_ns + 1)


cdef void permit_open(Worker* w) noexcept nogil:
    timer_init(&w.review_timer, on_review, w)


cdef void permit_review(Worker* w) noexcept nogil:
    cdef Captured* pod = w.first_pod
    while pod != NULL:
        pod.review = pod.first_conn     # who comes later is asked when they come
        pod = pod.next
    timer_set(&w.loop.timers, &w.review_timer, w.loop.now_ns + 1)
