/*
 * IOTLB: four-way sets of translations of all spaces, of any power-of-two size, bounded for good at creation.
 *
 * A translation is found by the tag of its scope and by its base and size. A scope is what an invalidation can name at
 * once: a space, or one PASID of it. Tags are numbers never used twice: giving a scope a new tag forgets all it had,
 * at no cost to others. Scopes stand under one another (PASID, space, parent, the IOTLB's own); what forgets a scope
 * for those under it adds one to its generation, and they take new tags when they are next used. So every invalidation
 * is of constant cost, or of the size of its range if that is small. A scope remembers which sizes it ever put in
 * under its tag, and a look-up probes one set for each: one or two in practice, at most 52 if a guest insists, at its
 * own cost.
 *
 * Any number of threads look up and fill at once; each set is a seqlock. A filler
 * that finds the set taken goes without: it has its translation already. Invalidation has the gate closed.
 */
#ifndef VIOASID_IOTLB_H
#define VIOASID_IOTLB_H

#include <pthread.h>
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

struct iotlb_scope {
    struct iotlb_scope *above; /* forgotten with this one; NULL: the IOTLB's own scope */
    uint64_t generation;       /* counts what forgot the scopes under this one */
    uint64_t seen;             /* generations above, added up, when the tag was taken; IOTLB_STALE: take another */
    uint64_t sizes;            /* bit n: an entry of 2^n bytes was filled under this tag */
    uint32_t tag;              /* 0: none to be had, nothing is held */
    /* of the walk cache, a new one at each invalidation or change: of the scope's own lines, and of what those under it
       know of its table, which changes with the gate closed alone */
    uint64_t walk_tag, page_tag;
};

#define IOTLB_STALE UINT64_MAX

struct iotlb {
    struct iotlb_set *sets; /* NULL: no IOTLB, every request walks */
    uint64_t mask;
    unsigned shift;
    struct iotlb_scope all;
    uint32_t next_tag;
    uint64_t last_walk_tag;
    pthread_mutex_t tag_lock; /* requests renew tags under it; changes have the gate closed */
};

struct iotlb_hit {
    uint64_t hva, gpa; /* of the address looked up */
    uint64_t size;     /* bytes to the end of the translation */
    unsigned perm;
};

int iotlb_init(struct iotlb *iotlb, uint32_t entries); /* 0 or a vio_status */
void iotlb_deinit(struct iotlb *iotlb);
/* Enter a translation whose bases are aligned to its size; true if it displaced another one. */
bool iotlb_fill(struct iotlb *iotlb, uint32_t tag, uint64_t iova, unsigned size_lg2, uint64_t hva, uint64_t gpa,
                unsigned perm);

/* Scopes. Begun with what stands above it, or NULL for &iotlb->all. All but the tag's look-up: with the gate closed. */
void iotlb_scope_begin(struct iotlb *iotlb, struct iotlb_scope *scope, struct iotlb_scope *above);
/*
 * Forget all of a scope and of those under it; of &iotlb->all: of everything. A scope that ends needs not even this: its
 * tag is never used again.
 */
void iotlb_forget(struct iotlb *iotlb, struct iotlb_scope *scope);
/* Forget what a scope holds in [first, last], at least; not those under it. */
void iotlb_forget_range(struct iotlb *iotlb, struct iotlb_scope *scope, uint64_t first, uint64_t last);
/* Forget the scopes under this one, but not its own. */
void iotlb_forget_below(struct iotlb *iotlb, struct iotlb_scope *scope);
void iotlb_renew(struct iotlb *iotlb, struct iotlb_scope *scope, uint64_t now); /* slow path of iotlb_tag */

/* Generations above a scope, added up: they only grow, so the sum is the same only if each of them is. */
static inline uint64_t iotlb_above(const struct iotlb_scope *scope)
{
    uint64_t now = 0;

    for (const struct iotlb_scope *above = scope->above; above; above = above->above)
        now += above->generation;
    return now;
}

/* The scope's tag, valid as long as the request stays behind the gate. */
static inline uint32_t iotlb_tag(struct iotlb *iotlb, struct iotlb_scope *scope)
{
    uint64_t now = iotlb_above(scope);

    if (__builtin_expect(__atomic_load_n(&scope->seen, __ATOMIC_ACQUIRE) != now, 0))
        iotlb_renew(iotlb, scope, now);
    return scope->tag;
}

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
