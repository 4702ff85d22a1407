/*
 * AMD IOMMU v1 page table ("host" page table).
 *
 * AMD I/O Virtualization Technology (IOMMU) Specification, 48882, section 2.2.3 "I/O Page Tables for Host
 * Translations". Levels are numbered as there: 1 holds 4 KiB leaves, Mode of the device table entry is the root's.
 * Each level indexes 9 bits of the address, level 6 the 7 bits 63:57.
 */
#ifndef VIOASID_FORMATS_AMD_V1_H
#define VIOASID_FORMATS_AMD_V1_H

#include "contract.h"

/* limits */
#define AMD_V1_MAX_LEVELS 6
#define AMD_V1_OA_BITS 52

/* entry bits */
#define AMD_V1_PR (1ull << 0)
#define AMD_V1_A (1ull << 5)
#define AMD_V1_D (1ull << 6)
#define AMD_V1_NEXT_SHIFT 9
#define AMD_V1_NEXT_MASK 7ull
#define AMD_V1_NEXT_SIZED 7u               /* leaf whose size is coded in the low ones of its address */
#define AMD_V1_OA PT_MASK(51, 12)
#define AMD_V1_PDE_RESERVED PT_MASK(60, 52)
#define AMD_V1_PTE_RESERVED PT_MASK(58, 52) /* U (59) and FC (60) have a meaning in leaves */
#define AMD_V1_IR_SHIFT 61                 /* IR 61, IW 62: in the order of VIO_READ, VIO_WRITE */

PT_INLINE bool amd_v1_prepare(struct pt_config *config, bool host)
{
    vio_table *t = &config->table;
    unsigned covered = t->tree.levels >= AMD_V1_MAX_LEVELS ? 64 : pt_entry_lg2(PT_GRANULE, t->tree.levels + 1);

    if (t->tree.input_bits && t->tree.input_bits != covered)
        return false;
    if (t->output_bits && t->output_bits != AMD_V1_OA_BITS)
        return false;
    t->tree.input_bits = covered;
    t->output_bits = AMD_V1_OA_BITS;
    config->last = covered < 64 ? (1ull << covered) - 1 : UINT64_MAX;
    /* HAD has no code for dirty without accessed */
    return host || (pt_root_ok(t, &t->tree, 4096) &&
                    (t->flags & (VIO_TABLE_ACCESSED | VIO_TABLE_DIRTY)) != VIO_TABLE_DIRTY);
}

PT_INLINE int amd_v1_start(const struct pt_config *config, uint64_t address, struct pt_start *out)
{
    const vio_tree *tree = &config->table.tree;

    *out = (struct pt_start){.table = tree->root, .index = address, .levels = tree->levels, .granule = PT_GRANULE};
    return address <= config->last ? 0 : VIO_REASON_ADDRESS_WIDTH;
}

/*
 * Next Level 7: the page is as large as the run of ones from bit 12 upward says, 0 at bit 12 being 8 KiB (table
 * "Example Page Size Encodings"; bits 63:52 count as zero). It must lie between the default sizes of this level and the
 * next.
 */
PT_INLINE int amd_v1_decode_sized(uint64_t entry, unsigned level, struct pt_entry *out)
{
    out->size_lg2 = (unsigned)__builtin_ctzll(~((entry & AMD_V1_OA) | 0xfff)) + 1;
    out->oa = entry & AMD_V1_OA & ~((1ull << out->size_lg2) - 1);
    if (level >= AMD_V1_MAX_LEVELS || out->size_lg2 <= pt_entry_lg2(PT_GRANULE, level) ||
        out->size_lg2 >= pt_entry_lg2(PT_GRANULE, level + 1) || out->size_lg2 > AMD_V1_OA_BITS)
        return VIO_REASON_BAD_LEVEL;
    return 0;
}

