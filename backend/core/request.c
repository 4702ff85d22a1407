/* Requests: routes, walks, loss of memory, counters, faults; see request.h. */
#include "request.h"

/* How often a job reads a PASID table anew because what it read was invalidated before it could be used. */
#define PASID_READS 16

uint32_t job_budget = JOB_BUDGET;

static __thread vio_fault last_fault;

const vio_fault *vio_last_fault(void)
{
    return &last_fault;
}

__attribute__((noinline)) int request_walk(struct job *job, struct request *request, struct guard *guard)
{
    struct space *space = request->space;
    struct walk *walk = &request->walk;
    struct iotlb *iotlb = &job->engine->iotlb;
    uint64_t offset_mask;
    int reason;

    walk->iova = request->iova;
    walk->need = request->rights;
    walk->cache = job->engine->walk_cache;
    walk->cached = walk->has_middle = false;
    request->walks++;
    reason = space->walk(space, guard, walk);
    request->cached += walk->cached;
    if (reason)
        return reason;
    offset_mask = (1ull << walk->size_lg2) - 1;
    if (iotlb->sets && request->tag) {
        request->misses++;
        request->evictions += iotlb_fill(iotlb, request->tag, walk->iova & ~offset_mask, walk->size_lg2,
                                         walk->hva & ~offset_mask, walk->gpa & ~offset_mask, walk->perm);
        if (!(__atomic_load_n(&space->scope.sizes, __ATOMIC_RELAXED) >> walk->size_lg2 & 1))
            __atomic_fetch_or(&space->scope.sizes, 1ull << walk->size_lg2, __ATOMIC_RELAXED);
    }
    request->hit.hva = walk->hva;
    request->hit.gpa = walk->gpa;
    request->hit.size = offset_mask + 1 - (walk->iova & offset_mask);
    request->hit.perm = walk->perm;
    return 0;
}

/* What a route must permit: it knows no right to execute, execution reads. */
static unsigned route_rights(unsigned need)
{
    return (need & RW_BOTH) | (need & VIO_EXECUTE ? VIO_READ : 0);
}

/* The route of a request: its PASID's own, else the one for any PASID of its device. */
static struct route *route_of(const struct vio_engine *engine, const struct request *request)
{
    struct route *route = index_find(&engine->routes, route_key(request->rid, request->pasid));

    if (!route_live(route) && request->pasid != VIO_NO_PASID && request->pasid != VIO_TRANSLATED)
        return index_find(&engine->routes, route_key(request->rid, VIO_ANY_PASID));
    return route;
}

/* Without a route: somebody may be asked for one, or has said already that there is none for translated requests. */
static int no_route(const struct vio_engine *engine, const struct request *request)
{
    return request->pasid == VIO_TRANSLATED &&
                   route_live(index_find(&engine->routes, route_key(request->rid, VIO_NO_PASID)))
               ? VIO_REASON_ATS_OFF
               : VIO_REASON_NO_ROUTE;
}

int request_route(struct vio_engine *engine, struct request *request)
{
    struct route *route = route_of(engine, request);
    unsigned need = request->need & PT_RWX;

    request->route = route;
    request->space = NULL;
    if (!route_live(route))
        return no_route(engine, request);
    if (!route->space)
        return VIO_REASON_BLOCKED;
    request->space = route->space;
    request->permitted = route->access;
    if (request->ats && !route->ats)
        return VIO_REASON_ATS_OFF;
    if (request->ats)
        need &= route->access | (route->access & VIO_READ ? VIO_EXECUTE : 0);
    if ((route_rights(need) & ~request->permitted) || !need)
        return VIO_REASON_PERMISSION;
    if (!request->space->walk && !request->space->pasids)
        return VIO_REASON_NOT_BOUND;
    request->rights = need << (request->need & VIO_PRIVILEGED ? PT_PRIVILEGED : 0);
    return 0;
}

/* The route and, where a PASID table is bound, the space of the PASID; also PASID_UNREAD. */
static int find_route(struct job *job, struct request *request)
{
    int reason;

    job->at = request;
    request->begun = true;
    request->walk.under = &request->under;
    reason = request_route(job->engine, request);
    if (!reason && request->space->pasids)
        reason = pasid_space(request->space, request->pasid, request->need, &request->walk, &request->space);
    if (reason)
        return reason;
    request->tag = iotlb_tag(&job->engine->iotlb, &request->space->scope);
    if (request->space->parent && request->space->parent->parent) /* what walks remember of it must hold, too */
        iotlb_tag(&job->engine->iotlb, &request->space->parent->scope);
    request->dirty = space_bottom(request->space)->dirty;
    return 0;
}

unsigned request_permitted(const struct request *request, unsigned perm)
{
    perm = PT_PERMITTED(perm) >> (request->need & VIO_PRIVILEGED ? PT_PRIVILEGED : 0) & PT_RWX;
    return perm & (request->permitted | (request->permitted & VIO_READ ? VIO_EXECUTE : 0));
}

