"""See worker.pxd."""
from libc.errno cimport errno
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, malloc
from posix.unistd cimport getpid
from ext.core.loop cimport clock_ns, loop_open, loop_turn
from ext.core.pipes cimport pipes_init
from ext.core.protocol cimport FD_CONTROL, FD_LOG, FD_STATS
from ext.core.ring cimport log_attach
from ext.core.shm cimport gauge, stats_attach
from ext.proxy.budget cimport budget_apply
from ext.proxy.conn cimport conn_near, pod_retire
from ext.proxy.control cimport control_apply, control_check_drained, control_open
from ext.proxy.early cimport early_follows
from ext.proxy.flow cimport flow_advance, flow_expire
from ext.proxy.forget cimport forget_turn
from ext.proxy.outbox cimport OUTBOX_BYTES
from ext.proxy.permit cimport permit_open
from ext.proxy.recall cimport recall_open, recall_tunnel
from ext.proxy.shed cimport shed_open, shed_turn
from ext.proxy.tunnel cimport tunnels_open
from ext.proxy.tunnel_in cimport tunnel_distrusts
from ext.proxy.upstream cimport pool_part
from ext.sys.privilege cimport privilege_drop
from ext.sys.seccomp cimport (CONFINED, CONFINED_OFF, CONFINED_SANITIZER, Tell, sanitizer_loaded, seccomp_install)
from ext.proxy.state cimport Captured, Conn, Exchange, Near, Texts, Upstream, Worker
from ext.route.tables cimport tables_new

import os
import sys

from ext.sys.seccomp import INSTRUCTION, py_program

cdef enum:
    OWN_PAGES = 16384               # blocks of so many bytes (buffers) are given back to the kernel when they are freed
    NOFILE_MOST = 1073741824        # no limit is a limit too: numbers of descriptors fit an int

cdef extern from "<sys/mman.h>" nogil:
    int PROT_READ
    int PROT_WRITE
    int MAP_SHARED
    void* MAP_FAILED
    void* mmap(void* at, size_t size, int protection, int flags, int fd, long offset)

cdef extern from "<sys/stat.h>" nogil:
    struct stat_t "stat":
        long st_size
    int fstat(int fd, stat_t* out)

cdef extern from "<malloc.h>" nogil:
    int M_MMAP_THRESHOLD
    int mallopt(int what, int value)

cdef extern from "<signal.h>" nogil:
    ctypedef struct sigset_t:
        pass
    int SIG_SETMASK
    int sigfillset(sigset_t* mask)
    int sigprocmask(int how, const sigset_t* mask, sigset_t* before)

cdef extern from "<sys/resource.h>" nogil:
    struct rlimit_t "rlimit":
        unsigned long rlim_cur
    int RLIMIT_NOFILE
    int getrlimit(int resource, rlimit_t* out)

cdef extern from "<sys/random.h>" nogil:
    ssize_t getrandom(void* data, size_t size, unsigned int flags)


cdef void* map_shared(int fd, size_t* size) noexcept nogil:
    cdef stat_t facts
    cdef void* at
    if fstat(fd, &facts) != 0 or facts.st_size <= 0:
        return NULL
    size[0] = facts.st_size
    at = mmap(NULL, facts.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0)
    return NULL if at == MAP_FAILED else at


cdef Worker* worker_new(int control, void* stats, size_t stats_size, void* log, size_t log_size) noexcept nogil:
    cdef uint64_t seed = 0
    cdef rlimit_t files
    cdef Worker* w = <Worker*>calloc(1, sizeof(Worker))
    if w == NULL or loop_open(&w.loop) != 0:
        return NULL
    if getrandom(&seed, sizeof(seed), 0) != sizeof(seed):
        seed = clock_ns()
    w.tables = tables_new(seed)
    w.outbox.data = <char*>malloc(OUTBOX_BYTES)
    w.outbox.size = OUTBOX_BYTES
    if w.tables == NULL or w.outbox.data == NULL:
        return NULL
    if stats == NULL or stats_attach(&w.table, stats, stats_size, getpid(), w.loop.now_ns) != 0:
        return NULL
    w.stats = w.table.header
    if log == NULL or log_attach(&w.log, log, log_size) != 0:
        return NULL
    pipes_init(&w.pipes)
    if getrlimit(RLIMIT_NOFILE, &files) != 0:
        return NULL
    w.descriptors_most = <uint32_t>files.rlim_cur if files.rlim_cur < NOFILE_MOST else NOFILE_MOST
    budget_apply(w)
    shed_open(w)
    permit_open(w)
    recall_open(w)
    w.conns.size = sizeof(Conn)
    w.exchanges.size = sizeof(Exchange)
    w.upstreams.size = sizeof(Upstream)
    w.pods.size = sizeof(Captured)
    w.texts.size = sizeof(Texts)
    w.nears.size = sizeof(Near)
    w.advance = flow_advance
    w.expire = flow_expire
    w.retire = pod_retire
    w.distrusts = tunnel_distrusts
    w.recalls = recall_tunnel
    w.follows = early_follows
    w.parts = pool_part
    w.enters = conn_near
    if control_open(w, control) != 0:
        return NULL
    return w


