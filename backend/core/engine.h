/*
 * The engine: one a VM. Spaces, routes, IOTLB and table pages behind one gate.
 *
 * The gate (gate.h): a request passes it before it looks its route up and leaves after the last byte touched. A long
 * one leaves in between when a change waits, after JOB_BUDGET (request.h) at most, and then starts over from its route
 * with what is left to do. Whatever changes a space or a route closes the gate for it: so once such a change has
 * returned, no request that could have seen the old state runs.
 */
#ifndef VIOASID_ENGINE_H
#define VIOASID_ENGINE_H

#include <pthread.h>
#include <stdbool.h>

#include "dirty.h"
#include "errand.h"
#include "faults.h"
#include "formats/formats.h"
#include "gate.h"
#include "guard.h"
#include "index.h"
#include "iotlb.h"
#include "pasid.h"
#include "pool.h"
#include "process_space.h"
#include "vio.h"
#include "walk_cache.h"

#define RW_BOTH (VIO_READ | VIO_WRITE)

struct space;

/* A translation asked for, and its answer: the result, or where the walk ended. */
struct walk {
    uint64_t iova;
    unsigned need; /* what must be permitted, in the order of PT_BOTH */
    struct walk_cache *cache; /* NULL: none is used */
    /* result */
    uint64_t hva, gpa;
    unsigned size_lg2; /* smaller of both stages */
    unsigned perm;     /* AND of both stages; PT_CLEAN of it if a write must walk again */
    bool cached;       /* the walk cache knew the way down to the last table */
    /* fault */
    unsigned stage, level;
    uint64_t fault_gpa, entry;
    bool pasid_table;    /* at an entry of a PASID table */
    bool has_gpa, table; /* table: at an entry of stage 1, not at the data */
    bool has_middle;     /* three stages: `middle` is what the guest's table in between was to translate */
    uint64_t middle;
    /* stage-1 entry being read, should its memory be gone; level 0: none */
    volatile unsigned reading_level;
    volatile uint64_t reading_gpa;
    struct walk *under; /* three stages: where the walk of the guest's table in the middle stands */
};

typedef int (*walk_fn)(const struct space *space, struct guard *guard, struct walk *walk); /* 0 or a vio_reason */

struct space {
    uint32_t ioasid;
    int format; /* enum pt_format_id, -1: none */
    struct pt_config table;
    walk_fn walk;         /* NULL: nested and no table bound */
    struct space *parent; /* NULL: host-managed. At most two above one another are guest-managed */
    uint32_t children, routes;
    struct pasid_table *pasids; /* nested: requests are translated by the table of their PASID; NULL: by `table` */
    struct space *bound;        /* what a PASID leads to: the space that its PASID table is bound to; else NULL */
    struct dirty *dirty; /* host-managed: pages written by DMA; NULL: not tracked */
    vio_process *process; /* whose address space it stands for, or whose addresses its table may hold; NULL: none */

    struct iotlb_scope scope;

    vio_space_counters counters;
};

struct window {
    uint64_t first, last;
    struct space *space; /* host-managed, beneath that of the route; NULL: nothing gets through */
};

struct windows {
    uint32_t count;
    struct window of[];
};

struct route {
    uint64_t key;
    struct space *space; /* NULL: detached, or blocked */
    unsigned access;
    bool ats; /* serves translation requests */
    bool blocked;
    struct windows *windows; /* addresses that `space` does not translate; NULL: there are none */
    struct route *older, *newer; /* among the detached, kept for their counters, or among the live ones of its RID */
    vio_route_counters counters;
};

/* Does it say anything? NULL: there is none. */
static inline bool route_live(const struct route *route)
{
    return route && (route->space || route->blocked);
}

struct route_list {
    struct route *oldest, *newest;
};

#define RIDS 0x10000u

struct pasid_space;

struct vio_engine {
    struct gate gate;
    struct index spaces, routes;
    struct route_list detached; /* in order of detachment */
    struct route_list *of_rid;  /* of each RID: its routes that are not detached */
    struct iotlb iotlb;
    struct walk_cache *walk_cache; /* NULL: off */
    struct pool pool;
    struct {
        struct pasid_space *oldest, *newest;
        size_t count;
        uint64_t serial; /* of the PASID table bound last */
    } pasids; /* that requests found */
    struct errands errands;
    struct fault_ring faults;
    vio_counters counters;
};

