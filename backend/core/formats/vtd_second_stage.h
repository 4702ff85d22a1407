/*
 * VT-d second-stage page table.
 *
 * Intel VT-d 3.7 (second-stage translation), 9.8 (entries), 9.6 (AW, SSADE of the PASID-table entry). Levels: 1 is
 * SS-PTE, 4 SS-PML4E. Each indexes 9 bits. Bits 2 (execute) and 6:3 (memory type) never refuse a request.
 */
#ifndef VIOASID_FORMATS_VTD_SECOND_STAGE_H
#define VIOASID_FORMATS_VTD_SECOND_STAGE_H

#include "contract.h"

/* limits */
#define VTD_SS_OA_BITS 52

/* entry bits: R 0, W 1, in the order of VIO_READ, VIO_WRITE */
#define VTD_SS_RW 3ull
#define VTD_SS_PS (1ull << 7)
#define VTD_SS_A (1ull << 8)
#define VTD_SS_D (1ull << 9)
#define VTD_SS_SNP (1ull << 11)
#define VTD_SS_OA PT_MASK(51, 12)
#define VTD_SS_TM (1ull << 62)

PT_INLINE bool vtd_second_stage_prepare(struct pt_config *config, bool host)
{
    const uint32_t both = VIO_TABLE_ACCESSED | VIO_TABLE_DIRTY; /* SSADE is one bit */
    vio_table *t = &config->table;
    unsigned width = pt_entry_lg2(PT_GRANULE, t->tree.levels + 1);

    t->output_bits = t->output_bits ? t->output_bits : VTD_SS_OA_BITS;
    if ((t->tree.input_bits && t->tree.input_bits != width) || t->output_bits < 32 ||
        t->output_bits > VTD_SS_OA_BITS || ((t->flags & both) && (t->flags & both) != both))
        return false;
    t->tree.input_bits = width;
    config->reserved = PT_MASK(51, t->output_bits) | VTD_SS_TM;
    config->last = (1ull << width) - 1;
    return host || pt_root_ok(t, &t->tree, 4096);
}

PT_INLINE int vtd_second_stage_start(const struct pt_config *config, uint64_t address, struct pt_start *out)
{
    const vio_tree *tree = &config->table.tree;

    *out = (struct pt_start){.table = tree->root, .index = address, .levels = tree->levels, .granule = PT_GRANULE};
    return address <= config->last ? 0 : VIO_REASON_ADDRESS_WIDTH;
}

/* Has `level` leaves besides those of level 1? */
PT_INLINE bool vtd_second_stage_large(const struct pt_config *config, unsigned level)
{
    return (level == 2 && !(config->table.flags & VIO_TABLE_NO_2M)) ||
           (level == 3 && !(config->table.flags & VIO_TABLE_NO_1G));
}

PT_INLINE int vtd_second_stage_decode(const struct pt_config *config, const struct pt_start *start, uint64_t entry,
                                      unsigned level, bool trusted, struct pt_entry *out)
{
    unsigned lg2 = pt_entry_lg2(PT_GRANULE, level);
    bool leaf = level == 1 || entry & VTD_SS_PS;

    (void)start;
    if (__builtin_expect(!(entry & VTD_SS_RW), 0))
        return VIO_REASON_NOT_PRESENT;
    if (!trusted) {
        uint64_t reserved = config->reserved;

        if (!leaf)
            reserved |= VTD_SS_SNP;
        else if (level > 1)
            reserved |= vtd_second_stage_large(config, level) ? PT_MASK(lg2 - 1, 12) : VTD_SS_PS;
        if (config->table.flags & VIO_TABLE_NO_SNOOP)
            reserved |= VTD_SS_SNP;
        if (__builtin_expect((entry & reserved) != 0, 0))
            return VIO_REASON_RESERVED_BITS;
    }
    out->next = leaf ? 0 : level - 1;
    out->size_lg2 = lg2;
    out->oa = entry & VTD_SS_OA;
    return 0;
}

/* R and W of all levels; there is no right to execute: execution reads. */
PT_INLINE unsigned vtd_second_stage_permissions(const struct pt_config *config, const struct pt_start *start,
                                                uint64_t tables, uint64_t leaf, bool trusted)
{
    unsigned perm = (unsigned)((trusted ? leaf : tables & leaf) & VTD_SS_RW);

    (void)config, (void)start;
    return PT_BOTH(perm | (perm & VIO_READ) * VIO_EXECUTE);
}

/* SSADE: accessed in every entry used, dirty in the leaf at a write. */
PT_INLINE int vtd_second_stage_use(const struct pt_config *config, uint64_t entry, bool leaf, bool write,
                                   uint64_t *after)
{
    *after = entry;
    if (config->table.flags & VIO_TABLE_ACCESSED)
        *after |= VTD_SS_A | (leaf && write ? VTD_SS_D : 0);
    return 0;
}

PT_INLINE uint64_t vtd_second_stage_leaf_sizes(const struct pt_config *config, unsigned level)
{
    return level == 1 || vtd_second_stage_large(config, level) ? 1ull << pt_entry_lg2(PT_GRANULE, level) : 0;
}

PT_INLINE uint64_t vtd_second_stage_make_leaf(const struct pt_config *config, uint64_t oa, unsigned level,
                                              unsigned size_lg2, unsigned perm)
{
    (void)config, (void)size_lg2;
    return oa | (level > 1 ? VTD_SS_PS : 0) | (perm & VTD_SS_RW);
}

PT_INLINE uint64_t vtd_second_stage_make_table(const struct pt_config *config, uint64_t oa, unsigned level)
{
    (void)config, (void)level;
    return oa | VTD_SS_RW;
}

static const struct pt_format vtd_second_stage_format = {
    .name = "vtd-second-stage",
    .flags = VIO_TABLE_ACCESSED | VIO_TABLE_DIRTY | VIO_TABLE_NO_1G | VIO_TABLE_NO_2M | VIO_TABLE_NO_SNOOP,
    .min_levels = 3,
    .max_levels = 5,
    .write_only = true,
    .dirty = {.set = VTD_SS_D},
    .prepare = vtd_second_stage_prepare,
    .start = vtd_second_stage_start,
    .decode = vtd_second_stage_decode,
    .permissions = vtd_second_stage_permissions,
    .use = vtd_second_stage_use,
    .leaf_sizes = vtd_second_stage_leaf_sizes,
    .make_leaf = vtd_second_stage_make_leaf,
    .make_table = vtd_second_stage_make_table,
};

#endif
