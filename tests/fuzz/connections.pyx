"""Whole connections through a real worker: a script of what clients, servers, the keeper and time do (stage.pxd), then the end.

Input: how it ends (2 bits), small steps of the clock (3 bits), a commit to begin with (byte), then operations of a byte each, with their
arguments behind. An operation with its highest bit set is followed by the next at once: the worker sees both in one turn.

What must hold:
  1. The worker comes to rest after every operation (a bound on its turns), and while time passes it never stops being able to.
  2. Silence ends every connection: whatever was open, hours later nothing is.
  3. Then nothing is left: connections, upstreams, pods, texts, buffers, pipes, sockets kept, waits, timers, references to
     configuration, requests in flight of an endpoint, descriptors of the process, blocks of memory; every gauge says 0.
  4. What a server of HTTP gets is a sequence of requests of which each is well-formed (strict.pxd), the last perhaps cut, and in no
     body there is another client's head.
  5. What a client of HTTP gets is a sequence of well-formed responses. If the worker ends the connection properly, the last is
     whole: what breaks later is a reset.
  6. A response goes to the client whose request it answers, and in order.
  7. Of opaque bytes each side gets a prefix of what the other said; when the connection ended properly, all of it; an end is passed
     on only behind all bytes. Whoever is not disturbed ends properly. A server that nobody was connected to gets no byte.
  8. Each connection of TCP and each exchange of HTTP is counted once: a client's log records are as many as the responses that it
     got, or one more; their codes are those of the responses; series add up to the records.
  9. All of it holds as well of what the first pod says to the second, of the same worker: joined in memory (ext/proxy/near), or by a
     tunnel between them (15008, TLS and HTTP/2 of the worker with itself). The second pod counts what it took once more.
 10. While policies let nobody in, no byte of a client's reaches a server, and no answer the client. They come and go, and so do
     certificates, roots and revocation lists: none of that breaks what is said above.
"""
from libc.stdint cimport int64_t, uint8_t, uint32_t
from libc.string cimport memcmp, memcpy, memset, strlen
from ext.core.arena cimport blocks_live
from ext.proxy.state cimport Worker
from claims cimport check_left, check_said, tag_next, tags_forget
from driver cimport Feed, claim, feed_byte, run as drive
from sides cimport client_opens, hears, leaves, says, says_bulk, servers_accept, shuts
from stage cimport (SIDES, Side, Stage, attaches, calms, commits, detaches, drains, gives, keeper_goes, settle, stage, stage_close,
                    stage_open, ticks, turn, wait)
from strict cimport tag_of

import stage as stage_door

cdef extern from "<dirent.h>" nogil:
    ctypedef struct DIR:
        pass
    struct dirent:
        pass
    DIR* opendir(const char* name)
    dirent* readdir(DIR* at)
    void rewinddir(DIR* at)

cdef extern from "<unistd.h>" nogil:
    int usleep(unsigned int us)
    ssize_t write(int fd, const void* data, size_t size)
    int ftruncate(int fd, long size)
    long lseek(int fd, long to, int whence)

cdef enum:
    ALL = 0x7fffffff
    OPERATIONS = 96
    OF_WORKER = 5               # descriptors: epoll, both ends of the control socket, two keys
    # Of an hour and more, until everything is over. The worker's survey has most of the HOPS of a wait, the rest is one leap, in which a
    # connection meets one deadline: the requests of a pipeline that find no socket fail one after the other, in 5 s each, a wait each. A
    # script of 160 lines took 14 so (traced: one connection, in X_UPSTREAM and the stock's queue, from the fourth wait on)
    WAITS = 64
    AT_LAST_MS = 3700000

cdef enum Operation:
    OP_OPEN = 0
    OP_CLIENT                   # SAYS .. HEARS, below
    OP_SERVER
    OP_WAIT
    OP_COMMIT
    OP_SOCKETS
    OP_ATTACH
    OP_DETACH
    OP_TURN
    OP_TICK
    OP_HEAR
    OP_DRAIN
    OP_ORPHAN
    OP_COUNT

cdef enum Deed:
    DEED_PHRASE = 0
    DEED_SAYS
    DEED_BULK
    DEED_SHUTS
    DEED_RESETS
    DEED_LEAVES
    DEED_HEARS
    DEED_COUNT

cdef enum How:                  # a script ends
    HOW_CLIENTS = 0             # clients end, servers behind them
    HOW_SERVERS
    HOW_RESETS
    HOW_SILENCE

cdef uint32_t[11] ticks_ns = [0, 0, 0, 0, 500, 5000, 30000, 60000, 120000, 400000, 2000000]
cdef uint32_t[16] waits_ms = [1, 10, 20, 50, 100, 250, 500, 1000, 1500, 5000, 10000, 30000, 60000, 300000, 600000, 3600000]
cdef const char* questions[64]
cdef const char* answers[64]
cdef uint32_t n_questions = 0
cdef uint32_t n_answers = 0
cdef char[60000] spoken
cdef DIR* own = NULL            # descriptors of this process
cdef int tape = -1              # the scripts that this worker has played: each its length (4 bytes, little-endian) and itself


