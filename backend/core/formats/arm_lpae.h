/*
 * Arm VMSAv8-64 page tables, stage 1 and stage 2, as an SMMUv3 walks them: granules of 4, 16 and 64 KiB, 48 and (64 KiB
 * alone) 52 bits.
 *
 * Arm ARM D8.2 (granules, start levels, concatenated tables), D8.3 (descriptors), D8.4 (permissions), D8.5 (access flag
 * and dirty state by hardware), D8.15 (priority of faults); SMMUv3 5.2 (STE), 5.4 (CD). Levels: Arm's level 3 is 1
 * here, its level 0 is 4. Each indexes 3 bits less than the granule; the root what is left, and up to 4 bits more where
 * stage 2 joins tables. RES0 bits and the low address bits of a block are ignored.
 */
#ifndef VIOASID_FORMATS_ARM_LPAE_H
#define VIOASID_FORMATS_ARM_LPAE_H

#include "contract.h"

/* limits */
#define ARM_OA_BITS 48
#define ARM_LARGE_OA_BITS 52
#define ARM_MAX_LEVELS 4u
#define ARM_JOINED_BITS 4 /* 16 root tables */
#define ARM_RANGE_BIT 55  /* selects TTBR1 */

/* descriptor bits */
#define ARM_VALID (1ull << 0)
#define ARM_TABLE (1ull << 1) /* table, or page at level 1; clear: block */
#define ARM_S2_NORMAL (0xfull << 2)
#define ARM_USER_SHIFT 6 /* stage 1: AP[1] */
#define ARM_READ_SHIFT 6 /* stage 2: S2AP[0] */
#define ARM_AP2_SHIFT 7  /* stage 1: AP[2], not writable; stage 2: S2AP[1], writable */
#define ARM_AP2 (1ull << ARM_AP2_SHIFT)
#define ARM_SHAREABLE (3ull << 8)
#define ARM_AF (1ull << 10)
#define ARM_OA_HIGH_SHIFT 12 /* 64 KiB granule with 52 bits: OA 51:48 in 15:12 */
#define ARM_DBM (1ull << 51)
#define ARM_PXN_SHIFT 53
#define ARM_UXN_SHIFT 54
/* stage 1, of a table: what is below it may not be executed (privileged, user), touched by users, written */
#define ARM_PXN_TABLE_SHIFT 59
#define ARM_UXN_TABLE_SHIFT 60
#define ARM_USER_TABLE_SHIFT 61
#define ARM_WRITE_TABLE_SHIFT 62

#define ARM_BIT(word, shift) ((unsigned)((word) >> (shift) & 1))

PT_INLINE bool arm_prepare_tree(const vio_table *t, vio_tree *tree, unsigned joined, bool host)
{
    unsigned stride, covered, most;

    tree->granule = tree->granule ? tree->granule : PT_GRANULE;
    if ((tree->granule != 12 && tree->granule != 14 && tree->granule != 16) || !tree->levels ||
        tree->levels > ARM_MAX_LEVELS)
        return false;
    stride = tree->granule - 3;
    covered = pt_entry_lg2(tree->granule, tree->levels + 1);
    most = tree->granule == 16 ? ARM_LARGE_OA_BITS : ARM_OA_BITS;
    if (!tree->input_bits)
        tree->input_bits = covered < ARM_OA_BITS ? covered : ARM_OA_BITS;
    return tree->input_bits >= 16 && tree->input_bits <= most && tree->input_bits > covered - stride &&
           tree->input_bits <= covered + joined && (host || pt_root_ok(t, tree, pt_root_bytes(tree)));
}

PT_INLINE bool arm_prepare(struct pt_config *config, unsigned joined, bool host)
{
    vio_table *t = &config->table;

    t->output_bits = t->output_bits ? t->output_bits : ARM_OA_BITS;
    if (t->output_bits < 32 || t->output_bits > ARM_LARGE_OA_BITS ||
        (t->output_bits > ARM_OA_BITS && !(t->flags & VIO_TABLE_LARGE_OUTPUT)) ||
        (t->flags & (VIO_TABLE_ACCESSED | VIO_TABLE_DIRTY)) == VIO_TABLE_DIRTY) /* HD needs HA */
        return false;
    if (t->tree.levels) {
        if (!arm_prepare_tree(t, &t->tree, joined, host))
            return false;
        config->last = (1ull << t->tree.input_bits) - 1;
    }
    return true;
}

