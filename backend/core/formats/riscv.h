/*
 * RISC-V page tables: Sv39, Sv48, Sv57 (first stage) and Sv39x4, Sv48x4, Sv57x4 (second stage), Svnapot, Svpbmt.
 *
 * Privileged specification: "Virtual Address Translation Process" (its steps 3 to 9 below), "Sv39", "Two-Stage Address
 * Translation", Svnapot, Svpbmt, Svadu, Svrsw60t59b; RISC-V IOMMU: tc.SADE, tc.GADE, PC.SUM. Levels: the
 * specification's i is level - 1. Each indexes 9 bits, the root of an x4 table 11.
 */
#ifndef VIOASID_FORMATS_RISCV_H
#define VIOASID_FORMATS_RISCV_H

#include "contract.h"

/* limits */
#define RISCV_OA_BITS 56
#define RISCV_NAPOT_LG2 16

/* entry bits: R 1, W 2, X 3, in the order of VIO_READ, VIO_WRITE, VIO_EXECUTE */
#define RISCV_V (1ull << 0)
#define RISCV_RWX_SHIFT 1
#define RISCV_R (1ull << 1)
#define RISCV_W (1ull << 2)
#define RISCV_X (1ull << 3)
#define RISCV_U (1ull << 4)
#define RISCV_A (1ull << 6)
#define RISCV_D (1ull << 7)
#define RISCV_PPN PT_MASK(53, 10)
#define RISCV_PPN_SHIFT 2 /* from an address to where the entry holds it */
#define RISCV_RESERVED PT_MASK(58, 54)
#define RISCV_RSW PT_MASK(60, 59)
#define RISCV_PBMT PT_MASK(62, 61) /* 3 is reserved */
#define RISCV_N (1ull << 63)
#define RISCV_NAPOT_MASK PT_MASK(13, 10) /* page number bits 3:0, which code the size */
#define RISCV_NAPOT_64K (8ull << 10)

PT_INLINE bool riscv_prepare_any(struct pt_config *config, unsigned more, unsigned less, uint64_t align, bool host)
{
    const uint32_t both = VIO_TABLE_ACCESSED | VIO_TABLE_DIRTY; /* SADE, GADE: one bit */
    vio_table *t = &config->table;
    unsigned width = pt_entry_lg2(PT_GRANULE, t->tree.levels + 1) + more;

    if ((t->tree.input_bits && t->tree.input_bits != width) || (t->output_bits && t->output_bits != RISCV_OA_BITS) ||
        ((t->flags & both) && (t->flags & both) != both))
        return false;
    t->tree.input_bits = width;
    t->output_bits = RISCV_OA_BITS;
    config->last = (1ull << (width - less)) - 1;
    config->reserved = RISCV_RESERVED | (t->flags & VIO_TABLE_RSW ? 0 : RISCV_RSW) |
                       (t->flags & VIO_TABLE_NO_PBMT ? RISCV_PBMT : 0) | (t->flags & VIO_TABLE_NO_NAPOT ? RISCV_N : 0);
    return host || pt_root_ok(t, &t->tree, align);
}

PT_INLINE bool riscv_prepare(struct pt_config *config, bool host)
{
    return riscv_prepare_any(config, 0, 1, 4096, host); /* ours: the lower canonical half */
}

PT_INLINE bool riscv_x4_prepare(struct pt_config *config, bool host)
{
    return riscv_prepare_any(config, 2, 0, 16384, host);
}

PT_INLINE int riscv_start(const struct pt_config *config, uint64_t address, struct pt_start *out)
{
    const vio_tree *tree = &config->table.tree;
    unsigned width = tree->input_bits;

    *out = (struct pt_start){.table = tree->root,
                             .index = address & ((1ull << width) - 1),
                             .levels = tree->levels,
                             .granule = PT_GRANULE};
    return (uint64_t)((int64_t)(address << (64 - width)) >> (64 - width)) == address ? 0 : VIO_REASON_ADDRESS_WIDTH;
}

PT_INLINE int riscv_x4_start(const struct pt_config *config, uint64_t address, struct pt_start *out)
{
    const vio_tree *tree = &config->table.tree;

    *out = (struct pt_start){.table = tree->root, .index = address, .levels = tree->levels, .granule = PT_GRANULE};
    return address <= config->last ? 0 : VIO_REASON_ADDRESS_WIDTH;
}

/* Step 3: encodings reserved in a valid entry, besides those that config->reserved tells. */
PT_INLINE bool riscv_reserved(const struct pt_config *config, uint64_t entry, unsigned level, bool leaf)
{
    if (entry & config->reserved || (entry & (RISCV_R | RISCV_W)) == RISCV_W)
        return true;
    if (!leaf)
        return entry & (RISCV_D | RISCV_A | RISCV_U | RISCV_PBMT | RISCV_N);
    return (entry & RISCV_PBMT) == RISCV_PBMT ||
           (entry & RISCV_N && (level != 1 || (entry & RISCV_NAPOT_MASK) != RISCV_NAPOT_64K));
}

