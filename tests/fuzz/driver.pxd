"""What every harness has in common: libFuzzer's entry, a claim that must hold, memory whose tail nobody may read."""
from libc.stdint cimport uint8_t
from libc.stdio cimport fprintf, stderr
from libc.stdlib cimport abort, free, malloc
from libc.string cimport memcpy

ctypedef int (*Target)(const uint8_t* data, size_t size) noexcept nogil

cdef extern from *:
    """
    int LLVMFuzzerRunDriver(int *argc, char ***argv, int (*target)(const uint8_t *data, size_t size));
    void __asan_poison_memory_region(void const volatile *at, size_t size);
    void __asan_unpoison_memory_region(void const volatile *at, size_t size);
    """
    int LLVMFuzzerRunDriver(int* argc, char*** argv, Target target) nogil
    void __asan_poison_memory_region(const void* at, size_t size) nogil
    void __asan_unpoison_memory_region(const void* at, size_t size) nogil

# The process ends with the sentence that does not hold; libFuzzer keeps the input.
cdef inline void claim(bint holds, const char* sentence) noexcept nogil:
    if not holds:
        fprintf(stderr, b"\nDOES NOT HOLD: %s\n", sentence)
        abort()

# A copy of which only the first `shown` bytes may be read: AddressSanitizer reports a read beyond. `show` moves the end forward.
cdef struct Curtain:
    char* data
    size_t size
    size_t shown

cdef inline void curtain_open(Curtain* c, const void* data, size_t size) noexcept nogil:
    c.data = <char*>malloc(size + 1)
    c.size = size
    c.shown = 0
    if size:
        memcpy(c.data, data, size)
    __asan_poison_memory_region(c.data, size + 1)

cdef inline void curtain_show(Curtain* c, size_t size) noexcept nogil:
    if size > c.shown:
        __asan_unpoison_memory_region(c.data + c.shown, size - c.shown)
        c.shown = size

cdef inline void curtain_close(Curtain* c) noexcept nogil:
    __asan_unpoison_memory_region(c.data, c.size + 1)
    free(c.data)

# Numbers that steer a harness are taken from the input's front, so that what follows is the message as it would stand on the wire.
cdef struct Feed:
    const uint8_t* at
    size_t left

cdef inline uint8_t feed_byte(Feed* f) noexcept nogil:          # 0 when there is none left
    cdef uint8_t b = 0
    if f.left:
        b = f.at[0]
        f.at += 1
        f.left -= 1
    return b

cdef inline int run(list words, Target target) except -1:
    """libFuzzer with these command-line words until it is done; it ends the process itself when it finds something."""
    cdef char* argv[64]
    cdef char** at = argv
    cdef int argc = 0, result
    raw = [word.encode() for word in words][:63]
    for word in raw:
        argv[argc] = word
        argc += 1
    argv[argc] = NULL
    with nogil:
        result = LLVMFuzzerRunDriver(&argc, &at, target)
    return result
