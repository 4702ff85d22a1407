/*
 * The walk, written once over the contract of formats/contract.h; the compiler folds a format's constants into each
 * instance. A guest's table is hostile: every step goes to a lower level, so a walk ends after at most `levels`
 * entries, and each entry is read once, by one 64-bit load, through stage 2: it can touch only what stage 2 maps.
 */
#ifndef VIOASID_WALK_H
#define VIOASID_WALK_H

#include "engine.h"

/* How often a walk tries to set an accessed or dirty bit in an entry that changes under it, before it gives up. */
#define UPDATE_ATTEMPTS 16

/* Where a stage's walk stands. */
struct stage {
    uint64_t oa;       /* out: output address of the address asked for */
    unsigned size_lg2; /* out */
    unsigned perm;     /* out: AND over all levels */
    unsigned level;    /* out, also at a fault: level of the last entry */
    uint64_t entry;    /* ditto: the entry, 0 if none was read */
    uint64_t entry_at; /* ditto: its address, in the space in which the table lies */
    bool read_failed;  /* out: the reason is the reader's, not this stage's */
};

/* An entry in memory: fetched by one acquire load, and replaced only if still what was read. */
struct entry_access {
    int (*read)(void *context, uint64_t at, unsigned level, uint64_t *entry);
    int (*replace)(void *context, uint64_t at, uint64_t old, uint64_t new); /* 0, a reason, or -1: it has changed */
};

PT_INLINE int walk_stage(const struct pt_format *format, const struct pt_config *table, bool trusted, uint64_t address,
                         unsigned need, const struct entry_access *access, void *context, struct stage *out)
{
    uint64_t base = table->root;
    unsigned level = table->levels, attempts = 0;

    out->perm = RW_BOTH;
    out->level = level;
    out->entry = 0;
    out->entry_at = base;
    out->read_failed = false;
    if (__builtin_expect(!format->address_ok(address, level), 0))
        return VIO_REASON_ADDRESS_WIDTH;
    for (;;) {
        uint64_t at = base + format->entry_offset(address, level), entry, used;
        struct pt_entry decoded;
        int reason = access->read(context, at, level, &entry);

        out->level = level;
        out->entry_at = at;
        if (__builtin_expect(reason, 0)) {
            out->read_failed = true;
            return reason;
        }
        out->entry = entry;
        reason = format->decode(entry, level, trusted, &decoded);
        if (__builtin_expect(reason, 0))
            return reason;
        if (__builtin_expect((need & ~(out->perm & decoded.perm)) != 0, 0))
            return VIO_REASON_PERMISSION;
        if (!trusted && __builtin_expect(table->flags, 0)) {
            used = format->used_bits(table->flags, !decoded.next, need & VIO_WRITE);
            if (used & ~entry) {
                reason = access->replace(context, at, entry, entry | used);
                if (reason > 0) {
                    out->read_failed = true;
                    return reason;
                }
                if (reason < 0) { /* the guest was quicker: look again at what it wrote */
                    if (++attempts == UPDATE_ATTEMPTS)
                        return VIO_REASON_ENTRY_CHANGED;
                    continue;
                }
                entry |= used;
            }
            /* A later write must come here again to set the dirty bit. */
            if (!decoded.next && format->used_bits(table->flags, true, true) & ~entry)
                decoded.perm &= ~(unsigned)VIO_WRITE;
        }
        out->perm &= decoded.perm;
        if (!decoded.next) {
            out->size_lg2 = decoded.size_lg2;
            out->oa = decoded.oa | (address & ((1ull << decoded.size_lg2) - 1));
            return 0;
        }
        if (!trusted && format->skips_levels && __builtin_expect(decoded.next != level - 1, 0)) {
            /* Address bits that skipped levels would have indexed must be zero. */
            uint64_t covered = (1ull << format->entry_lg2(decoded.next + 1)) - 1;

            if (address & ((1ull << format->entry_lg2(level)) - 1) & ~covered)
                return VIO_REASON_ADDRESS_WIDTH;
            level = decoded.next;
        } else {
            level--;
        }
        base = decoded.oa;
    }
}

/* Tables of ours: plain memory of this process, and nobody else's to change. */
PT_INLINE int host_read(void *context, uint64_t at, unsigned level, uint64_t *entry)
{
    (void)context;
    (void)level;
    *entry = __atomic_load_n((const uint64_t *)(uintptr_t)at, __ATOMIC_RELAXED);
    return 0;
}

static const struct entry_access host_access = {.read = host_read, .replace = NULL};

