/*
 * VT-d scalable-mode PASID directory and PASID table.
 *
 * Intel Virtualization Technology for Directed I/O, 3.4.3 (hierarchy), 9.4 (context entry: PASIDDIRPTR and PDTS), 9.5
 * (PASID directory entry), 9.6 (PASID table entry), 7.1 (fault conditions SPD, SPT). PASID 19:6 indexes the directory,
 * 5:0 the table, whose entries have 64 bytes.
 *
 * Of the reserved bits those are checked to which no revision since 3.0 gave a meaning. An entry that asks for nesting
 * is not legal here, as in hardware whose ECAP.NEST is clear: stage 2 is the core's, and a third is not to be had.
 */
#ifndef VIOASID_PASID_VTD_PASID_H
#define VIOASID_PASID_VTD_PASID_H

#include "contract.h"

#define VTD_PASID_P (1ull << 0)
#define VTD_PASID_PDE_RESERVED PT_MASK(11, 2) /* FPD is bit 1 */
#define VTD_PASID_ADDRESS PT_MASK(63, 12)
/* table entry, first word */
#define VTD_PASID_AW(word) ((word) >> 2 & 7)
#define VTD_PASID_PGTT(word) ((word) >> 6 & 7)
#define VTD_PASID_SSADE (1ull << 9)
#define VTD_PASID_RESERVED PT_MASK(11, 10)
enum { VTD_PASID_FIRST_STAGE = 1, VTD_PASID_SECOND_STAGE = 2, VTD_PASID_PASS_THROUGH = 4 };
/* third word */
#define VTD_PASID_SRE (1ull << 0)
#define VTD_PASID_FSPM(word) ((word) >> 2 & 3)
#define VTD_PASID_WPE (1ull << 4)
#define VTD_PASID_NXE (1ull << 5)

static bool vtd_pasid_prepare(vio_pasid_table *table)
{
    if (!table->pasid_bits)
        table->pasid_bits = 20;
    if (!table->output_bits)
        table->output_bits = 52;
    /* PDTS is 0 to 7: 2^(PDTS + 7) directory entries; the last two values reach beyond the 20 bits of a PASID */
    return table->pasid_bits >= 13 && table->pasid_bits <= 20 && table->output_bits >= 32 &&
           table->output_bits <= 52 && !(table->root & 4095) && !(table->root >> table->output_bits) &&
           (!table->levels || table->levels == 2) && !table->leaf_bits && !table->table_levels;
}

static int vtd_pasid_find(const vio_pasid_table *table, uint32_t pasid, struct pasid_reader *reader,
                          struct pasid_entry *out)
{
    uint64_t beyond = ~PT_MASK(table->output_bits - 1, 0), at, words[3];
    int reason;

    if (pasid >> table->pasid_bits)
        return VIO_REASON_ADDRESS_WIDTH;
    reason = pasid_load(reader, table->root + (pasid >> 6) * 8, 0, 2, &words[0]);
    if (reason)
        return reason;
    if (!(words[0] & VTD_PASID_P))
        return VIO_REASON_NOT_PRESENT;
    if (words[0] & (VTD_PASID_PDE_RESERVED | beyond))
        return VIO_REASON_RESERVED_BITS;
    at = (words[0] & VTD_PASID_ADDRESS) + (pasid & 63) * 64;
    for (unsigned i = 0; i < 3; i++) {
        reason = pasid_load(reader, at, i, 1, &words[i]);
        if (reason)
            return reason;
    }
    if (!(words[0] & VTD_PASID_P))
        return VIO_REASON_NOT_PRESENT;
    if ((words[0] & (VTD_PASID_RESERVED | beyond)) || (words[2] & beyond))
        return VIO_REASON_RESERVED_BITS;
    *out = (struct pasid_entry){.privileged = words[2] & VTD_PASID_SRE};
    out->table.output_bits = table->output_bits;
    switch (VTD_PASID_PGTT(words[0])) {
    case VTD_PASID_PASS_THROUGH:
        return 0;
    case VTD_PASID_SECOND_STAGE:
        if (VTD_PASID_AW(words[0]) < 1 || VTD_PASID_AW(words[0]) > 3)
            return VIO_REASON_BAD_LEVEL;
        out->format = "vtd-second-stage";
        out->table.tree.root = words[0] & VTD_PASID_ADDRESS;
        out->table.tree.levels = (uint32_t)VTD_PASID_AW(words[0]) + 2;
        out->table.flags = words[0] & VTD_PASID_SSADE ? VIO_TABLE_ACCESSED | VIO_TABLE_DIRTY : 0;
        return 0;
    case VTD_PASID_FIRST_STAGE:
        if (VTD_PASID_FSPM(words[2]) > 1)
            return VIO_REASON_BAD_LEVEL;
        out->format = "x86";
        out->table.tree.root = words[2] & VTD_PASID_ADDRESS;
        out->table.tree.levels = (uint32_t)VTD_PASID_FSPM(words[2]) + 4;
        out->table.flags = (words[2] & VTD_PASID_WPE ? 0 : VIO_TABLE_WRITE_ANY) |
                           (words[2] & VTD_PASID_NXE ? 0 : VIO_TABLE_XD_IGNORED);
        return 0;
    default:
        return VIO_REASON_RESERVED_BITS;
    }
}

static const char *const vtd_pasid_leads_to[] = {"x86", "vtd-second-stage", NULL};
static const struct pasid_format vtd_pasid = {"vtd-pasid", vtd_pasid_leads_to, false, vtd_pasid_prepare, vtd_pasid_find};

#endif
