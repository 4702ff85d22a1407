/*
 * A request under way: (RID, PASID) to space, IOVA to HVA, the access guarded, everything counted.
 *
 * A job is one call of the C face: one request, or two for a copy. It outlives its guarded part, so what it holds is
 * still known after memory was lost.
 */
#ifndef VIOASID_REQUEST_H
#define VIOASID_REQUEST_H

#include "engine.h"

#define PAGE 4096u

/*
 * How much a job may do before it looks whether a change waits: bytes moved, STEP_COST more for each translation. A
 * change then waits 20 us (tables and pages in the CPU's caches) to 100 us (nowhere near, pages touched first).
 */
#define JOB_BUDGET (128 << 10)
#define STEP_COST 1024

extern uint32_t job_budget; /* JOB_BUDGET; tests let jobs pause sooner */

#define JOB_PAUSED (-1000) /* a guarded part's answer beside reasons: a change waits. No vio_status */

struct request {
    uint32_t rid, pasid;
    unsigned need;
    bool ats;   /* it is a translation request: part of what it needs is better than nothing */
    bool prefetch; /* nobody asked: it is not counted, and whatever is wrong is told to nobody */
    bool begun;
    /* found anew each time the gate is passed */
    struct route *route;
    struct space *space;
    const struct dirty *dirty; /* where writes are noted; NULL: not */
    uint32_t tag;
    unsigned permitted; /* by the route */
    unsigned rights;    /* that the tables must give: `need` in the order of PT_BOTH */
    /* where it stands */
    uint64_t iova;
    struct iotlb_hit hit;
    struct walk walk, under; /* under: three stages, see struct walk */
    /* counted here, added up at the end */
    bool moved;
    uint64_t hits, misses, evictions, walks, cached;
};

struct job {
    struct vio_engine *engine;
    struct request request;
    struct request *second; /* copy: of the memory written; NULL otherwise */
    struct request *at;     /* the one under way, whose fault it would be */
    int64_t budget;
    uint64_t done;
    bool in_parts; /* it moves what can be moved by pages, so that a loss in the middle can be found */
    bool by_pages; /* memory was lost: go on page by page, to know how many bytes are done */
    struct pasid_found *found; /* read in a PASID table */
    struct errand *errand;     /* what the body wants done in another process's memory, and what came of it */
    void (*settle)(struct job *job); /* after an errand, the gate left: go on behind what it moved */
    const void *buffer; /* the caller's, which may be a mapped file and go away */
    uint64_t buffer_size;
};

typedef int (*job_body)(struct guard *guard, void *job); /* 0, a reason, or JOB_PAUSED */

/*
 * Run a job: a vio_status, the fault in vio_last_fault and in the ring. The body is called with all routes known; after
 * JOB_PAUSED it is called again, after an errand whatever it had returned, and after a loss of memory if the job is in
 * parts.
 */
int job_run(struct job *job, job_body body);

/* After an errand with a reason, in the body: that, if the request still leads there, or why not; 0: go on. */
int job_errand_reason(struct job *job, struct request *request, struct guard *guard);

/* Look the route up: 0, or why its requests go nowhere. Nothing is counted. */
int request_route(struct vio_engine *engine, struct request *request);
/* What route and tables, which permit `perm` in the order of PT_BOTH, permit to requests of this one's privilege. */
unsigned request_permitted(const struct request *request, unsigned perm);
vio_fault request_fault(const struct request *request, int reason, uint64_t done);

/* request.c: translation by a walk, entered into the IOTLB. */
int request_walk(struct job *job, struct request *request, struct guard *guard);

/* window.c: the same as below where the route has windows, and the space that an address is translated by. */
int window_translate(struct job *job, struct request *request, struct guard *guard);
int window_enter(struct request *request); /* 0, or the reason why it is translated by none */

/* Translate request->iova by request->space. */
static inline int space_translate(struct job *job, struct request *request, struct guard *guard)
{
    const struct iotlb *iotlb = &job->engine->iotlb;
    uint64_t sizes = __atomic_load_n(&request->space->scope.sizes, __ATOMIC_RELAXED);

    job->at = request;
    if (iotlb->sets && iotlb_lookup(iotlb, request->tag, sizes, request->iova, &request->hit) &&
        !(request->rights & ~request->hit.perm)) {
        request->hits++;
    } else {
        int reason = request_walk(job, request, guard);

        if (reason)
            return reason;
    }
    request->moved |= request->hit.gpa != request->iova;
    return 0;
}

/* Translate request->iova into request->hit; 0 or a reason. */
static inline int request_translate(struct job *job, struct request *request, struct guard *guard)
{
    if (__builtin_expect(request->route->windows != NULL, 0))
        return window_translate(job, request, guard);
    return space_translate(job, request, guard);
}

/* Announce the bytes about to be touched, from `back` before where it stands; the job is in memory before they are. */
static inline void about_to_touch(const struct request *request, struct guard *guard, uint64_t back, uint64_t size)
{
    guard_memory(guard, request->hit.hva - back, size);
    __asm__ volatile("" ::: "memory");
}

/* Has the job done its share, and does a change wait? */
static inline bool must_pause(struct job *job)
{
    if (__builtin_expect(job->budget > 0, 1))
        return false;
    job->budget = job_budget;
    return gate_wanted(&job->engine->gate);
}

#endif
