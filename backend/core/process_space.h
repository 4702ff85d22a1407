/*
 * Spaces that stand for the address space of a process: an IOVA is an address of that process, demand faulting
 * included, nothing pinned and no table of ours.
 *
 * Translation is the identity, and what differs is how the bytes are touched: this process's own plainly, under the
 * guard; another's by process_vm_readv(2) and process_vm_writev(2), for which the kernel faults pages in and checks
 * what they permit and whether we may touch that process at all.
 *
 * Those calls name a process by its pid, which may be another's by then. So a space holds /proc/PID/pagemap, which is
 * bound to the address space (struct mm_struct) itself: once that is gone, by exit or by exec, it reads as empty. It is
 * asked before each write and after each read, and costs half of what the call itself does.
 */
#ifndef VIOASID_PROCESS_SPACE_H
#define VIOASID_PROCESS_SPACE_H

#include <stdbool.h>
#include <stdint.h>

struct guard;
struct request;
struct space;
struct walk;

struct process {
    int pid;
    int pagemap; /* file descriptor; tells whether the address space still lives */
    bool own;
};

void process_free(struct process *process); /* NULL: nothing to do */

/* The walker of such spaces. */
int walk_process(const struct space *space, struct guard *guard, struct walk *walk);

/*
 * Move `size` bytes, at most JOB_BUDGET, between `buffer` and request->iova of another process. The count moved in
 * *moved; 0, or the reason why it ends there, request->iova and the walk telling where.
 */
int process_move(struct request *request, void *buffer, uint64_t size, uint64_t *moved);

/* Why this process, or another, could not be touched at request->iova; the walk tells where. */
int process_reason(struct request *request);

/* What is mapped at request->iova, without touching it: narrow request->hit to it; 0, or a reason. */
int process_look(struct request *request);

#endif
