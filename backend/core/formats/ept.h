/*
 * Extended page table (EPT).
 *
 * Intel SDM volume 3, "The Extended Page Table Mechanism (EPT)": entry formats, misconfigurations, violations, accessed
 * and dirty flags; EPTP. Levels: 1 is the EPT PTE, 4 the PML4E, 5 the PML5E. Each indexes 9 bits. A misconfiguration is
 * RESERVED_BITS here.
 */
#ifndef VIOASID_FORMATS_EPT_H
#define VIOASID_FORMATS_EPT_H

#include "contract.h"

/* limits */
#define EPT_OA_BITS 52

/* entry bits: R 0, W 1, X 2, in the order of VIO_READ, VIO_WRITE, VIO_EXECUTE */
#define EPT_R (1ull << 0)
#define EPT_W (1ull << 1)
#define EPT_TYPE_SHIFT 3
#define EPT_WRITE_BACK (6ull << EPT_TYPE_SHIFT)
#define EPT_BAD_TYPES (1u << 2 | 1u << 3 | 1u << 7)
#define EPT_TABLE_RESERVED PT_MASK(6, 3)
#define EPT_PS (1ull << 7)
#define EPT_A (1ull << 8)
#define EPT_D (1ull << 9)
#define EPT_XU_SHIFT 10 /* execution by user requests, where there are two rights to execute */
#define EPT_XU (1ull << EPT_XU_SHIFT)
#define EPT_OA PT_MASK(51, 12)

PT_INLINE bool ept_prepare(struct pt_config *config, bool host)
{
    const uint32_t both = VIO_TABLE_ACCESSED | VIO_TABLE_DIRTY; /* EPTP bit 6 is both */
    vio_table *t = &config->table;
    unsigned width = pt_entry_lg2(PT_GRANULE, t->tree.levels + 1);

    t->output_bits = t->output_bits ? t->output_bits : EPT_OA_BITS;
    if ((t->tree.input_bits && t->tree.input_bits != width) || t->output_bits < 32 || t->output_bits > EPT_OA_BITS ||
        ((t->flags & both) && (t->flags & both) != both))
        return false;
    t->tree.input_bits = width;
    config->reserved = PT_MASK(51, t->output_bits);
    config->last = (1ull << width) - 1;
    return host || pt_root_ok(t, &t->tree, 4096);
}

PT_INLINE int ept_start(const struct pt_config *config, uint64_t address, struct pt_start *out)
{
    const vio_tree *tree = &config->table.tree;

    *out = (struct pt_start){.table = tree->root, .index = address, .levels = tree->levels, .granule = PT_GRANULE};
    return address <= config->last ? 0 : VIO_REASON_ADDRESS_WIDTH;
}

/* Has `level` leaves besides those of level 1? */
PT_INLINE bool ept_large(const struct pt_config *config, unsigned level)
{
    return (level == 2 && !(config->table.flags & VIO_TABLE_NO_2M)) ||
           (level == 3 && !(config->table.flags & VIO_TABLE_NO_1G));
}

PT_INLINE bool ept_misconfigured(const struct pt_config *config, uint64_t entry, unsigned level)
{
    uint64_t reserved = config->reserved;

    if (level == 1 || entry & EPT_PS) {
        if (EPT_BAD_TYPES >> (entry >> EPT_TYPE_SHIFT & 7) & 1 && (level == 1 || ept_large(config, level)))
            return true;
        if (level > 1)
            reserved |= ept_large(config, level) ? PT_MASK(pt_entry_lg2(PT_GRANULE, level) - 1, 12) : EPT_PS;
    } else {
        reserved |= EPT_TABLE_RESERVED;
    }
    return entry & reserved || (!(entry & EPT_R) && (entry & EPT_W || config->table.flags & VIO_TABLE_NO_EXECUTE_ONLY));
}

PT_INLINE int ept_decode(const struct pt_config *config, const struct pt_start *start, uint64_t entry, unsigned level,
                         bool trusted, struct pt_entry *out)
{
    bool modes = !trusted && config->table.flags & VIO_TABLE_EXECUTE_MODES;

    (void)start;
    if (__builtin_expect(!(entry & (PT_RWX | (modes ? EPT_XU : 0))), 0))
        return VIO_REASON_NOT_PRESENT;
    if (!trusted && __builtin_expect(ept_misconfigured(config, entry, level), 0))
        return VIO_REASON_RESERVED_BITS;
    out->next = level == 1 || entry & EPT_PS ? 0 : level - 1;
    out->size_lg2 = pt_entry_lg2(PT_GRANULE, level);
    out->oa = entry & EPT_OA;
    return 0;
}

/* R, W and X of all levels; with mode-based execute control X is the right of privileged code alone. */
PT_INLINE unsigned ept_permissions(const struct pt_config *config, const struct pt_start *start, uint64_t tables,
                                   uint64_t leaf, bool trusted)
{
    uint64_t all = trusted ? leaf : tables & leaf;
    unsigned perm = (unsigned)(all & PT_RWX), user = perm;

    (void)start;
    if (!trusted && config->table.flags & VIO_TABLE_EXECUTE_MODES)
        user = (perm & (VIO_READ | VIO_WRITE)) | (unsigned)(all >> EPT_XU_SHIFT & 1) * VIO_EXECUTE;
    return user | perm << PT_PRIVILEGED;
}

/* EPTP bit 6: accessed in every entry used, dirty in the leaf at a write. */
PT_INLINE int ept_use(const struct pt_config *config, uint64_t entry, bool leaf, bool write, uint64_t *after)
{
    *after = entry;
    if (config->table.flags & VIO_TABLE_ACCESSED)
        *after |= EPT_A | (leaf && write ? EPT_D : 0);
    return 0;
}

PT_INLINE uint64_t ept_leaf_sizes(const struct pt_config *config, unsigned level)
{
    return level == 1 || ept_large(config, level) ? 1ull << pt_entry_lg2(PT_GRANULE, level) : 0;
}

PT_INLINE uint64_t ept_make_leaf(const struct pt_config *config, uint64_t oa, unsigned level, unsigned size_lg2,
                                 unsigned perm)
{
    (void)config, (void)size_lg2;
    return oa | EPT_WRITE_BACK | (level > 1 ? EPT_PS : 0) | (perm & VIO_EXECUTE ? EPT_XU : 0) | perm;
}

PT_INLINE uint64_t ept_make_table(const struct pt_config *config, uint64_t oa, unsigned level)
{
    (void)config, (void)level;
    return oa | PT_RWX | EPT_XU;
}

static const struct pt_format ept_format = {
    .name = "ept",
    .flags = VIO_TABLE_ACCESSED | VIO_TABLE_DIRTY | VIO_TABLE_NO_1G | VIO_TABLE_NO_2M | VIO_TABLE_NO_EXECUTE_ONLY |
             VIO_TABLE_EXECUTE_MODES,
    .min_levels = 4,
    .tables_written = true, /* SDM, "Accessed and Dirty Flags for EPT" */
    .max_levels = 5,
    .dirty = {.set = EPT_D},
    .prepare = ept_prepare,
    .start = ept_start,
    .decode = ept_decode,
    .permissions = ept_permissions,
    .use = ept_use,
    .leaf_sizes = ept_leaf_sizes,
    .make_leaf = ept_make_leaf,
    .make_table = ept_make_table,
};

#endif
