/* DMA: translate, read, write, scatter, fill, copy, single stores and loads. One call each; see request.h. */
#include <string.h>

#include "request.h"

static void settle_translate(struct job *job)
{
    (void)job; /* it is asked again */
}

static int run_translate(struct guard *guard, void *context)
{
    struct job *job = context;

    int reason = request_translate(job, &job->request, guard);

    return !reason && job->request.space->walk == walk_process ? process_look(job->errand, &job->request) : reason;
}

int vio_translate(vio_engine *engine, uint32_t rid, uint32_t pasid, uint64_t iova, uint32_t access,
                  vio_translation *out)
{
    struct job job = {.engine = engine,
                      .request = {.rid = rid, .pasid = pasid, .need = access, .iova = iova},
                      .settle = settle_translate};
    const struct request *request = &job.request;
    int status;

    if (!(access & PT_RWX) || (access & ~(uint32_t)(PT_RWX | VIO_PRIVILEGED)))
        return VIO_ERR_VALUE;
    status = job_run(&job, run_translate);
    if (!status)
        *out = (vio_translation){request->hit.hva, request->hit.size, request->hit.gpa,
                                 request_permitted(request, request->hit.perm)};
    return status;
}

/* Between a list of segments and a buffer, or a pattern. */
struct list {
    struct job job;
    const vio_segment *segments;
    uint64_t count;
    uint64_t segment, offset; /* where it stands */
    uint64_t errand_segment, errand_offset; /* where the errand under way begins */
    uint8_t *buffer;
    const uint8_t *pattern; /* PATTERN_SIZE bytes, the pattern over and over; NULL: the buffer */
};

#define PATTERN_PERIOD 8 /* every width divides it */
#define PATTERN_SIZE (PAGE + PATTERN_PERIOD)

/* A copy evicts the IOTLB from the CPU's nearest caches: fetch the next page's set while this page is copied. */
static inline void prefetch_next(const struct job *job, uint64_t size)
{
    const struct request *request = &job->request;
    uint64_t sizes = __atomic_load_n(&request->space->scope.sizes, __ATOMIC_RELAXED);

    if (sizes && job->engine->iotlb.sets)
        iotlb_prefetch(&job->engine->iotlb, request->tag, sizes, request->iova + size);
}

