/* Dirty tracking; see dirty.h. */
#include "dirty.h"

#include <stdlib.h>
#include <string.h>

#include "engine.h"

#define PAGE_LG2 12
#define CHUNK_PAGES_LG2 (DIRTY_CHUNK_LG2 - PAGE_LG2)
#define CHUNK_PAGES (1ull << CHUNK_PAGES_LG2)
#define CHUNK_WORDS (CHUNK_PAGES / 64)
#define READ_CHUNKS 32 /* read with the gate closed, 4 GiB: requests wait 30 to 60 us, and not for a whole VM's bits */

_Static_assert(CHUNK_PAGES / 8 == POOL_PAGE, "the bits of a chunk fill a page of the pool");

/* Bits low to high of a word, both included. */
static uint64_t bits(unsigned low, unsigned high)
{
    return (UINT64_MAX >> (63 - (high - low))) << low;
}

void dirty_mark_pages(const struct dirty *dirty, uint64_t gpa, uint64_t size)
{
    uint64_t page = gpa >> PAGE_LG2, last = (gpa + (size - 1)) >> PAGE_LG2;

    while (page <= last) {
        uint64_t *chunk = index_find(&dirty->chunks, page >> CHUNK_PAGES_LG2);
        uint64_t end = page | (CHUNK_PAGES - 1);

        if (end > last)
            end = last;
        for (; chunk && page <= end; page = (page | 63) + 1) {
            uint64_t *word = &chunk[page % CHUNK_PAGES / 64];
            uint64_t wanted = bits(page % 64, (page | 63) <= end ? 63 : end % 64);

            /* Nobody clears while a request runs: a bit that is set stays set. */
            if (wanted & ~__atomic_load_n(word, __ATOMIC_RELAXED))
                __atomic_fetch_or(word, wanted, __ATOMIC_RELAXED);
        }
        page = end + 1;
    }
}

int dirty_cover(struct dirty *dirty, struct pool *pool, uint64_t first, uint64_t last)
{
    uint64_t missing = 0;

    for (uint64_t key = first >> DIRTY_CHUNK_LG2; key <= last >> DIRTY_CHUNK_LG2; key++) {
        missing += !index_find(&dirty->chunks, key);
        if (missing > VIO_MAX_TABLE_PAGES - pool->pages) /* before any is taken: it could be a GiB */
            return VIO_ERR_LIMIT;
    }
    for (uint64_t key = first >> DIRTY_CHUNK_LG2; key <= last >> DIRTY_CHUNK_LG2; key++) {
        void *chunk;

        if (index_find(&dirty->chunks, key))
            continue;
        chunk = pool_take(pool, POOL_LEAST);
        if (!chunk)
            return VIO_ERR_LIMIT;
        if (index_insert(&dirty->chunks, key, chunk)) {
            pool_give(pool, chunk, POOL_LEAST);
            return VIO_ERR_MEMORY;
        }
    }
    return VIO_OK;
}

/* Bits for all that is mapped now. */
static int cover_mapped(struct dirty *dirty, struct pool *pool, const struct space *space)
{
    uint64_t at = 0;
    int status = VIO_OK;

    while (!status && host_table_next(space->format, &space->table, at, UINT64_MAX, &at)) {
        status = dirty_cover(dirty, pool, at, at);
        at = (at | ((1ull << DIRTY_CHUNK_LG2) - 1)) + 1;
        if (!at)
            break;
    }
    return status;
}

static bool clean(const uint64_t *chunk)
{
    for (size_t i = 0; i < CHUNK_WORDS; i++)
        if (chunk[i])
            return false;
    return true;
}

/* Give a chunk back that has nothing dirty, if nothing is mapped there. */
static void drop_unmapped(struct pool *pool, const struct space *space, uint64_t key, uint64_t *chunk)
{
    uint64_t first = key << DIRTY_CHUNK_LG2, at;

    if (!host_table_next(space->format, &space->table, first, first | ((1ull << DIRTY_CHUNK_LG2) - 1), &at)) {
        index_remove(&space->dirty->chunks, key);
        pool_give(pool, chunk, POOL_LEAST);
    }
}

