/*
 * Requests: translate, copy, single stores and loads. Each is one call, guarded against memory that goes away; see
 * engine.h for what keeps it apart from changes.
 */
#include <string.h>

#include "engine.h"

#define PAGE 4096u

/*
 * How much a request may do before it looks whether a change waits: copied bytes, STEP_COST more for each translation.
 * A change then waits 20 us (tables and pages in the CPU's caches) to 100 us (nowhere near, pages touched first).
 */
#define REQUEST_BUDGET (128 << 10)
#define STEP_COST 1024
#define PAUSED (-1000) /* of a guarded part: no vio_status */

/* A request under way. It outlives the guarded part, so what it holds is still known after memory was lost. */
struct job {
    struct vio_engine *engine;
    struct route *route;
    struct space *space;
    const struct dirty *dirty; /* where writes are noted; NULL: not */
    uint32_t tag;
    unsigned need, permitted; /* by the route */
    unsigned rights;          /* that the tables must give: `need` in the order of PT_BOTH */
    /* copy: a list of segments on one side, one buffer on the other */
    const vio_segment *segments;
    uint64_t count;
    uint8_t *buffer;
    uint64_t segment, offset, done;
    int64_t budget;
    uint64_t step; /* most bytes touched at once: all, until memory was lost, then a page */
    /* single access */
    uint64_t value;
    unsigned width;
    /* where it stands */
    uint64_t iova;
    struct iotlb_hit hit;
    struct walk walk;
    /* counted here, added up at the end */
    bool moved;
    uint64_t hits, misses, evictions, walks;
};

static __thread vio_fault last_fault;

const vio_fault *vio_last_fault(void)
{
    return &last_fault;
}

/* Translation by a walk; entered into the IOTLB. */
static __attribute__((noinline)) int walk_and_fill(struct job *job, struct guard *guard)
{
    struct space *space = job->space;
    struct walk *walk = &job->walk;
    struct iotlb *iotlb = &job->engine->iotlb;
    uint64_t offset_mask;
    int reason;

    walk->iova = job->iova;
    walk->need = job->rights;
    job->walks++;
    reason = space->walk(space, guard, walk);
    if (reason)
        return reason;
    offset_mask = (1ull << walk->size_lg2) - 1;
    if (iotlb->sets && job->tag) {
        job->misses++;
        job->evictions += iotlb_fill(iotlb, job->tag, walk->iova & ~offset_mask, walk->size_lg2,
                                     walk->hva & ~offset_mask, walk->gpa & ~offset_mask, walk->perm);
        if (!(__atomic_load_n(&space->scope.sizes, __ATOMIC_RELAXED) >> walk->size_lg2 & 1))
            __atomic_fetch_or(&space->scope.sizes, 1ull << walk->size_lg2, __ATOMIC_RELAXED);
    }
    job->hit.hva = walk->hva;
    job->hit.gpa = walk->gpa;
    job->hit.size = offset_mask + 1 - (walk->iova & offset_mask);
    job->hit.perm = walk->perm;
    return 0;
}

/* Translate job->iova into job->hit. */
static inline int translate(struct job *job, struct guard *guard)
{
    struct iotlb *iotlb = &job->engine->iotlb;
    uint64_t sizes = __atomic_load_n(&job->space->scope.sizes, __ATOMIC_RELAXED);

    if (iotlb->sets && iotlb_lookup(iotlb, job->tag, sizes, job->iova, &job->hit) && !(job->rights & ~job->hit.perm)) {
        job->hits++;
    } else {
        int reason = walk_and_fill(job, guard);

        if (reason)
            return reason;
    }
    job->moved |= job->hit.gpa != job->iova;
    return 0;
}

static int run_translate(struct guard *guard, void *context)
{
    return translate(context, guard);
}

/* Announce the bytes about to be touched; the job is in memory, as it stands, before they are. */
static inline void about_to_touch(const struct job *job, struct guard *guard, uint64_t size)
{
    guard_memory(guard, job->hit.hva, size);
    __asm__ volatile("" ::: "memory");
}

