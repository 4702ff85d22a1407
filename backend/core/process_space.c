/* Memory of processes; see process_space.h. */
#define _GNU_SOURCE
#include "process_space.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#include "request.h"

#define PROCESS_BITS 47u /* of a process's own half on x86-64 with 4-level paging; Linux gives no others unless asked */

int vio_process_hold(uint32_t pid, int pagemap, vio_process **out)
{
    vio_process *process = malloc(sizeof *process);
    int status;

    if (!process)
        return VIO_ERR_MEMORY;
    *process = (vio_process){(int)pid, fcntl(pagemap, F_DUPFD_CLOEXEC, 0), (int)pid == getpid(), 1};
    if (process->pagemap < 0) {
        status = errno == EBADF ? VIO_ERR_VALUE : VIO_ERR_LIMIT;
        free(process);
        return status;
    }
    *out = process;
    return VIO_OK;
}

static vio_process *hold(vio_process *process)
{
    __atomic_fetch_add(&process->holders, 1, __ATOMIC_RELAXED);
    return process;
}

void vio_process_release(vio_process *process)
{
    if (!process || __atomic_fetch_sub(&process->holders, 1, __ATOMIC_ACQ_REL) > 1)
        return;
    close(process->pagemap);
    free(process);
}

int vio_space_create_process(vio_engine *engine, uint32_t ioasid, vio_process *process)
{
    struct space *space;
    int status;

    engine_change_begin(engine);
    status = space_add(engine, ioasid, &space);
    if (!status) {
        space->format = -1;
        space->process = hold(process);
        space->walk = walk_process;
        iotlb_scope_begin(&engine->iotlb, &space->scope, NULL);
    }
    engine_change_end(engine);
    return status;
}

int vio_space_lend_process(vio_engine *engine, uint32_t ioasid, vio_process *process)
{
    struct space *space;
    int status = VIO_ERR_UNKNOWN;

    engine_change_begin(engine);
    space = space_find(engine, ioasid);
    if (space)
        status = !space_has_table(space) ? VIO_ERR_KIND : space->process ? VIO_ERR_EXISTS : VIO_OK;
    if (!status)
        space->process = hold(process);
    engine_change_end(engine);
    return status;
}

int walk_process(const struct space *space, struct guard *guard, struct walk *walk)
{
    (void)guard;
    if (walk->iova >> PROCESS_BITS) {
        walk->stage = 1;
        return VIO_REASON_ADDRESS_WIDTH;
    }
    walk->gpa = walk->iova;
    walk->hva = walk->iova | (space->process->own ? 0 : VIO_FOREIGN);
    walk->size_lg2 = PROCESS_BITS;
    walk->perm = PT_BOTH((unsigned)PT_RWX);
    return 0;
}

/* Does the address space that the space was made for still live? A word is 8 bytes: asked for less, it answers so. */
static bool alive(const vio_process *process)
{
    char byte;

    return pread(process->pagemap, &byte, sizeof byte, 0) != 0;
}

/* Of the space that translated, or of the host-managed one beneath it. */
static const vio_process *process_of(const struct request *request)
{
    return space_bottom(request->space)->process;
}

static ssize_t transfer(const vio_process *process, uint64_t address, void *buffer, uint64_t size, bool write)
{
    struct iovec local = {buffer, size}, remote = {(void *)(uintptr_t)address, size};

    return write ? process_vm_writev(process->pid, &local, 1, &remote, 1, 0)
                 : process_vm_readv(process->pid, &local, 1, &remote, 1, 0);
}

