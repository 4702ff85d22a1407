/*
 * The gate: requests pass it in any number at once, a change closes it to be alone.
 *
 * Fair by phases: while a change waits or is at work, requests that arrive wait; when it is done, all that waited pass
 * before the next change may close the gate again. So a change waits for the requests that had passed and for the
 * changes before it, a request for one change at most, and neither starves. A long request asks gate_wanted() now and
 * then, and goes back to the gate if somebody wants it closed.
 *
 * Changes are kept apart by gate_reserve(), requests by gate_close(): what requests cannot see, or see whole at any
 * moment, a change may prepare between the two.
 */
#ifndef VIOASID_GATE_H
#define VIOASID_GATE_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#define GATE_CLOSED (1ull << 32)
#define GATE_PASSED (GATE_CLOSED - 1) /* requests that have passed and not left */

struct gate {
    uint64_t state; /* GATE_CLOSED, set or cleared under `lock` only, and the count of GATE_PASSED */
    pthread_mutex_t changes; /* one change at a time */
    pthread_mutex_t lock;
    pthread_cond_t opened, emptied;
    uint64_t phase;  /* counts openings */
    uint64_t waiting; /* requests that the next opening lets pass */
};

void gate_init(struct gate *gate);
void gate_deinit(struct gate *gate);

void gate_reserve(struct gate *gate); /* no other change until gate_release */
void gate_release(struct gate *gate);
void gate_close(struct gate *gate); /* reserved: returns once every request has left */
void gate_open(struct gate *gate);

void gate_wait(struct gate *gate);    /* slow paths of the two below */
void gate_emptied(struct gate *gate);

static inline void gate_pass(struct gate *gate)
{
    if (__builtin_expect((__atomic_fetch_add(&gate->state, 1, __ATOMIC_ACQUIRE) & GATE_CLOSED) != 0, 0))
        gate_wait(gate);
}

static inline void gate_leave(struct gate *gate)
{
    if (__builtin_expect(__atomic_fetch_sub(&gate->state, 1, __ATOMIC_RELEASE) == (GATE_CLOSED | 1), 0))
        gate_emptied(gate);
}

static inline bool gate_wanted(const struct gate *gate)
{
    return __atomic_load_n(&gate->state, __ATOMIC_RELAXED) & GATE_CLOSED;
}

#endif
