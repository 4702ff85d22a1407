/*
 * SMMUv3 context descriptors: SubstreamID -> stage-1 configuration.
 *
 * Arm SMMUv3 (IHI 0070), 5.2 (stream table entry: S1Fmt, S1ContextPtr, S1CDMax), 5.3 (level 1 context descriptor), 5.4
 * (context descriptor), 5.4.1 (what makes one illegal). A context descriptor has 64 bytes. The table is linear, or has
 * two levels, the lower one of 4 KiB (64 descriptors, leaf_bits 6) or 64 KiB (1024, leaf_bits 10).
 *
 * Whatever makes a descriptor illegal is one event, C_BAD_CD, and RESERVED_BITS here. Tables of AArch32 and big-endian
 * ones are not to be had.
 */
#ifndef VIOASID_PASID_ARM_CD_H
#define VIOASID_PASID_ARM_CD_H

#include "contract.h"

#define ARM_CD_L1_V (1ull << 0)
#define ARM_CD_L1_ADDRESS PT_MASK(51, 12)
/* first word */
#define ARM_CD_TSZ(word, upper) ((word) >> ((upper) ? 16 : 0) & 63)
#define ARM_CD_TG(word, upper) ((word) >> ((upper) ? 22 : 6) & 3)
#define ARM_CD_EPD(upper) (1ull << ((upper) ? 30 : 14))
#define ARM_CD_ENDI (1ull << 15)
#define ARM_CD_V (1ull << 31)
#define ARM_CD_IPS(word) ((word) >> 32 & 7)
#define ARM_CD_AFFD (1ull << 35)
#define ARM_CD_TBI(upper) (1ull << ((upper) ? 39 : 38))
#define ARM_CD_AA64 (1ull << 41)
#define ARM_CD_HD (1ull << 42)
#define ARM_CD_HA (1ull << 43)
/* second and third word */
#define ARM_CD_HAD (1ull << 1)
#define ARM_CD_TTB PT_MASK(51, 4)

static bool arm_cd_prepare(vio_pasid_table *table)
{
    if (!table->output_bits)
        table->output_bits = 48;
    return table->pasid_bits <= 20 && !(table->root & 63) && !(table->root >> 52) && table->output_bits >= 32 &&
           table->output_bits <= 52 && !table->table_levels &&
           (table->levels == 1 ? !table->leaf_bits
                               : table->levels == 2 && (table->leaf_bits == 6 || table->leaf_bits == 10));
}

/* One range of a descriptor; false: illegal. Its input size and its root's alignment are the page-table format's. */
static bool arm_cd_range(uint64_t cd, uint64_t word, bool upper, unsigned output_bits, vio_tree *tree)
{
    static const uint8_t granules[2][4] = {{12, 16, 14, 0}, {0, 14, 12, 16}}; /* TG0 and TG1 are coded differently */
    unsigned stride;

    if (cd & ARM_CD_EPD(upper))
        return true;
    tree->granule = granules[upper][ARM_CD_TG(cd, upper)];
    tree->input_bits = 64 - (uint32_t)ARM_CD_TSZ(cd, upper);
    tree->root = word & ARM_CD_TTB;
    if (!tree->granule || tree->input_bits <= tree->granule || tree->root >> output_bits)
        return false;
    stride = tree->granule - 3;
    tree->levels = (tree->input_bits - tree->granule + stride - 1) / stride;
    return true;
}

static int arm_cd_find(const vio_pasid_table *table, uint32_t pasid, struct pasid_reader *reader,
                       struct pasid_entry *out)
{
    static const uint8_t sizes[8] = {32, 36, 40, 42, 44, 48, 52, 0};
    uint64_t at = table->root, words[3];
    uint32_t flags = 0, output_bits;
    int reason;

    if (pasid >> table->pasid_bits)
        return VIO_REASON_ADDRESS_WIDTH;
    if (table->levels == 2) {
        reason = pasid_load(reader, at + (pasid >> table->leaf_bits) * 8, 0, 2, &words[0]);
        if (reason)
            return reason;
        if (!(words[0] & ARM_CD_L1_V))
            return VIO_REASON_NOT_PRESENT;
        at = words[0] & ARM_CD_L1_ADDRESS;
        pasid &= (1u << table->leaf_bits) - 1;
    }
    at += pasid * 64ull;
    for (unsigned i = 0; i < 3; i++) {
        reason = pasid_load(reader, at, i, 1, &words[i]);
        if (reason)
            return reason;
    }
    if (!(words[0] & ARM_CD_V))
        return VIO_REASON_NOT_PRESENT;
    output_bits = sizes[ARM_CD_IPS(words[0])];
    if (!(words[0] & ARM_CD_AA64) || (words[0] & ARM_CD_ENDI) || !output_bits ||
        ((words[0] & ARM_CD_HD) && !(words[0] & ARM_CD_HA)))
        return VIO_REASON_RESERVED_BITS;
    if (output_bits > table->output_bits)
        output_bits = table->output_bits;
    *out = (struct pasid_entry){.format = "arm-s1", .privileged = true};
    if (!arm_cd_range(words[0], words[1], false, output_bits, &out->table.tree) ||
        !arm_cd_range(words[0], words[2], true, output_bits, &out->table.upper))
        return VIO_REASON_RESERVED_BITS;
    flags |= words[0] & ARM_CD_HA ? VIO_TABLE_ACCESSED : 0;
    flags |= words[0] & ARM_CD_HD ? VIO_TABLE_DIRTY : 0;
    flags |= words[0] & ARM_CD_AFFD ? VIO_TABLE_NO_ACCESS_FAULT : 0;
    flags |= words[0] & ARM_CD_TBI(false) ? VIO_TABLE_TOP_BYTE : 0;
    flags |= words[0] & ARM_CD_TBI(true) ? VIO_TABLE_UPPER_TOP_BYTE : 0;
    flags |= words[1] & ARM_CD_HAD ? VIO_TABLE_FLAT : 0;
    flags |= words[2] & ARM_CD_HAD ? VIO_TABLE_UPPER_FLAT : 0;
    flags |= table->output_bits == 52 ? VIO_TABLE_LARGE_OUTPUT : 0;
    out->table.output_bits = output_bits;
    out->table.flags = flags;
    return 0;
}

static const char *const arm_cd_leads_to[] = {"arm-s1", NULL};
static const struct pasid_format arm_cd = {"arm-cd", arm_cd_leads_to, true, arm_cd_prepare, arm_cd_find};

#endif
