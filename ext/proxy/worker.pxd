"""The worker process: one loop, one thread, no GIL and no privilege once it runs.

    main()      the Python door, argv: index uid gid required|off (seccomp; "required" when missing)
                descriptors: 3 control (SOCK_SEQPACKET), 4 statistics, 5 log ring (ext/core/protocol.pxd)
                ends with status 0 after DRAIN, or when the keeper is gone and its connections have ended (5 s)

The keeper starts it as  python -I -S -c "import sys; sys.path.insert(0, DIR); from ext.proxy.worker import main; main()" INDEX UID ...
where DIR holds the `ext` package (built modules; a folder without __init__.py will do).
"""
from ext.proxy.state cimport Worker

cdef Worker* worker_new(int control, int stats, int log) noexcept nogil      # NULL: no memory, or a descriptor is not what it should be
cdef void worker_run(Worker* w) noexcept nogil
