/*
 * What the programs share in which devices move data while changers take translations away: the canaries of pages that
 * are a changer's own, numbers at random for each thread, and the sign to stop.
 */
#ifndef CORE_TRAFFIC_H
#define CORE_TRAFFIC_H

#include <stdbool.h>
#include <stdint.h>

#include "core_holds.h"

#define CANARY 0xc5c5c5c5c5c5c5c5ull

static int stop;

struct random {
    uint64_t state;
};

static uint64_t below(struct random *random, uint64_t n) /* splitmix64 */
{
    uint64_t z = random->state += 0x9e3779b97f4a7c15ull;

    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return (z ^ z >> 31) % n;
}

static bool stopped(void)
{
    return __atomic_load_n(&stop, __ATOMIC_RELAXED);
}

static void check_no_canary(const uint64_t *data, uint64_t bytes)
{
    for (uint64_t i = 0; i < bytes / 8; i++)
        HOLDS(data[i] != CANARY);
}

#endif
