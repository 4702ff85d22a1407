/*
 * Floors: the same job written as simply as it can be, without a single check, on the same tables and in the same run;
 * and loops over the core's own functions, timed in C because a Python call costs as much as several walks.
 */
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "engine.h"

/* of this thread alone: others share the machine */
static double now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

/* Addresses are below 2^63, which the compiler does not know: so this is zero, and waits for `address`. */
static uint64_t after(uint64_t address)
{
    return address >> 63;
}

const void *bench_stage2_root(vio_engine *engine, uint32_t ioasid)
{
    return (const void *)(uintptr_t)space_find(engine, ioasid)->table.table.tree.root;
}

double bench_walk(vio_engine *engine, uint32_t ioasid, const uint64_t *iovas, uint64_t count, uint64_t rounds)
{
    struct space *space = space_find(engine, ioasid);
    struct guard guard = {.memory = {0}};
    struct walk walk = {.need = VIO_READ};
    uint64_t last = 0;
    double start = now();

    for (uint64_t round = 0; round < rounds; round++)
        for (uint64_t i = 0; i < count; i++) {
            walk.iova = iovas[i] + after(last);
            if (space->walk(space, &guard, &walk))
                abort();
            last = walk.hva;
        }
    return (now() - start) / (double)(rounds * count);
}

#define OA 0x000ffffffffff000ull

static inline uint64_t bare_stage2(const uint64_t *table, unsigned levels, uint64_t gpa)
{
    for (unsigned level = levels; level; level--)
        table = (const uint64_t *)(uintptr_t)(table[gpa >> (3 + 9 * level) & 511] & OA);
    return (uint64_t)(uintptr_t)table | (gpa & 4095);
}

double floor_walk(uint64_t root1, const void *root2, unsigned levels, const uint64_t *iovas, uint64_t count,
                  uint64_t rounds)
{
    uint64_t last = 0;
    double start = now();

    for (uint64_t round = 0; round < rounds; round++)
        for (uint64_t i = 0; i < count; i++) {
            uint64_t iova = iovas[i] + after(last), gpa = root1;

            for (unsigned level = levels; level; level--) {
                gpa += (iova >> (3 + 9 * level) & 511) * 8;
                gpa = *(const uint64_t *)(uintptr_t)bare_stage2(root2, levels, gpa) & OA;
            }
            last = bare_stage2(root2, levels, gpa | (iova & 4095));
        }
    if (after(last))
        abort();
    return (now() - start) / (double)(rounds * count);
}

double bench_iotlb(vio_engine *engine, uint32_t ioasid, const uint64_t *iovas, uint64_t count, uint64_t rounds)
{
    struct space *space = space_find(engine, ioasid);
    uint64_t sum = 0;
    double start = now();

    for (uint64_t round = 0; round < rounds; round++)
        for (uint64_t i = 0; i < count; i++) {
            struct iotlb_hit hit;

            const struct iotlb_scope *scope = &space->scope;

            if (scope->seen != iotlb_above(scope) ||
                !iotlb_lookup(&engine->iotlb, scope->tag, scope->sizes, iovas[i], &hit))
                return -1; /* displaced: the caller gave too many */
            sum += hit.hva;
        }
    if (sum == 1)
        abort();
    return (now() - start) / (double)(rounds * count);
}

struct bare_set {
    uint64_t key[4], hva[4];
};

static inline struct bare_set *bare_set_of(struct bare_set *sets, unsigned shift, uint64_t page)
{
    return &sets[page * 0x9e3779b97f4a7c15ull >> shift];
}

double floor_iotlb(const uint64_t *iovas, uint64_t count, uint64_t rounds, unsigned log2_sets)
{
    size_t size = sizeof(struct bare_set) << log2_sets;
    struct bare_set *sets = aligned_alloc(64, size);
    unsigned shift = 64 - log2_sets;
    uint64_t sum = 0;
    double start, spent;

    if (!sets)
        return -1;
    memset(sets, 0xff, size);
    for (uint64_t i = 0; i < count; i++)
        for (unsigned way = 0; way < 4; way++) {
            struct bare_set *set = bare_set_of(sets, shift, iovas[i] >> 12);

            if (set->key[way] == UINT64_MAX || set->key[way] == iovas[i] >> 12) {
                set->key[way] = iovas[i] >> 12;
                set->hva[way] = iovas[i];
                break;
            }
        }
    start = now();
    for (uint64_t round = 0; round < rounds; round++)
        for (uint64_t i = 0; i < count; i++) {
            const struct bare_set *set = bare_set_of(sets, shift, iovas[i] >> 12);

            for (unsigned way = 0; way < 4; way++)
                if (set->key[way] == iovas[i] >> 12) {
                    sum += set->hva[way] | (iovas[i] & 4095);
                    break;
                }
        }
    spent = now() - start;
    free(sets);
    if (sum == 1)
        abort();
    return spent / (double)(rounds * count);
}

double floor_memcpy(void *to, const void *from, uint64_t size, uint64_t rounds)
{
    double start = now();

    for (uint64_t round = 0; round < rounds; round++) {
        memcpy(to, from, size);
        __asm__ volatile("" ::: "memory");
    }
    return (now() - start) / (double)rounds;
}

void floor_empty(const void *engine, uint32_t rid, uint32_t pasid, uint64_t iova, const void *buffer, uint64_t size,
                 int write)
{
    (void)engine, (void)rid, (void)pasid, (void)iova, (void)buffer, (void)size, (void)write;
}
