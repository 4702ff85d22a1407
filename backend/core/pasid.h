/*
 * PASID tables of a guest's, bound to a nested space that stands for all PASIDs of a device.
 *
 * A request finds the stage-1 table of its PASID in the space's PASID table, read through stage 2 as a nested walk reads
 * a table. What it found is kept as a space of its own under the bound one, with an IOTLB scope of its own, for as long
 * as nothing above that scope is forgotten: an invalidation of the bound space, or of stage 2, makes the next request
 * read the PASID table again.
 */
#ifndef VIOASID_PASID_H
#define VIOASID_PASID_H

#include "index.h"
#include "pasid/contract.h"

struct guard;
struct space;
struct vio_engine;
struct walk;

struct pasid_table {
    const struct pasid_format *format;
    vio_pasid_table table;
    struct index found; /* PASID -> struct pasid_space */
    uint64_t serial;    /* no other table of the engine has or had it; a new one whenever a PASID is invalidated */
};

/* What a PASID leads to. */
struct pasid_target {
    int format;              /* of stage 1; -1: none, addresses are stage 2's */
    struct pt_config config; /* of its table */
    bool privileged;         /* requests with privilege are let in */
};

/* What a request read in a PASID table, until it is kept. */
struct pasid_found {
    uint32_t ioasid, pasid;
    uint64_t serial, generation; /* of the table, and above the PASID's scope, when it was read */
    struct pasid_target target;
};

/* Of a space with a PASID table: through which space that is read. */
const struct space *pasid_memory(const struct space *bound);
/* Find what a PASID leads to: 0, or a reason, the reader telling where. */
int pasid_find(const struct pasid_table *table, uint32_t pasid, struct pasid_reader *reader,
               struct pasid_target *target);

/*
 * A request has passed the gate: the space of its PASID in *out, and 0; a reason, walk telling where; or PASID_UNREAD,
 * if the table must be read for it first.
 */
#define PASID_UNREAD (-1001)
int pasid_space(const struct space *bound, uint32_t pasid, unsigned need, struct walk *walk, struct space **out);
/* Read the table, guarded, the gate passed: 0, or a reason, walk telling where. */
int pasid_read(const struct space *bound, uint32_t pasid, struct guard *guard, struct walk *walk,
               struct pasid_found *found);
/* Keep what was read, if it still holds; the gate is not passed. A vio_status. */
int pasid_keep(struct vio_engine *engine, const struct pasid_found *found);

/* The gate is closed for these. */
void pasid_table_free(struct vio_engine *engine, struct pasid_table *table); /* NULL: nothing to do */

#endif