cdef void worker_turn(Worker* w) noexcept nogil:
    loop_turn(&w.loop)
    if w.pending_fd >= 0:
        control_apply(w)
    forget_turn(w)
    shed_turn(w)
    if w.draining:
        control_check_drained(w)
    gauge(&w.stats.heartbeat_ns, w.loop.now_ns)
    gauge(&w.stats.loop_turns, w.loop.turns)
    gauge(&w.stats.buffered_bytes, w.memory.taken)


cdef void block_signals() noexcept nogil:
    """The keeper ends a worker by its control socket, or by SIGKILL."""
    cdef sigset_t all
    sigfillset(&all)
    sigprocmask(SIG_SETMASK, &all, NULL)


cdef void py_confine(Worker* w, index, str wanted) except *:
    """The filter, unless the operator said "off" or a sanitizer is loaded; what came of it stands in the statistics. Or SystemExit."""
    cdef Tell tell
    cdef const char* step = NULL
    cdef bytes program
    cdef int error
    if wanted not in ("required", "off"):
        sys.exit(f"worker {index}: seccomp is `required` or `off`, not {wanted!r}")
    if wanted == "off" or sanitizer_loaded():
        gauge(&w.stats.confinement, CONFINED_OFF if wanted == "off" else CONFINED_SANITIZER)
        return
    try:
        program = py_program(os.uname().machine)
    except LookupError as lacking:
        sys.exit(f"worker {index}: {lacking}; `--seccomp off` of the keeper runs workers without (SECURITY.md says what that costs)")
    tell.calls = &w.stats.refused_calls
    tell.last = &w.stats.refused_call
    gauge(&w.stats.confinement, CONFINED)
    error = seccomp_install(<const char*>program, <unsigned short>(len(program) // INSTRUCTION.size), &tell, &step)
    if error != 0:
        sys.exit(f"worker {index}: {(<bytes>step).decode()} failed: {os.strerror(-error)}; has the kernel CONFIG_SECCOMP_FILTER? "
                 "`--seccomp off` of the keeper runs workers without (SECURITY.md says what that costs)")


def main():
    """Runs until drained; never returns to other Python code."""
    cdef Worker* w
    cdef const char* step = NULL
    cdef void* stats
    cdef void* log
    cdef size_t stats_size = 0, log_size = 0
    cdef int error
    cdef unsigned int uid = 0, gid = 0
    try:
        index, uid, gid = (int(word) for word in sys.argv[1:4])
    except ValueError:
        sys.exit("worker: usage: INDEX UID GID [required|off] (the keeper starts it; descriptors 3, 4 and 5 must be open)")
    block_signals()
    mallopt(M_MMAP_THRESHOLD, OWN_PAGES)
    stats = map_shared(FD_STATS, &stats_size)
    log = map_shared(FD_LOG, &log_size)
    w = worker_new(FD_CONTROL, stats, stats_size, log, log_size)
    if w == NULL:
        sys.exit(f"worker {index}: descriptor 3, 4 or 5 is not the keeper's control socket, statistics and log "
                 f"(errno {errno}: {os.strerror(errno)}); was it started by hand?")
    if tunnels_open(w) != 0:
        sys.exit(f"worker {index}: OpenSSL cannot be set up; is its library another one than it was built with?")
    error = privilege_drop(uid, gid, &step)
    if error != 0:
        sys.exit(f"worker {index}: {(<bytes>step).decode()} failed: {os.strerror(-error)}; "
                 f"is uid {uid} valid, and did the keeper run as root?")
    py_confine(w, index, sys.argv[4] if len(sys.argv) > 4 else "required")
    with nogil:
        while not w.stop:
            worker_turn(w)
    os._exit(0)
