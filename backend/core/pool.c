/* Table memory; see pool.h. A walk over tables in huge pages misses the CPU's TLB far less. */
#define _GNU_SOURCE
#include "pool.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "vio.h"

#define CHUNK ((size_t)2 << 20)
/*
 * Chunks that may be held: twice what VIO_MAX_TABLE_PAGES needs, for blocks of one size that lie idle while another
 * size is asked for. They are not joined again: a VM's tables have one or two sizes.
 */
#define MAX_CHUNKS (2 * VIO_MAX_TABLE_PAGES / (CHUNK / POOL_PAGE))

struct pool_chunk {
    struct pool_chunk *next;
    void *base;
};

void pool_init(struct pool *pool)
{
    *pool = (struct pool){0};
}

void pool_deinit(struct pool *pool)
{
    while (pool->chunks) {
        struct pool_chunk *chunk = pool->chunks;

        pool->chunks = chunk->next;
        munmap(chunk->base, CHUNK);
        free(chunk);
    }
    pool_init(pool);
}

static int pool_grow(struct pool *pool)
{
    struct pool_chunk *chunk;
    char *area;
    size_t head;

    if (pool->held >= MAX_CHUNKS)
        return -1;
    chunk = malloc(sizeof *chunk);
    if (!chunk)
        return -1;
    area = mmap(NULL, 2 * CHUNK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (area == MAP_FAILED) {
        free(chunk);
        return -1;
    }
    head = -(uintptr_t)area & (CHUNK - 1); /* keep the aligned half */
    if (head)
        munmap(area, head);
    munmap(area + head + CHUNK, CHUNK - head);
    madvise(area + head, CHUNK, MADV_HUGEPAGE); /* a wish: without it all works, slower */
    chunk->base = area + head;
    chunk->next = pool->chunks;
    pool->chunks = chunk;
    pool->held++;
    pool->fresh = area + head;
    pool->end = pool->fresh + CHUNK;
    return 0;
}

static void put(struct pool *pool, void *block, unsigned lg2)
{
    void **spare = &pool->spare[lg2 - POOL_LEAST];

    memcpy(block, spare, sizeof *spare);
    *spare = block;
}

static void *get(struct pool *pool, unsigned lg2)
{
    void **spare = &pool->spare[lg2 - POOL_LEAST], *block = *spare;

    if (block) {
        memcpy(spare, block, sizeof *spare);
        memset(block, 0, sizeof *spare);
    }
    return block;
}

/* A block that was in use, or half of a larger one. */
static void *take_spare(struct pool *pool, unsigned lg2)
{
    char *block = NULL;
    unsigned found = lg2;

    while (found <= POOL_LARGEST && !(block = get(pool, found)))
        found++;
    while (block && found > lg2) {
        found--;
        put(pool, block + ((size_t)1 << found), found);
    }
    return block;
}

/* Leave the fresh memory below `until` to later takers of smaller blocks. */
static void skip(struct pool *pool, char *until)
{
    while (pool->fresh < until) {
        unsigned lg2 = (unsigned)__builtin_ctzll((uintptr_t)pool->fresh);

        if (lg2 > POOL_LARGEST)
            lg2 = POOL_LARGEST;
        while ((size_t)(until - pool->fresh) < (size_t)1 << lg2)
            lg2--;
        put(pool, pool->fresh, lg2);
        pool->fresh += (size_t)1 << lg2;
    }
}

void *pool_take(struct pool *pool, unsigned lg2)
{
    size_t size = (size_t)1 << lg2;
    char *block;

    /* 2^18 pages are 1 GiB of tables, enough for 512 GiB in 4 KiB leaves: who maps more so finely is refused. */
    if (pool->pages + size / POOL_PAGE > VIO_MAX_TABLE_PAGES)
        return NULL;
    block = take_spare(pool, lg2);
    if (!block) {
        if ((size_t)(pool->end - pool->fresh) < size + (-(uintptr_t)pool->fresh & (size - 1))) {
            skip(pool, pool->end);
            if (pool_grow(pool))
                return NULL;
        }
        skip(pool, pool->fresh + (-(uintptr_t)pool->fresh & (size - 1)));
        block = pool->fresh;
        pool->fresh += size;
    }
    pool->pages += size / POOL_PAGE;
    return block;
}

void pool_give(struct pool *pool, void *block, unsigned lg2)
{
    put(pool, block, lg2);
    pool->pages -= ((size_t)1 << lg2) / POOL_PAGE;
}