# ---- the script ------------------------------------------------------------------------------------------------------------------

cdef uint32_t last_tag(const Side* server) noexcept nogil:
    """Of the request that came last."""
    cdef int64_t at = <int64_t>server.n_heard - 17
    while at >= 0:
        if server.heard[at] == 120 and memcmp(server.heard + at, b"x-tag: ", 7) == 0:
            return tag_of(server.heard + at + 7, 8)
        at -= 1
    return 0


cdef size_t put_tag(char* out, uint32_t value) noexcept nogil:
    cdef int i
    memcpy(out, b"x-tag: ", 7)
    for i in range(8):
        out[7 + i] = b"0123456789abcdef"[(value >> (28 - 4 * i)) & 15]
    memcpy(out + 15, b"\r\n", 2)
    return 17


cdef void says_phrase(Side* side, const char* text, int client) noexcept nogil:
    cdef char* out = spoken
    cdef size_t n = 0, i, fill
    cdef uint32_t value
    for i in range(strlen(text)):
        if text[i] == 37:                       # %
            if client >= 0:
                value = tag_next(client)
            else:
                value = last_tag(side)
            n += put_tag(out + n, value)
        elif text[i] == 38 or text[i] == 94:    # & ^
            fill = 7000 if text[i] == 38 else 50000
            memcpy(out + n, b"x-big: ", 7)
            memset(out + n + 7, 98, fill)
            memcpy(out + n + 7 + fill, b"\r\n", 2)
            n += fill + 9
        else:
            out[n] = text[i]
            n += 1
    says(side, out, <uint32_t>n)


cdef void deed(Feed* f, Side* side, int client) noexcept nogil:
    """`side` NULL: nobody is there (yet), who would do it."""
    cdef uint8_t what = feed_byte(f) % DEED_COUNT, n
    if what == DEED_PHRASE:
        n = feed_byte(f)
        if side == NULL:
            return
        if client < 0:
            hears(side, ALL)                    # whom it answers
        says_phrase(side, questions[n % n_questions] if client >= 0 else answers[n % n_answers], client)
    elif what == DEED_SAYS:
        n = feed_byte(f)
        if n > f.left:
            n = <uint8_t>f.left
        if side != NULL:
            says(side, <const char*>f.at, n)
        f.at += n
        f.left -= n
    elif what == DEED_BULK:
        n = feed_byte(f)
        if side != NULL:
            says_bulk(side, (<uint32_t>n + 1) * 700 if n < 128 else <uint32_t>n + 1 - 128)
    elif what == DEED_SHUTS:
        if side != NULL:
            shuts(side)
    elif what == DEED_RESETS or what == DEED_LEAVES:
        if side != NULL:
            stage().disturbed = 1
            leaves(side, what == DEED_RESETS)
    else:
        n = feed_byte(f)
        if side != NULL:
            hears(side, ALL if n == 255 else (<uint32_t>n + 1) * 300)


cdef void operate(Feed* f, uint8_t op) noexcept nogil:
    cdef Stage* s = stage()
    cdef uint8_t arg = 0, who
    if op != OP_HEAR and op != OP_ORPHAN:
        arg = feed_byte(f)
    if op == OP_WAIT or op == OP_DETACH or op == OP_DRAIN or op == OP_ORPHAN:
        s.disturbed = 1
    if op == OP_OPEN:
        client_opens(arg & 31, arg & 32, arg & 64, arg & 128)
    elif op == OP_CLIENT:
        who = <uint8_t>(arg % s.n_clients) if s.n_clients > 0 else 0
        deed(f, &s.clients[who] if s.n_clients > 0 else NULL, who)
    elif op == OP_SERVER:
        servers_accept()
        deed(f, &s.servers[arg % s.n_servers] if s.n_servers > 0 else NULL, -1)
    elif op == OP_WAIT:
        wait(waits_ms[arg & 15])
    elif op == OP_COMMIT:
        commits(arg)
    elif op == OP_SOCKETS:
        if arg & 64:
            s.withholds = not s.withholds
            s.disturbed = 1                     # who waits for a socket may get it when everybody else has left
        else:
            gives(1 + (arg >> 7), arg & 31)
    elif op == OP_ATTACH:
        attaches(1 + (arg & 1))
    elif op == OP_DETACH:
        detaches(1 + (arg & 1))
    elif op == OP_TURN:
        for _ in range(1 + (arg & 3)):
            turn()
    elif op == OP_TICK:
        ticks(ticks_ns[arg % 11])
    elif op == OP_HEAR:
        hear_all()
    elif op == OP_DRAIN:
        drains(waits_ms[arg & 15])
    elif op == OP_ORPHAN:
        keeper_goes()


