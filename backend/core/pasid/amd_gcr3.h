/*
 * AMD guest CR3 table: PASID -> root of a guest (v2) table, which is an x86-64 page table.
 *
 * AMD I/O Virtualization Technology (IOMMU) Specification, 48882, section 2.2.6.3 "Guest CR3 Table", and 2.2.2 for the
 * device table entry, which gives its root, its levels (GLX + 1) and the levels of the guest tables (GuestPagingMode).
 * Each level resolves 9 bits of the PASID, the third the 2 bits that are left.
 *
 * Where the device table entry has a host table as well, that one translates the roots that level 1 holds and the guest
 * tables, but not the GCR3 table itself: its addresses are system physical ones as long as GCR3TRPMode is off.
 */
#ifndef VIOASID_PASID_AMD_GCR3_H
#define VIOASID_PASID_AMD_GCR3_H

#include "contract.h"

#define AMD_GCR3_V (1ull << 0)
#define AMD_GCR3_RESERVED (PT_MASK(63, 52) | PT_MASK(11, 1))
#define AMD_GCR3_ADDRESS PT_MASK(51, 12)

static bool amd_gcr3_prepare(vio_pasid_table *table)
{
    uint32_t most = table->levels < 3 ? 9 * table->levels : 20;

    if (!table->table_levels)
        table->table_levels = 4;
    if (!table->pasid_bits || table->pasid_bits > most)
        table->pasid_bits = most;
    return table->levels >= 1 && table->levels <= 3 && !(table->root & 4095) && !(table->root >> 52) &&
           (table->table_levels == 4 || table->table_levels == 5) && !table->leaf_bits;
}

static int amd_gcr3_find(const vio_pasid_table *table, uint32_t pasid, struct pasid_reader *reader,
                         struct pasid_entry *out)
{
    uint64_t at = table->root, entry;

    if (pasid >> table->pasid_bits)
        return VIO_REASON_ADDRESS_WIDTH;
    for (unsigned level = table->levels; level; level--) {
        int reason = pasid_load(reader, at + (pasid >> 9 * (level - 1) & 511) * 8, 0, level, &entry);

        if (reason)
            return reason;
        if (!(entry & AMD_GCR3_V))
            return VIO_REASON_NOT_PRESENT;
        if (entry & AMD_GCR3_RESERVED)
            return VIO_REASON_RESERVED_BITS;
        at = entry & AMD_GCR3_ADDRESS;
    }
    /* PASID 0 stands for requests without one, whose addresses are not sign-extended (2.2.6.4). */
    *out = (struct pasid_entry){.format = "x86", .privileged = true};
    out->table.tree = (vio_tree){.root = at, .levels = table->table_levels};
    out->table.output_bits = table->output_bits;
    out->table.flags = pasid ? 0 : VIO_TABLE_UNSIGNED;
    return 0;
}

static const char *const amd_gcr3_leads_to[] = {"x86", NULL};
static const struct pasid_format amd_gcr3 = {"amd-gcr3", amd_gcr3_leads_to, false, amd_gcr3_prepare, amd_gcr3_find};

#endif
