/*
 * The walk, written once over the contract of formats/contract.h; the compiler folds a format's constants, and the
 * granule, into each instance. A guest's table is hostile: every step goes to a lower level, so a walk ends after at most `levels`
 * entries, and each entry is read once, by one 64-bit load, through stage 2: it can touch only what stage 2 maps.
 */
#ifndef VIOASID_WALK_H
#define VIOASID_WALK_H

#include "engine.h"

/* How often a walk starts anew because an entry whose accessed or dirty bit it was to set changed under it. */
#define UPDATE_ATTEMPTS 16

/* One copy for all pairs of formats; clang knows no clones. */
#if __has_attribute(noclone)
#define OUT_OF_LINE __attribute__((noinline, noclone))
#else
#define OUT_OF_LINE __attribute__((noinline))
#endif

#define UNLIKELY(condition) __builtin_expect(!!(condition), 0)

/* Where a stage's walk stands. */
struct stage {
    uint64_t oa;       /* out: output address of the address asked for */
    unsigned size_lg2; /* out */
    unsigned perm;     /* out: over all levels */
    bool clean;        /* out: a write has a dirty bit to set, or will be refused for want of it; stage 2: three stages */
    uint64_t gpa;      /* out, stage 2 of three stages: of the host-managed space */
    unsigned level;    /* out, also at a fault: level of the last entry, 0 if none was read */
    uint64_t entry;    /* ditto: the entry, 0 if none was read */
};

/* Through a table of ours: plain memory of this process, and nobody else's to change. 0, or a reason. */
PT_INLINE int walk_table(const struct pt_format *format, unsigned granule, const struct pt_config *config,
                         uint64_t address, unsigned need, struct stage *out)
{
    const vio_tree *tree = &config->table.tree;
    const struct pt_start start = {.granule = granule};
    unsigned level = tree->levels;
    uint64_t at = tree->root + pt_root_offset(granule, address, level);

    out->entry = 0;
    out->level = 0;
    if (UNLIKELY(address > config->last))
        return VIO_REASON_ADDRESS_WIDTH;
    for (;;) {
        uint64_t entry = __atomic_load_n((const uint64_t *)(uintptr_t)at, __ATOMIC_RELAXED);
        struct pt_entry decoded;
        int reason = format->decode(config, &start, entry, level, true, &decoded);

        if (UNLIKELY(reason || !decoded.next)) {
            out->entry = entry;
            out->level = level;
            if (reason)
                return reason;
            out->perm = format->permissions(config, &start, ~0ull, entry, true);
            out->size_lg2 = decoded.size_lg2;
            out->oa = decoded.oa | (address & ((1ull << decoded.size_lg2) - 1));
            return UNLIKELY(need & ~out->perm) ? VIO_REASON_PERMISSION : 0;
        }
        level--;
        at = decoded.oa + pt_offset(granule, address, level);
    }
}

static inline int stage2_fault(struct walk *walk, const struct stage *stage, uint64_t gpa, bool table, int reason)
{
    walk->stage = 2;
    walk->level = stage->level;
    walk->entry = stage->entry;
    walk->fault_gpa = gpa;
    walk->has_gpa = true;
    walk->table = table;
    return reason;
}

/* Stage 2 alone: a host-managed space. */
PT_INLINE int walk_host_space(const struct pt_format *format, unsigned granule, const struct space *space,
                              struct walk *walk)
{
    struct stage stage;
    int reason = walk_table(format, granule, &space->table, walk->iova, walk->need, &stage);

    if (UNLIKELY(reason))
        return stage2_fault(walk, &stage, walk->iova, false, reason);
    walk->hva = stage.oa;
    walk->gpa = walk->iova;
    walk->size_lg2 = stage.size_lg2;
    walk->perm = stage.perm;
    return 0;
}

/* An entry of a guest's table that a walk used, whose accessed or dirty state is to change when it succeeds. */
struct update {
    uint64_t at, hva, old, new;
    uint64_t gpa;         /* three stages: of the host-managed space; else it is `at` */
    unsigned level, perm; /* perm: stage 2's */
};

