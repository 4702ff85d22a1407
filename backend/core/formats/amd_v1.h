/*
 * AMD IOMMU v1 page table ("host" page table).
 *
 * AMD I/O Virtualization Technology (IOMMU) Specification, 48882, section 2.2.3 "I/O Page Tables for Host
 * Translations". Levels are numbered as there: 1 holds 4 KiB leaves, Mode of the device table entry is the root's.
 * Each level indexes 9 bits of the address, level 6 the 7 bits 63:57.
 */
#ifndef VIOASID_FORMATS_AMD_V1_H
#define VIOASID_FORMATS_AMD_V1_H

#include "../vio.h"
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
#define AMD_V1_OA 0x000ffffffffff000ull    /* 51:12 */
#define AMD_V1_PDE_RESERVED (0x1ffull << 52) /* 60:52 */
#define AMD_V1_PTE_RESERVED (0x7full << 52)  /* 58:52; U (59) and FC (60) have a meaning in leaves */
#define AMD_V1_IR_SHIFT 61                 /* IR 61, IW 62: in the order of VIO_READ, VIO_WRITE */

PT_INLINE unsigned amd_v1_entry_lg2(unsigned level)
{
    return 3 + 9 * level;
}

PT_INLINE bool amd_v1_address_ok(uint64_t address, unsigned levels)
{
    return levels >= AMD_V1_MAX_LEVELS || !(address >> amd_v1_entry_lg2(levels + 1));
}

PT_INLINE uint64_t amd_v1_entry_offset(uint64_t address, unsigned level)
{
    return (address >> amd_v1_entry_lg2(level) & 511) * 8;
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
    if (level >= AMD_V1_MAX_LEVELS || out->size_lg2 <= amd_v1_entry_lg2(level) ||
        out->size_lg2 >= amd_v1_entry_lg2(level + 1))
        return VIO_REASON_BAD_LEVEL;
    return 0;
}

/* Reserved bits and level before permission: the event log's RZ says that PE means nothing (IO_PAGE_FAULT, 2.5.3). */
PT_INLINE int amd_v1_decode(uint64_t entry, unsigned level, bool trusted, struct pt_entry *out)
{
    unsigned next = (unsigned)(entry >> AMD_V1_NEXT_SHIFT & AMD_V1_NEXT_MASK);

    if (__builtin_expect(!(entry & AMD_V1_PR), 0))
        return VIO_REASON_NOT_PRESENT;
    out->perm = (unsigned)(entry >> AMD_V1_IR_SHIFT & 3);
    out->oa = entry & AMD_V1_OA;
    out->size_lg2 = amd_v1_entry_lg2(level);
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
    if (trusted) { /* the builder skips no level and codes no size */
        out->next = level - 1;
        return 0;
    }
    if (__builtin_expect(next == AMD_V1_NEXT_SIZED, 0)) {
        out->next = 0;
        if (entry & AMD_V1_PTE_RESERVED)
            return VIO_REASON_RESERVED_BITS;
        return amd_v1_decode_sized(entry, level, out);
    }
    if (__builtin_expect((entry & AMD_V1_PDE_RESERVED) != 0, 0))
        return VIO_REASON_RESERVED_BITS;
    if (__builtin_expect(next >= level, 0))
        return VIO_REASON_BAD_LEVEL;
    out->next = next;
    return 0;
}

/* Device table entry HA and HD (8:7): accessed in every entry used, dirty in the leaf that served a write. */
PT_INLINE uint64_t amd_v1_used_bits(unsigned flags, bool leaf, bool write)
{
    return (flags & VIO_TABLE_ACCESSED ? AMD_V1_A : 0) | (flags & VIO_TABLE_DIRTY && leaf && write ? AMD_V1_D : 0);
}

PT_INLINE uint64_t amd_v1_make_leaf(uint64_t oa, unsigned level, unsigned perm)
{
    (void)level; /* Next Level 0: the default size of the level it stands in */
    return AMD_V1_PR | oa | (uint64_t)perm << AMD_V1_IR_SHIFT;
}

PT_INLINE uint64_t amd_v1_make_table(uint64_t oa, unsigned next)
{
    return AMD_V1_PR | oa | (uint64_t)next << AMD_V1_NEXT_SHIFT | 3ull << AMD_V1_IR_SHIFT;
}

static const struct pt_format amd_v1_format = {
    .name = "amd-v1",
    .min_levels = 1,
    .max_levels = AMD_V1_MAX_LEVELS,
    .leaf_levels = 3, /* 4 KiB, 2 MiB, 1 GiB */
    .oa_bits = AMD_V1_OA_BITS,
    .skips_levels = true,
    .address_ok = amd_v1_address_ok,
    .entry_lg2 = amd_v1_entry_lg2,
    .entry_offset = amd_v1_entry_offset,
    .decode = amd_v1_decode,
    .used_bits = amd_v1_used_bits,
    .make_leaf = amd_v1_make_leaf,
    .make_table = amd_v1_make_table,
};

#endif
