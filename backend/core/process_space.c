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

vio_process *process_hold(vio_process *process)
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
        space->process = process_hold(process);
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
        space->process = process_hold(process);
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
bool process_alive(const vio_process *process)
{
    char byte;

    return pread(process->pagemap, &byte, sizeof byte, 0) != 0;
}

vio_process *process_of(const struct request *request)
{
    return space_bottom(request->space)->process;
}

void process_place(struct request *request)
{
    struct walk *walk = &request->walk;

    walk->stage = request->space->walk == walk_process ? 1 : 2;
    walk->level = 0;
    walk->entry = 0;
    walk->has_gpa = walk->stage == 2;
    walk->fault_gpa = request->hit.gpa;
}

int process_own_reason(struct request *request)
{
    char byte;
    struct iovec here = {&byte, 1}, there = {(void *)(uintptr_t)request->hit.hva, 1};

    process_place(request);
    /* As a processor's table would have it: what may not be read either is not present. */
    return (request->need & VIO_WRITE) && process_vm_readv(getpid(), &here, 1, &there, 1, 0) == 1
               ? VIO_REASON_PERMISSION
               : VIO_REASON_NOT_PRESENT;
}

int process_look(struct errand *errand, struct request *request)
{
    const vio_process *process = request->space->process;
    const struct mapping *found = &errand->found;

    if (errand->looked != process) { /* not yet, or the request has come to lead elsewhere */
        errand_look(errand, request);
        return 0;
    }
    errand->looked = NULL;
    request->walk.stage = 1;
    request->walk.has_gpa = false;
    if (!process_alive(process))
        return VIO_REASON_MEMORY_GONE;
    if (errand->reason)
        return errand->reason;
    if (!found->end)
        return VIO_REASON_NOT_PRESENT;
    if (request->need & PT_RWX & ~found->perm)
        return VIO_REASON_PERMISSION;
    request->hit.perm = PT_BOTH(found->perm);
    request->hit.size = found->end - request->iova;
    return 0;
}
