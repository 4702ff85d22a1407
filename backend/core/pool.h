/* Pages for tables that the core builds: 4 KiB, zeroed, cut from 2 MiB chunks that the host may back by huge pages. */
#ifndef VIOASID_POOL_H
#define VIOASID_POOL_H

#include <stddef.h>

#define POOL_PAGE 4096

struct pool_chunk;

struct pool {
    struct pool_chunk *chunks;
    void *free_pages;  /* linked through their first word */
    char *fresh, *end; /* rest of the newest chunk, never used and so still zero */
    size_t pages;      /* in use */
};

void pool_init(struct pool *pool);
void pool_deinit(struct pool *pool); /* frees every page, in use or not */
void *pool_take(struct pool *pool);  /* NULL: the bound is reached, or the host has no memory */
void pool_give(struct pool *pool, void *page); /* all zero again */

#endif
