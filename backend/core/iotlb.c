/* IOTLB: filling and forgetting; looking up is inline in iotlb.h. */
#include "iotlb.h"

#include <stdlib.h>
#include <string.h>

#include "vio.h"

/* Probing a set costs nanoseconds: up to this many, a range is forgotten exactly; beyond, its space starts anew. */
#define FORGET_PROBES 512

int iotlb_init(struct iotlb *iotlb, uint32_t entries)
{
    uint64_t sets = 1;
    unsigned log2 = 0;

    *iotlb = (struct iotlb){0};
    if (entries > VIO_MAX_IOTLB) /* 32 MiB of sets; more would miss the CPU's caches on every look-up */
        return VIO_ERR_LIMIT;
    if (!entries)
        return VIO_OK;
    while (sets * IOTLB_WAYS < entries) {
        sets *= 2;
        log2++;
    }
    iotlb->sets = aligned_alloc(sizeof *iotlb->sets, sets * sizeof *iotlb->sets);
    if (!iotlb->sets)
        return VIO_ERR_MEMORY;
    iotlb->mask = sets - 1;
    iotlb->shift = log2 ? 64 - log2 : 0;
    memset(iotlb->sets, 0, sets * sizeof *iotlb->sets);
    return VIO_OK;
}

void iotlb_deinit(struct iotlb *iotlb)
{
    free(iotlb->sets);
    iotlb->sets = NULL;
}

void iotlb_flush(struct iotlb *iotlb)
{
    if (iotlb->sets)
        memset(iotlb->sets, 0, (iotlb->mask + 1) * sizeof *iotlb->sets);
}

bool iotlb_fill(struct iotlb *iotlb, uint32_t tag, uint64_t iova, unsigned size_lg2, uint64_t hva, uint64_t gpa,
                unsigned perm)
{
    uint64_t key = iova | size_lg2;
    struct iotlb_set *set = iotlb_set_of(iotlb, key, tag);
    uint32_t sequence = __atomic_load_n(&set->sequence, __ATOMIC_RELAXED);
    unsigned way, victim = IOTLB_WAYS;
    bool displaced = false;

    if ((sequence & 1) || !__atomic_compare_exchange_n(&set->sequence, &sequence, sequence + 1, false,
                                                       __ATOMIC_ACQUIRE, __ATOMIC_RELAXED))
        return false;
    for (way = 0; way < IOTLB_WAYS; way++) {
        if (set->tag[way] == tag && set->key[way] == key) { /* the same with other permissions */
            victim = way;
            break;
        }
        if (!set->tag[way] && victim == IOTLB_WAYS)
            victim = way;
    }
    if (victim == IOTLB_WAYS) {
        victim = set->turn++ % IOTLB_WAYS;
        displaced = true;
    }
    /* Release: a reader that sees one of these sees the odd sequence. */
    __atomic_store_n(&set->tag[victim], tag, __ATOMIC_RELEASE);
    __atomic_store_n(&set->key[victim], key, __ATOMIC_RELEASE);
    __atomic_store_n(&set->hva[victim], hva | perm, __ATOMIC_RELEASE);
    __atomic_store_n(&set->gpa[victim], gpa, __ATOMIC_RELEASE);
    __atomic_store_n(&set->sequence, sequence + 2, __ATOMIC_RELEASE);
    return displaced;
}

bool iotlb_forget(struct iotlb *iotlb, uint32_t tag, uint64_t sizes, uint64_t first, uint64_t last)
{
    uint64_t probes = 0;

    if (!iotlb->sets)
        return true;
    for (uint64_t rest = sizes; rest; rest &= rest - 1) {
        unsigned lg2 = (unsigned)__builtin_ctzll(rest);

        if ((last >> lg2) - (first >> lg2) >= FORGET_PROBES - probes)
            return false;
        probes += (last >> lg2) - (first >> lg2) + 1;
    }
    for (; sizes; sizes &= sizes - 1) {
        unsigned lg2 = (unsigned)__builtin_ctzll(sizes);

        for (uint64_t unit = first >> lg2; unit <= last >> lg2; unit++) {
            uint64_t key = unit << lg2 | lg2;
            struct iotlb_set *set = iotlb_set_of(iotlb, key, tag);

            for (unsigned way = 0; way < IOTLB_WAYS; way++)
                if (set->tag[way] == tag && set->key[way] == key)
                    set->tag[way] = 0;
        }
    }
    return true;
}