/* The keys of the chunks in [first, last]; NULL without memory. There may be far fewer than the range could hold. */
static uint64_t *chunk_keys(const struct dirty *dirty, uint64_t first, uint64_t last, size_t *count)
{
    uint64_t *keys = malloc((dirty->chunks.used + 1) * sizeof *keys);

    *count = 0;
    first >>= DIRTY_CHUNK_LG2;
    last >>= DIRTY_CHUNK_LG2;
    if (!keys)
        return NULL;
    if (last - first < dirty->chunks.used) {
        for (uint64_t key = first; key <= last; key++)
            if (index_find(&dirty->chunks, key))
                keys[(*count)++] = key;
    } else {
        for (size_t i = 0; i <= dirty->chunks.mask; i++) {
            const struct index_slot *slot = &dirty->chunks.slots[i];

            if (slot->value && slot->key >= first && slot->key <= last)
                keys[(*count)++] = slot->key;
        }
    }
    return keys;
}

void dirty_trim(struct pool *pool, const struct space *space, uint64_t first, uint64_t last)
{
    size_t count;
    uint64_t *keys = chunk_keys(space->dirty, first, last, &count);

    for (size_t i = 0; keys && i < count; i++) { /* without memory: at the next occasion */
        uint64_t *chunk = index_find(&space->dirty->chunks, keys[i]);

        if (clean(chunk))
            drop_unmapped(pool, space, keys[i], chunk);
    }
    free(keys);
}

void dirty_free(struct dirty *dirty, struct pool *pool)
{
    if (!dirty)
        return;
    for (size_t i = 0; i <= dirty->chunks.mask; i++)
        if (dirty->chunks.slots[i].value) {
            memset(dirty->chunks.slots[i].value, 0, POOL_PAGE);
            pool_give(pool, dirty->chunks.slots[i].value, POOL_LEAST);
        }
    index_deinit(&dirty->chunks);
    free(dirty);
}

static int turn_on(struct vio_engine *engine, struct space *space)
{
    struct dirty *dirty = calloc(1, sizeof *dirty);
    int status;

    if (!dirty || index_init(&dirty->chunks)) {
        free(dirty);
        return VIO_ERR_MEMORY;
    }
    status = cover_mapped(dirty, &engine->pool, space);
    if (status)
        dirty_free(dirty, &engine->pool);
    else
        space->dirty = dirty;
    return status;
}

int vio_dirty_set(vio_engine *engine, uint32_t ioasid, int on)
{
    struct space *space;
    int status = VIO_ERR_UNKNOWN;

    engine_change_begin(engine);
    space = space_find(engine, ioasid);
    if (space)
        status = !space_has_table(space) ? VIO_ERR_KIND : VIO_OK;
    if (!status && on && !space->dirty) {
        status = turn_on(engine, space);
    } else if (!status && !on) {
        dirty_free(space->dirty, &engine->pool);
        space->dirty = NULL;
    }
    engine_change_end(engine);
    errands_end_space(engine, status ? NULL : space); /* what they write is not noted yet */
    return status;
}

/* Where the bits go: bit 0 of the bitmap stands for the 2^lg2 bytes at `first`. */
struct report {
    uint64_t first_page, last_page;
    unsigned lg2; /* pages of 4 KiB in a bit */
    uint8_t *bitmap;
};

static void report_word(const struct report *report, uint64_t page, uint64_t word)
{
    uint64_t at = page - report->first_page; /* wraps where the range starts within the word */

    if (!report->lg2 && page >= report->first_page && !(at & 7) && page + 63 <= report->last_page) {
        memcpy(report->bitmap + at / 8, &word, sizeof word);
        return;
    }
    for (; word; word &= word - 1) {
        uint64_t bit = (at + (unsigned)__builtin_ctzll(word)) >> report->lg2;

        report->bitmap[bit / 8] |= (uint8_t)(1u << bit % 8);
    }
}

/* Report a chunk's part of the range, and clear it; true if nothing dirty is left in all of the chunk. */
static bool read_chunk(const struct report *report, uint64_t key, uint64_t *chunk, bool clear)
{
    uint64_t page = key << CHUNK_PAGES_LG2, last = page | (CHUNK_PAGES - 1);
    bool whole = page >= report->first_page && last <= report->last_page;

    if (page < report->first_page)
        page = report->first_page;
    if (last > report->last_page)
        last = report->last_page;
    for (; page <= last; page = (page | 63) + 1) {
        uint64_t *word = &chunk[page % CHUNK_PAGES / 64];
        uint64_t found = *word & bits(page % 64, (page | 63) <= last ? 63 : last % 64);

        if (!found)
            continue;
        report_word(report, page & ~63ull, found);
        if (clear)
            *word &= ~found;
    }
    return whole ? clear : clean(chunk);
}