/* Reserved bits and level before permission: the event log's RZ says that PE means nothing (IO_PAGE_FAULT, 2.5.3). */
PT_INLINE int amd_v1_decode(const struct pt_config *config, const struct pt_start *start, uint64_t entry,
                            unsigned level, bool trusted, struct pt_entry *out)
{
    unsigned next = (unsigned)(entry >> AMD_V1_NEXT_SHIFT & AMD_V1_NEXT_MASK);

    (void)config, (void)start;
    if (__builtin_expect(!(entry & AMD_V1_PR), 0))
        return VIO_REASON_NOT_PRESENT;
    out->oa = entry & AMD_V1_OA;
    out->size_lg2 = pt_entry_lg2(PT_GRANULE, level);
    if (next == 0) {
        out->next = 0;
        if (trusted)
            return 0;
        if (__builtin_expect((entry & AMD_V1_PTE_RESERVED) != 0, 0))
            return VIO_REASON_RESERVED_BITS;
        if (__builtin_expect(level >= AMD_V1_MAX_LEVELS, 0)) /* level 6 has no translation entries */
            return VIO_REASON_BAD_LEVEL;
        if (__builtin_expect((out->oa & ((1ull << out->size_lg2) - 1)) != 0, 0))
            return VIO_REASON_MISALIGNED;
        return 0;
    }
    if (__builtin_expect(next == AMD_V1_NEXT_SIZED, 0)) {
        out->next = 0;
        if (!trusted && entry & AMD_V1_PTE_RESERVED)
            return VIO_REASON_RESERVED_BITS;
        return amd_v1_decode_sized(entry, level, out);
    }
    if (trusted) { /* the builder skips no level */
        out->next = level - 1;
        return 0;
    }
    if (__builtin_expect((entry & AMD_V1_PDE_RESERVED) != 0, 0))
        return VIO_REASON_RESERVED_BITS;
    if (__builtin_expect(next >= level, 0))
        return VIO_REASON_BAD_LEVEL;
    out->next = next;
    return 0;
}

/* IR and IW of all levels; there is no right to execute: execution reads. */
PT_INLINE unsigned amd_v1_permissions(const struct pt_config *config, const struct pt_start *start, uint64_t tables,
                                      uint64_t leaf, bool trusted)
{
    unsigned perm = (unsigned)((trusted ? leaf : tables & leaf) >> AMD_V1_IR_SHIFT & 3);

    (void)config, (void)start;
    return PT_BOTH(perm | (perm & VIO_READ) * VIO_EXECUTE);
}

/* Device table entry HAD (8:7), 1 or 3: accessed in every entry used; 3: dirty in the leaf that served a write. */
PT_INLINE int amd_v1_use(const struct pt_config *config, uint64_t entry, bool leaf, bool write, uint64_t *after)
{
    uint32_t flags = config->table.flags;

    *after = entry | (flags & VIO_TABLE_ACCESSED ? AMD_V1_A : 0) |
             (flags & VIO_TABLE_DIRTY && leaf && write ? AMD_V1_D : 0);
    return 0;
}

/* Every power of two: the level's default size, and coded sizes below the next level's. */
PT_INLINE uint64_t amd_v1_leaf_sizes(const struct pt_config *config, unsigned level)
{
    unsigned least = pt_entry_lg2(PT_GRANULE, level);

    (void)config;
    if (level >= AMD_V1_MAX_LEVELS)
        return 0;
    return PT_MASK(least + 8 < AMD_V1_OA_BITS ? least + 8 : AMD_V1_OA_BITS - 1, least);
}

PT_INLINE uint64_t amd_v1_make_leaf(const struct pt_config *config, uint64_t oa, unsigned level, unsigned size_lg2,
                                    unsigned perm)
{
    uint64_t entry = AMD_V1_PR | oa | (uint64_t)(perm & 3) << AMD_V1_IR_SHIFT;

    (void)config;
    if (size_lg2 > pt_entry_lg2(PT_GRANULE, level))
        entry |= (uint64_t)AMD_V1_NEXT_SIZED << AMD_V1_NEXT_SHIFT | PT_MASK(size_lg2 - 2, 12);
    return entry;
}

PT_INLINE uint64_t amd_v1_make_table(const struct pt_config *config, uint64_t oa, unsigned level)
{
    (void)config;
    return AMD_V1_PR | oa | (uint64_t)(level - 1) << AMD_V1_NEXT_SHIFT | 3ull << AMD_V1_IR_SHIFT;
}

static const struct pt_format amd_v1_format = {
    .name = "amd-v1",
    .flags = VIO_TABLE_ACCESSED | VIO_TABLE_DIRTY,
    .min_levels = 1,
    .max_levels = AMD_V1_MAX_LEVELS,
    .skips_levels = true,
    .write_only = true,
    .dirty = {.set = AMD_V1_D},
    .prepare = amd_v1_prepare,
    .start = amd_v1_start,
    .decode = amd_v1_decode,
    .permissions = amd_v1_permissions,
    .use = amd_v1_use,
    .leaf_sizes = amd_v1_leaf_sizes,
    .make_leaf = amd_v1_make_leaf,
    .make_table = amd_v1_make_table,
};

#endif
