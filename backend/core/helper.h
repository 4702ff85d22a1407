/*
 * Helpers: processes that make system calls for us which may never return.
 *
 * process_vm_readv(2) waits for a page of the other process as long as that keeps it from coming (userfaultfd, a file
 * system in user space), and only SIGKILL ends the wait: it ends whole processes. So such calls are made by a process
 * that can be spared. It shares our memory and our descriptors (clone(2), CLONE_VM and CLONE_FILES), so nothing is
 * copied on the way, makes one system call at a time for whoever has taken it, and touches nothing else.
 *
 * Handing a call over costs about a microsecond while both sides look out for each other, which they do for some 70
 * microseconds, and two wakings by the kernel else: 40 where the other CPU was idle.
 */
#ifndef VIOASID_HELPER_H
#define VIOASID_HELPER_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct helper;

struct helpers {
    pthread_mutex_t lock;
    struct helper *idle;
    struct helper *stuck; /* killed, and still asleep where the kernel lets nobody kill them */
    unsigned idle_count, stuck_count;
};

void helpers_init(struct helpers *helpers);
void helpers_deinit(struct helpers *helpers); /* nobody has taken one */

/* A helper of one's own until it is given back, alive or not, for the memory of process `owner`; NULL if the system, or a
 * bound, allows none. */
struct helper *helper_take(struct helpers *helpers, int owner);
void helper_give(struct helpers *helpers, struct helper *helper);

/*
 * Have a system call made, and wait for its end; the kernel's answer in *result (-errno for errors). At `latest`, by
 * helper_clock(), or HELPER_HASTE after *hurried was set and helper_hurry() called, the helper is killed in the middle of
 * it. Then it moves nothing more: it has ended, or sleeps where nobody can end it, before the first byte of a page that
 * did not come.
 */
enum helper_end { HELPER_ANSWERED, HELPER_LATE, HELPER_HURRIED, HELPER_DIED };

enum helper_end helper_call(struct helper *helper, long number, const long arguments[6], uint64_t latest,
                            const bool *hurried, long *result);

/* By anybody, as long as it is taken, after the flag was set: the call that it makes, if any, has HELPER_HASTE left. */
void helper_hurry(struct helper *helper);

#define HELPER_HASTE 1000000u /* nanoseconds: fifty times what 128 KiB take */

extern uint64_t helper_haste; /* HELPER_HASTE; tests break off more often */

uint64_t helper_clock(void); /* nanoseconds */

#endif