/* A copy evicts the IOTLB from the CPU's nearest caches: fetch the next page's set while this page is copied. */
static inline void prefetch_next(const struct job *job, uint64_t size)
{
    uint64_t sizes = __atomic_load_n(&job->space->scope.sizes, __ATOMIC_RELAXED);

    if (sizes && job->engine->iotlb.sets)
        iotlb_prefetch(&job->engine->iotlb, job->tag, sizes, job->iova + size);
}

/* Has the request done its share, and does a change wait? */
static inline bool must_pause(struct job *job)
{
    if (job->budget > 0)
        return false;
    job->budget = REQUEST_BUDGET;
    return gate_wanted(&job->engine->gate);
}

static int run_copy(struct guard *guard, void *context)
{
    struct job *job = context;

    for (; job->segment < job->count; job->segment++, job->offset = 0) {
        const vio_segment *segment = &job->segments[job->segment];

        if (segment->length && segment->iova + (segment->length - 1) < segment->iova) {
            job->iova = segment->iova;
            return VIO_REASON_ADDRESS_WIDTH;
        }
        while (job->offset < segment->length) {
            uint64_t size = segment->length - job->offset;
            void *memory;
            int reason;

            if (__builtin_expect(must_pause(job), 0))
                return PAUSED;
            job->iova = segment->iova + job->offset;
            reason = translate(job, guard);
            if (reason)
                return reason;
            memory = (void *)(uintptr_t)job->hit.hva;
            if (size > job->hit.size)
                size = job->hit.size;
            if (size > job->step)
                size = job->step;
            if (size > REQUEST_BUDGET)
                size = REQUEST_BUDGET;
            job->budget -= (int64_t)size + STEP_COST;
            if (job->step == PAGE && size > PAGE - job->hit.hva % PAGE)
                size = PAGE - job->hit.hva % PAGE;
            prefetch_next(job, size);
            about_to_touch(job, guard, size);
            if (job->need & VIO_WRITE) {
                dirty_mark(job->dirty, job->hit.gpa, size); /* before: a copy that faults may have written any of it */
                memcpy(memory, job->buffer + job->done, size);
            } else {
                memcpy(job->buffer + job->done, memory, size);
            }
            job->offset += size;
            job->done += size;
        }
    }
    return 0;
}

static int run_single(struct guard *guard, void *context)
{
    struct job *job = context;
    void *memory;
    int reason;

    if (job->iova % job->width) /* aligned, it lies in one page and is one access of the CPU */
        return VIO_REASON_MISALIGNED;
    reason = translate(job, guard);
    if (reason)
        return reason;
    memory = (void *)(uintptr_t)job->hit.hva;
    about_to_touch(job, guard, job->width);
    if (job->need & VIO_WRITE) {
        dirty_mark(job->dirty, job->hit.gpa, job->width);
        switch (job->width) { /* release: what it publishes is written before it */
        case 1: __atomic_store_n((uint8_t *)memory, (uint8_t)job->value, __ATOMIC_RELEASE); break;
        case 2: __atomic_store_n((uint16_t *)memory, (uint16_t)job->value, __ATOMIC_RELEASE); break;
        case 4: __atomic_store_n((uint32_t *)memory, (uint32_t)job->value, __ATOMIC_RELEASE); break;
        default: __atomic_store_n((uint64_t *)memory, job->value, __ATOMIC_RELEASE); break;
        }
        __sync_synchronize(); /* whoever stores an event index must then read the index anew */
    } else {
        switch (job->width) {
        case 1: job->value = __atomic_load_n((uint8_t *)memory, __ATOMIC_ACQUIRE); break;
        case 2: job->value = __atomic_load_n((uint16_t *)memory, __ATOMIC_ACQUIRE); break;
        case 4: job->value = __atomic_load_n((uint32_t *)memory, __ATOMIC_ACQUIRE); break;
        default: job->value = __atomic_load_n((uint64_t *)memory, __ATOMIC_ACQUIRE); break;
        }
    }
    job->done = job->width;
    return 0;
}

