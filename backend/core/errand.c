/* Errands; see errand.h. */
#define _GNU_SOURCE
#include "errand.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "request.h"

#define DEATHS 3u /* of helpers in a row, by the thread that made them or by the system, until we give up */

void errands_init(struct errands *errands)
{
    errands->newest = NULL;
    errands->numbers = errands->count = 0;
    errands->patience = ERRAND_PATIENCE;
    pthread_mutex_init(&errands->lock, NULL);
    pthread_cond_init(&errands->ended, NULL);
    helpers_init(&errands->helpers);
}

void errands_deinit(struct errands *errands)
{
    helpers_deinit(&errands->helpers);
    pthread_cond_destroy(&errands->ended);
    pthread_mutex_destroy(&errands->lock);
}

uint64_t errand_add(struct errand *errand, struct request *request, void *buffer, uint64_t size)
{
    uint64_t address = request->hit.hva & ~VIO_FOREIGN, added = 0;

    errand->request = request;
    while (added < size && errand->pieces < ERRAND_PIECES && errand->size < ERRAND_SIZE) {
        uint64_t piece = PAGE - (address + added) % PAGE;

        if (piece > size - added)
            piece = size - added;
        errand->here[errand->pieces] = (struct iovec){(char *)buffer + added, piece};
        errand->there[errand->pieces++] = (struct iovec){(void *)(uintptr_t)(address + added), piece};
        errand->size += piece;
        added += piece;
    }
    if (request->need & VIO_WRITE)
        dirty_mark(request->dirty, request->hit.gpa, added); /* before: it may be broken off after any byte of it */
    return added;
}

/* In the gate: whoever closes it from now on will find the errand. */
static void set_out(struct errands *errands, struct errand *errand)
{
    const struct space *space = errand->request->space;
    unsigned known = 0;

    for (; space && known < ERRAND_SPACES; space = space->parent) {
        errand->spaces[known++] = space;
        if (space->bound && known < ERRAND_SPACES)
            errand->spaces[known++] = space->bound;
    }
    while (known < ERRAND_SPACES)
        errand->spaces[known++] = NULL;
    errand->rid = errand->request->rid;
    errand->pasid = errand->request->pasid;
    errand->helper = NULL;
    errand->hurried = false;
    pthread_mutex_lock(&errands->lock);
    errand->number = ++errands->numbers;
    errand->before = errands->newest;
    errand->next = NULL;
    if (errands->newest)
        errands->newest->next = errand;
    errands->newest = errand;
    __atomic_fetch_add(&errands->count, 1, __ATOMIC_RELAXED);
    pthread_mutex_unlock(&errands->lock);
}

static void come_back(struct errands *errands, struct errand *errand)
{
    pthread_mutex_lock(&errands->lock);
    if (errand->before)
        errand->before->next = errand->next;
    if (errand->next)
        errand->next->before = errand->before;
    else
        errands->newest = errand->before;
    __atomic_fetch_sub(&errands->count, 1, __ATOMIC_RELAXED);
    if (errand->hurried)
        pthread_cond_broadcast(&errands->ended);
    pthread_mutex_unlock(&errands->lock);
    if (errand->helper)
        helper_give(&errands->helpers, errand->helper);
}

/* Take another helper, or none. Whoever hurries the errand sees it, or has set the flag before. */
static bool change_helper(struct errands *errands, struct errand *errand, struct helper *helper)
{
    struct helper *old = errand->helper;

    pthread_mutex_lock(&errands->lock);
    errand->helper = helper;
    pthread_mutex_unlock(&errands->lock);
    if (old)
        helper_give(&errands->helpers, old);
    return helper;
}

/* Have a system call made about a process: its result, unless it was broken off. */
static enum helper_end have_called(struct errands *errands, struct errand *errand, const vio_process *process,
                                   long number, const long arguments[6], uint64_t latest, long *result)
{
    enum helper_end end = HELPER_DIED;

    for (unsigned deaths = 0; end == HELPER_DIED && deaths < DEATHS; deaths++) {
        if (!errand->helper && !change_helper(errands, errand, helper_take(&errands->helpers, process->pid)))
            return HELPER_LATE;
        end = helper_call(errand->helper, number, arguments, latest, &errand->hurried, result);
        if (end != HELPER_ANSWERED)
            change_helper(errands, errand, NULL);
    }
    return end == HELPER_DIED ? HELPER_LATE : end;
}

/* Have bytes copied between iovecs here and there: their count, or -errno, in *result. */
static enum helper_end transfer(struct errands *errands, struct errand *errand, const vio_process *process,
                                const struct iovec *here, const struct iovec *there, unsigned count, bool write,
                                uint64_t latest, long *result)
{
    const long arguments[6] = {process->pid, (long)(uintptr_t)here, count, (long)(uintptr_t)there, count, 0};
    const long number = write ? SYS_process_vm_writev : SYS_process_vm_readv;

    return have_called(errands, errand, process, number, arguments, latest, result);
}