PT_INLINE bool arm_s1_prepare(struct pt_config *config, bool host)
{
    vio_table *t = &config->table;

    if (!arm_prepare(config, 0, host))
        return false;
    if (host)
        return t->tree.levels && !t->upper.levels;
    return !t->upper.levels || arm_prepare_tree(t, &t->upper, 0, false);
}

PT_INLINE bool arm_s2_prepare(struct pt_config *config, bool host)
{
    return config->table.tree.levels && !config->table.upper.levels && arm_prepare(config, ARM_JOINED_BITS, host);
}

/* Bit 55 chooses the range; the bits above its size all equal bit 55, but for a byte that TBI ignores. */
PT_INLINE int arm_s1_start(const struct pt_config *config, uint64_t address, struct pt_start *out)
{
    const vio_table *t = &config->table;
    bool upper = address >> ARM_RANGE_BIT & 1;
    const vio_tree *tree = upper ? &t->upper : &t->tree;
    uint64_t above;

    if (!tree->levels)
        return VIO_REASON_NOT_PRESENT;
    *out = (struct pt_start){.table = tree->root,
                             .index = address & ((1ull << tree->input_bits) - 1),
                             .levels = tree->levels,
                             .granule = tree->granule,
                             .upper = upper};
    above = (upper ? ~address : address) >> tree->input_bits;
    if (t->flags & (upper ? VIO_TABLE_UPPER_TOP_BYTE : VIO_TABLE_TOP_BYTE))
        above &= (1ull << (ARM_RANGE_BIT + 1 - tree->input_bits)) - 1;
    return above ? VIO_REASON_ADDRESS_WIDTH : 0;
}

PT_INLINE int arm_s2_start(const struct pt_config *config, uint64_t address, struct pt_start *out)
{
    const vio_tree *tree = &config->table.tree;

    *out = (struct pt_start){
        .table = tree->root, .index = address, .levels = tree->levels, .granule = tree->granule};
    return address <= config->last ? 0 : VIO_REASON_ADDRESS_WIDTH;
}

/* D8.3: blocks at Arm's levels 1 and 2 with 4 KiB, 2 with 16 KiB, 2 and, of 52 bits, 1 with 64 KiB. */
PT_INLINE bool arm_has_blocks(uint32_t flags, unsigned granule, unsigned level)
{
    return level == 2 || (level == 3 && (granule == 12 || (granule == 16 && flags & VIO_TABLE_LARGE_OUTPUT)));
}

PT_INLINE int arm_decode(const struct pt_config *config, const struct pt_start *start, uint64_t entry, unsigned level,
                         bool trusted, struct pt_entry *out)
{
    uint32_t flags = config->table.flags;
    unsigned granule = start->granule;
    bool leaf = false;

    if (__builtin_expect(!(entry & ARM_VALID), 0))
        return VIO_REASON_NOT_PRESENT;
    out->size_lg2 = pt_entry_lg2(granule, level);
    if (entry & ARM_TABLE && level > 1) {
        out->next = level - 1;
        out->oa = entry & PT_MASK(47, granule);
    } else {
        if (!trusted && !(entry & ARM_TABLE) && !arm_has_blocks(flags, granule, level))
            return VIO_REASON_BAD_LEVEL;
        leaf = true;
        out->next = 0;
        out->oa = entry & PT_MASK(47, out->size_lg2);
    }
    if (trusted)
        return 0;
    if (granule == 16 && flags & VIO_TABLE_LARGE_OUTPUT)
        out->oa |= (entry >> ARM_OA_HIGH_SHIFT & 0xf) << ARM_OA_BITS;
    if (__builtin_expect(out->oa >> config->table.output_bits != 0, 0))
        return VIO_REASON_ADDRESS_WIDTH;
    if (leaf && !(entry & ARM_AF) && !(flags & (VIO_TABLE_ACCESSED | VIO_TABLE_NO_ACCESS_FAULT)))
        return VIO_REASON_ACCESS_FLAG; /* before permission: D8.15 */
    return 0;
}