static inline int host_fault(struct walk *walk, const struct stage *stage, uint64_t gpa, int reason)
{
    walk->stage = 2;
    walk->level = stage->level;
    walk->entry = stage->entry;
    walk->fault_gpa = gpa;
    walk->has_gpa = true;
    return reason;
}

/* Stage 2 alone: a host-managed space. */
PT_INLINE int walk_host_space(const struct pt_format *format, const struct space *space, struct walk *walk)
{
    struct stage stage;
    int reason = walk_stage(format, &space->table, true, walk->iova, walk->need, &host_access, NULL, &stage);

    if (__builtin_expect(reason, 0))
        return host_fault(walk, &stage, walk->iova, reason);
    walk->hva = stage.oa;
    walk->gpa = walk->iova;
    walk->size_lg2 = stage.size_lg2;
    walk->perm = stage.perm;
    return 0;
}

/* What reading a stage-1 entry needs; one lives as long as one nested walk. */
struct nested {
    const struct pt_format *stage2;
    const struct pt_config *table2;
    const struct dirty *dirty; /* of stage 2 */
    struct guard *guard;
    struct walk *walk;
    uint64_t hva;  /* of the entry read last */
    unsigned perm; /* that stage 2 gives there */
};

PT_INLINE int nested_read(void *context, uint64_t at, unsigned level, uint64_t *entry)
{
    struct nested *nested = context;
    struct stage stage;
    int reason = walk_stage(nested->stage2, nested->table2, true, at, VIO_READ, &host_access, NULL, &stage);

    if (__builtin_expect(reason, 0))
        return host_fault(nested->walk, &stage, at, reason);
    nested->hva = stage.oa;
    nested->perm = stage.perm;
    nested->walk->reading_gpa = at;
    nested->walk->reading_level = level;
    guard_memory(nested->guard, stage.oa, sizeof *entry);
    *entry = __atomic_load_n((const uint64_t *)(uintptr_t)stage.oa, __ATOMIC_ACQUIRE);
    return 0;
}

/* For the entry read last, whose HVA is at hand. Stage 2 must permit the write, else its fault is the answer. */
PT_INLINE int nested_replace(void *context, uint64_t at, uint64_t old, uint64_t new)
{
    struct nested *nested = context;

    if (!(nested->perm & VIO_WRITE)) {
        struct stage stage;
        int reason = walk_stage(nested->stage2, nested->table2, true, at, VIO_WRITE, &host_access, NULL, &stage);

        return host_fault(nested->walk, &stage, at, reason);
    }
    if (!__atomic_compare_exchange_n((uint64_t *)(uintptr_t)nested->hva, &old, new, false, __ATOMIC_ACQ_REL,
                                     __ATOMIC_RELAXED))
        return -1;
    dirty_mark(nested->dirty, at, sizeof new); /* guest memory that its owner did not write */
    return 0;
}

static const struct entry_access nested_access = {.read = nested_read, .replace = nested_replace};

/*
 * Nested: the guest's stage 1 over the parent's stage 2.
 *   1. walk stage 1, each entry being read through stage 2;
 *   2. translate the GPA it gives through stage 2;
 *   3. permission is the AND of both, size the smaller one.
 */
PT_INLINE int walk_nested_space(const struct pt_format *format1, const struct pt_format *format2,
                                const struct space *space, struct guard *guard, struct walk *walk)
{
    const struct pt_config *table2 = &space->parent->table;
    struct nested nested = {
        .stage2 = format2, .table2 = table2, .dirty = space->parent->dirty, .guard = guard, .walk = walk};
    struct stage stage1, stage2;
    int reason = walk_stage(format1, &space->table, false, walk->iova, walk->need, &nested_access, &nested, &stage1);

    if (__builtin_expect(reason, 0)) {
        if (stage1.read_failed)
            return reason; /* nested_read has told where */
        walk->stage = 1;
        walk->level = stage1.level;
        walk->entry = stage1.entry;
        walk->fault_gpa = stage1.entry_at;
        walk->has_gpa = true;
        return reason;
    }
    walk->reading_level = 0;
    reason = walk_stage(format2, table2, true, stage1.oa, walk->need, &host_access, NULL, &stage2);
    if (__builtin_expect(reason, 0))
        return host_fault(walk, &stage2, stage1.oa, reason);
    walk->hva = stage2.oa;
    walk->gpa = stage1.oa;
    walk->size_lg2 = stage1.size_lg2 < stage2.size_lg2 ? stage1.size_lg2 : stage2.size_lg2;
    walk->perm = stage1.perm & stage2.perm;
    return 0;
}

#endif