/* One guest's table over its stage 2, while one request is translated. */
struct nested {
    const struct pt_format *stage1, *stage2; /* stage2 NULL: three stages, by the walk of `parent` */
    unsigned granule1, granule2;
    const struct pt_config *table1, *table2;
    const struct space *parent;
    const struct dirty *dirty; /* of stage 2 */
    uint64_t tag1, tag2;       /* of the space's paths, and of pages in its parent (walk_cache.h) */
    struct guard *guard;
    struct walk *walk;
};

static inline int stage1_fault(struct walk *walk, unsigned level, uint64_t at, uint64_t entry, int reason)
{
    walk->stage = 1;
    walk->level = level;
    walk->entry = entry;
    walk->fault_gpa = at;
    walk->has_gpa = level;
    walk->table = false;
    return reason;
}

/* Announce an entry about to be touched, should its memory be gone. */
PT_INLINE void about_to_touch_entry(const struct nested *nested, uint64_t at, unsigned level, uint64_t hva)
{
    nested->walk->reading_gpa = at;
    nested->walk->reading_level = level;
    guard_memory(nested->guard, hva, sizeof(uint64_t));
}

/* By stage 2: 0, or a reason, the walk telling where. `table`: for an entry of stage 1. */
PT_INLINE int walk_stage2(const struct nested *nested, uint64_t address, unsigned need, bool table, struct stage *out)
{
    struct walk *walk = nested->walk;
    int reason;

    if (nested->stage2) {
        reason = walk_table(nested->stage2, nested->granule2, nested->table2, address, need, out);
        return UNLIKELY(reason) ? stage2_fault(walk, out, address, table, reason) : 0;
    }
    reason = walk_middle(nested->parent, nested->guard, walk, address, need, table);
    if (UNLIKELY(reason))
        return reason;
    out->oa = walk->under->hva;
    out->gpa = walk->under->gpa;
    out->size_lg2 = walk->under->size_lg2;
    out->clean = walk->under->perm != (walk->under->perm & PT_BOTH((unsigned)PT_RWX));
    out->perm = PT_PERMITTED(walk->under->perm);
    return 0;
}

/* Where an entry of stage 1 lies: 0, or the reason why stage 2 does not lead there. */
PT_INLINE int place_entry(const struct nested *nested, struct walk_cache *cache, struct update *use)
{
    uint64_t key = use->at >> PT_GRANULE, offset = use->at & ((1u << PT_GRANULE) - 1);
    struct stage stage;
    int reason;

    if (cache) {
        struct walk_line page;

        if (walk_cache_find(cache, nested->tag2, key, &page)) {
            use->hva = page.hva + offset;
            use->perm = page.perm;
            return 0;
        }
    }
    reason = walk_stage2(nested, use->at, VIO_READ, true, &stage);
    if (UNLIKELY(reason))
        return reason;
    if (nested->stage2 && IS_FOREIGN(stage.oa)) /* it could be read, but neither at once nor compared and exchanged */
        return stage2_fault(nested->walk, &stage, use->at, true, VIO_REASON_UNSUPPORTED);
    use->hva = stage.oa;
    use->perm = stage.perm;
    if (!nested->stage2) {
        use->gpa = stage.gpa;
        if (stage.clean) /* what is written there must be walked for again */
            use->perm &= ~PT_WRITES;
    }
    if (cache)
        walk_cache_fill(cache, &(struct walk_line){
                                   .tag = nested->tag2, .key = key, .hva = stage.oa - offset, .perm = stage.perm});
    return 0;
}

PT_INLINE void read_entry(const struct nested *nested, struct update *use)
{
    about_to_touch_entry(nested, use->at, use->level, use->hva);
    use->old = __atomic_load_n((const uint64_t *)(uintptr_t)use->hva, __ATOMIC_ACQUIRE);
}

