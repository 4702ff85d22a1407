/*
 * Floors: the same job written as simply as it can be, without a single check, on the same tables and in the same run;
 * and loops over the core's own functions, timed in C because a Python call costs as much as several walks.
 */
#include <stdlib.h>
#include <string.h>

#include "bench_clock.h"
#include "engine.h"

void bench_table(vio_engine *engine, uint32_t ioasid, vio_table *out)
{
    *out = space_find(engine, ioasid)->table.table;
}

uint64_t bench_space_bytes(void)
{
    return sizeof(struct space) + 2 * sizeof(struct index_slot);
}

/* The pages of a guest's table, one call of the builder each; `map` is the core's own function. */
int bench_fill(void *map, void *table, const uint64_t *gpas, uint64_t count, uint64_t page)
{
    int (*each)(void *, uint64_t, uint64_t, uint64_t, uint32_t);
    int status = 0;

    memcpy(&each, &map, sizeof each);
    for (uint64_t i = 0; i < count && !status; i++)
        status = each(table, i * page, gpas[i], page, RW_BOTH);
    return status;
}

double floor_entries(uint64_t *entries, uint64_t count, uint64_t rounds)
{
    double start = now();

    for (uint64_t round = 0; round < rounds; round++) {
        for (uint64_t i = 0; i < count; i++)
            entries[i] = (i << 12) | (3ull << 61 | 1);
        __asm__ volatile("" ::: "memory");
    }
    return (now() - start) / (double)(rounds * count);
}

double floor_clear(uint64_t *entries, uint64_t count, uint64_t rounds)
{
    double start = now();

    for (uint64_t round = 0; round < rounds; round++) {
        memset(entries, 0, count * sizeof *entries);
        __asm__ volatile("" ::: "memory");
    }
    return (now() - start) / (double)(rounds * count);
}

uint64_t bench_walk_one(vio_engine *engine, uint32_t ioasid, uint64_t iova)
{
    struct space *space = space_find(engine, ioasid);
    struct guard guard = {.memory = {0}};
    struct walk walk = {.need = VIO_READ, .iova = iova};

    return space->walk(space, &guard, &walk) ? 0 : walk.hva;
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
