/*
 * Memory of processes: demand faulting included, nothing pinned.
 *
 * A space can stand for a process's address space: then translation is the identity, without a table of ours. Or a table
 * of ours leads to addresses of a process that was lent to its space. An address of another process's has VIO_FOREIGN
 * set, from the leaf to the IOTLB and the copy, and is touched by process_vm_readv(2) and process_vm_writev(2), for which
 * the kernel faults pages in and checks what they permit and whether we may touch that process at all: on an errand, as
 * that can take as long as the other process likes. This process's own is touched plainly, under the guard.
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

struct errand;
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

/* Is what the request was translated to another process's? Then its bytes are moved by an errand (errand.h). */
#define IS_FOREIGN(address) __builtin_expect(((address) & VIO_FOREIGN) != 0, 0)

/* The process whose memory the request was translated to. */
struct vio_process *process_of(const struct request *request);
struct vio_process *process_hold(struct vio_process *process);
/* Does the address space live that was held? */
bool process_alive(const struct vio_process *process);

/* Tell in the walk that request->hit, which a process has, is where the request ends. */
void process_place(struct request *request);
/* Why our own memory could not be touched at request->hit, and its place. */
int process_own_reason(struct request *request);

/*
 * What is mapped at request->iova, without touching it: narrow request->hit to it; 0, or a reason. It takes an errand: 0
 * as well, and it is to be asked again after that.
 */
int process_look(struct errand *errand, struct request *request);

#endif