/*
 * Set accessed and dirty, root to leaf, each a write by stage 2: 0, a reason, or -1: an entry has changed meanwhile.
 * Rare, hence one for all pairs; the pair's own `nested` must not get out of the compiler's sight, so it gets a copy.
 */
static OUT_OF_LINE int make_updates(struct nested copy, const struct update *updates, unsigned count)
{
    const struct nested *nested = &copy;

    for (unsigned i = 0; i < count; i++) {
        const struct update *update = &updates[i];
        uint64_t old = update->old;

        if (!(update->perm & VIO_WRITE)) {
            struct stage stage;
            int reason = walk_stage2(nested, update->at, VIO_WRITE, true, &stage);

            if (reason)
                return reason;
            if (stage.oa != update->hva) /* the table in the middle has just been changed */
                return -1;
        }
        about_to_touch_entry(nested, update->at, update->level, update->hva);
        if (!__atomic_compare_exchange_n((uint64_t *)(uintptr_t)update->hva, &old, update->new, false,
                                         __ATOMIC_ACQ_REL, __ATOMIC_RELAXED))
            return -1;
        /* guest memory that its owner did not write */
        dirty_mark(nested->dirty, nested->stage2 ? update->at : update->gpa, sizeof old);
    }
    return 0;
}

/* Stage 1 to its end: *out, 0 or a reason, walk telling where; -1: once more. */
PT_INLINE int walk_guest_table(const struct nested *nested, struct stage *out)
{
    const struct pt_format *format = nested->stage1;
    const struct pt_config *config = nested->table1;
    struct walk *walk = nested->walk;
    uint64_t address = walk->iova, tables = ~0ull;
    struct update updates[PT_MAX_LEVELS], use = {.hva = 0};
    struct walk_cache *cache = nested->stage2 ? walk->cache : NULL; /* three stages: that of the middle is enough */
    unsigned count = 0, granule = nested->granule1;
    bool placed = false, keep = false;
    struct pt_start start;
    int reason = format->start(config, address, &start);

    if (UNLIKELY(reason))
        return stage1_fault(walk, 0, 0, 0, reason);
    start.granule = granule; /* it is: let the compiler know */
    use.level = start.levels;
    use.at = start.table + pt_root_offset(granule, start.index, use.level);
    if (cache && use.level > 1) {
        struct walk_line path;

        if (walk_cache_find(cache, nested->tag1, address >> pt_entry_lg2(granule, 2), &path)) {
            uint64_t offset = pt_offset(granule, start.index, 1);

            use = (struct update){.at = path.gpa + offset, .hva = path.hva + offset, .level = 1, .perm = path.perm};
            tables = path.tables;
            placed = path.hva;
            walk->cached = true;
        } else {
            keep = true;
        }
    }
    for (;;) {
        struct pt_entry decoded;
        bool write = walk->need & PT_WRITES;

        if (!placed) {
            reason = place_entry(nested, cache, &use);
            if (UNLIKELY(reason))
                return reason;
        }
        read_entry(nested, &use);
        reason = format->decode(config, &start, use.old, use.level, false, &decoded);
        if (UNLIKELY(reason))
            return stage1_fault(walk, use.level, use.at, use.old, reason);
        if (decoded.next) {
            if (format->skips_levels && UNLIKELY(decoded.next != use.level - 1)) {
                /* Address bits that skipped levels would have indexed must be zero. */
                uint64_t covered = (1ull << pt_entry_lg2(granule, decoded.next + 1)) - 1;

                if (address & ((1ull << pt_entry_lg2(granule, use.level)) - 1) & ~covered)
                    return stage1_fault(walk, use.level, use.at, use.old, VIO_REASON_ADDRESS_WIDTH);
            }
            format->use(config, use.old, false, false, &use.new);
            if (UNLIKELY(use.new != use.old))
                updates[count++] = use;
            tables &= use.old ^ format->denies;
            use.level = format->skips_levels ? decoded.next : use.level - 1;
            use.at = decoded.oa + pt_offset(granule, start.index, use.level);
            continue;
        }
        out->perm = format->permissions(config, &start, tables, use.old, false);
        if (UNLIKELY(walk->need & ~out->perm))
            return stage1_fault(walk, use.level, use.at, use.old, VIO_REASON_PERMISSION);
        reason = format->use(config, use.old, true, write, &use.new);
        if (UNLIKELY(reason))
            return stage1_fault(walk, use.level, use.at, use.old, reason);
        if (UNLIKELY(use.new != use.old))
            updates[count++] = use;
        out->size_lg2 = decoded.size_lg2;
        out->oa = decoded.oa | (address & ((1ull << decoded.size_lg2) - 1));
        break;
    }
    out->clean = false;
    if (!(walk->need & PT_WRITES)) { /* a later write must come here again if there is a dirty bit to set */
        uint64_t written;

        out->clean = format->use(config, use.new, true, true, &written) || written != use.new;
    }
    if (UNLIKELY(count)) {
        reason = make_updates(*nested, updates, count);
        if (reason)
            return reason;
    }
    if (keep && use.level == 1) {
        uint64_t offset = pt_offset(granule, start.index, 1);

        walk_cache_fill(cache, &(struct walk_line){.tag = nested->tag1,
                                                   .key = address >> pt_entry_lg2(granule, 2),
                                                   .gpa = use.at - offset,
                                                   .hva = granule == PT_GRANULE ? use.hva - offset : 0,
                                                   .perm = use.perm,
                                                   .tables = tables});
    }
    return 0;
}

