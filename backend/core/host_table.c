/*
 * Tables that the core builds in its own memory: stage 2, in a hardware format, its leaf addresses being HVAs.
 *
 * Ranges are inclusive ([first, last]): the last one of a 64-bit space has no end to name. The gate is closed, so
 * nothing walks a table while it changes.
 */
#include <string.h>

#include "engine.h"

struct builder {
    struct pool *pool;
    const struct pt_format *format;
    const struct pt_config *config;
};

static uint64_t *table_at(uint64_t address)
{
    return (uint64_t *)(uintptr_t)address;
}

static uint64_t *entry_at(const struct builder *b, uint64_t *table, uint64_t address, unsigned level)
{
    unsigned granule = b->config->table.tree.granule;
    uint64_t offset = level == b->config->table.tree.levels ? pt_root_offset(granule, address, level)
                                                            : pt_offset(granule, address, level);

    return table + offset / sizeof *table;
}

static unsigned entry_lg2(const struct builder *b, unsigned level)
{
    return pt_entry_lg2(b->config->table.tree.granule, level);
}

static uint64_t entry_size(const struct builder *b, unsigned level)
{
    return 1ull << entry_lg2(b, level);
}

/* Last address that the entry for `address` at `level` covers, or `last` if that comes first. */
static uint64_t entry_last(const struct builder *b, uint64_t address, uint64_t last, unsigned level)
{
    uint64_t covered = address | (entry_size(b, level) - 1);

    return covered < last ? covered : last;
}

static bool decode(const struct builder *b, uint64_t entry, unsigned level, struct pt_entry *out)
{
    return b->format->decode(b->config, NULL, entry, level, true, out) == 0;
}

int host_table_create(struct pool *pool, struct pt_config *table)
{
    void *root = pool_take(pool);

    if (!root)
        return VIO_ERR_LIMIT;
    table->table.tree.root = (uint64_t)(uintptr_t)root;
    return VIO_OK;
}

static void free_table(struct builder *b, uint64_t *table, unsigned level)
{
    if (level > 1)
        for (size_t i = 0; i < POOL_PAGE / sizeof *table; i++) {
            struct pt_entry e;

            if (decode(b, table[i], level, &e) && e.next)
                free_table(b, table_at(e.oa), e.next);
        }
    memset(table, 0, POOL_PAGE);
    pool_give(b->pool, table);
}

void host_table_destroy(struct pool *pool, const struct pt_format *format, const struct pt_config *table)
{
    free_table(&(struct builder){pool, format, table}, table_at(table->table.tree.root), table->table.tree.levels);
}

/* The first address of [first, last] that is mapped (mapped = true) or is not; false if there is none. */
static bool find(const struct builder *b, uint64_t *table, unsigned level, uint64_t first, uint64_t last, bool mapped,
                 uint64_t *at)
{
    for (;;) {
        uint64_t end = entry_last(b, first, last, level);
        struct pt_entry e;
        bool there = decode(b, *entry_at(b, table, first, level), level, &e);

        if (there && e.next) {
            if (find(b, table_at(e.oa), e.next, first, end, mapped, at))
                return true;
        } else if (there == mapped) {
            *at = first;
            return true;
        }
        if (end == last)
            return false;
        first = end + 1;
    }
}

static bool empty(const uint64_t *table)
{
    for (size_t i = 0; i < POOL_PAGE / sizeof *table; i++)
        if (table[i])
            return false;
    return true;
}

