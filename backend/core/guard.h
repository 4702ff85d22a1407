/*
 * Touching memory that somebody else can take away.
 *
 * Guest RAM is a shared file: its client may truncate it or the mapping may go while a walk or a copy runs, and the
 * kernel then answers a load or store with SIGBUS (SIGSEGV for an unmapped page). Between guard_enter and guard_leave
 * such a signal, at an address inside the window announced last, makes the guarded call return GUARD_MEMORY or
 * GUARD_BUFFER instead; at any other address it is a bug of ours and goes on to whoever handled it before.
 *
 * Somebody may install a handler in front of ours. One that reports a signal and then raises it again for the one before
 * (Python's faulthandler) costs a false report, no more: see on_signal. guard_install puts ours first again, and is
 * called whenever memory is mapped.
 */
#ifndef VIOASID_GUARD_H
#define VIOASID_GUARD_H

#include <setjmp.h>
#include <stddef.h>
#include <stdint.h>

enum guard_result { GUARD_OK = 0, GUARD_MEMORY = 1, GUARD_BUFFER = 2 };

struct guard_window {
    volatile uintptr_t first;
    volatile uintptr_t size;
};

struct guard {
    sigjmp_buf env;
    volatile int raised; /* a signal was raised again in front of us: once is a report */
    struct guard_window memory; /* guest memory about to be touched */
    struct guard_window buffer; /* the caller's buffer: may itself be a mapped file */
};

/*
 * Install the process's handler for SIGBUS and SIGSEGV, or put it first again if somebody came after it. Whoever
 * installs another one later must hand on to this one what is not his, by a call with siginfo or by raising it again.
 */
int guard_install(void);

/*
 * Run body(guard, context) guarded. Returns GUARD_OK after body returned, its result in *result; otherwise which window
 * was lost, body then having been left where it stood: all it must remember lies behind `context`.
 */
int guard_run(struct guard *guard, int (*body)(struct guard *, void *), void *context, int *result);

/* Announce the bytes of guest memory touched next. */
static inline void guard_memory(struct guard *guard, uintptr_t first, uintptr_t size)
{
    guard->memory.first = first;
    guard->memory.size = size;
}

#endif
