"""See forget.pxd."""
from libc.stdint cimport uint32_t, uint64_t
from ext.core.protocol cimport KIND_SERVICE, KIND_WORKLOAD
from ext.core.shm cimport stats_forget_service, stats_forget_workload
from ext.proxy.state cimport Gone, Worker
from ext.route.shapes cimport Service, Workload
from ext.route.tables cimport Operation, Prepared, service_by_index, workload_by_index


cdef void forget_first(Worker* w) noexcept nogil:
    cdef Gone* gone = &w.gone[w.gone_first % FORGET_MAX]
    w.gone_first += 1
    if gone.kind == KIND_WORKLOAD and workload_by_index(w.tables, gone.index) == NULL:
        stats_forget_workload(&w.table, gone.index)
    elif gone.kind == KIND_SERVICE and service_by_index(w.tables, gone.index) == NULL:
        stats_forget_service(&w.table, gone.index)


cdef void forget_prepare(Worker* w, const Prepared* prepared) noexcept nogil:
    cdef const Operation* operation
    cdef Gone* gone
    cdef uint32_t i, index
    for i in range(prepared.n):
        operation = &prepared.operations[i]
        if operation.content != NULL or operation.slot.current == NULL:
            continue
        if operation.slot.kind == KIND_WORKLOAD:
            index = (<Workload*>operation.slot.current).index
        elif operation.slot.kind == KIND_SERVICE:
            index = (<Service*>operation.slot.current).index
        else:
            continue
        if w.gone_last - w.gone_first == FORGET_MAX:
            forget_first(w)
        gone = &w.gone[w.gone_last % FORGET_MAX]
        gone.due_ns = w.loop.now_ns + <uint64_t>FORGET_AFTER_MS * 1000000
        gone.index = index
        gone.kind = operation.slot.kind
        w.gone_last += 1


cdef void forget_turn(Worker* w) noexcept nogil:
    while w.gone_first != w.gone_last and w.gone[w.gone_first % FORGET_MAX].due_ns <= w.loop.now_ns:
        forget_first(w)
