/*
 * The memory of tables under sanitizers, against an array of what was taken; test_core_sanitized.py builds and runs it.
 * Argument: SEED. Ends with 0 and silence, or with a sanitizer's report or a line that says what did not hold.
 */
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core_holds.h"
#include "pool.h"
#include "vio.h"

#define BLOCKS 400u
#define STEPS 40000u

struct block {
    char *at; /* NULL: not taken */
    unsigned lg2;
    char mark; /* at its start and end: nobody else has it */
};

static uint64_t state;

static uint64_t below(uint64_t n)
{
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return (state >> 33) % n;
}

static bool zero(const char *at, size_t size)
{
    return !at[0] && !memcmp(at, at + 1, size - 1);
}

static void take(struct pool *pool, struct block *block)
{
    block->lg2 = POOL_LEAST + (unsigned)below(below(4) ? 3 : POOL_LARGEST - POOL_LEAST + 1);
    block->at = pool_take(pool, block->lg2);
    HOLDS(block->at && !((uintptr_t)block->at & (((uintptr_t)1 << block->lg2) - 1)));
    HOLDS(zero(block->at, (size_t)1 << block->lg2));
    block->mark = (char)(1 + below(127));
    memset(block->at, block->mark, (size_t)1 << block->lg2);
}

static void give(struct pool *pool, struct block *block)
{
    size_t size = (size_t)1 << block->lg2;

    HOLDS(block->at[0] == block->mark && !memcmp(block->at, block->at + 1, size - 1));
    memset(block->at, 0, size);
    pool_give(pool, block->at, block->lg2);
    block->at = NULL;
}

int main(int argc, char **argv)
{
    static struct block blocks[BLOCKS];
    size_t pages = 0, held;
    struct pool pool;

    if (argc != 2)
        return 2;
    state = strtoull(argv[1], NULL, 0);
    pool_init(&pool);
    for (unsigned step = 0; step < STEPS; step++) {
        struct block *block = &blocks[below(step / 4000 % 2 ? BLOCKS / 8 : BLOCKS)];

        if (block->at) {
            pages -= ((size_t)1 << block->lg2) / POOL_PAGE;
            give(&pool, block);
        } else {
            take(&pool, block);
            pages += ((size_t)1 << block->lg2) / POOL_PAGE;
        }
        HOLDS(pool.pages == pages);
    }
    for (unsigned i = 0; i < BLOCKS; i++)
        if (blocks[i].at)
            give(&pool, &blocks[i]);
    HOLDS(!pool.pages);
    /* Pages are cut from the blocks that lie idle before a chunk is added. */
    held = pool.held;
    for (size_t i = 0; i < held * 256; i++)
        HOLDS(pool_take(&pool, POOL_LEAST));
    HOLDS(pool.held <= held + 1);
    /* The bound: on pages in use, whatever their sizes. */
    pool.pages = VIO_MAX_TABLE_PAGES - 3;
    HOLDS(!pool_take(&pool, POOL_LEAST + 2) && pool_take(&pool, POOL_LEAST + 1) && pool_take(&pool, POOL_LEAST));
    HOLDS(!pool_take(&pool, POOL_LEAST));
    pool_deinit(&pool);
    return 0;
}
