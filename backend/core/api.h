/*
 * The C face of the core, as Python sees it: build.py hands this file to cffi, engine.h includes it.
 * So it holds declarations only, and the one preprocessor form cffi knows: integer #defines.
 */

/* What a request does, and what a mapping or a route permits. A format without a right to execute asks for VIO_READ. */
#define VIO_READ 1
#define VIO_WRITE 2
#define VIO_EXECUTE 4
#define VIO_PRIVILEGED 8 /* of a request: with supervisor privilege */
#define VIO_ATS 16 /* of a route: it serves translation requests, too */

/* of an address: it is one of another process's; no address of a process has this bit */
#define VIO_FOREIGN 0x800000000000

/* pasid argument of a request that carries none */
#define VIO_NO_PASID 0xffffffff
/* pasid of a route that takes the requests of all PASIDs that have no route of their own */
#define VIO_ANY_PASID 0xfffffffe
/* ditto of a request that was translated before (ATS), and of its route: they have no PASID of their own */
#define VIO_TRANSLATED 0xfffffffd

/* Bounds, each with its reason where it is enforced (space.c, route.c, pool.c, iotlb.c, pasid.c). */
#define VIO_MAX_SPACES 1048576
#define VIO_MAX_ROUTES 65536
#define VIO_MAX_TABLE_PAGES 262144
#define VIO_MAX_IOTLB 1048576
#define VIO_MAX_PASIDS 65536
#define VIO_FAULT_RING 1024
#define VIO_MAX_PATIENCE 3600000000000

/* Why a request was answered with a fault: one table for every format. */
enum vio_reason {
    VIO_REASON_NONE = 0,
    VIO_REASON_NO_ROUTE,       /* nobody said where requests of this (RID, PASID) go */
    VIO_REASON_BLOCKED,        /* the route exists and lets nothing through */
    VIO_REASON_NOT_BOUND,      /* nested space without a table */
    VIO_REASON_NOT_PRESENT,    /* entry not present */
    VIO_REASON_PERMISSION,     /* present, and the access is not permitted */
    VIO_REASON_RESERVED_BITS,  /* a reserved bit of an entry is set */
    VIO_REASON_ADDRESS_WIDTH,  /* address bits beyond what table or skipped level covers; request wraps */
    VIO_REASON_BAD_LEVEL,      /* the entry's level or size code is not legal where it stands */
    VIO_REASON_MISALIGNED,     /* leaf base not aligned to its size; single access not to its width */
    VIO_REASON_MEMORY_GONE,    /* mapped memory that its owner has taken away (truncated, unmapped) */
    VIO_REASON_BUS_MASTER_OFF, /* said by the layers above: the function may not send requests */
    VIO_REASON_ENTRY_CHANGED,  /* an entry changed at every attempt to set its accessed or dirty bit */
    VIO_REASON_ACCESS_FLAG,    /* accessed bit clear, and hardware is not to set it */
    VIO_REASON_DIRTY,          /* dirty bit clear at a write, and hardware is not to set it */
    VIO_REASON_UNSUPPORTED,    /* another process's memory: it takes no AtomicOps, and tables there are not walked */
    VIO_REASON_PASID_OFF,      /* said by the layers above: the function may not send this PASID */
    VIO_REASON_ATS_OFF,        /* the route serves neither translation requests nor what they translated */
    VIO_REASON_WITHHELD,       /* another process's memory, which that process did not let come in time */
    VIO_REASON_RESERVED_RANGE, /* the device's requests to that address never reach memory (x86: interrupts) */
};

