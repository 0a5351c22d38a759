"""See scene.pxd."""

cdef Scene one


cdef Scene* scene() noexcept nogil:
    return &one


cdef Lane* lane_of(uint32_t id) noexcept nogil:
    return &one.lanes[id // 2] if id & 1 and id // 2 < LANES else NULL
