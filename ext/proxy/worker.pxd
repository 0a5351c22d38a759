"""The worker process: one loop, one thread, no GIL and no privilege once it runs.

    main()      the Python door, argv: index uid gid required|off (seccomp; "required" when missing)
                descriptors: 3 control (SOCK_SEQPACKET), 4 statistics, 5 log ring (ext/core/protocol.pxd)
                ends with status 0 after DRAIN, or when the keeper is gone and its connections have ended (5 s)

The keeper starts it as  python -I -S -c "import sys; sys.path.insert(0, DIR); from ext.proxy.worker import main; main()" INDEX UID ...
where DIR holds the `ext` package (built modules; a folder without __init__.py will do).
"""
from ext.proxy.state cimport Worker

# On the segments of its index, as they are mapped. NULL: no memory, or one of them is not what it should be.
cdef Worker* worker_new(int control, void* stats, size_t stats_size, void* log, size_t log_size) noexcept nogil
# One turn of the loop and what comes between two of them; `stop` is set when it was the last.
cdef void worker_turn(Worker* w) noexcept nogil