/* Status of every call: 0 done, 1 answered by a fault (vio_last_fault), negative: misuse by the caller. */
enum vio_status {
    VIO_OK = 0,
    VIO_FAULT = 1,
    VIO_ERR_VALUE = -1,      /* bad alignment, size, level, address */
    VIO_ERR_UNKNOWN = -2,    /* no such space or route */
    VIO_ERR_EXISTS = -3,     /* ioasid in use */
    VIO_ERR_BUSY = -4,       /* space has children or routes */
    VIO_ERR_OVERLAP = -5,    /* part of the range is mapped already */
    VIO_ERR_NOT_MAPPED = -6, /* part of the range is not mapped */
    VIO_ERR_KIND = -7,       /* not this kind of space's business */
    VIO_ERR_LIMIT = -8,      /* a bound is reached */
    VIO_ERR_MEMORY = -9,     /* the host has no memory left */
    VIO_ERR_BUFFER = -10,    /* the caller's own buffer went away under the call */
    VIO_ERR_UNTRACKED = -11, /* the space does not track what is dirty */
};

/* AtomicOps */
#define VIO_ATOMIC_ADD 1
#define VIO_ATOMIC_SWAP 2
#define VIO_ATOMIC_CAS 3

/* Options of a table. A format takes those that its header names, and refuses others. */
#define VIO_TABLE_ACCESSED 0x1         /* set accessed bits; formats with options for it (x86 always does) */
#define VIO_TABLE_DIRTY 0x2            /* set dirty bits; needs the former */
#define VIO_TABLE_UNSIGNED 0x4         /* x86: the address is not sign-extended (AMD: requests of PASID 0) */
#define VIO_TABLE_WRITE_ANY 0x8        /* x86: privileged writes ignore R/W (CR0.WP or WPE clear) */
#define VIO_TABLE_SMEP 0x10            /* x86: no privileged execution of user pages */
#define VIO_TABLE_XD_IGNORED 0x20      /* x86: bit 63 means nothing */
#define VIO_TABLE_XD_RESERVED 0x40     /* x86: bit 63 is reserved */
#define VIO_TABLE_NO_1G 0x80           /* x86, VT-d, EPT: no leaves of 1 GiB */
#define VIO_TABLE_NO_2M 0x100          /* VT-d, EPT: no leaves of 2 MiB */
#define VIO_TABLE_NO_SNOOP 0x200       /* VT-d: bit 11 of a leaf is reserved (ECAP.SC clear) */
#define VIO_TABLE_NO_EXECUTE_ONLY 0x400 /* EPT: execution needs read */
#define VIO_TABLE_EXECUTE_MODES 0x800  /* EPT: bit 10 is the user's right to execute (mode-based execute control) */
#define VIO_TABLE_TOP_BYTE 0x1000      /* Arm stage 1: bits 63:56 are ignored, lower range (TBI0) */
#define VIO_TABLE_UPPER_TOP_BYTE 0x2000 /* ditto, upper range (TBI1) */
#define VIO_TABLE_FLAT 0x4000          /* Arm stage 1: attributes of tables do not count, lower range (HAD0) */
#define VIO_TABLE_UPPER_FLAT 0x8000    /* ditto, upper range (HAD1) */
#define VIO_TABLE_NO_ACCESS_FAULT 0x10000 /* Arm: a clear access flag is no fault (AFFD) */
#define VIO_TABLE_LARGE_OUTPUT 0x20000 /* Arm: the SMMU has 52 output bits, whatever is in force (OAS) */
#define VIO_TABLE_ONE_XN 0x40000       /* Arm stage 2: XN has one bit (no FEAT_XNX) */
#define VIO_TABLE_SUM 0x80000          /* RISC-V: privileged reads and writes may touch user pages */
#define VIO_TABLE_NO_NAPOT 0x100000    /* RISC-V: no Svnapot */
#define VIO_TABLE_NO_PBMT 0x200000     /* RISC-V: no Svpbmt */
#define VIO_TABLE_RSW 0x400000         /* RISC-V: bits 60:59 are software's (Svrsw60t59b) */

