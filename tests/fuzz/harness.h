/*
 * What the fuzzing harnesses share: numbers taken from an input, guest memory, and formats chosen by a number.
 *
 * Each harness is one function over the bytes of an input (LLVMFuzzerTestOneInput). An input never fails: numbers beyond
 * its end are zero. What must hold is said by HOLDS, the rest by the sanitizers.
 */
#ifndef VIOASID_FUZZ_HARNESS_H
#define VIOASID_FUZZ_HARNESS_H

#include <sanitizer/asan_interface.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>

#include "engine.h"

#define PAGE 4096u

#define HOLDS(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "%s:%d: does not hold: %s\n", __FILE__, __LINE__, #condition);                             \
            abort();                                                                                                   \
        }                                                                                                              \
    } while (0)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

struct input {
    const uint8_t *at, *end;
};

static inline bool more(const struct input *in)
{
    return in->at < in->end;
}

static inline uint64_t take(struct input *in, unsigned bytes)
{
    uint64_t value = 0;

    for (unsigned i = 0; i < bytes && more(in); i++)
        value |= (uint64_t)*in->at++ << 8 * i;
    return value;
}

/* A number of a table's kind: small, at one of the levels, sign-extended, or any. */
static inline uint64_t take_address(struct input *in)
{
    uint64_t kind = take(in, 1), low = kind & 31;

    switch (kind >> 5) {
    case 0:
    case 1:
        return low << 12;
    case 2:
    case 3:
        return take(in, 1) << (12 + low) | take(in, 1) << 12;
    case 4:
        return low << 12 | take(in, 2);
    case 5:
        return ~0ull << (32 + low) | take(in, 2) << 12;
    default:
        return take(in, 8);
    }
}

/* Memory without huge pages and with nothing behind it: inputs are many, and each touches little. */
static inline uint8_t *reserve(size_t size, size_t align, int protection)
{
    uintptr_t at;
    void *area;

    prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0);
    area = mmap(NULL, size + 2 * align, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    HOLDS(area != MAP_FAILED);
    at = ((uintptr_t)area + 2 * align - 1) & ~(uintptr_t)(align - 1); /* something without access on both sides */
    HOLDS(!mprotect((void *)at, size, protection));
    return (uint8_t *)at;
}

/* Formats, whatever they are: a number of the input names one. */

static inline int any_format(uint64_t number)
{
    return (int)(number % PT_FORMATS);
}

/* A table of a format, and how the core will read it. */
struct tables {
    int format;
    vio_table asked;
    struct pt_config config;
};

static inline bool tables_legal(struct tables *t, bool host)
{
    const struct pt_format *f = pt_formats[t->format];
    const vio_tree *tree = &t->asked.tree;

    t->config = (struct pt_config){.table = t->asked};
    if (!f->any_granule) {
        if (tree->levels < f->min_levels || tree->levels > f->max_levels || (tree->granule && tree->granule != 12) ||
            t->asked.upper.levels)
            return false;
        t->config.table.tree.granule = 12;
    }
    return !(t->asked.flags & ~(host ? 0 : f->flags)) && f->prepare(&t->config, host);
}

enum { TABLES_HOST = 1, TABLES_PLAIN = 2 };

/* Any legal configuration; plain: without options but for accessed and dirty, and as wide as it can be. */
static inline struct tables take_tables(struct input *in, int format, uint64_t root, unsigned kind)
{
    const struct pt_format *f = pt_formats[format];
    struct tables t = {.format = format, .asked = {.tree = {.root = root}}};
    uint64_t choice = take(in, 1), wanted;
    bool host = kind & TABLES_HOST;

    wanted = t.asked.tree.levels = f->min_levels + (unsigned)(choice % (f->max_levels - f->min_levels + 1));
    if (f->any_granule)
        t.asked.tree.granule = 12 + (unsigned)(choice >> 3) % 3 * 2;
    if (!host)
        t.asked.flags = (uint32_t)(choice >> 5) & (VIO_TABLE_ACCESSED | VIO_TABLE_DIRTY) & f->flags;
    if (!kind && choice & 128) {
        t.asked.flags = (uint32_t)take(in, 4) & f->flags;
        t.asked.tree.input_bits = take(in, 1) & 63;
        t.asked.output_bits = take(in, 1) & 63;
        if (f->any_granule) { /* so Arm's: a second tree */
            t.asked.upper = t.asked.tree;
            t.asked.upper.levels = take(in, 1) & 7;
            t.asked.upper.input_bits = take(in, 1) & 63;
        }
    }
    if (tables_legal(&t, host))
        return t;
    t.asked = (vio_table){.tree = {.root = root}};
    for (unsigned i = 0; i < 3 * PT_MAX_LEVELS; i++) {
        t.asked.tree.levels = 1 + (unsigned)(wanted + i) % PT_MAX_LEVELS;
        t.asked.tree.granule = f->any_granule ? 12 + i / PT_MAX_LEVELS * 2 : 12;
        if (tables_legal(&t, host))
            return t;
    }
    HOLDS(!"a format has a legal configuration");
    return t;
}

