/*
 * Dirty tracking of a host-managed space: which of its pages DMA has written since they were last read and cleared.
 *
 * It is a bitmap beside the table, one bit for 4 KiB, and not the dirty bit of the leaves: that one stands for a whole
 * leaf (1 GiB, when one page was written), and an IOTLB entry lets writes by that do not set it, so that each clear
 * would have to throw entries out. Here a request marks the pages that it writes, by the GPA that every translation
 * carries, walked or from the IOTLB, nested or not; off, it costs a test of one pointer.
 *
 * A request marks and writes without leaving the engine's gate in between, and a page of bits is read and cleared with
 * the gate closed: so each piece of a request is marked and written before that, or after it, and no write falls between
 * read and clear. Bits are there for all that is mapped before it can be written: marking allocates nothing and cannot
 * fail.
 */
#ifndef VIOASID_DIRTY_H
#define VIOASID_DIRTY_H

#include <stdbool.h>
#include <stdint.h>

#include "index.h"
#include "pool.h"

#define DIRTY_CHUNK_LG2 27 /* 128 MiB of the space have their bits in one page of the pool */

struct dirty {
    struct index chunks; /* by address / 128 MiB */
};

/* Set the bits of [gpa, gpa + size), all of it mapped and size not 0; the gate has been passed. */
void dirty_mark_pages(const struct dirty *dirty, uint64_t gpa, uint64_t size);

/* Note a write of a request's; dirty NULL: tracking is off. */
static inline void dirty_mark(const struct dirty *dirty, uint64_t gpa, uint64_t size)
{
    if (__builtin_expect(dirty != NULL, 0))
        dirty_mark_pages(dirty, gpa, size);
}

/* The gate is closed for all that follows. */
struct space;

/* Have bits for [first, last]; a vio_status. Bits that were there stay as they are. */
int dirty_cover(struct dirty *dirty, struct pool *pool, uint64_t first, uint64_t last);
/*
 * Give back what [first, last] no longer needs: bits of 128 MiB in which nothing is mapped and nothing dirty. What was
 * written and then unmapped stays dirty until it is read.
 */
void dirty_trim(struct pool *pool, const struct space *space, uint64_t first, uint64_t last);
void dirty_free(struct dirty *dirty, struct pool *pool); /* NULL: nothing to do */

#endif