/* Run the guarded part; 0, a reason (the walk telling stage, level and entry), or a negative status. */
static int run_guarded(struct job *job, int (*body)(struct guard *, void *))
{
    struct guard guard;
    int reason = 0;

    guard.buffer.first = (uintptr_t)job->buffer;
    guard.buffer.size = 0;
    for (uint64_t i = 0; i < job->count; i++)
        guard.buffer.size += job->segments[i].length;
    for (;;) {
        switch (guard_run(&guard, body, job, &reason)) {
        case GUARD_OK:
            return reason;
        case GUARD_BUFFER:
            return VIO_ERR_BUFFER;
        default:
            break;
        }
        if (job->walk.reading_level) { /* a table of the guest's */
            job->walk.stage = 1;
            job->walk.level = job->walk.reading_level;
            job->walk.fault_gpa = job->walk.reading_gpa;
            job->walk.has_gpa = job->walk.table = true;
            return VIO_REASON_MEMORY_GONE;
        }
        if (job->count && job->step != PAGE) {
            job->step = PAGE; /* once more by pages, to know how many bytes are done */
            continue;
        }
        job->walk.stage = 2;
        job->walk.fault_gpa = job->hit.gpa;
        job->walk.has_gpa = true;
        return VIO_REASON_MEMORY_GONE;
    }
}

/* What a route must permit: it knows no right to execute, execution reads. */
static unsigned route_rights(unsigned need)
{
    return (need & RW_BOTH) | (need & VIO_EXECUTE ? VIO_READ : 0);
}

/* Look the route up; 0, or why its requests go nowhere. */
static int find_route(struct job *job, uint32_t rid, uint32_t pasid)
{
    job->route = index_find(&job->engine->routes, route_key(rid, pasid));
    if (!job->route || (!job->route->space && !job->route->blocked))
        return VIO_REASON_NO_ROUTE;
    job->space = job->route->space;
    if (!job->space)
        return VIO_REASON_BLOCKED;
    job->permitted = job->route->access;
    if (route_rights(job->need) & ~job->permitted)
        return VIO_REASON_PERMISSION;
    if (!job->space->walk)
        return VIO_REASON_NOT_BOUND;
    job->rights = (job->need & PT_RWX) << (job->need & VIO_PRIVILEGED ? PT_PRIVILEGED : 0);
    job->tag = iotlb_tag(&job->engine->iotlb, &job->space->scope);
    job->dirty = (job->space->parent ? job->space->parent : job->space)->dirty;
    return 0;
}

static void account(const struct job *job, bool fault)
{
    vio_counters *all = &job->engine->counters;

    count(&all->requests, 1);
    count(&all->bytes, job->done);
    count(&all->faults, fault);
    count(&all->iotlb_hits, job->hits);
    count(&all->iotlb_misses, job->misses);
    count(&all->iotlb_evictions, job->evictions);
    count(&all->walks, job->walks);
    if (job->route) {
        count(&job->route->counters.requests, 1);
        count(&job->route->counters.bytes, job->done);
        count(&job->route->counters.faults, fault);
        count(&job->route->counters.nested, job->space && job->space->parent);
        count(&job->route->counters.direct, job->space && !job->space->parent);
        count(&job->route->counters.moved, job->moved);
    }
    if (job->space) {
        vio_space_counters *counters = &job->space->counters;

        count(&counters->requests, 1);
        count(&counters->bytes, job->done);
        count(&counters->faults, fault);
        count(&counters->moved, job->moved);
        count(&counters->iotlb_hits, job->hits);
        count(&counters->iotlb_misses, job->misses);
    }
}

