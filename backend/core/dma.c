/* DMA: translate, read, write, scatter, fill, copy, single stores and loads. One call each; see request.h. */
#include <string.h>

#include "request.h"

static int run_translate(struct guard *guard, void *context)
{
    struct job *job = context;

    int reason = request_translate(job, &job->request, guard);

    return !reason && job->request.space->walk == walk_process ? process_look(&job->request) : reason;
}

int vio_translate(vio_engine *engine, uint32_t rid, uint32_t pasid, uint64_t iova, uint32_t access,
                  vio_translation *out)
{
    struct job job = {.engine = engine, .request = {.rid = rid, .pasid = pasid, .need = access, .iova = iova}};
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
        reason = request_translate(job, request, guard);
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
            uint64_t moved;

            memory = list->pattern ? (void *)(uintptr_t)(list->pattern + job->done % PATTERN_PERIOD)
                                   : list->buffer + job->done;
            reason = process_move(request, memory, size, &moved);
            list->offset += moved;
            job->done += moved;
            if (reason)
                return reason;
            continue;
        }
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
};

#define BOUNCE 16384u

static void step_back(struct request *request, uint64_t bytes)
{
    request->iova -= bytes;
    request->hit.hva -= bytes;
    request->hit.gpa -= bytes;
}

/* A piece where one end, or each, is another process's memory: by way of a buffer. It begins `back` before. */
static int copy_foreign(struct copy *copy, struct guard *guard, uint64_t back, uint64_t size)
{
    struct job *job = &copy->job;
    struct request *read = &job->request, *write = &copy->write;
    uint8_t buffer[BOUNCE];
    uint64_t moved = size;
    int reason = 0, refused = 0;

    guard->buffer.size = 0;
    job->at = read;
    if (IS_FOREIGN(read->hit.hva)) {
        step_back(read, back);
        reason = process_move(read, buffer, size, &moved);
    } else {
        about_to_touch(read, guard, back, size);
        memcpy(buffer, (const void *)(uintptr_t)(read->hit.hva - back), size);
    }
    if (!moved)
        return reason;
    size = moved; /* what could be read is written before it is told that the rest could not */
    job->at = write;
    if (IS_FOREIGN(write->hit.hva)) {
        step_back(write, back);
        refused = process_move(write, buffer, size, &moved);
    } else {
        guard_memory(guard, 0, 0);
        guard->buffer.first = write->hit.hva - back;
        guard->buffer.size = size;
        __asm__ volatile("" ::: "memory");
        dirty_mark(write->dirty, write->hit.gpa - back, size);
        memcpy((void *)(uintptr_t)(write->hit.hva - back), buffer, size);
    }
    job->done += moved;
    if (!refused)
        job->at = read;
    return refused ? refused : reason;
}

/*
 * Between two places of guest memory, each piece by one memmove. Where the IOVAs overlap with the target behind the
 * source it goes from the end down, page by page, so that nothing is written before it was read.
 */
static int run_copy(struct guard *guard, void *context)
{
    struct copy *copy = context;
    struct job *job = &copy->job;
    struct request *read = job->at = &job->request, *write = &copy->write;
    bool down = copy->to - copy->from < copy->length && copy->to != copy->from;

    if (copy->length && copy->from + (copy->length - 1) < copy->from)
        return VIO_REASON_ADDRESS_WIDTH;
    job->at = write;
    if (copy->length && copy->to + (copy->length - 1) < copy->to)
        return VIO_REASON_ADDRESS_WIDTH;
    while (job->done < copy->length) {
        uint64_t size = copy->length - job->done, offset = down ? size - 1 : job->done;
        uint64_t back = 0; /* from where we stand to where the piece begins */
        int reason;

        read->iova = copy->from + offset;
        write->iova = copy->to + offset;
        if (must_pause(job))
            return JOB_PAUSED;
        reason = request_translate(job, read, guard);
        if (!reason)
            reason = request_translate(job, write, guard);
        if (reason)
            return reason;
        if (down) {
            size = least(size, least(read->hit.hva % PAGE, write->hit.hva % PAGE) + 1);
            back = size - 1;
        } else {
            size = least(size, least(JOB_BUDGET, least(read->hit.size, write->hit.size)));
            if (job->by_pages)
                size = least(size, least(page_rest(read), page_rest(write)));
        }
        job->budget -= (int64_t)size + 2 * STEP_COST;
        if (IS_FOREIGN(read->hit.hva | write->hit.hva)) {
            reason = copy_foreign(copy, guard, back, least(size, BOUNCE));
            if (reason)
                return reason;
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
    struct copy copy = {
        .job = {.engine = engine,
                .request = {.rid = from_rid, .pasid = from_pasid, .need = VIO_READ, .iova = from},
                .second = &copy.write,
                .in_parts = true},
        .write = {.rid = to_rid, .pasid = to_pasid, .need = VIO_WRITE, .iova = to},
        .from = from,
        .to = to,
        .length = length,
    };

    return job_run(&copy.job, run_copy);
}

struct single {
    struct job job;
    uint64_t value;
    unsigned width;
};

static int run_single(struct guard *guard, void *context)
{
    struct single *single = context;
    struct request *request = &single->job.request;
    void *memory;
    int reason;

    if (request->iova % single->width) /* aligned, it lies in one page and is one access of the CPU */
        return VIO_REASON_MISALIGNED;
    reason = request_translate(&single->job, request, guard);
    if (reason)
        return reason;
    if (IS_FOREIGN(request->hit.hva)) { /* the kernel copies an aligned word as one, on the machines that we know of */
        return process_move(request, &single->value, single->width, &single->job.done);
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
        .job = {.engine = engine, .request = {.rid = rid, .pasid = pasid, .need = VIO_WRITE, .iova = iova}},
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
        .job = {.engine = engine, .request = {.rid = rid, .pasid = pasid, .need = VIO_READ, .iova = iova}},
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