/* One tree of tables. */
typedef struct {
    uint64_t root;       /* address of the root table: GPA of a guest's, HVA of ours */
    uint32_t levels;     /* level of the root, 1 holding the smallest leaves; 0: no such tree (Arm: EPDn) */
    uint32_t input_bits; /* bits of the address that index it; 0: what the levels of the format cover */
    uint32_t granule;    /* log2 of the smallest page; 0: 12, and 12 in all formats but Arm's */
} vio_tree;

/* A table and how it is to be read. */
typedef struct {
    vio_tree tree;
    vio_tree upper;       /* Arm stage 1: of addresses with bit 55 set (TTBR1); else levels 0 */
    uint32_t output_bits; /* width of output addresses; 0: as many as the format has */
    uint32_t flags;       /* VIO_TABLE_* */
} vio_table;

/* A PASID table of the guest's, and how it is to be read. What a kind has no use for is 0. */
typedef struct {
    uint64_t root;          /* GPA of the root table, or of the directory */
    uint32_t levels;        /* AMD: GLX + 1; RISC-V: 1 PD8, 2 PD17, 3 PD20; Arm: 1 linear, 2; VT-d: 0 or 2 */
    uint32_t pasid_bits;    /* VT-d: PDTS + 13, but 20 at most, 0: 20; Arm: S1CDMax; AMD: PASmax + 1, 0: all */
    uint32_t leaf_bits;     /* Arm, 2 levels: log2 of the descriptors in a lower table, 6 (4 KiB) or 10 (64 KiB) */
    uint32_t table_levels;  /* AMD: levels of the guest tables, 4 or 5 (GuestPagingMode), 0: 4 */
    uint32_t output_bits;   /* width of GPAs: VT-d HAW, 0: 52; Arm OAS, 0: 48; AMD, 0: as the format */
    uint32_t flags;         /* VIO_TABLE_* of tables found whose format takes them, beside what the PASID table says */
    uint32_t default_pasid; /* of requests that carry none; VIO_NO_PASID: they are blocked */
} vio_pasid_table;

typedef struct vio_engine vio_engine;

#define VIO_AT_REQUEST 1    /* a translation request */
#define VIO_AT_TRANSLATED 2

typedef struct {
    uint64_t iova;    /* where the request stood when it failed */
    uint64_t gpa;     /* valid if has_gpa */
    uint64_t entry;   /* the table entry at fault, 0 if none was read */
    uint64_t done;    /* bytes moved before */
    uint32_t rid;
    uint32_t pasid;
    uint32_t ioasid;  /* 0 without a route */
    uint8_t access;
    uint8_t stage;    /* 1, 2, or 0 if no walk took place */
    uint8_t level;
    uint8_t reason;
    uint8_t has_gpa;
    uint8_t pasid_table; /* at an entry of a PASID table */
    uint8_t table;    /* stage 2 (or memory gone): at an entry of a stage-1 table, not at the data */
    uint8_t has_middle;
    uint64_t middle;  /* three stages: the address that the guest's table in the middle was to translate */
    uint8_t type;     /* of the request's address, PCI Express's AT: 0, or VIO_AT_* */
} vio_fault;

typedef struct {
    uint64_t hva;
    uint64_t size;    /* bytes valid from hva onward */
    uint64_t gpa;
    uint32_t access;  /* permitted by both stages and the route */
} vio_translation;

typedef struct {
    uint64_t iova;
    uint64_t length;
} vio_segment;

