/*
 * Memory of processes: demand faulting included, nothing pinned.
 *
 * A space can stand for a process's address space: then translation is the identity, without a table of ours. Or a table
 * of ours leads to addresses of a process that was lent to its space. An address of another process's has VIO_FOREIGN
 * set, from the leaf to the IOTLB and the copy, and is touched by process_vm_readv(2) and process_vm_writev(2), for which
 * the kernel faults pages in and checks what they permit and whether we may touch that process at all. This process's own
 * is touched plainly, under the guard.
 *
 * Those calls name a process by its pid, which may be another's by then. So a space holds /proc/PID/pagemap, which is
 * bound to the address space (struct mm_struct) itself: once that is gone, by exit or by exec, it reads as empty. It is
 * asked before each write and after each read, and costs half of what the call itself does.
 */
#ifndef VIOASID_PROCESS_SPACE_H
#define VIOASID_PROCESS_SPACE_H

#include <stdbool.h>
#include <stdint.h>

#include "vio.h"

struct guard;
struct request;
struct space;
struct walk;

struct vio_process {
    int pid;
    int pagemap; /* file descriptor; tells whether the address space still lives */
    bool own;
    uint32_t holders;
};

/* The walker of spaces that stand for a process. */
int walk_process(const struct space *space, struct guard *guard, struct walk *walk);

/* Is what the request was translated to another process's? Then its bytes are moved by process_move. */
#define IS_FOREIGN(address) __builtin_expect(((address) & VIO_FOREIGN) != 0, 0)

/*
 * Move `size` bytes, at most JOB_BUDGET, between `buffer` and request->hit of another process. The count moved in
 * *moved; 0, or the reason why it ends there, request->iova and the walk telling where.
 */
int process_move(struct request *request, void *buffer, uint64_t size, uint64_t *moved);

/* Why a process could not be touched at request->hit; the walk tells where. */
int process_reason(struct request *request);

/* What is mapped at request->iova, without touching it: narrow request->hit to it; 0, or a reason. */
int process_look(struct request *request);

#endif
