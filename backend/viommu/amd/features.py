"""What this IOMMU offers: the Extended Feature Register and the PCI capability block that announce it.

Sections are those of the AMD I/O Virtualization Technology (IOMMU) Specification, publication 48882. The value of the
feature register stands in one table, because three places must agree on it: MMIO 0x30, the IVHD in the IVRS table, and
the code that takes a bit of the guest as reserved when its feature is absent.
"""

from dataclasses import dataclass
from enum import IntFlag


class Efr(IntFlag):
    """Features of one bit in the Extended Feature Register (section 3.3.1, MMIO 0x30)."""

    PREFETCH = 1 << 0
    PPR = 1 << 1
    NX = 1 << 3
    GUEST_TRANSLATION = 1 << 4
    INVALIDATE_ALL = 1 << 6
    GUEST_APIC = 1 << 7
    USER_SUPERVISOR = 1 << 37
    GUEST_IO = 1 << 48
    HOST_ACCESSED = 1 << 49
    ENHANCED_PPR = 1 << 50
    HOST_DIRTY = 1 << 52
    IOTLB_TYPE = 1 << 54


@dataclass(frozen=True, slots=True)
class EfrField:
    """One field of the Extended Feature Register: its bits, what is announced there, and why."""

    name: str
    shift: int
    width: int
    value: int
    reason: str


PASID_BITS = 16
"""Of a PASID: Linux takes no more (it stops at boot where PASmax is larger), and PCI Express has 20."""

EFR_FIELDS = (
    EfrField("PreFSup", 0, 1, 1, "PREFETCH_IOMMU_PAGES walks ahead, and what it finds is in the IOTLB"),
    EfrField("PPRSup", 1, 1, 1, "page requests of devices in a log, answered by COMPLETE_PPR_REQUEST"),
    EfrField("XTSup", 2, 1, 0, "interrupts do not pass through this IOMMU: QEMU delivers them"),
    EfrField("NXSup", 3, 1, 1, "bit 63 of a guest table's entries forbids requests that execute"),
    EfrField("GTSup", 4, 1, 1, "guest (v2) tables, found through a GCR3 table for each PASID"),
    EfrField("GAPPISup", 5, 1, 0, "interrupts do not pass through this IOMMU"),
    EfrField("IASup", 6, 1, 1, "INVALIDATE_IOMMU_ALL; without it Linux sends one command a device and domain at start"),
    EfrField(
        "GASup",
        7,
        1,
        1,
        "remapping entries of 128 bits, chosen by GAEn: no interrupt passes here, so none is ever read, and GAMSup "
        "offers no guest APIC; Linux reads the IVHD's features, and so offers v2 tables, only where this is set",
    ),
    EfrField("HESup", 8, 1, 0, "hardware errors go to the event log alone"),
    EfrField("PCSup", 9, 1, 0, "no performance counters; they would also need a BAR of 512 KiB"),
    EfrField("HATS", 10, 2, 2, "host tables of up to six levels: DTE modes 1 to 6"),
    EfrField("GATS", 12, 2, 1, "guest tables of four and five levels"),
    EfrField("GLXSup", 14, 2, 2, "GCR3 tables of one to three levels"),
    EfrField("SmiFSup", 16, 2, 0, "no system management interrupts pass here"),
    EfrField("SmiFRC", 18, 3, 0, "belongs to the filter of system management interrupts"),
    EfrField("GAMSup", 21, 3, 0, "no guest APIC: interrupts do not pass through this IOMMU"),
    EfrField("DualPprLogSup", 24, 2, 0, "one page-request log: software that lags behind is told of its overflow"),
    EfrField("DualEventLogSup", 28, 2, 0, "one event log"),
    EfrField("SATSSup", 31, 1, 0, "translation requests are answered by addresses of the guest's memory, in the clear"),
    EfrField("PASmax", 32, 5, PASID_BITS - 1, "PASIDs of 16 bits, all that Linux takes"),
    EfrField("USSup", 37, 1, 1, "the user bit of a guest table's entries keeps unprivileged requests out"),
    EfrField("DevTblSegSup", 38, 2, 0, "one segment: the whole table of 65,536 entries is 2 MiB"),
    EfrField("PprOvrflwEarlySup", 40, 1, 0, "the overflow itself is told; no warning before it"),
    EfrField(
        "PPRAutoRspSup", 41, 1, 0, "what finds the log full is discarded; the device is answered when its wait ends"
    ),
    EfrField("MarcSup", 42, 2, 0, "no address routing: memory is the VM's alone"),
    EfrField("BlkStopMrkSup", 44, 1, 0, "no stop markers arrive: a function cancels by itself"),
    EfrField("PerfOptSup", 45, 1, 0, "nothing to choose from"),
    EfrField("MsiCapMmioSup", 46, 1, 0, "the MSI capability is reached through configuration space"),
    EfrField("GIoSup", 48, 1, 1, "requests without a PASID through the table of PASID 0 (DTE.GIoV)"),
    EfrField("HASup", 49, 1, 1, "accessed bits of host tables, as DTE.HAD asks"),
    EfrField(
        "EPHSup", 50, 1, 1, "DTE.GPRP: an answer always tells the PASID of its request, which a device may ignore"
    ),
    EfrField("AttrFWSup", 51, 1, 0, "requests have no attributes here"),
    EfrField("HDSup", 52, 1, 1, "dirty bits of host tables, as DTE.HAD asks"),
    EfrField("InvIotlbTypeSup", 54, 1, 0, "an invalidation of a device TLB has one type: its pages"),
    EfrField("vIommuSup", 55, 1, 0, "no IOMMU for guests of the guest"),
    EfrField("GAUpdateDisSup", 61, 1, 0, "walks of guest tables always set accessed and dirty bits"),
    EfrField("ForcePhyDestSup", 62, 1, 0, "interrupts do not pass through this IOMMU"),
    EfrField("SNPSup", 63, 1, 0, "no memory is owned page by page"),
)
EFR = sum(field.value << field.shift for field in EFR_FIELDS)
EFR2 = 0  # Extended Feature Register 2 (MMIO 0x1A0): none of its features