PT_INLINE int riscv_decode(const struct pt_config *config, const struct pt_start *start, uint64_t entry,
                           unsigned level, bool trusted, struct pt_entry *out)
{
    bool leaf = entry & (RISCV_R | RISCV_X);

    (void)start;
    if (__builtin_expect(!(entry & RISCV_V), 0))
        return VIO_REASON_NOT_PRESENT;
    if (!trusted && __builtin_expect(riscv_reserved(config, entry, level, leaf), 0))
        return VIO_REASON_RESERVED_BITS;
    out->size_lg2 = pt_entry_lg2(PT_GRANULE, level);
    if (!leaf) { /* step 4 */
        /* in ours there is nothing but the number and V: no mask, so that the next load can do the shift */
        out->oa = (trusted ? entry - RISCV_V : entry & RISCV_PPN) << RISCV_PPN_SHIFT;
        out->next = level - 1;
        return level > 1 ? 0 : VIO_REASON_BAD_LEVEL;
    }
    out->oa = (entry & RISCV_PPN) << RISCV_PPN_SHIFT;
    out->next = 0;
    if (__builtin_expect((entry & RISCV_N) != 0, 0)) {
        out->size_lg2 = RISCV_NAPOT_LG2;
        out->oa &= ~((1ull << RISCV_NAPOT_LG2) - 1);
    } else if (!trusted && __builtin_expect((out->oa & ((1ull << out->size_lg2) - 1)) != 0, 0)) {
        return VIO_REASON_MISALIGNED; /* step 5 */
    }
    return 0;
}

/* Steps 6 to 8, of the leaf alone: SUM lets the privileged touch user pages, nothing lets them execute those. */
PT_INLINE unsigned riscv_permissions(const struct pt_config *config, const struct pt_start *start, uint64_t tables,
                                     uint64_t leaf, bool trusted)
{
    unsigned perm = (unsigned)(leaf >> RISCV_RWX_SHIFT) & PT_RWX;

    (void)start, (void)tables;
    if (trusted)
        return PT_BOTH(perm);
    if (!(leaf & RISCV_U))
        return perm << PT_PRIVILEGED;
    return perm | (config->table.flags & VIO_TABLE_SUM ? (perm & ~(unsigned)VIO_EXECUTE) << PT_PRIVILEGED : 0);
}

/* The second stage sees every request as a user's. */
PT_INLINE unsigned riscv_x4_permissions(const struct pt_config *config, const struct pt_start *start, uint64_t tables,
                                        uint64_t leaf, bool trusted)
{
    unsigned perm = (unsigned)(leaf >> RISCV_RWX_SHIFT) & PT_RWX;

    (void)config, (void)start, (void)tables;
    return trusted || leaf & RISCV_U ? PT_BOTH(perm) : 0;
}

/* Step 9: A and D of the leaf, set where hardware is to (Svadu), else wanted. */
PT_INLINE int riscv_use(const struct pt_config *config, uint64_t entry, bool leaf, bool write, uint64_t *after)
{
    uint64_t wanted = leaf ? RISCV_A | (write ? RISCV_D : 0) : 0;

    *after = entry | wanted;
    if (*after == entry || config->table.flags & VIO_TABLE_ACCESSED)
        return 0;
    return entry & RISCV_A ? VIO_REASON_DIRTY : VIO_REASON_ACCESS_FLAG;
}

PT_INLINE uint64_t riscv_leaf_sizes(const struct pt_config *config, unsigned level)
{
    bool napot = level == 1 && !(config->table.flags & VIO_TABLE_NO_NAPOT);

    return 1ull << pt_entry_lg2(PT_GRANULE, level) | (uint64_t)napot << RISCV_NAPOT_LG2;
}

/* A and D stand from the start where hardware does not set them and would refuse the leaf. */
PT_INLINE uint64_t riscv_make_leaf(const struct pt_config *config, uint64_t oa, unsigned level, unsigned size_lg2,
                                   unsigned perm)
{
    return oa >> RISCV_PPN_SHIFT | RISCV_V | (uint64_t)perm << RISCV_RWX_SHIFT | RISCV_U | RISCV_A |
           (config->table.flags & VIO_TABLE_DIRTY ? 0 : RISCV_D) |
           (size_lg2 > pt_entry_lg2(PT_GRANULE, level) ? RISCV_N | RISCV_NAPOT_64K : 0);
}

PT_INLINE uint64_t riscv_make_table(const struct pt_config *config, uint64_t oa, unsigned level)
{
    (void)config, (void)level;
    return oa >> RISCV_PPN_SHIFT | RISCV_V;
}

static const struct pt_format riscv_format = {
    .name = "riscv",
    .flags = VIO_TABLE_ACCESSED | VIO_TABLE_DIRTY | VIO_TABLE_SUM | VIO_TABLE_NO_NAPOT | VIO_TABLE_NO_PBMT |
             VIO_TABLE_RSW,
    .min_levels = 3,
    .max_levels = 5,
    .dirty = {.set = RISCV_D},
    .prepare = riscv_prepare,
    .start = riscv_start,
    .decode = riscv_decode,
    .permissions = riscv_permissions,
    .use = riscv_use,
    .leaf_sizes = riscv_leaf_sizes,
    .make_leaf = riscv_make_leaf,
    .make_table = riscv_make_table,
};

static const struct pt_format riscv_x4_format = {
    .name = "riscv-x4",
    .flags = VIO_TABLE_ACCESSED | VIO_TABLE_DIRTY | VIO_TABLE_NO_NAPOT | VIO_TABLE_NO_PBMT | VIO_TABLE_RSW,
    .min_levels = 3,
    .max_levels = 5,
    .dirty = {.set = RISCV_D},
    .prepare = riscv_x4_prepare,
    .start = riscv_x4_start,
    .decode = riscv_decode,
    .permissions = riscv_x4_permissions,
    .use = riscv_use,
    .leaf_sizes = riscv_leaf_sizes,
    .make_leaf = riscv_make_leaf,
    .make_table = riscv_make_table,
};

#endif
