/*
 * Tables that the core builds in its own memory: stage 2, in a hardware format, its leaf addresses being HVAs.
 *
 * Ranges are inclusive ([first, last]): the last one of a 64-bit space has no end to name. Tables are read with the
 * gate reserved, and written in stints (engine.h), so nothing walks a table while it changes. An entry of 0 is no
 * entry, in every format, and none that the core writes is 0. Leaves have the size of their level's entries.
 */
#include <string.h>

#include "engine.h"

struct builder {
    struct pool *pool;
    const struct pt_format *format;
    const struct pt_config *config;
    unsigned granule;
    struct stint *stint; /* what is written, it counts */
    void (*fill_run)(const struct pt_config *config, uint64_t *entry, uint64_t count, uint64_t oa, unsigned perm);
};

/* The loop in which the time of a mapping goes: one instance for each format. Entries of level 1 for `oa` and on. */
PT_INLINE void fill_run(const struct pt_format *format, const struct pt_config *config, uint64_t *entry,
                        uint64_t count, uint64_t oa, unsigned perm)
{
    const struct pt_config known = *config; /* what entries are written to does not change it: the compiler may know */
    unsigned granule = format->any_granule ? known.table.tree.granule : PT_GRANULE;

    for (uint64_t i = 0; i < count; i++)
        entry[i] = format->make_leaf(&known, oa + (i << granule), 1, granule, perm);
}

