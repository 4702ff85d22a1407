/*
 * Translation requests (PCI Express, Address Translation Services): one call for all pages of a range. See request.h.
 *
 * What a device caches of the answer must hold until it is told to forget it. So writes are granted only where the dirty
 * bit is set or there is none: a request for them sets it, as a write would.
 */
#include "request.h"

/* How often a request lets a change go first: it then begins anew, for what it had found may have ended. */
#define PAUSES 4

struct ats {
    struct job job;
    uint64_t first, last; /* of the range */
    vio_translated *out;
    uint64_t room, count;
    unsigned pauses;
    bool wraps;
};

/* One page: for all that is asked, or where that is refused, for reads or for writes alone. 0 or a reason. */
static int translate_part(struct ats *ats, struct guard *guard, unsigned all)
{
    static const unsigned parts[] = {PT_BOTH((unsigned)VIO_READ), PT_WRITES};
    struct request *request = &ats->job.request;
    int reason;

    request->rights = all;
    reason = request_translate(&ats->job, request, guard);
    if (reason != VIO_REASON_PERMISSION && reason != VIO_REASON_DIRTY)
        return reason;
    for (unsigned i = 0; i < sizeof parts / sizeof parts[0]; i++) {
        request->rights = all & parts[i];
        if (request->rights && request->rights != all && !request_translate(&ats->job, request, guard))
            return 0;
    }
    request->rights = all; /* once more, to tell why */
    return request_translate(&ats->job, request, guard);
}

/* Enter what a page gave; one that goes on where the last one ends makes that larger. */
static void add_translated(struct ats *ats)
{
    const struct request *request = &ats->job.request;
    const unsigned shift = request->need & VIO_PRIVILEGED ? PT_PRIVILEGED : 0;
    const unsigned route = request->permitted | (request->permitted & VIO_READ ? VIO_EXECUTE : 0);
    vio_translated found = {request->iova, request->hit.size, request->hit.gpa,
                            request->hit.perm >> shift & PT_RWX & route};
    vio_translated *before = ats->count ? &ats->out[ats->count - 1] : NULL;

    if (before && before->access == found.access && before->iova + before->size == found.iova &&
        before->address + before->size == found.address)
        before->size += found.size;
    else
        ats->out[ats->count++] = found;
}

static int run_ats(struct guard *guard, void *context)
{
    struct ats *ats = context;
    struct job *job = &ats->job;
    struct request *request = &job->request;
    unsigned all = request->rights;

    ats->count = 0;
    if (ats->wraps)
        return VIO_REASON_ADDRESS_WIDTH;
    request->iova = ats->first;
    for (uint64_t leaves = 0; leaves < ats->room; leaves++) {
        int reason;

        if (ats->pauses < PAUSES && must_pause(job)) {
            ats->pauses++;
            return JOB_PAUSED;
        }
        reason = translate_part(ats, guard, all);
        if (reason)
            return reason;
        job->budget -= STEP_COST;
        add_translated(ats);
        if (ats->last - request->iova < request->hit.size)
            break;
        request->iova += request->hit.size;
    }
    return 0;
}

static int run_prefetch(struct guard *guard, void *context)
{
    struct job *job = context;

    return request_translate(job, &job->request, guard);
}

int vio_prefetch(vio_engine *engine, uint32_t rid, uint32_t pasid, uint64_t iova)
{
    struct job job = {.engine = engine,
                      .request = {.rid = rid, .pasid = pasid, .need = VIO_READ, .prefetch = true, .iova = iova}};
    int status = job_run(&job, run_prefetch);

    return status > 0 ? VIO_OK : status; /* there may be nothing to know */
}

int vio_ats(vio_engine *engine, uint32_t rid, uint32_t pasid, uint64_t iova, uint64_t length, uint32_t access,
            vio_translated *out, uint64_t room, uint64_t *count)
{
    struct ats ats = {
        .job = {.engine = engine,
                .request = {.rid = rid, .pasid = pasid, .need = access, .ats = true, .iova = iova}},
        .first = iova & ~(PAGE - 1ull),
        .last = iova + (length - 1),
        .out = out,
        .room = room,
        .wraps = iova + (length - 1) < iova,
    };
    int status;

    if (!length || !room || !(access & PT_RWX) || (access & ~(uint32_t)(PT_RWX | VIO_PRIVILEGED)))
        return VIO_ERR_VALUE;
    status = job_run(&ats.job, run_ats);
    *count = ats.count;
    return status;
}