cdef void hear_all() noexcept nogil:
    """Until nobody hears anything more."""
    cdef Stage* s = stage()
    cdef uint32_t before = 1, now = 0, i
    while before != now:
        before = now
        now = 0
        servers_accept()
        for i in range(SIDES):
            if s.clients[i].was:
                hears(&s.clients[i], ALL)
                now += s.clients[i].n_heard + s.clients[i].ended + s.clients[i].broken
            if s.servers[i].was:
                hears(&s.servers[i], ALL)
                now += s.servers[i].n_heard + s.servers[i].ended + s.servers[i].broken + 1
        settle()


# ---- the end ---------------------------------------------------------------------------------------------------------------------

cdef bint over(Worker* w) noexcept nogil:
    return w.stop or (w.n_conns == 0 and w.upstreams.live == 0)


cdef void shut_all(Side* sides) noexcept nogil:
    cdef uint32_t i
    for i in range(SIDES):
        if sides[i].was:
            shuts(&sides[i])
    settle()
    hear_all()


cdef void finish(uint8_t how) noexcept nogil:
    cdef Stage* s = stage()
    cdef Side* first = &s.clients[0] if how != HOW_SERVERS else &s.servers[0]
    cdef Side* second = &s.servers[0] if how != HOW_SERVERS else &s.clients[0]
    cdef uint32_t i
    hear_all()
    s.disturbed |= how == HOW_RESETS or how == HOW_SILENCE
    if how == HOW_CLIENTS or how == HOW_SERVERS:
        for _ in range(2):      # a client's end may bring a server
            shut_all(first)
            shut_all(second)
    elif how == HOW_RESETS:
        for i in range(SIDES):
            if first[i].was:
                leaves(&first[i], True)
    for i in range(WAITS):
        settle()
        if over(s.w):
            break
        wait(AT_LAST_MS)
        hear_all()
        if i > 6:
            usleep(2000)        # the kernel itself may be late
    claim(over(s.w), b"silence ends every connection")
    hear_all()
    for i in range(SIDES):
        if s.clients[i].was:
            leaves(&s.clients[i], False)
        if s.servers[i].was:
            leaves(&s.servers[i], False)
    detaches(1)
    detaches(2)
    settle()
    wait(1)                     # what was put off to the next turn
    i = 0
    while i < WAITS and not s.w.stop and s.w.n_tunnels > 0:
        wait(AT_LAST_MS)        # a tunnel says that it ends, and hears it
        i += 1


cdef uint32_t descriptors() noexcept nogil:
    """Beside those of a worker that goes on."""
    cdef uint32_t n = 0
    rewinddir(own)
    while readdir(own) != NULL:
        n += 1
    return n - OF_WORKER if stage().w != NULL else n


# ---- one script ------------------------------------------------------------------------------------------------------------------

cdef void note(const uint8_t* raw, size_t raw_size) noexcept nogil:
    """Before it is played: what does not hold may need those before it."""
    cdef uint32_t n = <uint32_t>raw_size
    if tape < 0:
        return
    if stage().w == NULL:
        ftruncate(tape, 0)
        lseek(tape, 0, 0)
    claim(write(tape, &n, 4) == 4 and write(tape, raw, n) == <ssize_t>n, b"(the tape takes a script)")


cdef int one_input(const uint8_t* raw, size_t raw_size) noexcept nogil:
    cdef Feed f
    cdef Stage* s = stage()
    cdef int64_t blocks
    cdef uint32_t n = 0, before = descriptors()    # libFuzzer starts a symbolizer when it likes
    cdef uint8_t first, op
    f.at = raw
    f.left = raw_size
    tags_forget()
    note(raw, raw_size)
    stage_open()
    blocks = blocks_live()
    first = feed_byte(&f)
    op = feed_byte(&f)
    if op != 0:
        commits(op)
        settle()
        calms(op)
    ticks(ticks_ns[(first >> 2) & 7])
    while f.left and n < OPERATIONS and not s.w.stop:
        n += 1
        op = feed_byte(&f)
        operate(&f, (op & 127) % OP_COUNT)
        if not op & 128:
            settle()
    settle()
    ticks(0)
    finish(first & 3)
    check_left(s.w)
    check_said(s.w)
    if stage_close():
        claim(blocks_live() == blocks, b"no block of memory is left")
    else:
        claim(blocks_live() == 0, b"no block of memory is left behind")
    claim(descriptors() == before, b"no descriptor is left")
    return 0


def run(list words):
    """`NARROWS_FUZZ_TAPE` in the environment names the file of the tape; without it there is none."""
    global n_questions, n_answers, own, tape
    import os

    from tests.fuzz import phrases          # late: see CHILD in run.py

    stage_door.prepare()
    if os.environ.get("NARROWS_FUZZ_TAPE"):
        tape = os.open(os.environ["NARROWS_FUZZ_TAPE"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    own = opendir(b"/proc/self/fd")
    if own == NULL:
        raise SystemExit("fuzz: /proc/self/fd cannot be read")
    n_questions, n_answers = len(phrases.QUESTIONS), len(phrases.ANSWERS)
    for i, text in enumerate(phrases.QUESTIONS):
        questions[<int>i] = text            # the tuples keep them
    for i, text in enumerate(phrases.ANSWERS):
        answers[<int>i] = text
    return drive(words, one_input)
