/* The interpreter of the environment whose extension counts the lines that run (environment.py).

   Counters live in a process's memory and are written by the C library's exit. Workers never get there: they end by _exit, or are killed.
   So those two are ours here: what was counted is written first. Nothing of this is in the product. */
#define _GNU_SOURCE
#include <Python.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define SEEN __attribute__((visibility("default"), used))
#define MODULES 256
#define FLUSH (SIGRTMAX - 2)        /* asks a process of ours to write its counters and to kill itself */
#define PATIENCE_MS 2000            /* for that; one that is stopped never will */

static void (*modules[MODULES])(void);
static int count;
static pid_t whose;                 /* a child that has not called exec yet shares our memory (vfork) or counts in vain (fork) */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* As a profiler's: ext/sys/seccomp leaves the filter off where this is, since counters are files. */
SEEN int __llvm_profile_runtime = 1;

/* Called by each module of the extension when it is loaded (coverage_module.c). */
SEEN void narrows_coverage_module(void (*flush)(void))
{
    pthread_mutex_lock(&lock);
    if (count < MODULES)
        modules[count++] = flush;
    pthread_mutex_unlock(&lock);
}

static void flush_all(void)
{
    if (getpid() != whose)
        return;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < count; i++)
        modules[i]();
    pthread_mutex_unlock(&lock);
}

SEEN void _exit(int status)
{
    flush_all();
    for (;;)
        syscall(SYS_exit_group, status);
}

static int same_program(pid_t pid)
{
    char path[64], ours[4096], theirs[4096];
    ssize_t a, b;
    snprintf(path, sizeof path, "/proc/%d/exe", (int)pid);
    a = readlink("/proc/self/exe", ours, sizeof ours);
    b = readlink(path, theirs, sizeof theirs);
    return a > 0 && a == b && memcmp(ours, theirs, (size_t)a) == 0;
}

static long long now_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000LL + now.tv_nsec / 1000000;
}

/* Of a process, as /proc says; Z also when there is none. */
static char state_of(pid_t pid)
{
    char path[64], state = 'Z';
    FILE *stat;
    snprintf(path, sizeof path, "/proc/%d/stat", (int)pid);
    stat = fopen(path, "re");
    if (stat == NULL)
        return 'Z';
    if (fscanf(stat, "%*d (%*[^)]) %c", &state) != 1 || state == 'X')
        state = 'Z';
    fclose(stat);
    return state;
}

SEEN int kill(pid_t pid, int number)
{
    const struct timespec pause = {0, 2000000};
    if (number == SIGKILL && pid > 0 && pid != getpid() && same_program(pid) && syscall(SYS_kill, pid, FLUSH) == 0)
        for (long long until = now_ms() + PATIENCE_MS; now_ms() < until; nanosleep(&pause, NULL)) {
            char state = state_of(pid);
            if (state == 'Z')
                return 0;
            if (state == 'T')
                break;
        }
    return (int)syscall(SYS_kill, pid, number);
}

static void *wait_for_the_end(void *unused)
{
    sigset_t set;
    int number;
    sigemptyset(&set);
    sigaddset(&set, FLUSH);
    while (sigwait(&set, &number) != 0)
        ;
    flush_all();
    syscall(SYS_kill, getpid(), SIGKILL);
    return unused;
}

int main(int argc, char **argv)
{
    sigset_t set;
    pthread_t waiting;
    whose = getpid();
    setenv("GCOV_PREFIX", PREFIX, 1);
    sigemptyset(&set);
    sigaddset(&set, FLUSH);
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    if (pthread_create(&waiting, NULL, wait_for_the_end, NULL) != 0)
        return 70;
    pthread_detach(waiting);
    return Py_BytesMain(argc, argv);
}