def host_levels(efr: int) -> int:
    """Levels that a host page table may have (EFR.HATS: 0 is four, 1 is five, 2 is six; 3 is reserved)."""
    return 4 + (efr >> 10 & 3)


def guest_levels(efr: int) -> int:
    """Levels that a guest page table may have (EFR.GATS: 0 is four, 1 is five; the rest is reserved)."""
    return 4 + (efr >> 12 & 3)


def gcr3_levels(efr: int) -> int:
    """Levels that a GCR3 table may have (EFR.GLXSup: 0 is one, 1 is two, 2 is three; 3 is reserved)."""
    return 1 + (efr >> 14 & 3)


def pasid_bits(efr: int) -> int:
    """Width of the PASIDs that requests may carry (EFR.PASmax, less one)."""
    return 1 + (efr >> 32 & 0x1F)


# Sizes of addresses, in MiscInfo 0 of the capability block and again in the IVinfo of the IVRS table (section 5.2.1)
PHYSICAL_ADDRESS_BITS = 52
VIRTUAL_ADDRESS_BITS = 64  # a table of six levels takes all of the address
ADDRESS_SIZES = PHYSICAL_ADDRESS_BITS << 8 | VIRTUAL_ADDRESS_BITS << 15

CAPABILITY_ID = 0x0F
CAPABILITY_OFFSET = 0x40
MSI_OFFSET = 0x60


def capability_data() -> bytes:
    """The IOMMU capability block without its two bytes of id and link: 22 bytes of offsets 0x42 to 0x57 (section 3.2).

    The registers themselves stand in BAR 0, so the base address registers of the block hold no address, only their
    enable bit.
    """
    header = 3 | 1 << 3 | 1 << 8 | 1 << 11  # CapType 3, CapRev 1, IotlbSup, EFRSup
    words = (1, 0, 0, ADDRESS_SIZES, 0)
    return header.to_bytes(2, "little") + b"".join(word.to_bytes(4, "little") for word in words)
