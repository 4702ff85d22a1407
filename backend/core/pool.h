/*
 * Memory for tables that the core builds: zeroed blocks of 4 KiB to 1 MiB, aligned to their size, cut from chunks of
 * 2 MiB that the host may back by huge pages.
 */
#ifndef VIOASID_POOL_H
#define VIOASID_POOL_H

#include <stddef.h>

#define POOL_PAGE 4096
#define POOL_LEAST 12 /* log2 of the sizes of blocks */
#define POOL_LARGEST 20

struct pool_chunk;

struct pool {
    struct pool_chunk *chunks;
    void *spare[POOL_LARGEST - POOL_LEAST + 1]; /* by log2 of the size; linked through their first word, else zero */
    char *fresh, *end;                          /* rest of the newest chunk, never used and so still zero */
    size_t pages;                               /* of 4 KiB, in use */
    size_t held;                                /* chunks */
};

void pool_init(struct pool *pool);
void pool_deinit(struct pool *pool); /* frees every block, in use or not */
/* A block of 2^lg2 bytes; NULL: the bound is reached, or the host has no memory. */
void *pool_take(struct pool *pool, unsigned lg2);
void pool_give(struct pool *pool, void *block, unsigned lg2); /* all zero again */

#endif
