/* Helpers; see helper.h. */
#define _GNU_SOURCE
#include "helper.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* helper->turn. The kernel itself writes the first one, and wakes who waits, when the process has ended (set_tid_address(2)). */
enum { DEAD = 0, FREE = 1, ASKED = 2, ANSWERED = 3, HURRIED = 4 };

uint64_t helper_haste = HELPER_HASTE;

#define STACK 16384u
#define IDLE_MOST 4u   /* kept for the next call: a clone costs 50 us, and more than a few callers at once are rare */
#define STUCK_MOST 32u /* each is a process that we cannot end: beyond so many there are no more helpers for anybody */
#define STUCK_EACH 4u  /* of them in the memory of one process, which gets none then: others have theirs left */
#define LOOKS 1500u    /* at the other side's answer before going to sleep: some 70 us, what two wakings of an idle CPU cost */
#define DYING 20000000u /* nanoseconds that a killed process may take before we look what keeps it */

struct helper {
    uint32_t turn;
    bool sleeping, waiting; /* the helper, and the one who has asked: must be woken */
    bool looks;             /* there are CPUs enough to look out for the other side */
    bool asleep;            /* killed, and it does not end */
    long number, arguments[6], result;
    pid_t pid;
    int parent;
    int owner; /* of the memory that it is for, a pid */
    struct helper *next;
    _Alignas(16) char stack[STACK];
};

/*
 * The helper's own code. It has neither a thread's local storage nor anything that a C library or a sanitizer keeps
 * there: no errno, no canary on the stack.
 */
#if defined __clang__
#define BARE __attribute__((no_stack_protector, no_sanitize("address", "thread", "undefined", "coverage")))
#else
#define BARE __attribute__((no_stack_protector, no_sanitize("address", "thread", "undefined")))
#endif

#if defined __x86_64__
#define LOOK_AGAIN() __builtin_ia32_pause()
BARE static long bare_call(long number, long a, long b, long c, long d, long e, long f)
{
    register long r10 __asm__("r10") = d, r8 __asm__("r8") = e, r9 __asm__("r9") = f;
    long result;

    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "0"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return result;
}
#elif defined __aarch64__
#define LOOK_AGAIN() __asm__ volatile("yield")
BARE static long bare_call(long number, long a, long b, long c, long d, long e, long f)
{
    register long x8 __asm__("x8") = number, x0 __asm__("x0") = a, x1 __asm__("x1") = b, x2 __asm__("x2") = c;
    register long x3 __asm__("x3") = d, x4 __asm__("x4") = e, x5 __asm__("x5") = f;

    __asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x5) : "memory");
    return x0;
}
#else
#error "a system call without the C library is needed here"
#endif

BARE static int helper_main(void *argument)
{
    struct helper *helper = argument;

    /* It must not outlive us. Its parent is the thread that made it: with that thread it goes, and another is made. */
    bare_call(SYS_prctl, PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0, 0);
    bare_call(SYS_prctl, PR_SET_NAME, (long)"vioasid-helper", 0, 0, 0, 0);
    while (bare_call(SYS_getppid, 0, 0, 0, 0, 0, 0) == helper->parent) {
        for (unsigned i = 0; helper->looks && i < LOOKS; i++) {
            if ((__atomic_load_n(&helper->turn, __ATOMIC_ACQUIRE) & ~(uint32_t)HURRIED) == ASKED)
                break;
            LOOK_AGAIN();
        }
        __atomic_store_n(&helper->sleeping, true, __ATOMIC_SEQ_CST);
        for (;;) {
            uint32_t turn = __atomic_load_n(&helper->turn, __ATOMIC_SEQ_CST);

            if ((turn & ~(uint32_t)HURRIED) == ASKED)
                break;
            bare_call(SYS_futex, (long)&helper->turn, FUTEX_WAIT, turn, 0, 0, 0);
        }
        __atomic_store_n(&helper->sleeping, false, __ATOMIC_RELAXED);
        helper->result = bare_call(helper->number, helper->arguments[0], helper->arguments[1], helper->arguments[2],
                                   helper->arguments[3], helper->arguments[4], helper->arguments[5]);
        __atomic_store_n(&helper->turn, ANSWERED, __ATOMIC_SEQ_CST);
        if (__atomic_load_n(&helper->waiting, __ATOMIC_SEQ_CST))
            bare_call(SYS_futex, (long)&helper->turn, FUTEX_WAKE, INT_MAX, 0, 0, 0);
    }
    return 0;
}

