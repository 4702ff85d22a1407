/*
 * What a page-table format must tell the walker and the builder: the contract, without bodies.
 *
 * A format is one header of this folder, its parts always in this order: title with the specification's section and its
 * numbering of levels, limits, entry bits, accessors, the constant table of them. formats.h lists the formats and the
 * pairs that get a walker of their own. Accessors are static inline and take no state: the walker (../walk.h) is
 * written once over this contract and the compiler folds a format's constant table into it.
 *
 * Levels: 1 holds the smallest leaves, the root stands at `levels`.
 */
#ifndef VIOASID_FORMATS_CONTRACT_H
#define VIOASID_FORMATS_CONTRACT_H

#include <stdbool.h>
#include <stdint.h>

#define PT_MAX_LEVELS 6
#define PT_INLINE static inline __attribute__((always_inline))

/* A table as it is installed: where its root lies (GPA of a guest's, HVA of ours) and how it is to be read. */
struct pt_config {
    uint64_t root;
    unsigned levels;
    unsigned flags; /* VIO_TABLE_* */
};

/* An entry, decoded. */
struct pt_entry {
    uint64_t oa;       /* output address: base of the leaf, or of the next table */
    unsigned size_lg2; /* leaf: log2 of its size */
    unsigned perm;     /* VIO_READ | VIO_WRITE, as this entry alone says */
    unsigned next;     /* level of the next table; 0: leaf */
};

struct pt_format {
    /* limits */
    const char *name;
    unsigned min_levels, max_levels;
    unsigned leaf_levels; /* the builder puts leaves at levels 1..leaf_levels */
    unsigned oa_bits;     /* output addresses are below 2^oa_bits */
    bool skips_levels;    /* a table entry may name any lower level, not just the next */

    /* Are the bits of `address` above what `levels` levels cover as they must be? */
    bool (*address_ok)(uint64_t address, unsigned levels);
    /* log2 of the bytes that one entry at `level` covers. */
    unsigned (*entry_lg2)(unsigned level);
    /* Byte offset, within its table, of the entry for `address` at `level`. */
    uint64_t (*entry_offset)(uint64_t address, unsigned level);
    /*
     * Decode `entry`, read at `level`: 0, or the reason why it leads nowhere. A leaf's base is aligned to its size, and
     * next < level, whatever the entry holds. `trusted`: the core built it, so checks of well-formedness can go.
     */
    int (*decode)(uint64_t entry, unsigned level, bool trusted, struct pt_entry *out);
    /* Accessed and dirty bits that an entry must carry once it served this access under `flags`. */
    uint64_t (*used_bits)(unsigned flags, bool leaf, bool write);
    /* Entries as the builder writes them. `oa` of a leaf is aligned to its size. */
    uint64_t (*make_leaf)(uint64_t oa, unsigned level, unsigned perm);
    uint64_t (*make_table)(uint64_t oa, unsigned next);
};

#endif