/* Run the guarded part; 0, a reason (the walk telling stage, level and entry), JOB_PAUSED or a vio_status. */
static int run_guarded(struct job *job, job_body body)
{
    struct guard guard;
    struct walk *walk;
    const struct walk *reading;
    int reason = 0;

    guard.buffer.first = (uintptr_t)job->buffer;
    guard.buffer.size = job->buffer_size;
    for (;;) {
        int lost = guard_run(&guard, body, job, &reason);

        if (lost == GUARD_OK)
            return reason;
        walk = &job->at->walk;
        reading = walk->under->reading_level ? walk->under : walk;
        if (reading->reading_level) { /* a table of the guest's */
            walk->stage = 1;
            walk->level = reading->reading_level;
            walk->fault_gpa = reading->reading_gpa;
            walk->has_gpa = walk->table = true;
            walk->has_middle = reading != walk;
            walk->middle = reading->iova;
            return VIO_REASON_MEMORY_GONE;
        }
        if (lost == GUARD_BUFFER && !job->second)
            return VIO_ERR_BUFFER;
        if (job->in_parts && !job->by_pages) {
            job->by_pages = true;
            continue;
        }
        if (job->second) /* both ends are guest memory, the second one in the buffer's window */
            job->at = lost == GUARD_BUFFER ? job->second : &job->request;
        if (job->at->space->walk == walk_process)
            return process_own_reason(job->at);
        walk = &job->at->walk;
        walk->stage = 2;
        walk->level = 0;
        walk->entry = 0;
        walk->fault_gpa = job->at->hit.gpa;
        walk->has_gpa = true;
        return VIO_REASON_MEMORY_GONE;
    }
}

static void account(const struct job *job, const struct request *request, bool fault)
{
    vio_counters *all = &job->engine->counters;

    count(&all->requests, 1);
    count(&all->bytes, job->done);
    count(&all->faults, fault);
    count(&all->iotlb_hits, request->hits);
    count(&all->iotlb_misses, request->misses);
    count(&all->iotlb_evictions, request->evictions);
    count(&all->walks, request->walks);
    count(&all->walk_cache_hits, request->cached);
    if (request->route) {
        vio_route_counters *counters = &request->route->counters;

        count(&counters->requests, 1);
        count(&counters->bytes, job->done);
        count(&counters->faults, fault);
        count(&counters->nested, request->space && request->space->parent);
        count(&counters->direct, request->space && !request->space->parent);
        count(&counters->moved, request->moved);
    }
    if (request->space) {
        struct space *space = request->space->bound ? request->space->bound : request->space;
        vio_space_counters *counters = &space->counters;

        count(&counters->requests, 1);
        count(&counters->bytes, job->done);
        count(&counters->faults, fault);
        count(&counters->moved, request->moved);
        count(&counters->iotlb_hits, request->hits);
        count(&counters->iotlb_misses, request->misses);
    }
}

vio_fault request_fault(const struct request *request, int reason, uint64_t done)
{
    const struct walk *walk = &request->walk;

    return (vio_fault){.iova = request->iova,
                       .gpa = walk->fault_gpa,
                       .entry = walk->entry,
                       .done = done,
                       .rid = request->rid,
                       .pasid = request->pasid,
                       .ioasid = request->space ? request->space->ioasid : 0,
                       .access = (uint8_t)request->need,
                       .stage = (uint8_t)walk->stage,
                       .level = (uint8_t)walk->level,
                       .reason = (uint8_t)reason,
                       .has_gpa = walk->has_gpa,
                       .pasid_table = walk->pasid_table,
                       .table = walk->table,
                       .has_middle = walk->has_middle,
                       .middle = walk->middle,
                       .type = request->ats                       ? VIO_AT_REQUEST
                               : request->pasid == VIO_TRANSLATED ? VIO_AT_TRANSLATED
                                                                  : 0};
}

/*
 * Is it what a translation request is for to find out? Its answer tells the device, and nobody else is told. Malformed
 * tables, and what the route says, are told as of any request.
 */
static bool is_miss(const struct request *request, int reason)
{
    return request->ats && (reason == VIO_REASON_NOT_PRESENT || reason == VIO_REASON_PERMISSION ||
                            reason == VIO_REASON_ACCESS_FLAG || reason == VIO_REASON_DIRTY ||
                            (reason == VIO_REASON_ADDRESS_WIDTH && request->walk.stage));
}

static int run_pasid_read(struct guard *guard, void *context)
{
    struct job *job = context;
    struct request *request = job->at;

    return pasid_read(request->space, request->pasid, guard, &request->walk, job->found);
}

int job_errand_reason(struct job *job, struct request *request, struct guard *guard)
{
    int reason = request_translate(job, request, guard);

    if (reason)
        return reason;
    reason = errand_reason(job->errand, request);
    return IS_FOREIGN(request->hit.hva) ? reason : 0;
}

int job_run(struct job *job, job_body body)
{
    struct pasid_found found;
    struct errand errand;
    unsigned reads = 0;
    bool missed;
    int reason;

    errand_init(&errand);
    job->errand = &errand;
    job->found = &found;
    job->budget = job_budget;
    for (;;) {
        bool unread;

        gate_pass(&job->engine->gate);
        reason = find_route(job, &job->request);
        if (!reason && job->second)
            reason = find_route(job, job->second);
        unread = reason == PASID_UNREAD;
        if (unread)
            reason = reads++ < PASID_READS ? run_guarded(job, run_pasid_read) : VIO_REASON_ENTRY_CHANGED;
        else if (!reason)
            reason = run_guarded(job, body);
        if (errand.pieces) { /* whatever else it came to, it will again */
            errand_run(job->engine, &errand);
            job->settle(job);
            continue;
        }
        if (reason != JOB_PAUSED && !(unread && !reason))
            break;
        gate_leave(&job->engine->gate);
        if (unread && (reason = pasid_keep(job->engine, &found)))
            return reason;
    }
    missed = job->request.prefetch || is_miss(&job->request, reason);
    if (!job->request.prefetch)
        account(job, &job->request, reason > 0 && !missed && job->at == &job->request);
    if (job->second && job->second->begun)
        account(job, job->second, reason > 0 && job->at == job->second);
    if (reason > 0) {
        last_fault = request_fault(job->at, reason, job->done);
        if (!missed)
            fault_ring_put(&job->engine->faults, &last_fault);
        reason = VIO_FAULT;
    }
    gate_leave(&job->engine->gate);
    return reason;
}