/* D8.4: AP[2:1], DBM counting as writable, and what tables above take away; nothing users can write runs privileged. */
PT_INLINE unsigned arm_s1_permissions(const struct pt_config *config, const struct pt_start *start, uint64_t tables,
                                      uint64_t leaf, bool trusted)
{
    uint32_t flags = config->table.flags;
    unsigned user = ARM_BIT(leaf, ARM_USER_SHIFT), write = !ARM_BIT(leaf, ARM_AP2_SHIFT);
    unsigned user_execute = !ARM_BIT(leaf, ARM_UXN_SHIFT), privileged_execute = !ARM_BIT(leaf, ARM_PXN_SHIFT);

    if (trusted)
        return PT_BOTH(user * VIO_READ | write * VIO_WRITE | user_execute * VIO_EXECUTE);
    if (flags & (start->upper ? VIO_TABLE_UPPER_FLAT : VIO_TABLE_FLAT))
        tables = ~0ull;
    write = (write | (flags & VIO_TABLE_DIRTY && leaf & ARM_DBM)) & ARM_BIT(tables, ARM_WRITE_TABLE_SHIFT);
    user &= ARM_BIT(tables, ARM_USER_TABLE_SHIFT);
    user_execute &= ARM_BIT(tables, ARM_UXN_TABLE_SHIFT);
    privileged_execute &= ARM_BIT(tables, ARM_PXN_TABLE_SHIFT) & !(write & user);
    return user * VIO_READ | (write & user) * VIO_WRITE | user_execute * VIO_EXECUTE |
           (VIO_READ | write * VIO_WRITE | privileged_execute * VIO_EXECUTE) << PT_PRIVILEGED;
}

/* D8.4: S2AP, DBM counting as writable; XN[1:0] 0 everybody, 1 users, 2 nobody, 3 the privileged; execution reads. */
PT_INLINE unsigned arm_s2_permissions(const struct pt_config *config, const struct pt_start *start, uint64_t tables,
                                      uint64_t leaf, bool trusted)
{
    uint32_t flags = config->table.flags;
    unsigned read = ARM_BIT(leaf, ARM_READ_SHIFT), write = ARM_BIT(leaf, ARM_AP2_SHIFT);
    unsigned not_privileged = ARM_BIT(leaf, ARM_UXN_SHIFT), not_user = not_privileged;

    (void)start, (void)tables;
    if (trusted)
        return PT_BOTH(read * VIO_READ | write * VIO_WRITE | (read & !not_user) * VIO_EXECUTE);
    write |= flags & VIO_TABLE_DIRTY && leaf & ARM_DBM;
    if (!(flags & VIO_TABLE_ONE_XN))
        not_privileged ^= ARM_BIT(leaf, ARM_PXN_SHIFT);
    return PT_BOTH(read * VIO_READ | write * VIO_WRITE) | (read & !not_user) * VIO_EXECUTE |
           (read & !not_privileged) * VIO_EXECUTE << PT_PRIVILEGED;
}

/* D8.5: HA sets the access flag of leaves; HD makes one with DBM writable. */
PT_INLINE int arm_s1_use(const struct pt_config *config, uint64_t entry, bool leaf, bool write, uint64_t *after)
{
    uint32_t flags = config->table.flags;

    *after = entry | (leaf && flags & VIO_TABLE_ACCESSED ? ARM_AF : 0);
    if (leaf && write && flags & VIO_TABLE_DIRTY && entry & ARM_DBM)
        *after &= ~ARM_AP2;
    return 0;
}

PT_INLINE int arm_s2_use(const struct pt_config *config, uint64_t entry, bool leaf, bool write, uint64_t *after)
{
    uint32_t flags = config->table.flags;

    *after = entry | (leaf && flags & VIO_TABLE_ACCESSED ? ARM_AF : 0);
    if (leaf && write && flags & VIO_TABLE_DIRTY && entry & ARM_DBM)
        *after |= ARM_AP2;
    return 0;
}

PT_INLINE uint64_t arm_leaf_sizes(const struct pt_config *config, unsigned level)
{
    unsigned granule = config->table.tree.granule;

    return level == 1 || arm_has_blocks(config->table.flags, granule, level) ? 1ull << pt_entry_lg2(granule, level) : 0;
}

