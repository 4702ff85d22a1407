/* Table pages; see pool.h. A walk over tables in huge pages misses the CPU's TLB far less. */
#define _GNU_SOURCE
#include "pool.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "vio.h"

#define CHUNK ((size_t)2 << 20)

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
    struct pool_chunk *chunk = malloc(sizeof *chunk);
    char *area;
    size_t head;

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
    pool->fresh = area + head;
    pool->end = pool->fresh + CHUNK;
    return 0;
}

void *pool_take(struct pool *pool)
{
    void *page = pool->free_pages;

    /* 2^18 pages are 1 GiB of tables, enough for 512 GiB in 4 KiB leaves: who maps more so finely is refused. */
    if (pool->pages >= VIO_MAX_TABLE_PAGES)
        return NULL;
    if (page) {
        memcpy(&pool->free_pages, page, sizeof pool->free_pages);
        memset(page, 0, sizeof pool->free_pages);
    } else {
        if (pool->fresh == pool->end && pool_grow(pool))
            return NULL;
        page = pool->fresh;
        pool->fresh += POOL_PAGE;
    }
    pool->pages++;
    return page;
}

void pool_give(struct pool *pool, void *page)
{
    memcpy(page, &pool->free_pages, sizeof pool->free_pages);
    pool->free_pages = page;
    pool->pages--;
}