/* Clear a range in which no leaf is larger than its part of the range; free the tables that it empties. */
static void clear(struct builder *b, uint64_t *table, unsigned level, uint64_t first, uint64_t last)
{
    for (;;) {
        uint64_t end = entry_last(b, first, last, level), *entry = entry_at(b, table, first, level);
        struct pt_entry e;

        if (decode(b, *entry, level, &e)) {
            if (!e.next) {
                *entry = 0;
            } else {
                clear(b, table_at(e.oa), e.next, first, end);
                if (empty(table_at(e.oa))) {
                    pool_give(b->pool, table_at(e.oa));
                    *entry = 0;
                }
            }
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
    uint64_t size = entry_size(b, level);

    for (;;) {
        uint64_t end = entry_last(b, first, last, level), *entry = entry_at(b, table, first, level);
        struct pt_entry e;

        bool table_here = decode(b, *entry, level, &e); /* the range is free: so no leaf */

        if (!table_here && b->format->leaf_sizes(b->config, level) >> entry_lg2(b, level) & 1 && !((first | hva) & (size - 1)) &&
            end - first == size - 1) {
            *entry = b->format->make_leaf(b->config, hva, level, entry_lg2(b, level), perm);
        } else {
            if (!table_here) {
                void *next = pool_take(b->pool);

                if (!next)
                    return false;
                e.oa = (uint64_t)(uintptr_t)next;
                e.next = level - 1;
                *entry = b->format->make_table(b->config, e.oa, level);
            }
            if (!fill(b, table_at(e.oa), e.next, first, end, hva, perm))
                return false;
        }
        if (end == last)
            return true;
        hva += end - first + 1;
        first = end + 1;
    }
}

int host_table_map(struct pool *pool, const struct pt_format *format, const struct pt_config *table, uint64_t iova,
                   uint64_t hva, uint64_t size, unsigned perm)
{
    struct builder b = {pool, format, table};
    uint64_t last = iova + size - 1, *root = table_at(table->table.tree.root), at;

    if (last > table->last)
        return VIO_ERR_VALUE;
    if (find(&b, root, table->table.tree.levels, iova, last, true, &at))
        return VIO_ERR_OVERLAP;
    if (!fill(&b, root, table->table.tree.levels, iova, last, hva, perm)) {
        clear(&b, root, table->table.tree.levels, iova, last);
        return VIO_ERR_LIMIT;
    }
    return VIO_OK;
}

/* Let a leaf boundary lie at `address`: a larger leaf there becomes a table of smaller ones, level by level. */
static bool split(struct builder *b, uint64_t *table, unsigned level, uint64_t address)
{
    for (;;) {
        uint64_t *entry = entry_at(b, table, address, level);
        struct pt_entry e;

        if (!(address & (entry_size(b, level) - 1)) || !decode(b, *entry, level, &e))
            return true;
        if (!e.next) {
            uint64_t *next = pool_take(b->pool), small = entry_size(b, level - 1);
            unsigned perm = b->format->permissions(b->config, NULL, ~0ull, *entry, true) & PT_RWX;

            if (!next)
                return false;
            for (uint64_t i = 0; i < POOL_PAGE / sizeof *next; i++)
                next[i] = b->format->make_leaf(b->config, e.oa + i * small, level - 1, entry_lg2(b, level - 1), perm);
            e.oa = (uint64_t)(uintptr_t)next;
            e.next = level - 1;
            *entry = b->format->make_table(b->config, e.oa, level);
        }
        table = table_at(e.oa);
        level = e.next;
    }
}

/* A range that is mapped, with leaf boundaries at both its ends: nothing done, or all that can fail. */
static int carve(struct builder *b, const struct pt_config *table, uint64_t first, uint64_t last)
{
    uint64_t *root = table_at(table->table.tree.root), at;

    if (last > table->last)
        return VIO_ERR_VALUE;
    if (find(b, root, table->table.tree.levels, first, last, false, &at))
        return VIO_ERR_NOT_MAPPED;
    /* Splitting may lack room, but changes no translation. */
    if (!split(b, root, table->table.tree.levels, first) || (last != UINT64_MAX && !split(b, root, table->table.tree.levels, last + 1)))
        return VIO_ERR_LIMIT;
    return VIO_OK;
}

int host_table_unmap(struct pool *pool, const struct pt_format *format, const struct pt_config *table, uint64_t iova,
                     uint64_t size)
{
    struct builder b = {pool, format, table};
    int status = carve(&b, table, iova, iova + (size - 1));

    if (!status)
        clear(&b, table_at(table->table.tree.root), table->table.tree.levels, iova, iova + (size - 1));
    return status;
}

/* Write the permission into every leaf of a range in which no leaf is larger than its part of the range. */
static void permit(const struct builder *b, uint64_t *table, unsigned level, uint64_t first, uint64_t last,
                   unsigned perm)
{
    for (;;) {
        uint64_t end = entry_last(b, first, last, level), *entry = entry_at(b, table, first, level);
        struct pt_entry e;

        if (decode(b, *entry, level, &e)) {
            if (e.next)
                permit(b, table_at(e.oa), e.next, first, end, perm);
            else
                *entry = b->format->make_leaf(b->config, e.oa, level, entry_lg2(b, level), perm);
        }
        if (end == last)
            return;
        first = end + 1;
    }
}

int host_table_protect(struct pool *pool, const struct pt_format *format, const struct pt_config *table, uint64_t iova,
                       uint64_t size, unsigned perm)
{
    struct builder b = {pool, format, table};
    int status = carve(&b, table, iova, iova + (size - 1));

    if (!status)
        permit(&b, table_at(table->table.tree.root), table->table.tree.levels, iova, iova + (size - 1), perm);
    return status;
}

bool host_table_next(const struct pt_format *format, const struct pt_config *table, uint64_t first, uint64_t last,
                     uint64_t *at)
{
    struct builder b = {NULL, format, table};

    if (last > table->last)
        last = table->last;
    return first <= last && find(&b, table_at(table->table.tree.root), table->table.tree.levels, first, last, true, at);
}