uint64_t helper_clock(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

/* Sleep until `turn` is not `seen` any more, or somebody wakes us, or so long. */
static void wait_for(const uint32_t *turn, uint32_t seen, uint64_t nanoseconds)
{
    struct timespec time = {(time_t)(nanoseconds / 1000000000u), (long)(nanoseconds % 1000000000u)};

    syscall(SYS_futex, turn, FUTEX_WAIT, seen, &time, NULL, 0);
}

void helpers_init(struct helpers *helpers)
{
    *helpers = (struct helpers){.idle = NULL};
    pthread_mutex_init(&helpers->lock, NULL);
}

/* A process that has ended, or is about to: nothing of it is left afterwards. */
static void bury(struct helper *helper)
{
    while (waitpid(helper->pid, NULL, __WALL) < 0 && errno == EINTR)
        continue;
    free(helper);
}

/* Those stuck that have ended by now; the lock is held. */
static void bury_stuck(struct helpers *helpers)
{
    for (struct helper **link = &helpers->stuck, *helper; (helper = *link);) {
        if (__atomic_load_n(&helper->turn, __ATOMIC_ACQUIRE) != DEAD) {
            link = &helper->next;
            continue;
        }
        *link = helper->next;
        helpers->stuck_count--;
        bury(helper);
    }
}

void helpers_deinit(struct helpers *helpers)
{
    for (struct helper *helper = helpers->idle, *next; helper; helper = next) {
        next = helper->next;
        kill(helper->pid, SIGKILL);
        bury(helper);
    }
    bury_stuck(helpers); /* the others' memory stays: the kernel will write their end there */
    pthread_mutex_destroy(&helpers->lock);
}

/* clone(2) by the name under which no sanitizer takes it for a fork. */
int __clone(int (*main)(void *), void *stack, int flags, void *argument, ...);

static struct helper *make(void)
{
    struct helper *helper = aligned_alloc(64, (sizeof *helper + 63) & ~(size_t)63);
    sigset_t all, before;

    if (!helper)
        return NULL;
    memset(helper, 0, offsetof(struct helper, stack));
    helper->turn = FREE;
    helper->parent = getpid();
    helper->looks = sysconf(_SC_NPROCESSORS_ONLN) > 1;
    /* Handlers of ours must not run there: it is born, and stays, with every signal blocked. */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    helper->pid = __clone(helper_main, helper->stack + STACK, CLONE_VM | CLONE_FILES | CLONE_FS | CLONE_CHILD_CLEARTID,
                          helper, NULL, NULL, &helper->turn);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (helper->pid < 0) {
        free(helper);
        return NULL;
    }
    return helper;
}

struct helper *helper_take(struct helpers *helpers, int owner)
{
    struct helper *helper;
    unsigned stuck = 0;
    bool full;

    pthread_mutex_lock(&helpers->lock);
    bury_stuck(helpers);
    for (helper = helpers->stuck; helper; helper = helper->next)
        stuck += helper->owner == owner;
    if (stuck >= STUCK_EACH) {
        pthread_mutex_unlock(&helpers->lock);
        return NULL;
    }
    while ((helper = helpers->idle)) {
        helpers->idle = helper->next;
        helpers->idle_count--;
        if (__atomic_load_n(&helper->turn, __ATOMIC_ACQUIRE) != DEAD)
            break;
        bury(helper); /* it went with the thread that had made it */
    }
    full = helpers->stuck_count >= STUCK_MOST;
    pthread_mutex_unlock(&helpers->lock);
    if (!helper && !full)
        helper = make();
    if (helper)
        helper->owner = owner;
    return helper;
}

void helper_give(struct helpers *helpers, struct helper *helper)
{
    bool dead = __atomic_load_n(&helper->turn, __ATOMIC_ACQUIRE) == DEAD, keep = false;

    pthread_mutex_lock(&helpers->lock);
    if (helper->asleep && !dead) {
        helper->next = helpers->stuck;
        helpers->stuck = helper;
        helpers->stuck_count++;
        keep = true;
    } else if (!dead && helpers->idle_count < IDLE_MOST) {
        helper->next = helpers->idle;
        helpers->idle = helper;
        helpers->idle_count++;
        keep = true;
    }
    pthread_mutex_unlock(&helpers->lock);
    if (keep)
        return;
    if (!dead)
        kill(helper->pid, SIGKILL);
    bury(helper);
}

/* Is the process asleep in a way that not even SIGKILL ends? proc(5): its state stands behind its name in brackets. */
static bool asleep_for_good(const struct helper *helper)
{
    char path[32], line[128] = "";
    const char *state;
    FILE *file;

    snprintf(path, sizeof path, "/proc/%d/stat", helper->pid);
    file = fopen(path, "re");
    if (!file)
        return false;
    state = fgets(line, sizeof line, file) ? strrchr(line, ')') : NULL;
    fclose(file);
    return state && !strncmp(state, ") D", 3);
}

/*
 * Kill a helper in the middle of its call, and wait for its end. One that was waiting for a page wakes, finds that it is
 * to die and moves nothing more. Some waits are not ended even so (a file system in user space that has taken the request
 * and does not answer): there it finds the same when it wakes, whenever that is, before it has moved any of that page.
 */
static void end(struct helper *helper)
{
    uint32_t turn;

    kill(helper->pid, SIGKILL);
    while ((turn = __atomic_load_n(&helper->turn, __ATOMIC_ACQUIRE)) != DEAD && !helper->asleep) {
        uint64_t start = helper_clock();

        wait_for(&helper->turn, turn, DYING);
        helper->asleep = helper_clock() - start >= DYING && asleep_for_good(helper);
    }
}

enum helper_end helper_call(struct helper *helper, long number, const long arguments[6], uint64_t latest,
                            const bool *hurried, long *result)
{
    uint32_t turn, before = FREE;
    bool hasty = false;

    helper->number = number;
    memcpy(helper->arguments, arguments, sizeof helper->arguments);
    __atomic_store_n(&helper->waiting, false, __ATOMIC_RELAXED);
    if (!__atomic_compare_exchange_n(&helper->turn, &before, ASKED, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
        return HELPER_DIED;
    if (__atomic_load_n(&helper->sleeping, __ATOMIC_SEQ_CST))
        syscall(SYS_futex, &helper->turn, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
    for (unsigned i = 0; helper->looks && i < LOOKS; i++) {
        turn = __atomic_load_n(&helper->turn, __ATOMIC_ACQUIRE);
        if (turn == ANSWERED || turn == DEAD)
            break;
        LOOK_AGAIN();
    }
    for (;;) {
        uint64_t now;

        turn = __atomic_load_n(&helper->turn, __ATOMIC_SEQ_CST);
        if (turn == ANSWERED) {
            *result = helper->result;
            /* unless it has died since */
            __atomic_compare_exchange_n(&helper->turn, &turn, FREE, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
            return HELPER_ANSWERED;
        }
        if (turn == DEAD)
            return HELPER_DIED;
        now = helper_clock();
        /* Set before we had asked, or followed by helper_hurry() after that. */
        if (!hasty && __atomic_load_n(hurried, __ATOMIC_SEQ_CST) && now + helper_haste < latest) {
            hasty = true;
            latest = now + helper_haste;
        }
        if (now >= latest) {
            end(helper);
            return hasty ? HELPER_HURRIED : HELPER_LATE;
        }
        __atomic_store_n(&helper->waiting, true, __ATOMIC_SEQ_CST);
        wait_for(&helper->turn, turn, latest - now);
    }
}

void helper_hurry(struct helper *helper)
{
    uint32_t asked = ASKED;

    if (__atomic_compare_exchange_n(&helper->turn, &asked, ASKED | HURRIED, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
        syscall(SYS_futex, &helper->turn, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}
