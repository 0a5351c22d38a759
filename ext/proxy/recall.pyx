"""See recall.pxd."""
from ext.core.shm cimport DETAIL_REVOKED, FLAG_CERT_REVOKED
from ext.core.text cimport Span
from ext.core.timer cimport Timer, timer_init, timer_set
from ext.proxy.account cimport account_begin_tcp, account_failure
from ext.proxy.conn cimport conn_end
from ext.proxy.keys cimport LACK_NONE, Lack, credentials_of
from ext.proxy.state cimport C_DIAL, C_HTTP, C_LINGER, C_RELAY, T_DEAD, T_OPEN, Captured, Conn, Upstream
from ext.proxy.tunnel cimport tunnel_fail
from ext.proxy.tunnel_in cimport tunnel_tell
from ext.tunnel.shapes cimport TROUBLE_TLS, Stream
from ext.tunnel.tls cimport TLS_ERROR_BYTES, Credentials, tls_revoked, tls_text


cdef Conn* user_of(const Tunnel* t, const Stream* stream) noexcept nogil:
    """The connection that a stream belongs to; NULL: nobody's now, or one whose answer says it."""
    cdef Conn* c
    if stream.source == NULL:
        return NULL
    if t.server:
        return <Conn*>stream.source
    c = (<Upstream*>stream.source).conn
    return c if c != NULL and (c.state == C_RELAY or c.state == C_DIAL) else NULL


cdef void end(Tunnel* t, Span why) noexcept nogil:
    """The users first, since only they can be told of one by one; requests of HTTP get their 503, or a reset, from the stream's end."""
    cdef Stream* stream = t.session.first
    cdef Stream* after
    cdef Conn* c
    cdef bint told = False
    while stream != NULL:
        after = stream.next             # ending a connection drops its own stream at most
        c = user_of(t, stream)
        if c != NULL:
            if c.state != C_HTTP and c.state != C_LINGER:
                account_begin_tcp(c)
            told = told or c.facts.open
            account_failure(c, why)
            conn_end(c, FLAG_CERT_REVOKED, DETAIL_REVOKED, True)
        elif stream.source != NULL and not t.server and (<Upstream*>stream.source).conn != NULL:
            told = True
            account_failure((<Upstream*>stream.source).conn, why)
        stream = after
    if not told:
        tunnel_tell(t, why, FLAG_CERT_REVOKED, DETAIL_REVOKED)
    tunnel_fail(t, TROUBLE_TLS)


cdef void recall_tunnel(Tunnel* t) noexcept nogil:
    cdef char[TLS_ERROR_BYTES] text
    cdef Lack lack = LACK_NONE
    cdef Span why
    cdef Credentials* credentials = credentials_of(t.w, t.own, &lack, text)
    if credentials == NULL or credentials == t.session.tls.credentials or not tls_revoked(&t.session.tls, credentials):
        return
    t.w.stats.tunnels_revoked += 1
    why.p = text
    why.n = tls_text(&t.session.tls, text, sizeof(text))
    end(t, why)


cdef void on_recall(Timer* timer) noexcept nogil:
    cdef Worker* w = <Worker*>timer.owner
    cdef Captured* pod = w.first_pod
    cdef Tunnel* t
    cdef int left = RECALLS_A_TURN
    while pod != NULL and left > 0:
        while left > 0 and pod.recall != NULL:
            t = pod.recall
            pod.recall = t.next
            if t.state == T_OPEN:
                left -= 1
                recall_tunnel(t)
            elif t.state != T_DEAD:
                t.doubted = 1
        if left > 0:
            pod = pod.next
    if left == 0:
        timer_set(&w.loop.timers, &w.recall_timer, w.loop.now_ns + 1)


cdef void recall_open(Worker* w) noexcept nogil:
    timer_init(&w.recall_timer, on_recall, w)


cdef void recall_begin(Worker* w) noexcept nogil:
    cdef Captured* pod = w.first_pod
    while pod != NULL:
        pod.recall = pod.first_tunnel       # who comes later has credentials with the lists
        pod = pod.next
    timer_set(&w.loop.timers, &w.recall_timer, w.loop.now_ns + 1)
