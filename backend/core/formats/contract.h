/*
 * What a page-table format must tell the walker and the builder: the contract, without bodies.
 *
 * A format is one header of this folder, its parts always in this order: title with the specification's section and its
 * numbering of levels, limits, entry bits, accessors, the constant table of them. formats.h lists the formats.
 * Accessors are static inline and keep no state: the walker (../walk.h) is written once over this contract and the
 * compiler folds a format's constant table into it.
 *
 * Levels: 1 holds the smallest leaves, the root stands at `levels`. An entry at a level covers 2^(3 + stride x level)
 * bytes, stride being the bits that one table resolves, 3 less than the granule; the root resolves all bits that are
 * left.
 *
 * Order of checks, the same in every format: the input address (start); of each entry, from the root down: present,
 * reserved bits, level, alignment, output address (decode); at the leaf, for all levels together: permissions; then
 * accessed and dirty (use).
 */
#ifndef VIOASID_FORMATS_CONTRACT_H
#define VIOASID_FORMATS_CONTRACT_H

#include <stdbool.h>
#include <stdint.h>

#include "../vio.h"

#define PT_MAX_LEVELS 6
#define PT_GRANULE 12u /* of every format but Arm's */
#define PT_INLINE static inline __attribute__((always_inline))

/* Permissions: VIO_READ, VIO_WRITE, VIO_EXECUTE of user requests, and the same shifted up of privileged ones. */
#define PT_RWX (VIO_READ | VIO_WRITE | VIO_EXECUTE)
#define PT_PRIVILEGED 3
#define PT_BOTH(perm) ((perm) | (perm) << PT_PRIVILEGED)
#define PT_WRITES PT_BOTH((unsigned)VIO_WRITE)
/* Permissions of a translation that is not to serve writes yet, the dirty bit being clear; and what is permitted still. */
#define PT_CLEAN(perm) (((perm) & ~PT_WRITES) | ((perm) & PT_WRITES) << 6)
#define PT_PERMITTED(perm) (((perm) | (perm) >> 6) & PT_BOTH((unsigned)PT_RWX))

/* Bits high:low, both included. */
#define PT_MASK(high, low) ((~0ull >> (63 - (high))) & (~0ull << (low)))

/* A table as it is installed; `prepare` has made sure that it can be read as it says. */
struct pt_config {
    vio_table table;
    uint64_t reserved; /* bits of every entry that must be zero, where the format knows them beforehand */
    uint64_t last;     /* a table of ours: highest address that it can map, 0 being the lowest */
};

/* Where a walk starts, and what it indexes by. */
struct pt_start {
    uint64_t table;   /* address of the root */
    uint64_t index;   /* the bits of the address that index the tables, higher ones zero */
    unsigned levels;
    unsigned granule; /* log2 of the smallest page */
    bool upper;       /* by config->table.upper */
};

/* An entry, decoded. */
struct pt_entry {
    uint64_t oa;       /* output address: base of the leaf, or of the next table */
    unsigned size_lg2; /* leaf: log2 of its size */
    unsigned next;     /* level of the next table; 0: leaf */
};

/*
 * Dirty state of a leaf: if all of `tracked` stand, a dirty leaf has all bits `set` and none of `clear`, a clean one the
 * other way round; else the leaf has none.
 */
struct pt_dirty {
    uint64_t set, clear, tracked;
};

struct pt_format {
    /* limits */
    const char *name;
    uint32_t flags;          /* VIO_TABLE_* that it takes */
    unsigned min_levels, max_levels;
    bool skips_levels;       /* a table entry may name any lower level, not just the next */
    bool any_granule;        /* not only PT_GRANULE */
    bool write_only;         /* leaves can permit writes without reads */
    bool tables_written;     /* beneath stage 1, while it sets accessed bits: reads of that one's entries are writes */
    struct pt_dirty dirty;
    uint64_t denies;         /* bits of a table entry that take rights away when set, not clear (see permissions) */

    /*
     * Check a configuration and fill in what it leaves at 0; false: it is not legal. `host`: for a table of ours, whose
     * root is still to be made: addresses are 0 to `last`, options are off, and every output address fits.
     */
    bool (*prepare)(struct pt_config *config, bool host);
    /* Begin a walk by a guest's table: 0, or the reason why `address` is not one of this table's. */
    int (*start)(const struct pt_config *config, uint64_t address, struct pt_start *out);
    /*
     * Decode `entry`, read at `level`: 0, or the reason why it leads nowhere. A leaf's base is aligned to its size, and
     * next < level, whatever the entry holds. `trusted`: the core built it, so checks of well-formedness can go, and
     * `start` has the granule alone.
     */
    int (*decode)(const struct pt_config *config, const struct pt_start *start, uint64_t entry, unsigned level,
                  bool trusted, struct pt_entry *out);
    /*
     * What a leaf permits (PT_BOTH order), accessed and dirty bits aside. `tables`: AND over all table entries above
     * it, bits in `denies` inverted; all ones without any. `trusted`: ours, whose tables take nothing away; `start` as above.
     */
    unsigned (*permissions)(const struct pt_config *config, const struct pt_start *start, uint64_t tables,
                            uint64_t leaf, bool trusted);
    /* An entry's accessed and dirty state as this access leaves it, in *after: 0, or why it may not be used as it is. */
    int (*use)(const struct pt_config *config, uint64_t entry, bool leaf, bool write, uint64_t *after);

    /*
     * Entries as the builder writes them; leaves are clean where walks are to set the dirty bit. `perm` is of PT_RWX; `oa` is aligned to 2^size_lg2, a size that leaf_sizes
     * allows. A leaf larger than its level's entries stands in each of those it covers, the same in all.
     */
    uint64_t (*leaf_sizes)(const struct pt_config *config, unsigned level); /* bit n: leaves of 2^n bytes at `level` */
    uint64_t (*make_leaf)(const struct pt_config *config, uint64_t oa, unsigned level, unsigned size_lg2,
                          unsigned perm);
    uint64_t (*make_table)(const struct pt_config *config, uint64_t oa, unsigned level); /* entry at `level` */
};

/* log2 of the bytes that one entry at `level` covers. */
PT_INLINE unsigned pt_entry_lg2(unsigned granule, unsigned level)
{
    return 3 + (granule - 3) * level;
}

/* Byte offset of the entry for `index` within its table at `level`; of a root, and below it. */
PT_INLINE uint64_t pt_root_offset(unsigned granule, uint64_t index, unsigned level)
{
    return (index >> pt_entry_lg2(granule, level)) * 8;
}

PT_INLINE uint64_t pt_offset(unsigned granule, uint64_t index, unsigned level)
{
    return (index >> pt_entry_lg2(granule, level) & ((1ull << (granule - 3)) - 1)) * 8;
}

/* Bytes of the root table: more than a granule where stage 2 joins several, less where few bits are left for it. */
PT_INLINE uint64_t pt_root_bytes(const vio_tree *tree)
{
    unsigned lg2 = pt_entry_lg2(tree->granule, tree->levels);

    return tree->input_bits > lg2 ? 8ull << (tree->input_bits - lg2) : 8;
}

/* Does a guest's root lie within the output addresses, aligned to `align` bytes? */
PT_INLINE bool pt_root_ok(const vio_table *table, const vio_tree *tree, uint64_t align)
{
    return !(tree->root & (align - 1)) && !(table->output_bits < 64 && tree->root >> table->output_bits);
}

#endif