int vio_dirty_read(vio_engine *engine, uint32_t ioasid, uint64_t iova, uint64_t size, uint32_t page_lg2, int clear,
                   uint8_t *bitmap)
{
    uint64_t last = iova + (size - 1);
    struct space *space;
    int status = VIO_ERR_UNKNOWN;

    if (page_lg2 < PAGE_LG2 || page_lg2 > 63 || !size || ((iova | size) & ((1ull << page_lg2) - 1)) || last < iova)
        return VIO_ERR_VALUE;
    gate_reserve(&engine->gate);
    space = space_find(engine, ioasid);
    if (space)
        status = !space_has_table(space) ? VIO_ERR_KIND : space->dirty ? VIO_OK : VIO_ERR_UNTRACKED;
    if (!status) {
        struct report report = {iova >> PAGE_LG2, last >> PAGE_LG2, page_lg2 - PAGE_LG2, bitmap};
        size_t count;
        uint64_t *keys = chunk_keys(space->dirty, iova, last, &count);

        status = keys ? VIO_OK : VIO_ERR_MEMORY;
        for (size_t first = 0; !status && first < count; first += READ_CHUNKS) {
            gate_close(&engine->gate);
            for (size_t i = first; i < count && i < first + READ_CHUNKS; i++) {
                uint64_t *chunk = index_find(&space->dirty->chunks, keys[i]);

                if (read_chunk(&report, keys[i], chunk, clear))
                    drop_unmapped(&engine->pool, space, keys[i], chunk);
            }
            gate_open(&engine->gate);
        }
        free(keys);
    }
    gate_release(&engine->gate);
    errands_end_space(engine, status ? NULL : space); /* noted here as written, and some not yet */
    return status;
}

/* Chunks of `from` hold pages that are to be dirty in `to`, so many bytes further on (modulo 2^64). */
static int pass_chunk(struct vio_engine *engine, const struct report *range, uint64_t *chunk, uint64_t key,
                      struct dirty *to, uint64_t further, bool clear)
{
    for (uint64_t i = 0; i < CHUNK_PAGES / 64; i++) {
        for (uint64_t word = chunk[i]; word; word &= word - 1) {
            unsigned bit = (unsigned)__builtin_ctzll(word);
            uint64_t page = (key << CHUNK_PAGES_LG2) + 64 * i + bit, at = (page << PAGE_LG2) + further;
            int status;

            if (page < range->first_page || page > range->last_page)
                continue;
            status = dirty_cover(to, &engine->pool, at, at);
            if (status)
                return status;
            dirty_mark_pages(to, at, 1);
            if (clear)
                chunk[i] &= ~(1ull << bit);
        }
    }
    return VIO_OK;
}

int vio_dirty_pass(vio_engine *engine, uint32_t ioasid, uint64_t iova, uint64_t size, uint32_t to_ioasid,
                   uint64_t start, int clear)
{
    uint64_t last = iova + (size - 1);
    struct space *from, *to;
    int status = VIO_ERR_UNKNOWN;

    if (!size || ((iova | size | start) & ((1ull << PAGE_LG2) - 1)) || last < iova || start + (size - 1) < start ||
        ioasid == to_ioasid)
        return VIO_ERR_VALUE;
    engine_change_begin(engine);
    from = space_find(engine, ioasid);
    to = space_find(engine, to_ioasid);
    if (from && to)
        status = !space_has_table(from) || !space_has_table(to) ? VIO_ERR_KIND
                 : !from->dirty || !to->dirty                   ? VIO_ERR_UNTRACKED
                                                                : VIO_OK;
    if (!status) {
        struct report range = {iova >> PAGE_LG2, last >> PAGE_LG2, 0, NULL};
        size_t count;
        uint64_t *keys = chunk_keys(from->dirty, iova, last, &count);

        status = keys ? VIO_OK : VIO_ERR_MEMORY;
        for (size_t i = 0; !status && i < count; i++) {
            uint64_t *chunk = index_find(&from->dirty->chunks, keys[i]);

            status = pass_chunk(engine, &range, chunk, keys[i], to->dirty, start - iova, clear);
            if (clear && clean(chunk))
                drop_unmapped(&engine->pool, from, keys[i], chunk);
        }
        free(keys);
    }
    engine_change_end(engine);
    errands_end_space(engine, status ? NULL : from);
    return status;
}
