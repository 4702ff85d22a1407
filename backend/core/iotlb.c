/* IOTLB: filling and forgetting; looking up is inline in iotlb.h. */
#include "iotlb.h"

#include <stdlib.h>
#include <string.h>

#include "vio.h"

/* Probing a set costs nanoseconds: up to this many, a range is forgotten exactly; beyond, its space starts anew. */
#define FORGET_PROBES 512

/*
 * Tags are given out upward; before they run out, at a change, all start again. Between two changes a scope renews its
 * tag once at most: the room left is for all spaces and as many PASIDs. Should more renew, they go without.
 */
#define NO_TAG UINT32_MAX
#define LAST_TAG (NO_TAG - 2 * VIO_MAX_SPACES)

int iotlb_init(struct iotlb *iotlb, uint32_t entries)
{
    uint64_t sets = 1;
    unsigned log2 = 0;

    *iotlb = (struct iotlb){.next_tag = 1};
    if (entries > VIO_MAX_IOTLB) /* 32 MiB of sets; more would miss the CPU's caches on every look-up */
        return VIO_ERR_LIMIT;
    pthread_mutex_init(&iotlb->tag_lock, NULL);
    if (!entries)
        return VIO_OK;
    while (sets * IOTLB_WAYS < entries) {
        sets *= 2;
        log2++;
    }
    iotlb->sets = aligned_alloc(sizeof *iotlb->sets, sets * sizeof *iotlb->sets);
    if (!iotlb->sets) {
        pthread_mutex_destroy(&iotlb->tag_lock);
        return VIO_ERR_MEMORY;
    }
    iotlb->mask = sets - 1;
    iotlb->shift = log2 ? 64 - log2 : 0;
    memset(iotlb->sets, 0, sets * sizeof *iotlb->sets);
    return VIO_OK;
}

void iotlb_deinit(struct iotlb *iotlb)
{
    pthread_mutex_destroy(&iotlb->tag_lock);
    free(iotlb->sets);
    iotlb->sets = NULL;
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

/* 64 bits: they do not run out. */
static uint64_t new_walk_tag(struct iotlb *iotlb)
{
    return __atomic_add_fetch(&iotlb->last_walk_tag, 1, __ATOMIC_RELAXED);
}

static void renew_walk_tags(struct iotlb *iotlb, struct iotlb_scope *scope)
{
    scope->walk_tag = new_walk_tag(iotlb);
    scope->page_tag = new_walk_tag(iotlb);
}

void iotlb_scope_begin(struct iotlb *iotlb, struct iotlb_scope *scope, struct iotlb_scope *above)
{
    *scope = (struct iotlb_scope){.above = above ? above : &iotlb->all, .seen = IOTLB_STALE};
    renew_walk_tags(iotlb, scope);
}

/* Nothing holds a tag afterwards, and no set an entry: all numbers are free again. */
static void restart_tags(struct iotlb *iotlb)
{
    if (iotlb->sets)
        memset(iotlb->sets, 0, (iotlb->mask + 1) * sizeof *iotlb->sets);
    iotlb->next_tag = 1;
    iotlb->all.generation++;
}

void iotlb_forget_below(struct iotlb *iotlb, struct iotlb_scope *scope)
{
    scope->generation++;
    renew_walk_tags(iotlb, scope);
    if (iotlb->next_tag >= LAST_TAG)
        restart_tags(iotlb);
}

void iotlb_forget(struct iotlb *iotlb, struct iotlb_scope *scope)
{
    scope->seen = IOTLB_STALE;
    iotlb_forget_below(iotlb, scope);
}

void iotlb_renew(struct iotlb *iotlb, struct iotlb_scope *scope, uint64_t now)
{
    pthread_mutex_lock(&iotlb->tag_lock);
    if (scope->seen != now) {
        scope->tag = iotlb->next_tag < NO_TAG ? iotlb->next_tag++ : 0;
        scope->sizes = 0;
        scope->walk_tag = new_walk_tag(iotlb);
        __atomic_store_n(&scope->seen, now, __ATOMIC_RELEASE);
    }
    pthread_mutex_unlock(&iotlb->tag_lock);
}

void iotlb_forget_range(struct iotlb *iotlb, struct iotlb_scope *scope, uint64_t first, uint64_t last)
{
    uint64_t probes = 0;

    renew_walk_tags(iotlb, scope);
    for (uint64_t rest = scope->sizes; rest; rest &= rest - 1) {
        unsigned lg2 = (unsigned)__builtin_ctzll(rest);

        if ((last >> lg2) - (first >> lg2) >= FORGET_PROBES - probes) {
            iotlb_forget(iotlb, scope);
            return;
        }
        probes += (last >> lg2) - (first >> lg2) + 1;
    }
    for (uint64_t rest = scope->sizes; rest; rest &= rest - 1) {
        unsigned lg2 = (unsigned)__builtin_ctzll(rest);

        for (uint64_t unit = first >> lg2; unit <= last >> lg2; unit++) {
            uint64_t key = unit << lg2 | lg2;
            struct iotlb_set *set = iotlb_set_of(iotlb, key, scope->tag);

            for (unsigned way = 0; way < IOTLB_WAYS; way++)
                if (set->tag[way] == scope->tag && set->key[way] == key)
                    set->tag[way] = 0;
        }
    }
}