/* A line of /proc/PID/maps (proc(5)): "first-end rwxp ..."; false: it is none. */
static bool parse_mapping(const char *line, struct mapping *mapping)
{
    char rights[5];

    if (sscanf(line, "%" SCNx64 "-%" SCNx64 " %4s", &mapping->first, &mapping->end, rights) != 3)
        return false;
    mapping->perm = (rights[0] == 'r' ? VIO_READ : 0u) | (rights[1] == 'w' ? VIO_WRITE : 0u) |
                    (rights[2] == 'x' ? VIO_EXECUTE : 0u);
    return true;
}

/* The mapping at request->iova, or none there, in errand->found; or a reason. */
static void look(struct errands *errands, struct errand *errand, const vio_process *process)
{
    char path[32], text[8192 + 1];
    uint64_t iova = errand->request->iova, latest = helper_clock() + ERRAND_LOOK;
    size_t kept = 0; /* of a line that is not whole yet */
    long result;
    bool found = false;
    const long opening[6] = {AT_FDCWD, (long)(uintptr_t)path, O_RDONLY | O_CLOEXEC};
    enum helper_end end;
    int fd;

    errand->found = (struct mapping){0};
    errand->reason = 0;
    snprintf(path, sizeof path, "/proc/%d/maps", process->pid);
    end = have_called(errands, errand, process, SYS_openat, opening, latest, &result);
    fd = end == HELPER_ANSWERED ? (int)result : -1;
    while (end == HELPER_ANSWERED && fd >= 0 && !found) {
        const long reading[6] = {fd, (long)(uintptr_t)(text + kept), (long)(sizeof text - 1 - kept)};
        char *line = text, *rest;

        end = have_called(errands, errand, process, SYS_read, reading, latest, &result);
        if (end != HELPER_ANSWERED || result <= 0)
            break;
        text[kept + (size_t)result] = 0;
        for (; !found && (rest = strchr(line, '\n')); line = rest + 1) {
            struct mapping mapping;

            found = parse_mapping(line, &mapping) && iova < mapping.end;
            if (found && mapping.first <= iova)
                errand->found = mapping;
        }
        kept = strlen(line);
        memmove(text, line, kept + 1);
    }
    if (fd >= 0)
        close(fd);
    if (end == HELPER_LATE)
        errand->reason = VIO_REASON_WITHHELD;
    errand->looked = end == HELPER_HURRIED ? NULL : process;
    errand->moved = 0;
}

/* Why nothing was moved of the piece at `there`; 0: it was broken off, and is to be tried again. */
static int refusal(struct errands *errands, struct errand *errand, const vio_process *process, const struct iovec *there,
                   bool write, uint64_t latest)
{
    char byte;
    struct iovec one = {&byte, 1}, of = {there->iov_base, 1};
    enum helper_end end;
    long result;

    if (!process_alive(process))
        return VIO_REASON_MEMORY_GONE;
    if (!write)
        return VIO_REASON_NOT_PRESENT;
    /* As a processor's table would have it: what may not be read either is not present. */
    end = transfer(errands, errand, process, &one, &of, 1, false, latest, &result);
    if (end != HELPER_ANSWERED)
        return end == HELPER_LATE ? VIO_REASON_WITHHELD : 0;
    return result == 1 ? VIO_REASON_PERMISSION : VIO_REASON_NOT_PRESENT;
}

static void advance(struct errand *errand, unsigned *piece, uint64_t bytes)
{
    errand->moved += bytes;
    while (bytes) {
        struct iovec *here = &errand->here[*piece], *there = &errand->there[*piece];
        uint64_t part = bytes < here->iov_len ? bytes : here->iov_len;

        here->iov_base = (char *)here->iov_base + part;
        there->iov_base = (char *)there->iov_base + part;
        here->iov_len = there->iov_len -= part;
        bytes -= part;
        *piece += !here->iov_len;
    }
}