#define X(name)                                                                                                        \
    static void fill_run_##name(const struct pt_config *config, uint64_t *entry, uint64_t count, uint64_t oa,          \
                                unsigned perm)                                                                         \
    {                                                                                                                  \
        fill_run(&name##_format, config, entry, count, oa, perm);                                                      \
    }
FORMATS(X)
#undef X

static struct builder builder(struct pool *pool, int format, const struct pt_config *config)
{
    struct builder b = {pool, pt_formats[format], config, config->table.tree.granule, NULL, NULL};

#define X(name)                                                                                                        \
    if (format == PT_##name)                                                                                           \
        b.fill_run = fill_run_##name;
    FORMATS(X)
#undef X
    return b;
}

static uint64_t *table_at(uint64_t address)
{
    return (uint64_t *)(uintptr_t)address;
}

static uint64_t *root(const struct builder *b)
{
    return table_at(b->config->table.tree.root);
}

static unsigned levels(const struct builder *b)
{
    return b->config->table.tree.levels;
}

static uint64_t *entry_at(const struct builder *b, uint64_t *table, uint64_t address, unsigned level)
{
    uint64_t offset = level == levels(b) ? pt_root_offset(b->granule, address, level)
                                         : pt_offset(b->granule, address, level);

    return table + offset / sizeof *table;
}

static uint64_t entry_size(const struct builder *b, unsigned level)
{
    return 1ull << pt_entry_lg2(b->granule, level);
}

/* Last address that the entry for `address` at `level` covers, or `last` if that comes first. */
static uint64_t entry_last(const struct builder *b, uint64_t address, uint64_t last, unsigned level)
{
    uint64_t covered = address | (entry_size(b, level) - 1);

    return covered < last ? covered : last;
}

/* The table below an entry that is not 0; NULL: it is a leaf, decoded in *leaf. */
static uint64_t *below(const struct builder *b, uint64_t entry, unsigned level, struct pt_entry *leaf)
{
    const struct pt_start start = {.granule = b->granule};

    leaf->next = 0;
    b->format->decode(b->config, &start, entry, level, true, leaf);
    return leaf->next ? table_at(leaf->oa) : NULL;
}

static uint64_t make_leaf(const struct builder *b, uint64_t oa, unsigned level, unsigned perm)
{
    return b->format->make_leaf(b->config, oa, level, pt_entry_lg2(b->granule, level), perm);
}

static unsigned root_lg2(const struct pt_config *config)
{
    unsigned lg2 = POOL_LEAST;

    while (1ull << lg2 < pt_root_bytes(&config->table.tree))
        lg2++;
    return lg2;
}

/* Give a table back that holds nothing any more. */
static void give_table(struct builder *b, uint64_t *table)
{
    pool_give(b->pool, table, b->granule);
}

int host_table_create(struct pool *pool, struct pt_config *table)
{
    unsigned lg2 = root_lg2(table);
    void *made = lg2 <= POOL_LARGEST ? pool_take(pool, lg2) : NULL;

    if (!made)
        return VIO_ERR_LIMIT;
    table->table.tree.root = (uint64_t)(uintptr_t)made;
    return VIO_OK;
}

static void free_below(struct builder *b, uint64_t *table, unsigned level, uint64_t entries)
{
    for (uint64_t i = 0; level > 1 && i < entries; i++) {
        struct pt_entry leaf;
        uint64_t *next = table[i] ? below(b, table[i], level, &leaf) : NULL;

        if (next) {
            free_below(b, next, level - 1, 1ull << (b->granule - 3));
            give_table(b, next);
        }
    }
    memset(table, 0, entries * sizeof *table);
}

void host_table_destroy(struct pool *pool, int format, const struct pt_config *table)
{
    struct builder b = builder(pool, format, table);

    free_below(&b, root(&b), levels(&b), pt_root_bytes(&table->table.tree) / sizeof(uint64_t));
    pool_give(pool, root(&b), root_lg2(table));
}

/* The first address of [first, last] that is mapped (mapped = true) or is not; false if there is none. */
static bool find(const struct builder *b, uint64_t *table, unsigned level, uint64_t first, uint64_t last, bool mapped,
                 uint64_t *at)
{
    uint64_t *entry = entry_at(b, table, first, level);

    if (level == 1) {
        uint64_t count = ((last - first) >> b->granule) + 1, i = 0;

        while (i < count && (entry[i] != 0) != mapped)
            i++;
        *at = first + (i << b->granule);
        return i < count;
    }
    for (;; entry++) {
        uint64_t end = entry_last(b, first, last, level);
        struct pt_entry leaf;
        uint64_t *next = *entry ? below(b, *entry, level, &leaf) : NULL;

        if (next) {
            if (find(b, next, level - 1, first, end, mapped, at))
                return true;
        } else if ((*entry != 0) == mapped) {
            *at = first;
            return true;
        }
        if (end == last)
            return false;
        first = end + 1;
    }
}

static bool empty(const struct builder *b, const uint64_t *table)
{
    for (uint64_t i = 0; i < 1ull << (b->granule - 3); i++)
        if (table[i])
            return false;
    return true;
}

/* Clear a range in which no leaf is larger than its part of the range; give back the tables that it empties. */
static void clear(struct builder *b, uint64_t *table, unsigned level, uint64_t first, uint64_t last)
{
    uint64_t *entry = entry_at(b, table, first, level);

    if (level == 1) {
        uint64_t count = ((last - first) >> b->granule) + 1;

        memset(entry, 0, count * sizeof *entry);
        stint_wrote(b->stint, count);
        return;
    }
    for (;; entry++) {
        uint64_t end = entry_last(b, first, last, level);
        struct pt_entry leaf;
        uint64_t *next = *entry ? below(b, *entry, level, &leaf) : NULL;

        if (next) {
            clear(b, next, level - 1, first, end);
            if (empty(b, next)) {
                give_table(b, next);
                *entry = 0;
            }
        } else {
            *entry = 0;
        }
        if (end == last)
            return;
        first = end + 1;
    }
}

/* Fill a range that is free, by the largest leaves that its alignment allows; false without room, part of it filled. */
static bool fill(struct builder *b, uint64_t *table, unsigned level, uint64_t first, uint64_t last, uint64_t hva,
                 unsigned perm)
{
    uint64_t *entry = entry_at(b, table, first, level), size = entry_size(b, level);
    bool leaves;

    if (level == 1) {
        uint64_t count = ((last - first) >> b->granule) + 1;

        b->fill_run(b->config, entry, count, hva, perm);
        stint_wrote(b->stint, count);
        return true;
    }
    leaves = b->format->leaf_sizes(b->config, level) & size;
    for (;; entry++) {
        uint64_t end = entry_last(b, first, last, level);

        if (!*entry && leaves && !((first | hva) & (size - 1)) && end - first == size - 1) {
            *entry = make_leaf(b, hva, level, perm);
        } else {
            struct pt_entry leaf;
            uint64_t *next = *entry ? below(b, *entry, level, &leaf) : NULL; /* the range is free: it is no leaf */

            if (!next) {
                next = pool_take(b->pool, b->granule);
                if (!next)
                    return false;
                *entry = b->format->make_table(b->config, (uint64_t)(uintptr_t)next, level);
            }
            if (!fill(b, next, level - 1, first, end, hva, perm))
                return false;
        }
        if (end == last)
            return true;
        hva += end - first + 1;
        first = end + 1;
    }
}

/* Whole pages that the table can hold, and a permission that its leaves can give. */
static bool legal(const struct builder *b, uint64_t first, uint64_t last, uint64_t hva, unsigned perm)
{
    return !((first | (last + 1) | hva) & ((1ull << b->granule) - 1)) && last <= b->config->last &&
           (perm & VIO_READ || b->format->write_only);
}

/* Mappings tell reads and writes apart, as DMA_MAP does; what may be read may be executed. */
static unsigned with_execute(unsigned perm)
{
    return perm | (perm & VIO_READ ? VIO_EXECUTE : 0);
}

int host_table_may_map(int format, const struct pt_config *table, uint64_t hva, unsigned perm,
                       const struct stint *stint)
{
    struct builder b = builder(NULL, format, table);
    uint64_t at;

    if (!legal(&b, stint->first, stint->last, hva, perm))
        return VIO_ERR_VALUE;
    return find(&b, root(&b), levels(&b), stint->first, stint->last, true, &at) ? VIO_ERR_OVERLAP : VIO_OK;
}

int host_table_map(struct pool *pool, int format, const struct pt_config *table, uint64_t hva, unsigned perm,
                   struct stint *stint)
{
    struct builder b = builder(pool, format, table);
    uint64_t first = stint->first, last = stint->last;
    bool filled;

    b.stint = stint;
    stint_begin(stint);
    filled = fill(&b, root(&b), levels(&b), first, last, hva, with_execute(perm));
    if (!filled) {
        stint->ending = true; /* of what requests may have found meanwhile */
        clear(&b, root(&b), levels(&b), first, last);
    }
    stint_end(stint);
    return filled ? VIO_OK : VIO_ERR_LIMIT;
}

/* Let a leaf boundary lie at `address`: a larger leaf there becomes a table of smaller ones, level by level. */
static bool split(struct builder *b, uint64_t address)
{
    uint64_t *table = root(b);

    for (unsigned level = levels(b);; level--) {
        uint64_t *entry = entry_at(b, table, address, level), small, *next;
        struct pt_entry leaf;

        if (!(address & (entry_size(b, level) - 1)) || !*entry)
            return true;
        next = below(b, *entry, level, &leaf);
        if (!next) {
            const struct pt_start start = {.granule = b->granule};
            unsigned perm = b->format->permissions(b->config, &start, ~0ull, *entry, true) & PT_RWX;

            next = pool_take(b->pool, b->granule);
            if (!next)
                return false;
            small = entry_size(b, level - 1);
            for (uint64_t i = 0; i < 1ull << (b->granule - 3); i++)
                next[i] = make_leaf(b, leaf.oa + i * small, level - 1, perm);
            *entry = b->format->make_table(b->config, (uint64_t)(uintptr_t)next, level);
        }
        table = next;
    }
}

/* Begin to change a range that is mapped, by leaf boundaries at both its ends: nothing begun, or all that can fail. */
static int carve(struct builder *b, uint64_t first, uint64_t last)
{
    uint64_t at;

    if (find(b, root(b), levels(b), first, last, false, &at))
        return VIO_ERR_NOT_MAPPED;
    stint_begin(b->stint);
    /* Splitting may lack room, but changes no translation. */
    if (split(b, first) && (last == b->config->last || split(b, last + 1)))
        return VIO_OK;
    stint_end(b->stint);
    return VIO_ERR_LIMIT;
}

int host_table_unmap(struct pool *pool, int format, const struct pt_config *table, struct stint *stint)
{
    struct builder b = builder(pool, format, table);
    int status;

    b.stint = stint;
    if (!legal(&b, stint->first, stint->last, 0, VIO_READ))
        return VIO_ERR_VALUE;
    status = carve(&b, stint->first, stint->last);
    if (!status) {
        clear(&b, root(&b), levels(&b), stint->first, stint->last);
        stint_end(stint);
    }
    return status;
}

/* Write the permission into every leaf of a range in which no leaf is larger than its part of the range. */
static void permit(const struct builder *b, uint64_t *table, unsigned level, uint64_t first, uint64_t last,
                   unsigned perm)
{
    uint64_t *start = entry_at(b, table, first, level), *entry = start;

    for (;; entry++) {
        uint64_t end = entry_last(b, first, last, level);
        struct pt_entry leaf;
        uint64_t *next = below(b, *entry, level, &leaf);

        if (next)
            permit(b, next, level - 1, first, end, perm);
        else
            *entry = make_leaf(b, leaf.oa, level, perm);
        if (end == last)
            break;
        first = end + 1;
    }
    stint_wrote(b->stint, entry - start + 1);
}

int host_table_protect(struct pool *pool, int format, const struct pt_config *table, unsigned perm,
                       struct stint *stint)
{
    struct builder b = builder(pool, format, table);
    int status;

    b.stint = stint;
    if (!legal(&b, stint->first, stint->last, 0, perm))
        return VIO_ERR_VALUE;
    status = carve(&b, stint->first, stint->last);
    if (!status) {
        permit(&b, root(&b), levels(&b), stint->first, stint->last, with_execute(perm));
        stint_end(stint);
    }
    return status;
}

bool host_table_next(int format, const struct pt_config *table, uint64_t first, uint64_t last, uint64_t *at)
{
    struct builder b = builder(NULL, format, table);

    if (last > table->last)
        last = table->last;
    return first <= last && find(&b, root(&b), levels(&b), first, last, true, at);
}