int process_reason(struct request *request)
{
    const vio_process *process = process_of(request);
    struct walk *walk = &request->walk;
    char byte;

    walk->stage = request->space->walk == walk_process ? 1 : 2;
    walk->level = 0;
    walk->entry = 0;
    walk->has_gpa = walk->stage == 2;
    walk->fault_gpa = request->hit.gpa;
    if (!alive(process))
        return VIO_REASON_MEMORY_GONE;
    if (!(request->need & VIO_WRITE))
        return VIO_REASON_NOT_PRESENT;
    /* As a processor's table would have it: what may not be read either is not present. */
    return transfer(process, request->hit.hva & ~VIO_FOREIGN, &byte, 1, false) == 1 ? VIO_REASON_PERMISSION
                                                                                    : VIO_REASON_NOT_PRESENT;
}

/* The caller's buffer may be a mapped file, truncated by now: touched here, that is the guard's to tell. */
static void touch(const volatile char *buffer, uint64_t size)
{
    for (uint64_t at = 0; at < size; at += PAGE - (uintptr_t)(buffer + at) % PAGE)
        (void)buffer[at];
}

/* The request stands so many bytes further on. */
static void advance(struct request *request, uint64_t bytes)
{
    request->iova += bytes;
    request->hit.hva += bytes;
    request->hit.gpa += bytes;
}

int process_move(struct request *request, void *buffer, uint64_t size, uint64_t *moved)
{
    const vio_process *process = process_of(request);
    uint64_t start = request->hit.hva & ~VIO_FOREIGN, done = 0, ask = size;
    bool write = request->need & VIO_WRITE;

    *moved = 0;
    if (write) {
        if (!alive(process))
            return process_reason(request);
        dirty_mark(request->dirty, request->hit.gpa, size);
    }
    while (done < size) {
        ssize_t got = transfer(process, start + done, (char *)buffer + done, ask, write);
        uint64_t page = PAGE - (start + done) % PAGE;

        if (got > 0) {
            done += (uint64_t)got;
            ask = size - done;
        } else if (got < 0 && errno != EFAULT) { /* it ended (ESRCH), or became another user's (EPERM) */
            process_reason(request);
            return VIO_REASON_MEMORY_GONE;
        } else if (ask > page) { /* how much is moved before a page that cannot be is the kernel's choice */
            ask = page;
        } else {
            touch((char *)buffer + done, ask);
            *moved = done;
            advance(request, done);
            return process_reason(request);
        }
    }
    if (!write && !alive(process)) /* it may have been another process that was read: nothing of it counts */
        return process_reason(request);
    *moved = done;
    return 0;
}

/* The next line of /proc/PID/maps (proc(5)); a path may be longer than what we look at. */
static bool next_mapping(FILE *maps, uint64_t *first, uint64_t *end, char rights[5])
{
    char line[128];
    bool told = fgets(line, sizeof line, maps) &&
                sscanf(line, "%" SCNx64 "-%" SCNx64 " %4s", first, end, rights) == 3;

    while (told && !strchr(line, '\n') && fgets(line, sizeof line, maps))
        continue;
    return told;
}

int process_look(struct request *request)
{
    const vio_process *process = request->space->process;
    uint64_t first = 0, end = 0;
    char path[32], rights[5];
    unsigned perm = 0;
    FILE *maps;

    snprintf(path, sizeof path, "/proc/%d/maps", process->pid);
    maps = fopen(path, "re");
    while (maps && end <= request->iova && next_mapping(maps, &first, &end, rights))
        continue;
    if (maps)
        fclose(maps);
    if (first <= request->iova && request->iova < end)
        perm = (rights[0] == 'r' ? VIO_READ : 0u) | (rights[1] == 'w' ? VIO_WRITE : 0u) |
               (rights[2] == 'x' ? VIO_EXECUTE : 0u);
    request->walk.stage = 1;
    request->walk.has_gpa = false;
    if (!alive(process))
        return VIO_REASON_MEMORY_GONE;
    if (!perm)
        return VIO_REASON_NOT_PRESENT;
    if (request->need & PT_RWX & ~perm)
        return VIO_REASON_PERMISSION;
    request->hit.perm = PT_BOTH(perm);
    request->hit.size = end - request->iova;
    return 0;
}
