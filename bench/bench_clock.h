/* Time and dependence, for every measured loop. */
#ifndef VIOASID_BENCH_CLOCK_H
#define VIOASID_BENCH_CLOCK_H

#include <stdint.h>
#include <time.h>

#include "vio.h"
#include "core_floor.h"

/* Nanoseconds of this thread alone: others share the machine. */
static inline double now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

/* Addresses are below 2^63, which the compiler does not know: so this is zero, and waits for `address`. */
static inline uint64_t after(uint64_t address)
{
    return address >> 63;
}

#endif