static inline uint64_t least(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

/* Bytes from the request's place to the end of its page. */
static inline uint64_t page_rest(const struct request *request)
{
    return PAGE - request->hit.hva % PAGE;
}

static void settle_list(struct job *job)
{
    struct list *list = (struct list *)job;
    uint64_t moved = job->errand->moved;

    job->done += moved;
    list->segment = list->errand_segment;
    list->offset = list->errand_offset;
    for (;;) {
        uint64_t part = least(moved, list->segments[list->segment].length - list->offset);

        moved -= part;
        list->offset += part;
        if (list->offset < list->segments[list->segment].length || list->segment == list->count - 1)
            break;
        list->segment++;
        list->offset = 0;
    }
    job->request.iova = list->segments[list->segment].iova + list->offset;
}

/* The piece where the request stands, to be moved by an errand together with those that follow; true: no more fit. */
static bool add_to_errand(struct list *list, uint64_t size)
{
    struct job *job = &list->job;
    struct errand *errand = job->errand;
    uint64_t at = job->done + errand->size, added;

    if (!errand->pieces) {
        list->errand_segment = list->segment;
        list->errand_offset = list->offset;
    }
    added = errand_add(errand, &job->request,
                       list->pattern ? (uint8_t *)(uintptr_t)list->pattern + at % PATTERN_PERIOD : list->buffer + at,
                       size);
    list->offset += added;
    return added < size;
}

static int run_list(struct guard *guard, void *context)
{
    struct list *list = context;
    struct job *job = &list->job;
    struct request *request = &job->request;

    while (list->segment < list->count) {
        const vio_segment *segment = &list->segments[list->segment];
        uint64_t size = segment->length - list->offset;
        void *memory;
        int reason;

        request->iova = segment->iova + list->offset; /* before a pause: its route may be gone after it */
        if (must_pause(job))
            return JOB_PAUSED;
        if (!size) {
            list->segment++;
            list->offset = 0;
            job->budget -= sizeof *segment;
            continue;
        }
        if (segment->iova + (segment->length - 1) < segment->iova)
            return VIO_REASON_ADDRESS_WIDTH;
        reason = job->errand->reason ? job_errand_reason(job, request, guard) : request_translate(job, request, guard);
        if (reason)
            return reason;
        memory = (void *)(uintptr_t)request->hit.hva;
        size = least(size, least(request->hit.size, JOB_BUDGET));
        if (job->by_pages)
            size = least(size, page_rest(request));
        if (list->pattern)
            size = least(size, PAGE);
        job->budget -= (int64_t)size + STEP_COST;
        if (IS_FOREIGN(request->hit.hva)) {
            if (add_to_errand(list, size))
                return 0;
            continue;
        }
        if (job->errand->pieces) /* in their order */
            return 0;
        prefetch_next(job, size);
        about_to_touch(request, guard, 0, size);
        if (request->need & VIO_WRITE) {
            dirty_mark(request->dirty, request->hit.gpa, size); /* before: a loss may come after any byte of it */
            memcpy(memory, list->pattern ? list->pattern + job->done % PATTERN_PERIOD : list->buffer + job->done, size);
        } else {
            memcpy(list->buffer + job->done, memory, size);
        }
        list->offset += size;
        job->done += size;
    }
    return 0;
}

int vio_dma_scatter(vio_engine *engine, uint32_t rid, uint32_t pasid, const vio_segment *segments, uint64_t count,
                    void *buffer, int write)
{
    struct list list = {
        .job = {.engine = engine,
                .request = {.rid = rid, .pasid = pasid, .need = write ? VIO_WRITE : VIO_READ},
                .settle = settle_list,
                .in_parts = true,
                .buffer = buffer},
        .segments = segments,
        .count = count,
        .buffer = buffer,
    };

    if (count)
        list.job.request.iova = segments[0].iova;
    for (uint64_t i = 0; i < count; i++)
        list.job.buffer_size += segments[i].length;
    return job_run(&list.job, run_list);
}

int vio_dma(vio_engine *engine, uint32_t rid, uint32_t pasid, uint64_t iova, void *buffer, uint64_t length, int write)
{
    vio_segment segment = {iova, length};

    return vio_dma_scatter(engine, rid, pasid, &segment, 1, buffer, write);
}

static bool width_ok(uint32_t width)
{
    return width == 1 || width == 2 || width == 4 || width == 8;
}

static bool fits(uint64_t value, uint32_t width)
{
    return width == 8 || !(value >> 8 * width);
}

int vio_dma_fill(vio_engine *engine, uint32_t rid, uint32_t pasid, uint64_t iova, uint64_t length, uint64_t pattern,
                 uint32_t width)
{
    uint8_t block[PATTERN_SIZE];
    vio_segment segment = {iova, length};
    struct list list = {
        .job = {.engine = engine,
                .request = {.rid = rid, .pasid = pasid, .need = VIO_WRITE, .iova = iova},
                .settle = settle_list,
                .in_parts = true},
        .segments = &segment,
        .count = 1,
        .pattern = block,
    };

    if (!width_ok(width) || !fits(pattern, width))
        return VIO_ERR_VALUE;
    for (uint32_t bytes = width; bytes < PATTERN_PERIOD; bytes *= 2)
        pattern |= pattern << 8 * bytes;
    for (size_t at = 0; at < sizeof block && at < least(length, PAGE) + PATTERN_PERIOD; at += sizeof pattern)
        memcpy(block + at, &pattern, sizeof pattern);
    return job_run(&list.job, run_list);
}

struct copy {
    struct job job; /* its request reads */
    struct request write;
    uint64_t from, to, length;
    bool down; /* from the end down */
    /* Where one end, or each, is another process's memory: what was read, of the piece where the job stands, and not written. */
    uint8_t *bounce;
    uint64_t held, held_at;
    uint64_t asked; /* of an errand */
};

#define BOUNCE 65536u /* bytes */

/* The place of the byte of `request` to be moved next: the last one of its piece if that goes down. */
static uint64_t copy_offset(const struct copy *copy)
{
    return copy->down ? copy->length - copy->job.done - 1 : copy->job.done;
}

static void place_copy(struct copy *copy)
{
    copy->job.request.iova = copy->from + copy_offset(copy);
    copy->write.iova = copy->to + copy_offset(copy);
}

static void step_back(struct request *request, uint64_t bytes)
{
    request->iova -= bytes;
    request->hit.hva -= bytes;
    request->hit.gpa -= bytes;
}

static void settle_copy(struct job *job)
{
    struct copy *copy = (struct copy *)job;
    struct errand *errand = job->errand;
    uint64_t moved = errand->moved;

    if (copy->down && moved < copy->asked) /* it is in one page: all of it is moved, or again */
        moved = 0;
    if (errand->request == &job->request) {
        copy->held = moved;
        copy->held_at = 0;
        if (moved)
            errand->reason = 0; /* what was read is written, before it is told that the rest could not be */
    } else {
        copy->held -= moved;
        copy->held_at += moved;
        job->done += moved;
    }
    place_copy(copy);
}

/* Read a piece, which begins `back` before, into the buffer; by an errand if it must be. */
static void read_piece(struct copy *copy, struct guard *guard, uint64_t back, uint64_t size)
{
    struct job *job = &copy->job;
    struct request *read = job->at = &job->request;

    size = least(size, BOUNCE);
    guard->buffer.size = 0;
    if (IS_FOREIGN(read->hit.hva)) {
        step_back(read, back);
        copy->asked = errand_add(job->errand, read, copy->bounce, size);
        return;
    }
    about_to_touch(read, guard, back, size);
    memcpy(copy->bounce, (const void *)(uintptr_t)(read->hit.hva - back), size);
    copy->held = size;
    copy->held_at = 0;
}

/* Write what was read; 0 or a reason. */
static int write_piece(struct copy *copy, struct guard *guard)
{
    struct job *job = &copy->job;
    struct request *write = job->at = &copy->write;
    uint64_t size = copy->held, back = copy->down ? size - 1 : 0;
    int reason = job->errand->reason ? job_errand_reason(job, write, guard) : request_translate(job, write, guard);

    if (reason)
        return reason;
    size = copy->down ? size : least(size, write->hit.size);
    if (IS_FOREIGN(write->hit.hva)) {
        step_back(write, back);
        copy->asked = errand_add(job->errand, write, copy->bounce + copy->held_at, size);
        return 0;
    }
    guard_memory(guard, 0, 0);
    guard->buffer.first = write->hit.hva - back;
    guard->buffer.size = size;
    __asm__ volatile("" ::: "memory");
    dirty_mark(write->dirty, write->hit.gpa - back, size);
    memcpy((void *)(uintptr_t)(write->hit.hva - back), copy->bounce + copy->held_at, size);
    job->done += size;
    copy->held -= size;
    copy->held_at += size;
    return 0;
}

/*
 * Between two places of guest memory, each piece by one memmove. Where the IOVAs overlap with the target behind the
 * source it goes from the end down, page by page, so that nothing is written before it was read.
 */
static int run_copy(struct guard *guard, void *context)
{
    struct copy *copy = context;
    struct job *job = context;
    struct request *read = job->at = &job->request, *write = &copy->write;

    if (copy->length && copy->from + (copy->length - 1) < copy->from)
        return VIO_REASON_ADDRESS_WIDTH;
    job->at = write;
    if (copy->length && copy->to + (copy->length - 1) < copy->to)
        return VIO_REASON_ADDRESS_WIDTH;
    while (job->done < copy->length) {
        uint64_t size = copy->length - job->done;
        uint64_t back = 0; /* from where we stand to where the piece begins */
        int reason;

        place_copy(copy);
        if (must_pause(job))
            return JOB_PAUSED;
        if (copy->held) {
            reason = write_piece(copy, guard);
            if (reason || job->errand->pieces)
                return reason;
            continue;
        }
        reason = job->errand->reason ? job_errand_reason(job, read, guard) : request_translate(job, read, guard);
        if (!reason)
            reason = request_translate(job, write, guard);
        if (reason)
            return reason;
        if (copy->down) {
            size = least(size, least(read->hit.hva % PAGE, write->hit.hva % PAGE) + 1);
            back = size - 1;
        } else {
            size = least(size, least(JOB_BUDGET, least(read->hit.size, write->hit.size)));
            if (job->by_pages)
                size = least(size, least(page_rest(read), page_rest(write)));
        }
        job->budget -= (int64_t)size + 2 * STEP_COST;
        if (IS_FOREIGN(read->hit.hva | write->hit.hva)) {
            read_piece(copy, guard, back, size);
            if (job->errand->pieces)
                return 0;
            continue;
        }
        guard->buffer.first = write->hit.hva - back;
        guard->buffer.size = size;
        about_to_touch(read, guard, back, size);
        dirty_mark(write->dirty, write->hit.gpa - back, size);
        memmove((void *)(uintptr_t)(write->hit.hva - back), (const void *)(uintptr_t)(read->hit.hva - back), size);
        job->done += size;
    }
    return 0;
}

int vio_dma_copy(vio_engine *engine, uint32_t from_rid, uint32_t from_pasid, uint64_t from, uint32_t to_rid,
                 uint32_t to_pasid, uint64_t to, uint64_t length)
{
    uint8_t bounce[BOUNCE]; /* its pages are touched only where it is used */
    struct copy copy = {
        .job = {.engine = engine,
                .request = {.rid = from_rid, .pasid = from_pasid, .need = VIO_READ, .iova = from},
                .second = &copy.write,
                .settle = settle_copy,
                .in_parts = true},
        .write = {.rid = to_rid, .pasid = to_pasid, .need = VIO_WRITE, .iova = to},
        .from = from,
        .to = to,
        .length = length,
        .down = to - from < length && to != from,
        .bounce = bounce,
    };

    return job_run(&copy.job, run_copy);
}

struct single {
    struct job job;
    uint64_t value;
    unsigned width;
};

static void settle_single(struct job *job)
{
    job->done = job->errand->moved;
}

static int run_single(struct guard *guard, void *context)
{
    struct single *single = context;
    struct request *request = &single->job.request;
    struct errand *errand = single->job.errand;
    void *memory;
    int reason;

    if (single->job.done)
        return 0;
    if (request->iova % single->width) /* aligned, it lies in one page and is one access of the CPU */
        return VIO_REASON_MISALIGNED;
    reason = errand->reason ? job_errand_reason(&single->job, request, guard)
                            : request_translate(&single->job, request, guard);
    if (reason)
        return reason;
    if (IS_FOREIGN(request->hit.hva)) { /* the kernel copies an aligned word as one, on the machines that we know of */
        errand_add(errand, request, &single->value, single->width);
        return 0;
    }
    memory = (void *)(uintptr_t)request->hit.hva;
    about_to_touch(request, guard, 0, single->width);
    if (request->need & VIO_WRITE) {
        dirty_mark(request->dirty, request->hit.gpa, single->width);
        switch (single->width) { /* release: what it publishes is written before it */
        case 1: __atomic_store_n((uint8_t *)memory, (uint8_t)single->value, __ATOMIC_RELEASE); break;
        case 2: __atomic_store_n((uint16_t *)memory, (uint16_t)single->value, __ATOMIC_RELEASE); break;
        case 4: __atomic_store_n((uint32_t *)memory, (uint32_t)single->value, __ATOMIC_RELEASE); break;
        default: __atomic_store_n((uint64_t *)memory, single->value, __ATOMIC_RELEASE); break;
        }
        __sync_synchronize(); /* whoever stores an event index must then read the index anew */
    } else {
        switch (single->width) {
        case 1: single->value = __atomic_load_n((uint8_t *)memory, __ATOMIC_ACQUIRE); break;
        case 2: single->value = __atomic_load_n((uint16_t *)memory, __ATOMIC_ACQUIRE); break;
        case 4: single->value = __atomic_load_n((uint32_t *)memory, __ATOMIC_ACQUIRE); break;
        default: single->value = __atomic_load_n((uint64_t *)memory, __ATOMIC_ACQUIRE); break;
        }
    }
    single->job.done = single->width;
    return 0;
}

int vio_store(vio_engine *engine, uint32_t rid, uint32_t pasid, uint64_t iova, uint64_t value, uint32_t width)
{
    struct single single = {
        .job = {.engine = engine,
                .request = {.rid = rid, .pasid = pasid, .need = VIO_WRITE, .iova = iova},
                .settle = settle_single},
        .value = value,
        .width = width,
    };

    if (!width_ok(width) || !fits(value, width))
        return VIO_ERR_VALUE;
    return job_run(&single.job, run_single);
}

int vio_load(vio_engine *engine, uint32_t rid, uint32_t pasid, uint64_t iova, uint32_t width, uint64_t *out)
{
    struct single single = {
        .job = {.engine = engine,
                .request = {.rid = rid, .pasid = pasid, .need = VIO_READ, .iova = iova},
                .settle = settle_single},
        .width = width,
    };
    int status;

    if (!width_ok(width))
        return VIO_ERR_VALUE;
    status = job_run(&single.job, run_single);
    if (!status)
        *out = single.value;
    return status;
}
