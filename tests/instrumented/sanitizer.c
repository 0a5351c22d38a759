/* The interpreter of an environment whose extension is instrumented (environment.py). The sanitizer's runtime is linked to it, so it is the
   first library of every Python process, and of no other: no LD_PRELOAD that nginx or ip would get too. Options are compiled in: the keeper
   passes none of the *_OPTIONS on to its workers, and is not asked to. */
#define _GNU_SOURCE
#include <Python.h>
#include <dlfcn.h>
#include <limits.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#define SEEN __attribute__((visibility("default"), used))

/* Each is asked for by the runtime of its name; the others are never called. */
SEEN const char *__asan_default_options(void) { return OPTIONS ":log_path=" LOG "/report"; }
SEEN const char *__ubsan_default_options(void) { return OPTIONS ":log_path=" LOG "/report"; }
SEEN const char *__tsan_default_options(void) { return OPTIONS ":log_path=" LOG "/report"; }

static int shared;

static void *race(void *unused)
{
    shared++;
    return unused;
}

/* What each sanitizer is for, once: a run without reports means something only if these are reported. */
static int prove(void)
{
    volatile int large = INT_MAX;
    volatile char *volatile block = malloc(8);
    pthread_t other;
    large++;
    if (pthread_create(&other, NULL, race, NULL) == 0) {
        shared++;
        pthread_join(other, NULL);
    }
    block[8] = 1;
    return 0;
}

/* gcc's two runtimes are two libraries, and the call by which the second is told its path ends in the first: told by hand, into a file of
   another name. */
static void undefined_to_files(void)
{
    void *library = dlopen("libubsan.so.1", RTLD_NOLOAD | RTLD_LAZY);
    void (*set_path)(const char *) = NULL;
    if (library != NULL)
        *(void **)&set_path = dlsym(library, "__sanitizer_set_report_path");
    if (set_path != NULL)
        set_path(LOG "/undefined");
}

int main(int argc, char **argv)
{
    PyPreConfig config;
    undefined_to_files();
    if (argc == 2 && strcmp(argv[1], "--prove") == 0)
        return prove();
    PyPreConfig_InitPythonConfig(&config);
    /* each object a block of its own, with red zones around it: Python's pools would hide a read past a bytes object */
    config.allocator = PYMEM_ALLOCATOR_MALLOC;
    if (PyStatus_Exception(Py_PreInitializeFromBytesArgs(&config, argc, argv)))
        return 70;
    return Py_BytesMain(argc, argv);
}
