/*
 * Errands: what a request does in another process's memory, done with the gate left.
 *
 * The other process may withhold its pages (userfaultfd(2), a file system in user space), so nobody may have to wait for
 * them but who asked. A request that comes to such memory notes the pieces, and leaves the gate; a helper (helper.h) moves
 * them; then the request passes the gate again and goes on from its route with what is left to do.
 *
 * A change that ends translations waits for the errands begun under them, of its own spaces or routes and no others, after
 * it has opened the gate. It hurries them: one that is not done HELPER_HASTE later is broken off, and the request, back
 * at the gate, finds what the change left. So once a change has returned, no byte moves by what it ended, as everywhere;
 * but it has waited for a millisecond or two at most, and everybody else for nothing.
 *
 * An errand that moves nothing for ERRAND_PATIENCE ends in a fault, VIO_REASON_WITHHELD.
 */
#ifndef VIOASID_ERRAND_H
#define VIOASID_ERRAND_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

#include "helper.h"
#include "vio.h"

struct request;
struct space;
struct vio_engine;

/*
 * In memory that is slow, but comes: a page from a disk that is busy takes a tenth of this, and one from another machine
 * (post-copy migration) as well. As long as PCI Express lets a completion take in the middle of its ranges.
 */
#define ERRAND_PATIENCE 1000000000u /* nanoseconds */

/*
 * With the list of a process's mappings, which is there for the asking unless a thread of that process sleeps in the
 * kernel with its address space locked: whoever looks waits himself.
 */
#define ERRAND_LOOK 50000000u /* nanoseconds */

#define ERRAND_PIECES 64u   /* each within a page: 128 KiB of whole ones, or so many short ones */
#define ERRAND_SIZE 131072u /* bytes */
#define ERRAND_SPACES 8u    /* on the way from a request to its memory */

/* A mapping of a process; `end` 0: there is none. */
struct mapping {
    uint64_t first, end;
    unsigned perm;
};

struct errand {
    /* what it is to do; `pieces` 0: nothing */
    struct request *request;
    unsigned pieces;
    int reason; /* of the last one: see errand_reason */
    uint64_t size;
    uint64_t moved; /* by the last one */
    bool look; /* at the list of its mappings, at request->iova: `pieces` is 1 */
    struct iovec here[ERRAND_PIECES], there[ERRAND_PIECES];
    struct mapping found;       /* at request->iova */
    const vio_process *looked;  /* whose it is: compared only */
    struct iovec stopped; /* what of the buffer was to be moved next */
    uint64_t since;       /* when it began to move nothing, 0: not */
    /* on its way: kept by struct errands */
    struct helper *helper;
    struct errand *before, *next;
    const struct space *spaces[ERRAND_SPACES]; /* compared only: they may have gone */
    uint32_t rid, pasid;
    uint64_t number;
    bool hurried;
};

struct errands {
    pthread_mutex_t lock;
    pthread_cond_t ended;
    struct errand *newest;
    uint64_t numbers, count;
    uint64_t patience; /* nanoseconds */
    struct helpers helpers;
};

void errands_init(struct errands *errands);
void errands_deinit(struct errands *errands);

static inline void errand_init(struct errand *errand)
{
    errand->pieces = 0;
    errand->size = errand->since = 0;
    errand->reason = 0;
    errand->look = false;
    errand->looked = NULL;
}

/*
 * Add [request->hit.hva, + size) of the other process, to or from `buffer`; how much of it was added, 0: it must be run
 * first. Only one request at a time has an errand.
 */
uint64_t errand_add(struct errand *errand, struct request *request, void *buffer, uint64_t size);

/* Have request->iova looked up in the list of the process's mappings. */
static inline void errand_look(struct errand *errand, struct request *request)
{
    errand->request = request;
    errand->look = true;
    errand->pieces = 1;
}

/* In the gate: leave it, do the errand, with the gate left still when this returns. `pieces` is 0 then. */
void errand_run(struct vio_engine *engine, struct errand *errand);

/* Why the last errand could not go on, which is then forgotten; its place, where the request stands, in the walk. */
int errand_reason(struct errand *errand, struct request *request);

/* After a change, with its gate released: no errand is under way that was begun before it through this space,
 * (NULL: nothing has changed), by requests of a route or a device, or any at all. */
void errands_end_space(struct vio_engine *engine, const struct space *space);
void errands_end_route(struct vio_engine *engine, uint32_t rid, uint32_t pasid);
void errands_end_device(struct vio_engine *engine, uint32_t rid);
void errands_end_all(struct vio_engine *engine);

#endif