/* An entry on the path of a translation. */
typedef struct {
    uint64_t input;      /* address that is translated: IOVA by stage 1, GPA by stage 2 */
    uint64_t address;    /* of the entry: GPA in stage 1, HVA in stage 2 */
    uint64_t entry;      /* as read, if `read` */
    uint64_t output;     /* base of the leaf or of the next table, if `decoded` */
    uint8_t stage;
    uint8_t level;
    uint8_t table_of;    /* stage 2: level of the entry of a guest's that it leads to; 0: it leads to the data */
    uint8_t middle;      /* three stages: of the guest's table in the middle, or of stage 2 that leads to one of those */
    uint8_t pasid_table; /* an entry of a PASID table, or of stage 2 that leads to one */
    uint8_t read;        /* 0: its memory is gone */
    uint8_t decoded;     /* 0: it leads nowhere, for `reason` */
    uint8_t next;        /* level of the next table; 0: a leaf */
    uint8_t size_lg2;    /* of the leaf */
    uint8_t permissions; /* VIO_READ, WRITE, EXECUTE: what this entry and the leaf permit together, for the request's
                            privilege; VIO_PRIVILEGED: not known, as the walk reached no leaf */
    int8_t accessed, dirty; /* 1: set, 0: a request would have to set it, -1: there is none */
    uint8_t reason;      /* why the path ends here, 0: it does not */
} vio_step;

#define VIO_PATH_STEPS 512

/* The path of one translation: all entries, in the order in which they are read. */
typedef struct {
    vio_step steps[VIO_PATH_STEPS];
    uint32_t count;
    uint32_t ioasid, parent; /* 0: none */
    int format, middle_format, parent_format; /* numbers for vio_format_name, -1: none; parent_format: of stage 2 */
    int found;               /* 1: translation is valid; 0: fault is */
    vio_translation translation;
    vio_fault fault;
} vio_path;

typedef struct {
    uint64_t iotlb_hits, iotlb_misses, iotlb_evictions, walks, walk_cache_hits, requests, bytes, faults;
    uint64_t spaces, routes, table_pages, faults_dropped;
} vio_counters;

typedef struct {
    uint64_t requests, bytes, faults, moved, iotlb_hits, iotlb_misses;
} vio_space_counters;

typedef struct {
    uint64_t requests, bytes, faults, nested, direct, moved;
} vio_route_counters;

/* engine.c */
int vio_engine_create(uint32_t iotlb_entries, vio_engine **out);
void vio_engine_destroy(vio_engine *engine);
int vio_patience(vio_engine *engine, uint64_t nanoseconds); /* with pages of other processes that do not come; a second */
int vio_walk_caches(vio_engine *engine, int on); /* from the start: as the IOTLB is. Anew, they are empty */
void vio_invalidate_all(vio_engine *engine);
void vio_engine_counters(vio_engine *engine, vio_counters *out);
/* vio_counters.table_pages alone, without waiting for anything: between changes of the caller's own. */
uint64_t vio_table_pages(const vio_engine *engine);
int vio_format_find(const char *name);
const char *vio_format_name(int format);

/* space.c */
int vio_space_create_host(vio_engine *engine, uint32_t ioasid, int format, const vio_table *table);
int vio_space_create_nested(vio_engine *engine, uint32_t ioasid, uint32_t parent);
int vio_space_destroy(vio_engine *engine, uint32_t ioasid);
int vio_space_map(vio_engine *engine, uint32_t ioasid, uint64_t iova, uint64_t hva, uint64_t size, uint32_t access);
int vio_space_unmap(vio_engine *engine, uint32_t ioasid, uint64_t iova, uint64_t size);
int vio_space_protect(vio_engine *engine, uint32_t ioasid, uint64_t iova, uint64_t size, uint32_t access);
/* The table of a host-managed space, its root an HVA; of a nested one: what is bound. For tests and explanations. */
int vio_space_table_get(vio_engine *engine, uint32_t ioasid, vio_table *out);
int vio_space_bind(vio_engine *engine, uint32_t ioasid, int format, const vio_table *table);
int vio_space_unbind(vio_engine *engine, uint32_t ioasid);
int vio_space_invalidate(vio_engine *engine, uint32_t ioasid, uint64_t first, uint64_t last);
int vio_space_counters_get(vio_engine *engine, uint32_t ioasid, vio_space_counters *out);

/*
 * process_space.c: a process's address space; pagemap: an open /proc/PID/pagemap of its, which is duplicated. Spaces hold
 * it as long as they are there. A host-managed space that a process was lent to can map addresses of that process:
 * hva | VIO_FOREIGN.
 */
