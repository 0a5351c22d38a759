/* Linked into each module of the extension when its lines are counted: every one has counters, and a copy of the library that writes them,
   of its own. See coverage.c. */
extern void __gcov_dump(void);
extern void __gcov_reset(void);
extern void narrows_coverage_module(void (*flush)(void)) __attribute__((weak));      /* not there in what meson tries the compiler with */

static void flush(void)
{
    __gcov_dump();
    __gcov_reset();
}

__attribute__((constructor)) static void tell(void)
{
    if (narrows_coverage_module)
        narrows_coverage_module(flush);
}
