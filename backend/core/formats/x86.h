/*
 * x86-64 page table: VT-d first stage, AMD IOMMU guest (v2) table.
 *
 * Intel SDM volume 3, 4.5 to 4.8 (4-level and 5-level paging, access rights, faults, accessed and dirty); Intel VT-d
 * 3.6 and 9.7; AMD IOMMU 48882, 2.2.6. Levels: 1 is the page table, 4 the PML4, 5 the PML5. Each indexes 9 bits.
 */
#ifndef VIOASID_FORMATS_X86_H
#define VIOASID_FORMATS_X86_H

#include "contract.h"

/* limits */
#define X86_OA_BITS 52
#define X86_LEAF_LEVELS 3u

/* entry bits */
#define X86_P (1ull << 0)
#define X86_RW_SHIFT 1
#define X86_RW (1ull << X86_RW_SHIFT)
#define X86_US_SHIFT 2
#define X86_US (1ull << X86_US_SHIFT)
#define X86_A (1ull << 5)
#define X86_D (1ull << 6)
#define X86_PS (1ull << 7)
#define X86_OA PT_MASK(51, 12)
#define X86_XD_SHIFT 63
#define X86_XD (1ull << X86_XD_SHIFT)

PT_INLINE bool x86_prepare(struct pt_config *config, bool host)
{
    const uint32_t both = VIO_TABLE_XD_IGNORED | VIO_TABLE_XD_RESERVED;
    vio_table *t = &config->table;
    unsigned width = pt_entry_lg2(PT_GRANULE, t->tree.levels + 1);

    t->output_bits = t->output_bits ? t->output_bits : X86_OA_BITS;
    if ((t->tree.input_bits && t->tree.input_bits != width) || t->output_bits < 32 || t->output_bits > X86_OA_BITS ||
        (t->flags & both) == both)
        return false;
    t->tree.input_bits = width;
    config->reserved = PT_MASK(51, t->output_bits) | (t->flags & VIO_TABLE_XD_RESERVED ? X86_XD : 0);
    config->last = (1ull << (width - !(t->flags & VIO_TABLE_UNSIGNED))) - 1; /* the lower canonical half */
    return host || pt_root_ok(t, &t->tree, 4096);
}

PT_INLINE int x86_start(const struct pt_config *config, uint64_t address, struct pt_start *out)
{
    const vio_tree *tree = &config->table.tree;
    unsigned width = tree->input_bits;

    *out = (struct pt_start){.table = tree->root,
                             .index = address & ((1ull << width) - 1),
                             .levels = tree->levels,
                             .granule = PT_GRANULE};
    if (config->table.flags & VIO_TABLE_UNSIGNED)
        return address >> width ? VIO_REASON_ADDRESS_WIDTH : 0;
    return (uint64_t)((int64_t)(address << (64 - width)) >> (64 - width)) == address ? 0 : VIO_REASON_ADDRESS_WIDTH;
}

PT_INLINE int x86_decode(const struct pt_config *config, const struct pt_start *start, uint64_t entry, unsigned level,
                         bool trusted, struct pt_entry *out)
{
    unsigned lg2 = pt_entry_lg2(PT_GRANULE, level);
    bool leaf = level == 1 || entry & X86_PS;

    (void)start;
    if (__builtin_expect(!(entry & X86_P), 0))
        return VIO_REASON_NOT_PRESENT;
    if (!trusted) {
        uint64_t reserved = config->reserved;

        if (level > 1 && entry & X86_PS) {
            if (level > X86_LEAF_LEVELS || (level == 3 && config->table.flags & VIO_TABLE_NO_1G))
                reserved |= X86_PS;
            else
                reserved |= PT_MASK(lg2 - 1, 13);
        }
        if (__builtin_expect((entry & reserved) != 0, 0))
            return VIO_REASON_RESERVED_BITS;
    }
    out->next = leaf ? 0 : level - 1;
    out->size_lg2 = lg2;
    out->oa = entry & X86_OA;
    if (leaf)
        out->oa &= ~((1ull << lg2) - 1); /* bit 12 of a large page is PAT */
    return 0;
}

/* SDM 4.6.1: R/W, U/S and XD of all levels together; what is mapped can be read. */
PT_INLINE unsigned x86_permissions(const struct pt_config *config, const struct pt_start *start, uint64_t tables,
                                   uint64_t leaf, bool trusted)
{
    uint32_t flags = config->table.flags;
    uint64_t all = (leaf ^ X86_XD) & (trusted ? ~0ull : tables);
    unsigned write = (unsigned)(all >> X86_RW_SHIFT & 1), user = (unsigned)(all >> X86_US_SHIFT & 1);
    unsigned execute = !trusted && flags & VIO_TABLE_XD_IGNORED ? 1 : (unsigned)(all >> X86_XD_SHIFT);
    unsigned of_user = VIO_READ | write * VIO_WRITE | execute * VIO_EXECUTE, of_privileged = of_user;

    (void)start;
    if (trusted)
        return PT_BOTH(of_user);
    if (flags & VIO_TABLE_WRITE_ANY)
        of_privileged |= VIO_WRITE;
    if (flags & VIO_TABLE_SMEP && user)
        of_privileged &= ~(unsigned)VIO_EXECUTE;
    return of_user * user | of_privileged << PT_PRIVILEGED;
}

/* SDM 4.8: accessed in every entry used, dirty in the leaf at a write. */
PT_INLINE int x86_use(const struct pt_config *config, uint64_t entry, bool leaf, bool write, uint64_t *after)
{
    (void)config;
    *after = entry | X86_A | (leaf && write ? X86_D : 0);
    return 0;
}

PT_INLINE uint64_t x86_leaf_sizes(const struct pt_config *config, unsigned level)
{
    if (level > X86_LEAF_LEVELS || (level == 3 && config->table.flags & VIO_TABLE_NO_1G))
        return 0;
    return 1ull << pt_entry_lg2(PT_GRANULE, level);
}

PT_INLINE uint64_t x86_make_leaf(const struct pt_config *config, uint64_t oa, unsigned level, unsigned size_lg2,
                                 unsigned perm)
{
    (void)config, (void)size_lg2;
    return oa | X86_P | X86_US | (level > 1 ? X86_PS : 0) | (perm & VIO_WRITE ? X86_RW : 0) |
           (perm & VIO_EXECUTE ? 0 : X86_XD);
}

PT_INLINE uint64_t x86_make_table(const struct pt_config *config, uint64_t oa, unsigned level)
{
    (void)config, (void)level;
    return oa | X86_P | X86_RW | X86_US;
}

static const struct pt_format x86_format = {
    .name = "x86",
    .flags = VIO_TABLE_UNSIGNED | VIO_TABLE_WRITE_ANY | VIO_TABLE_SMEP | VIO_TABLE_XD_IGNORED | VIO_TABLE_XD_RESERVED |
             VIO_TABLE_NO_1G,
    .min_levels = 4,
    .max_levels = 5,
    .dirty = {.set = X86_D},
    .denies = X86_XD,
    .prepare = x86_prepare,
    .start = x86_start,
    .decode = x86_decode,
    .permissions = x86_permissions,
    .use = x86_use,
    .leaf_sizes = x86_leaf_sizes,
    .make_leaf = x86_make_leaf,
    .make_table = x86_make_table,
};

#endif