typedef struct vio_process vio_process;
int vio_process_hold(uint32_t pid, int pagemap, vio_process **out);
void vio_process_release(vio_process *process);
int vio_space_create_process(vio_engine *engine, uint32_t ioasid, vio_process *process);
int vio_space_lend_process(vio_engine *engine, uint32_t ioasid, vio_process *process);

/* pasid.c */
int vio_pasid_format_find(const char *name);
int vio_pasid_bind(vio_engine *engine, uint32_t ioasid, int format, const vio_pasid_table *options);
int vio_pasid_invalidate(vio_engine *engine, uint32_t ioasid, uint32_t pasid, uint64_t first, uint64_t last);

/* dirty.c: bit i of the bitmap, zeroed by the caller, stands for the 2^page_lg2 bytes from iova + i * 2^page_lg2 */
int vio_dirty_set(vio_engine *engine, uint32_t ioasid, int on);
/* Pages of [iova, iova + size) of a space that are dirty make those from `start` on of another one so. */
int vio_dirty_pass(vio_engine *engine, uint32_t ioasid, uint64_t iova, uint64_t size, uint32_t to, uint64_t start,
                   int clear);
int vio_dirty_read(vio_engine *engine, uint32_t ioasid, uint64_t iova, uint64_t size, uint32_t page_lg2, int clear,
                   uint8_t *bitmap);

/*
 * window.c: addresses [first, last] that requests of a device without a PASID do not find translated by the space of
 * their route: they go as they are to the host-managed space underneath, `ioasid`, or nowhere (0). They last until the
 * route is attached anew. A request that reaches into a window is in parts, as if a page ended there.
 */
#define VIO_WINDOWS 32 /* more than the windows that any machine's devices have: the bound on what a route can hold */
typedef struct {
    uint64_t first, last;
    uint32_t ioasid;
} vio_window;
int vio_route_windows(vio_engine *engine, uint32_t rid, const vio_window *windows, uint32_t count);

/* route.c; access: of VIO_READ, VIO_WRITE and VIO_ATS */
int vio_route_attach(vio_engine *engine, uint32_t rid, uint32_t pasid, uint32_t ioasid, uint32_t access);
int vio_route_block(vio_engine *engine, uint32_t rid, uint32_t pasid);
int vio_route_detach(vio_engine *engine, uint32_t rid, uint32_t pasid);
int vio_invalidate_device(vio_engine *engine, uint32_t rid);
int vio_route_counters_get(vio_engine *engine, uint32_t rid, uint32_t pasid, vio_route_counters *out);

/* dma.c */
int vio_translate(vio_engine *engine, uint32_t rid, uint32_t pasid, uint64_t iova, uint32_t access,
                  vio_translation *out);
int vio_dma(vio_engine *engine, uint32_t rid, uint32_t pasid, uint64_t iova, void *buffer, uint64_t length, int write);
int vio_dma_scatter(vio_engine *engine, uint32_t rid, uint32_t pasid, const vio_segment *segments, uint64_t count,
                    void *buffer, int write);
int vio_dma_fill(vio_engine *engine, uint32_t rid, uint32_t pasid, uint64_t iova, uint64_t length, uint64_t pattern,
                 uint32_t width);
int vio_dma_copy(vio_engine *engine, uint32_t from_rid, uint32_t from_pasid, uint64_t from, uint32_t to_rid,
                 uint32_t to_pasid, uint64_t to, uint64_t length);
int vio_store(vio_engine *engine, uint32_t rid, uint32_t pasid, uint64_t iova, uint64_t value, uint32_t width);
int vio_load(vio_engine *engine, uint32_t rid, uint32_t pasid, uint64_t iova, uint32_t width, uint64_t *out);

/* atomic.c: operand, compare and before are of 128 bits, low half first. */
int vio_atomic(vio_engine *engine, uint32_t rid, uint32_t pasid, uint64_t iova, int operation, uint32_t width,
               const uint64_t *operand, const uint64_t *compare, uint64_t *before);