/* A change: no other one, and no request, between begin and end. */
static inline void engine_change_begin(struct vio_engine *engine)
{
    gate_reserve(&engine->gate);
    gate_close(&engine->gate);
}

static inline void engine_change_end(struct vio_engine *engine)
{
    gate_open(&engine->gate);
    gate_release(&engine->gate);
}

/*
 * A change of a host-managed space's table, done in stints: the gate is closed for each and open in between, so that
 * requests wait for one stint and not for a whole mapping of a million pages. The gate is reserved throughout. What
 * they see in between is part of the change, which has not returned yet; and where translations end, none of the range
 * is held when the gate opens, nor is anything that a table given back had told.
 */
struct stint {
    struct vio_engine *engine;
    struct space *space;
    uint64_t first, last;
    bool ending;      /* translations of the range end */
    uint64_t entries; /* written in this stint */
};

#define STINT_ENTRIES 4096 /* 1 to 50 us, as the tables are in the CPU's caches or nowhere near */

extern uint32_t stint_entries; /* STINT_ENTRIES; tests make stints shorter */

void stint_begin(struct stint *stint);
void stint_end(struct stint *stint);

/* So many entries have been written, and every table is as it may be seen. */
static inline void stint_wrote(struct stint *stint, uint64_t entries)
{
    stint->entries += entries;
    if (stint->entries >= stint_entries) {
        stint_end(stint);
        stint_begin(stint);
    }
}

/* Counters are added to by many requests at once. */
static inline void count(uint64_t *counter, uint64_t n)
{
    if (n)
        __atomic_fetch_add(counter, n, __ATOMIC_RELAXED);
}

static inline struct space *space_find(struct vio_engine *engine, uint32_t ioasid)
{
    return index_find(&engine->spaces, ioasid);
}

/* Is it host-managed, with a table of ours? */
static inline bool space_has_table(const struct space *space)
{
    return !space->parent && space->format >= 0;
}

/* The host-managed space at the bottom of a guest-managed one, or the space itself. */
static inline struct space *space_bottom(struct space *space)
{
    while (space->parent)
        space = space->parent;
    return space;
}

/* What reading an entry of a table over this space needs of it. */
static inline unsigned space_entry_rights(const struct space *space, unsigned need)
{
    return space->parent && pt_formats[space->format]->tables_written && space->table.table.flags & VIO_TABLE_ACCESSED
               ? need | VIO_WRITE
               : need;
}

/* space.c, with the gate closed: a space with nothing but its number; a vio_status. */
int space_add(struct vio_engine *engine, uint32_t ioasid, struct space **out);

/* space.c: is the table one of this format's? Fills in what its options leave at 0. `host`: a table of ours. */
bool table_config_ok(int format, struct pt_config *config, bool host);

static inline uint64_t route_key(uint32_t rid, uint32_t pasid)
{
    return (uint64_t)pasid << 32 | rid;
}

/* walk.c */
walk_fn walk_host(int format, const struct pt_config *table);
walk_fn walk_nested(int stage1, const struct pt_config *table, const struct space *parent);
/*
 * An address of a space underneath by that one's own walk, which leaves what it found in walk->under: 0, or a reason,
 * walk telling where, as of a table in the middle. `table`: an entry of stage 1 lies there. One for all formats.
 */
int walk_middle(const struct space *middle, struct guard *guard, struct walk *walk, uint64_t address, unsigned need,
                bool table);

/* host_table.c: tables that the core builds. All but the last answer a vio_status. */
int host_table_create(struct pool *pool, struct pt_config *table);
void host_table_destroy(struct pool *pool, int format, const struct pt_config *table);
/* Is the range this table's, and free? */
int host_table_may_map(int format, const struct pt_config *table, uint64_t hva, unsigned perm,
                       const struct stint *stint);
int host_table_map(struct pool *pool, int format, const struct pt_config *table, uint64_t hva, unsigned perm,
                   struct stint *stint);
int host_table_unmap(struct pool *pool, int format, const struct pt_config *table, struct stint *stint);
/* Give a range that is mapped another permission. */
int host_table_protect(struct pool *pool, int format, const struct pt_config *table, unsigned perm,
                       struct stint *stint);
/* The first mapped address of [first, last]; false if nothing there is mapped. */
bool host_table_next(int format, const struct pt_config *table, uint64_t first, uint64_t last, uint64_t *at);

#endif
