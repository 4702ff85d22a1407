/* Address spaces of processes; see process_space.h. */
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

int vio_space_create_process(vio_engine *engine, uint32_t ioasid, uint32_t pid, int pagemap)
{
    struct process *process = malloc(sizeof *process);
    struct space *space;
    int status;

    if (!process)
        return VIO_ERR_MEMORY;
    *process = (struct process){(int)pid, fcntl(pagemap, F_DUPFD_CLOEXEC, 0), (int)pid == getpid()};
    if (process->pagemap < 0) {
        status = errno == EBADF ? VIO_ERR_VALUE : VIO_ERR_LIMIT;
        free(process);
        return status;
    }
    engine_change_begin(engine);
    status = space_add(engine, ioasid, &space);
    if (!status) {
        space->format = -1;
        space->process = process;
        space->walk = walk_process;
        iotlb_scope_begin(&engine->iotlb, &space->scope, NULL);
    }
    engine_change_end(engine);
    if (status)
        process_free(process);
    return status;
}

void process_free(struct process *process)
{
    if (!process)
        return;
    close(process->pagemap);
    free(process);
}

int walk_process(const struct space *space, struct guard *guard, struct walk *walk)
{
    (void)space;
    (void)guard;
    if (walk->iova >> PROCESS_BITS) {
        walk->stage = 1;
        return VIO_REASON_ADDRESS_WIDTH;
    }
    walk->hva = walk->gpa = walk->iova;
    walk->size_lg2 = PROCESS_BITS;
    walk->perm = PT_BOTH((unsigned)PT_RWX);
    return 0;
}

/* Does the address space that the space was made for still live? A word is 8 bytes: asked for less, it answers so. */
static bool alive(const struct process *process)
{
    char byte;

    return pread(process->pagemap, &byte, sizeof byte, 0) != 0;
}

static ssize_t transfer(const struct process *process, uint64_t address, void *buffer, uint64_t size, bool write)
{
    struct iovec local = {buffer, size}, remote = {(void *)(uintptr_t)address, size};

    return write ? process_vm_writev(process->pid, &local, 1, &remote, 1, 0)
                 : process_vm_readv(process->pid, &local, 1, &remote, 1, 0);
}

int process_reason(struct request *request)
{
    const struct process *process = request->space->process;
    char byte;

    request->walk.stage = 1;
    request->walk.level = 0;
    request->walk.entry = 0;
    request->walk.has_gpa = false;
    if (!alive(process))
        return VIO_REASON_MEMORY_GONE;
    if (!(request->need & VIO_WRITE))
        return VIO_REASON_NOT_PRESENT;
    /* As a processor's table would have it: what may not be read either is not present. */
    return transfer(process, request->iova, &byte, 1, false) == 1 ? VIO_REASON_PERMISSION : VIO_REASON_NOT_PRESENT;
}

/* The caller's buffer may be a mapped file, truncated by now: touched here, that is the guard's to tell. */
static void touch(const volatile char *buffer, uint64_t size)
{
    for (uint64_t at = 0; at < size; at += PAGE - (uintptr_t)(buffer + at) % PAGE)
        (void)buffer[at];
}

int process_move(struct request *request, void *buffer, uint64_t size, uint64_t *moved)
{
    const struct process *process = request->space->process;
    bool write = request->need & VIO_WRITE;
    uint64_t start = request->iova, done = 0, ask = size;

    *moved = 0;
    if (write && !alive(process))
        return process_reason(request);
    while (done < size) {
        ssize_t got = transfer(process, start + done, (char *)buffer + done, ask, write);

        if (got <= 0) {
            uint64_t page = PAGE - (start + done) % PAGE;

            request->iova = start + done;
            if (got < 0 && errno != EFAULT) { /* it ended (ESRCH), or became another user's (EPERM) */
                process_reason(request);
                return VIO_REASON_MEMORY_GONE;
            }
            if (ask > page) { /* how much of a range is moved before a page that cannot be is the kernel's choice */
                ask = page;
                continue;
            }
            touch((char *)buffer + done, ask);
            *moved = done;
            return process_reason(request);
        }
        done += (uint64_t)got;
        ask = size - done;
    }
    if (!write && !alive(process)) { /* it may have been another process that was read: nothing of it counts */
        request->iova = start;
        return process_reason(request);
    }
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
    const struct process *process = request->space->process;
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
