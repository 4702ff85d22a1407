/*
 * What walks remember of the way, where the IOTLB remembers its end: bounded for good at creation, and it can be off.
 *
 * Two kinds of lines in one direct-mapped array:
 *   path: (space, bits of the IOVA above the reach of a level-1 table) -> that table, and what all entries above it let
 *         through. A walk that succeeded left it; its accessed bits are set.
 *   page: (parent, 4 KiB page of GPAs that holds entries of stage 1) -> where stage 2 has it.
 * A line is found by a tag of its scope (iotlb.h): a number never used twice, which any invalidation of the scope changes,
 * and for paths a change of the parent as well; so what is stale is not found. Numbers of both kinds are of one sequence:
 * a path is never taken for a page.
 *
 * Any number of threads look up and fill at once; each line is a seqlock, as the IOTLB's sets are.
 */
#ifndef VIOASID_WALK_CACHE_H
#define VIOASID_WALK_CACHE_H

#include <stdbool.h>
#include <stdint.h>

/* 256 KiB: the tables of 4 GiB in 4 KiB pages with few collisions, and a share of a CPU's second cache. */
#define WALK_CACHE_LG2 12

struct walk_line {
    uint32_t sequence; /* odd: being written */
    uint32_t perm;     /* that stage 2 gives at hva */
    uint64_t tag, key; /* tag 0: empty */
    uint64_t gpa;      /* path: of the table */
    uint64_t hva;      /* of the table or page; 0: stage 2 has the table in several pieces */
    uint64_t tables;   /* path: AND over the entries above, bits that deny inverted */
} __attribute__((aligned(64)));

struct walk_cache {
    struct walk_line lines[1u << WALK_CACHE_LG2];
};

static inline struct walk_line *walk_cache_line(struct walk_cache *cache, uint64_t tag, uint64_t key)
{
    return &cache->lines[(key + tag * 0xd1342543de82ef95ull) * 0x9e3779b97f4a7c15ull >> (64 - WALK_CACHE_LG2)];
}

static inline bool walk_cache_find(struct walk_cache *cache, uint64_t tag, uint64_t key, struct walk_line *out)
{
    const struct walk_line *line = walk_cache_line(cache, tag, key);
    uint32_t sequence = __atomic_load_n(&line->sequence, __ATOMIC_ACQUIRE);

    if (__atomic_load_n(&line->key, __ATOMIC_ACQUIRE) != key || __atomic_load_n(&line->tag, __ATOMIC_ACQUIRE) != tag)
        return false;
    out->perm = __atomic_load_n(&line->perm, __ATOMIC_ACQUIRE); /* all read before the sequence is read again */
    out->gpa = __atomic_load_n(&line->gpa, __ATOMIC_ACQUIRE);
    out->hva = __atomic_load_n(&line->hva, __ATOMIC_ACQUIRE);
    out->tables = __atomic_load_n(&line->tables, __ATOMIC_ACQUIRE);
    return !(sequence & 1) && __atomic_load_n(&line->sequence, __ATOMIC_RELAXED) == sequence;
}

/* Keep a line in place of whatever stood there; if another thread writes there now, not. */
static inline void walk_cache_fill(struct walk_cache *cache, const struct walk_line *what)
{
    struct walk_line *line = walk_cache_line(cache, what->tag, what->key);
    uint32_t sequence = __atomic_load_n(&line->sequence, __ATOMIC_RELAXED);

    if ((sequence & 1) || !__atomic_compare_exchange_n(&line->sequence, &sequence, sequence + 1, false,
                                                       __ATOMIC_ACQUIRE, __ATOMIC_RELAXED))
        return;
    /* Release: a reader that sees one of these sees the odd sequence. */
    __atomic_store_n(&line->tag, what->tag, __ATOMIC_RELEASE);
    __atomic_store_n(&line->key, what->key, __ATOMIC_RELEASE);
    __atomic_store_n(&line->perm, what->perm, __ATOMIC_RELEASE);
    __atomic_store_n(&line->gpa, what->gpa, __ATOMIC_RELEASE);
    __atomic_store_n(&line->hva, what->hva, __ATOMIC_RELEASE);
    __atomic_store_n(&line->tables, what->tables, __ATOMIC_RELEASE);
    __atomic_store_n(&line->sequence, sequence + 2, __ATOMIC_RELEASE);
}

#endif