PT_INLINE uint64_t arm_make(const struct pt_config *config, uint64_t oa)
{
    if (config->table.flags & VIO_TABLE_LARGE_OUTPUT)
        oa = (oa & PT_MASK(47, 0)) | oa >> ARM_OA_BITS << ARM_OA_HIGH_SHIFT;
    return oa | ARM_VALID;
}

/* Writable: dirty, or clean where DBM lets walks make it dirty. `set`: AP2 of a leaf that may be written. */
PT_INLINE uint64_t arm_writable(const struct pt_config *config, uint64_t set)
{
    return config->table.flags & VIO_TABLE_DIRTY ? ARM_DBM | (set ^ ARM_AP2) : set;
}

PT_INLINE uint64_t arm_s1_make_leaf(const struct pt_config *config, uint64_t oa, unsigned level, unsigned size_lg2,
                                    unsigned perm)
{
    (void)size_lg2;
    return arm_make(config, oa) | (level == 1 ? ARM_TABLE : 0) | ARM_SHAREABLE | ARM_AF | 1ull << ARM_USER_SHIFT |
           (perm & VIO_WRITE ? arm_writable(config, 0) : ARM_AP2) |
           (perm & VIO_EXECUTE ? 0 : 1ull << ARM_UXN_SHIFT | 1ull << ARM_PXN_SHIFT);
}

PT_INLINE uint64_t arm_s2_make_leaf(const struct pt_config *config, uint64_t oa, unsigned level, unsigned size_lg2,
                                    unsigned perm)
{
    (void)size_lg2;
    return arm_make(config, oa) | (level == 1 ? ARM_TABLE : 0) | ARM_S2_NORMAL | ARM_SHAREABLE | ARM_AF |
           (perm & VIO_READ ? 1ull << ARM_READ_SHIFT : 0) | (perm & VIO_WRITE ? arm_writable(config, ARM_AP2) : 0) |
           (perm & VIO_EXECUTE ? 0 : 1ull << ARM_UXN_SHIFT);
}

PT_INLINE uint64_t arm_make_table(const struct pt_config *config, uint64_t oa, unsigned level)
{
    (void)level;
    return arm_make(config, oa) | ARM_TABLE;
}

static const struct pt_format arm_s1_format = {
    .name = "arm-s1",
    .flags = VIO_TABLE_ACCESSED | VIO_TABLE_DIRTY | VIO_TABLE_TOP_BYTE | VIO_TABLE_UPPER_TOP_BYTE | VIO_TABLE_FLAT |
             VIO_TABLE_UPPER_FLAT | VIO_TABLE_NO_ACCESS_FAULT | VIO_TABLE_LARGE_OUTPUT,
    .min_levels = 1,
    .max_levels = ARM_MAX_LEVELS,
    .any_granule = true,
    .dirty = {.clear = ARM_AP2, .tracked = ARM_DBM},
    .denies = PT_MASK(62, 59),
    .prepare = arm_s1_prepare,
    .start = arm_s1_start,
    .decode = arm_decode,
    .permissions = arm_s1_permissions,
    .use = arm_s1_use,
    .leaf_sizes = arm_leaf_sizes,
    .make_leaf = arm_s1_make_leaf,
    .make_table = arm_make_table,
};

static const struct pt_format arm_s2_format = {
    .name = "arm-s2",
    .flags = VIO_TABLE_ACCESSED | VIO_TABLE_DIRTY | VIO_TABLE_NO_ACCESS_FAULT | VIO_TABLE_LARGE_OUTPUT |
             VIO_TABLE_ONE_XN,
    .min_levels = 1,
    .max_levels = ARM_MAX_LEVELS,
    .any_granule = true,
    .write_only = true,
    .dirty = {.set = ARM_AP2, .tracked = ARM_DBM},
    .prepare = arm_s2_prepare,
    .start = arm_s2_start,
    .decode = arm_decode,
    .permissions = arm_s2_permissions,
    .use = arm_s2_use,
    .leaf_sizes = arm_leaf_sizes,
    .make_leaf = arm_s2_make_leaf,
    .make_table = arm_make_table,
};

#endif