static void move(struct errands *errands, struct errand *errand, const vio_process *process, bool write)
{
    uint64_t latest, half;
    unsigned piece = 0;
    bool by_pages = false;

    errand->moved = 0;
    errand->reason = 0;
    if (!errand->since)
        errand->since = helper_clock();
    latest = errand->since + __atomic_load_n(&errands->patience, __ATOMIC_RELAXED);
    half = errand->since + (latest - errand->since) / 2;
    if (write && !process_alive(process))
        errand->reason = VIO_REASON_MEMORY_GONE;
    while (!errand->reason && errand->moved < errand->size) {
        unsigned count = by_pages ? 1 : errand->pieces - piece;
        long result = 0;
        enum helper_end end = transfer(errands, errand, process, &errand->here[piece], &errand->there[piece], count,
                                       write, by_pages || count == 1 ? latest : half, &result);

        if (end == HELPER_HURRIED)
            break;
        if (end == HELPER_LATE && !by_pages && count > 1) {
            by_pages = true; /* what was moved of it nobody knows: find the page that does not come */
            continue;
        }
        if (end == HELPER_LATE) {
            errand->reason = VIO_REASON_WITHHELD;
        } else if (result > 0) {
            advance(errand, &piece, (uint64_t)result);
            if (__atomic_load_n(&errand->hurried, __ATOMIC_RELAXED))
                break;
        } else if (result && result != -EFAULT) { /* it ended (ESRCH), or became another user's (EPERM) */
            errand->reason = VIO_REASON_MEMORY_GONE;
        } else {
            errand->reason = refusal(errands, errand, process, &errand->there[piece], write, latest);
            break;
        }
    }
    if (!write && !process_alive(process)) { /* it may have been another process that was read: nothing of it counts */
        errand->reason = VIO_REASON_MEMORY_GONE;
        errand->moved = 0;
    }
    if (errand->moved)
        errand->since = 0;
    errand->stopped = errand->here[piece < errand->pieces ? piece : 0];
}

void errand_run(struct vio_engine *engine, struct errand *errand)
{
    vio_process *process = process_hold(process_of(errand->request));
    bool write = errand->request->need & VIO_WRITE;

    set_out(&engine->errands, errand);
    gate_leave(&engine->gate);
    if (errand->look)
        look(&engine->errands, errand, process);
    else
        move(&engine->errands, errand, process, write);
    come_back(&engine->errands, errand);
    vio_process_release(process);
    errand->pieces = 0;
    errand->size = 0;
    errand->look = false;
}

/* The caller's buffer may be a mapped file, truncated by now: touched here, that is the guard's to tell. */
static void touch(const volatile char *buffer, uint64_t size)
{
    for (uint64_t at = 0; at < size; at += PAGE - (uintptr_t)(buffer + at) % PAGE)
        (void)buffer[at];
}

int errand_reason(struct errand *errand, struct request *request)
{
    int reason = errand->reason;

    errand->reason = 0;
    if (reason == VIO_REASON_NOT_PRESENT || reason == VIO_REASON_PERMISSION)
        touch(errand->stopped.iov_base, errand->stopped.iov_len);
    process_place(request);
    return reason;
}

/* What a change has changed; without a space, the requests of a RID and PASID, VIO_ANY_PASID: of them all. */
struct change {
    bool everything;
    const struct space *space;
    uint32_t rid, pasid;
};

static bool concerns(const struct change *change, const struct errand *errand)
{
    if (change->everything)
        return true;
    if (!change->space)
        return errand->rid == change->rid && (change->pasid == VIO_ANY_PASID || errand->pasid == change->pasid);
    for (unsigned i = 0; i < ERRAND_SPACES; i++)
        if (errand->spaces[i] == change->space)
            return true;
    return errand->spaces[ERRAND_SPACES - 1]; /* there may be more than it knows of */
}

/* Hurry those that it concerns, and wait for them. */
static void end(struct errands *errands, const struct change *change)
{
    uint64_t newest;
    bool waiting = true;

    if (!__atomic_load_n(&errands->count, __ATOMIC_RELAXED)) /* the gate orders it: it was closed since they set out */
        return;
    pthread_mutex_lock(&errands->lock);
    for (newest = errands->numbers; waiting;) {
        waiting = false;
        for (struct errand *errand = errands->newest; errand; errand = errand->before) {
            if (errand->number > newest || !concerns(change, errand))
                continue;
            waiting = true;
            if (!errand->hurried) {
                __atomic_store_n(&errand->hurried, true, __ATOMIC_SEQ_CST);
                if (errand->helper)
                    helper_hurry(errand->helper);
            }
        }
        if (waiting)
            pthread_cond_wait(&errands->ended, &errands->lock);
    }
    pthread_mutex_unlock(&errands->lock);
}

void errands_end_space(struct vio_engine *engine, const struct space *space)
{
    if (space)
        end(&engine->errands, &(struct change){.space = space});
}

void errands_end_route(struct vio_engine *engine, uint32_t rid, uint32_t pasid)
{
    end(&engine->errands, &(struct change){.rid = rid, .pasid = pasid});
}

void errands_end_device(struct vio_engine *engine, uint32_t rid)
{
    end(&engine->errands, &(struct change){.rid = rid, .pasid = VIO_ANY_PASID});
}

void errands_end_all(struct vio_engine *engine)
{
    end(&engine->errands, &(struct change){.everything = true});
}

int vio_patience(vio_engine *engine, uint64_t nanoseconds)
{
    if (!nanoseconds || nanoseconds > VIO_MAX_PATIENCE)
        return VIO_ERR_VALUE;
    __atomic_store_n(&engine->errands.patience, nanoseconds, __ATOMIC_RELAXED);
    return VIO_OK;
}
