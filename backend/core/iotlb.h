/*
 * IOTLB: four-way sets of translations of all spaces, of any power-of-two size, bounded for good at creation.
 *
 * A translation is found by the tag of its space and by its base and size. Tags are numbers never used twice: giving a
 * space a new tag forgets all it had, at no cost to others. A space remembers which sizes it ever put in under its tag,
 * and a look-up probes one set for each: one or two in practice, at most 52 if a guest insists, at its own cost.
 *
 * Any number of threads look up and fill at once; each set is a seqlock. A filler
 * that finds the set taken goes without: it has its translation already. Invalidation has the gate closed.
 */
#ifndef VIOASID_IOTLB_H
#define VIOASID_IOTLB_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define IOTLB_WAYS 4
#define IOTLB_FLAGS 0xfffull /* what fits below the 4 KiB alignment of addresses */

struct iotlb_set {
    uint64_t key[IOTLB_WAYS]; /* IOVA of the base | log2 of the size */
    uint32_t tag[IOTLB_WAYS]; /* 0: empty */
    uint32_t sequence;        /* odd: being written */
    uint32_t turn;            /* way that the next fill displaces */
    uint64_t reserved;
    /* second cache line, touched by a hit only */
    uint64_t hva[IOTLB_WAYS]; /* base | permission */
    uint64_t gpa[IOTLB_WAYS];
} __attribute__((aligned(64)));

struct iotlb {
    struct iotlb_set *sets; /* NULL: no IOTLB, every request walks */
    uint64_t mask;
    unsigned shift;
};

struct iotlb_hit {
    uint64_t hva, gpa; /* of the address looked up */
    uint64_t size;     /* bytes to the end of the translation */
    unsigned perm;
};

int iotlb_init(struct iotlb *iotlb, uint32_t entries); /* 0 or a vio_status */
void iotlb_deinit(struct iotlb *iotlb);
void iotlb_flush(struct iotlb *iotlb);
/* Enter a translation whose bases are aligned to its size; true if it displaced another one. */
bool iotlb_fill(struct iotlb *iotlb, uint32_t tag, uint64_t iova, unsigned size_lg2, uint64_t hva, uint64_t gpa,
                unsigned perm);
/* Forget what `tag` has in [first, last], of the sizes in the mask; false if that is more than it is worth. */
bool iotlb_forget(struct iotlb *iotlb, uint32_t tag, uint64_t sizes, uint64_t first, uint64_t last);

static inline struct iotlb_set *iotlb_set_of(const struct iotlb *iotlb, uint64_t key, uint32_t tag)
{
    uint64_t hash = (key + ((uint64_t)tag << 40 | tag)) * 0x9e3779b97f4a7c15ull;

    return &iotlb->sets[hash >> iotlb->shift & iotlb->mask];
}

/* Ask for the set in which a translation of the smallest size for `iova` would lie, while there is other work to do. */
static inline void iotlb_prefetch(const struct iotlb *iotlb, uint32_t tag, uint64_t sizes, uint64_t iova)
{
    unsigned lg2 = (unsigned)__builtin_ctzll(sizes);
    const struct iotlb_set *set = iotlb_set_of(iotlb, (iova >> lg2 << lg2) | lg2, tag);

    __builtin_prefetch(set->key);
    __builtin_prefetch(set->hva);
}

static inline bool iotlb_lookup(const struct iotlb *iotlb, uint32_t tag, uint64_t sizes, uint64_t iova,
                                struct iotlb_hit *hit)
{
    for (; sizes; sizes &= sizes - 1) {
        unsigned lg2 = (unsigned)__builtin_ctzll(sizes);
        uint64_t offset = iova & ((1ull << lg2) - 1);
        uint64_t key = (iova - offset) | lg2;
        const struct iotlb_set *set = iotlb_set_of(iotlb, key, tag);
        uint32_t sequence = __atomic_load_n(&set->sequence, __ATOMIC_ACQUIRE);

        for (unsigned way = 0; way < IOTLB_WAYS; way++) {
            uint64_t hva, gpa;

            if (__atomic_load_n(&set->key[way], __ATOMIC_ACQUIRE) != key ||
                __atomic_load_n(&set->tag[way], __ATOMIC_ACQUIRE) != tag)
                continue;
            hva = __atomic_load_n(&set->hva[way], __ATOMIC_ACQUIRE); /* read before the sequence is read again */
            gpa = __atomic_load_n(&set->gpa[way], __ATOMIC_ACQUIRE);
            if ((sequence & 1) || __atomic_load_n(&set->sequence, __ATOMIC_RELAXED) != sequence)
                break; /* written meanwhile: as good as a miss */
            hit->hva = (hva & ~IOTLB_FLAGS) + offset;
            hit->gpa = gpa + offset;
            hit->size = (1ull << lg2) - offset;
            hit->perm = (unsigned)(hva & IOTLB_FLAGS);
            return true;
        }
    }
    return false;
}

#endif