/*
 * Nested: the guest's stage 1 over the parent's stage 2.
 *   1. walk stage 1, each entry being read through stage 2; set its accessed and dirty bits once it has led somewhere;
 *   2. translate the GPA it gives through stage 2;
 *   3. permission is the AND of both, size the smaller one.
 * Without format2 the parent is guest-managed too, and each step through stage 2 is a nested walk of its own: at most
 * (levels + 1) x (levels + 1) entries of the guest's, and each of those is read through our table.
 */
PT_INLINE int walk_nested_space(const struct pt_format *format1, unsigned granule1, const struct pt_format *format2,
                                unsigned granule2, const struct space *space, struct guard *guard, struct walk *walk)
{
    const struct nested nested = {.stage1 = format1,
                                  .stage2 = format2,
                                  .granule1 = granule1,
                                  .granule2 = granule2,
                                  .table1 = &space->table,
                                  .table2 = &space->parent->table,
                                  .parent = space->parent,
                                  .dirty = (format2 ? space->parent : space->parent->parent)->dirty,
                                  .tag1 = space->scope.walk_tag,
                                  .tag2 = space->parent->scope.page_tag,
                                  .guard = guard,
                                  .walk = walk};
    struct stage stage1 = {0}, stage2;
    unsigned attempts = 0;
    int reason;

    do {
        if (UNLIKELY(attempts++ == UPDATE_ATTEMPTS))
            return stage1_fault(walk, walk->reading_level, walk->reading_gpa, 0, VIO_REASON_ENTRY_CHANGED);
        reason = walk_guest_table(&nested, &stage1);
        if (UNLIKELY(reason > 0) && walk->cached) { /* what has become permitted needs no invalidation: look again */
            walk->cached = false;
            walk->cache = NULL;
            reason = -1;
        }
    } while (UNLIKELY(reason < 0)); /* the guest was quicker: look again at what it wrote, too */
    if (UNLIKELY(reason))
        return reason;
    walk->reading_level = 0;
    reason = walk_stage2(&nested, stage1.oa, walk->need, false, &stage2);
    if (UNLIKELY(reason))
        return reason;
    walk->hva = stage2.oa;
    walk->gpa = format2 ? stage1.oa : stage2.gpa;
    walk->size_lg2 = stage1.size_lg2 < stage2.size_lg2 ? stage1.size_lg2 : stage2.size_lg2;
    walk->perm = stage1.perm & stage2.perm;
    if (stage1.clean || (!format2 && stage2.clean))
        walk->perm = PT_CLEAN(walk->perm);
    return 0;
}

#endif