/* What a translation request gives: [iova, iova + size) lies at `address`, for translated requests; size 0: 2^64. */
typedef struct {
    uint64_t iova, size, address;
    uint32_t access; /* that a cached entry may serve: writes only if there is no dirty bit left to set */
} vio_translated;

/* ats.c: translate a page as for a read, so that the IOTLB knows it; not counted, and no fault if there is none. */
int vio_prefetch(vio_engine *engine, uint32_t rid, uint32_t pasid, uint64_t iova);

/*
 * ats.c: a translation request for the pages of [iova, iova + length): as many as `room` leaves into out[], neighbours
 * made one; how many in *count. VIO_FAULT: where they end, nothing of `access` is to be had, vio_last_fault telling why.
 */
int vio_ats(vio_engine *engine, uint32_t rid, uint32_t pasid, uint64_t iova, uint64_t length, uint32_t access,
            vio_translated *out, uint64_t room, uint64_t *count);

/*
 * ats_missing.c: pages of [iova, iova + length) of which translation requests do not give all of `access`, `most` at the
 * most, in order, to out[]; how many in *count. VIO_FAULT: where requests are led, and no page, is to blame.
 */
int vio_ats_missing(vio_engine *engine, uint32_t rid, uint32_t pasid, uint64_t iova, uint64_t length, uint32_t access,
                    uint64_t *out, uint64_t most, uint64_t *count);

/*
 * batch.c: one answer an IOVA, in columns as long as there are IOVAs. reasons[i] is 0 and what a translation has holds,
 * or it is the reason of a fault and what a fault has holds; the rest is 0.
 */
typedef struct {
    uint64_t *hvas, *gpas, *sizes;                 /* of translations */
    uint64_t *fault_gpas, *entries;                /* of faults */
    uint8_t *access;                               /* of translations */
    uint8_t *reasons, *stages, *levels, *tables; /* of faults */
} vio_answers;

int vio_translate_many(vio_engine *engine, uint32_t rid, uint32_t pasid, const uint64_t *iovas, uint64_t count,
                       uint32_t access, const vio_answers *out);

/*
 * guest_table.c: a table in memory whose GPA 0 lies at `memory`, its tables in GPAs [first, first + size). What is mapped
 * is a GPA; access is of VIO_READ, VIO_WRITE, VIO_EXECUTE. `get` tells what to bind.
 */
typedef struct vio_guest_table vio_guest_table;
int vio_guest_table_create(int format, const vio_table *table, void *memory, uint64_t first, uint64_t size,
                           vio_guest_table **out);
void vio_guest_table_destroy(vio_guest_table *table);
void vio_guest_table_get(vio_guest_table *table, vio_table *out);
int vio_guest_table_map(vio_guest_table *table, uint64_t iova, uint64_t gpa, uint64_t size, uint32_t access);
int vio_guest_table_unmap(vio_guest_table *table, uint64_t iova, uint64_t size);
int vio_guest_table_protect(vio_guest_table *table, uint64_t iova, uint64_t size, uint32_t access);
/* Of leaves, whose dirty bit stands for all their pages; bitmap as in vio_dirty_read. */
int vio_guest_table_read_dirty(vio_guest_table *table, uint64_t iova, uint64_t size, uint32_t page_lg2, int clear,
                               uint8_t *bitmap);

/* lookup.c */
int vio_lookup(vio_engine *engine, uint32_t rid, uint32_t pasid, uint64_t iova, uint32_t access, vio_path *out);

/* request.c: of this thread's last request that was answered by VIO_FAULT. */
const vio_fault *vio_last_fault(void);

/* faults.c: take the oldest ones out of the ring; how many. */
uint32_t vio_faults(vio_engine *engine, vio_fault *out, uint32_t room);
uint64_t vio_faults_dropped(vio_engine *engine);