/* Bytes from the start of its table to the entry for an address, were there a table at that level. */
static inline uint64_t entry_offset(const struct tables *t, uint64_t address, unsigned level)
{
    unsigned granule = t->config.table.tree.granule ? t->config.table.tree.granule : 12;
    struct pt_start start;

    if (pt_entry_lg2(granule, level) > 63)
        return 0;
    if (!pt_formats[t->format]->start(&t->config, address, &start) && level == start.levels)
        return pt_root_offset(start.granule, start.index, level);
    return pt_offset(granule, address, level);
}

/* The unit in which a table of ours maps, in pages of 4 KiB. */
static inline uint64_t pages_of(const struct tables *host)
{
    return 1ull << (host->config.table.tree.granule - 12);
}

static inline unsigned some_leaf_size(const struct tables *t, unsigned level, uint64_t number)
{
    uint64_t sizes = pt_formats[t->format]->leaf_sizes(&t->config, level);

    for (number %= 8; number && sizes & (sizes - 1); number--)
        sizes &= sizes - 1;
    return sizes ? (unsigned)__builtin_ctzll(sizes) : 0;
}

/* Bits that the core may change in an entry of the guest's. */
static inline uint64_t may_change(const struct tables *t, uint64_t entry)
{
    uint64_t changes = 0, after;

    for (unsigned i = 0; i < 4; i++)
        if (!pt_formats[t->format]->use(&t->config, entry, i & 1, i >> 1, &after))
            changes |= entry ^ after;
    return changes;
}

enum { ENTRY_RAW, ENTRY_LEAF, ENTRY_TABLE, ENTRY_FLIP };

/*
 * An entry as one op of an input gives it: any bits, a leaf or a table as the format has them, but for one bit perhaps,
 * or bits to flip; for a table in one of `pages` pages of 4 KiB from GPA `base` on. `at`: its offset in them, not cut.
 */
static inline uint64_t take_entry(struct input *in, const struct tables *t, uint64_t base, unsigned pages,
                                  unsigned kind, uint64_t *at)
{
    const struct pt_format *f = pt_formats[t->format];
    uint64_t place, target, oa, entry;
    unsigned level, bits, size;

    *at = take(in, 1) % pages * PAGE;
    place = take(in, 1);
    target = take(in, 1);
    bits = (unsigned)take(in, 1);
    level = 1 + place % PT_MAX_LEVELS;
    size = some_leaf_size(t, level, place >> 4);
    *at += place & 128 ? take(in, 2) * 8 : entry_offset(t, take_address(in), level);
    oa = base + target % pages * PAGE;
    switch (kind) {
    case ENTRY_RAW: entry = take(in, 8); break;
    case ENTRY_LEAF:
        if (!size)
            return 0;
        entry = f->make_leaf(&t->config, oa & ~((1ull << size) - 1), level, size, 1 + bits % 7);
        break;
    case ENTRY_TABLE:
        oa &= ~((1ull << t->config.table.tree.granule) - 1);
        entry = level > 1 ? f->make_table(&t->config, oa, level) : 0;
        break;
    default: return 1ull << (bits & 63);
    }
    return bits & 128 ? entry ^ 1ull << (bits & 63) : entry;
}

#endif