static int request(struct job *job, uint32_t rid, uint32_t pasid, int (*body)(struct guard *, void *))
{
    int reason;

    job->budget = REQUEST_BUDGET;
    for (;;) {
        gate_pass(&job->engine->gate);
        reason = find_route(job, rid, pasid);
        if (!reason)
            reason = run_guarded(job, body);
        if (reason != PAUSED)
            break;
        gate_leave(&job->engine->gate);
    }
    account(job, reason > 0);
    if (reason > 0) {
        const struct walk *walk = &job->walk;

        last_fault = (vio_fault){.iova = job->iova,
                                 .gpa = walk->fault_gpa,
                                 .entry = walk->entry,
                                 .done = job->done,
                                 .rid = rid,
                                 .pasid = pasid,
                                 .ioasid = job->space ? job->space->ioasid : 0,
                                 .access = (uint8_t)job->need,
                                 .stage = (uint8_t)walk->stage,
                                 .level = (uint8_t)walk->level,
                                 .reason = (uint8_t)reason,
                                 .has_gpa = walk->has_gpa,
                                 .table = walk->table};
        reason = VIO_FAULT;
    }
    gate_leave(&job->engine->gate);
    return reason;
}

/* What route and tables permit to requests of this one's privilege. */
static unsigned permitted(const struct job *job)
{
    unsigned perm = PT_PERMITTED(job->hit.perm) >> (job->need & VIO_PRIVILEGED ? PT_PRIVILEGED : 0) & PT_RWX;

    return perm & (job->permitted | (job->permitted & VIO_READ ? VIO_EXECUTE : 0));
}

int vio_translate(vio_engine *engine, uint32_t rid, uint32_t pasid, uint64_t iova, uint32_t access,
                  vio_translation *out)
{
    struct job job = {.engine = engine, .need = access, .iova = iova};
    int status;

    if (!(access & PT_RWX) || (access & ~(uint32_t)(PT_RWX | VIO_PRIVILEGED)))
        return VIO_ERR_VALUE;
    status = request(&job, rid, pasid, run_translate);
    if (!status)
        *out = (vio_translation){job.hit.hva, job.hit.size, job.hit.gpa, permitted(&job)};
    return status;
}

int vio_dma_scatter(vio_engine *engine, uint32_t rid, uint32_t pasid, const vio_segment *segments, uint64_t count,
                    void *buffer, int write)
{
    struct job job = {.engine = engine,
                      .need = write ? VIO_WRITE : VIO_READ,
                      .iova = count ? segments[0].iova : 0,
                      .segments = segments,
                      .count = count,
                      .buffer = buffer,
                      .step = UINT64_MAX};

    return request(&job, rid, pasid, run_copy);
}

int vio_dma(vio_engine *engine, uint32_t rid, uint32_t pasid, uint64_t iova, void *buffer, uint64_t length, int write)
{
    vio_segment segment = {iova, length};

    return vio_dma_scatter(engine, rid, pasid, &segment, 1, buffer, write);
}

static int single(struct job *job, uint32_t rid, uint32_t pasid)
{
    if ((job->width != 1 && job->width != 2 && job->width != 4 && job->width != 8) ||
        (job->width < 8 && job->value >> 8 * job->width))
        return VIO_ERR_VALUE;
    return request(job, rid, pasid, run_single);
}

int vio_store(vio_engine *engine, uint32_t rid, uint32_t pasid, uint64_t iova, uint64_t value, uint32_t width)
{
    struct job job = {.engine = engine, .need = VIO_WRITE, .iova = iova, .value = value, .width = width};

    return single(&job, rid, pasid);
}

int vio_load(vio_engine *engine, uint32_t rid, uint32_t pasid, uint64_t iova, uint32_t width, uint64_t *out)
{
    struct job job = {.engine = engine, .need = VIO_READ, .iova = iova, .width = width};
    int status = single(&job, rid, pasid);

    if (!status)
        *out = job.value;
    return status;
}
