/*
 * RISC-V IOMMU process-directory table: process_id -> process context; PD8, PD17, PD20 (1, 2, 3 levels).
 *
 * RISC-V IOMMU Architecture Specification, "Process-Directory-Table (PDT)", "Process to locate the Process-context" (the
 * numbers of its steps stand below), "Process-context configuration checks". PDI[0] is process_id 7:0, PDI[1] 16:8,
 * PDI[2] 19:17. A process context has 16 bytes.
 *
 * "Entry misconfigured" is RESERVED_BITS; a process_id that is too wide ("transaction type disallowed") ADDRESS_WIDTH.
 */
#ifndef VIOASID_PASID_RISCV_PDT_H
#define VIOASID_PASID_RISCV_PDT_H

#include "contract.h"

#define RISCV_PDT_V (1ull << 0)
#define RISCV_PDT_NODE_RESERVED (PT_MASK(9, 1) | PT_MASK(63, 54))
#define RISCV_PDT_NODE_ADDRESS(entry) (((entry) >> 10 & PT_MASK(43, 0)) << 12)
/* ta */
#define RISCV_PDT_ENS (1ull << 1)
#define RISCV_PDT_SUM (1ull << 2)
#define RISCV_PDT_TA_RESERVED (PT_MASK(11, 3) | PT_MASK(63, 32))
/* fsc */
#define RISCV_PDT_FSC_RESERVED PT_MASK(59, 44)
#define RISCV_PDT_FSC_ADDRESS(fsc) (((fsc) & PT_MASK(43, 0)) << 12)
#define RISCV_PDT_MODE(fsc) ((fsc) >> 60)
enum { RISCV_PDT_BARE = 0, RISCV_PDT_SV39 = 8, RISCV_PDT_SV57 = 10 };

static bool riscv_pdt_prepare(vio_pasid_table *table)
{
    return table->levels >= 1 && table->levels <= 3 && !(table->root & 4095) && !(table->root >> 56) &&
           !table->pasid_bits && !table->leaf_bits && !table->table_levels;
}

static int riscv_pdt_find(const vio_pasid_table *table, uint32_t pasid, struct pasid_reader *reader,
                          struct pasid_entry *out)
{
    static const uint8_t bits[] = {8, 17, 20};
    const uint32_t pdi[] = {pasid & 255, pasid >> 8 & 511, pasid >> 17};
    uint64_t at = table->root, ta, fsc; /* 1. */
    int reason;

    if (pasid >> bits[table->levels - 1])
        return VIO_REASON_ADDRESS_WIDTH;
    for (unsigned level = table->levels; level > 1; level--) { /* 2. to 6. */
        uint64_t entry;

        reason = pasid_load(reader, at + pdi[level - 1] * 8, 0, level, &entry);
        if (reason)
            return reason;
        if (!(entry & RISCV_PDT_V)) /* 7. */
            return VIO_REASON_NOT_PRESENT;
        if (entry & RISCV_PDT_NODE_RESERVED) /* 8. */
            return VIO_REASON_RESERVED_BITS;
        at = RISCV_PDT_NODE_ADDRESS(entry); /* 9. */
    }
    at += pdi[0] * 16;
    reason = pasid_load(reader, at, 0, 1, &ta); /* 10. */
    if (!reason)
        reason = pasid_load(reader, at, 1, 1, &fsc);
    if (reason)
        return reason;
    if (!(ta & RISCV_PDT_V)) /* 11. */
        return VIO_REASON_NOT_PRESENT;
    if ((ta & RISCV_PDT_TA_RESERVED) || (fsc & RISCV_PDT_FSC_RESERVED) || /* 12. */
        (RISCV_PDT_MODE(fsc) != RISCV_PDT_BARE &&
         (RISCV_PDT_MODE(fsc) < RISCV_PDT_SV39 || RISCV_PDT_MODE(fsc) > RISCV_PDT_SV57)))
        return VIO_REASON_RESERVED_BITS;
    *out = (struct pasid_entry){.privileged = ta & RISCV_PDT_ENS}; /* 13. */
    if (RISCV_PDT_MODE(fsc) == RISCV_PDT_BARE)
        return 0;
    out->format = "riscv";
    out->table.tree.root = RISCV_PDT_FSC_ADDRESS(fsc);
    out->table.tree.levels = (uint32_t)RISCV_PDT_MODE(fsc) - RISCV_PDT_SV39 + 3;
    out->table.flags = ta & RISCV_PDT_SUM ? VIO_TABLE_SUM : 0;
    return 0;
}

static const char *const riscv_pdt_leads_to[] = {"riscv", NULL};
static const struct pasid_format riscv_pdt = {"riscv-pdt", riscv_pdt_leads_to, true, riscv_pdt_prepare, riscv_pdt_find};

#endif
