/*
 * AtomicOps: one read-modify-write of the CPU's, atomic to guest and devices alike.
 *
 * PCI Express Base Specification 5.0, 6.15 "Atomic Operations": FetchAdd and Swap of 32 and 64 bits, CAS of 32, 64 and
 * 128; the address is aligned to the operand (2.2.7); the answer is what stood there before, and FetchAdd lets the
 * carry go. The completer needs to read and write, whatever CAS finds.
 */
#include "request.h"

typedef unsigned __int128 wide __attribute__((may_alias));

struct atomic {
    struct job job;
    int operation;
    unsigned width;
    uint64_t operand[2], compare[2]; /* low half first */
    uint64_t before[2];
};

#if defined __x86_64__
__attribute__((target("cx16")))
#endif
static void swap_wide_if(wide *memory, struct atomic *atomic)
{
    wide compare = (wide)atomic->compare[1] << 64 | atomic->compare[0];
    wide operand = (wide)atomic->operand[1] << 64 | atomic->operand[0];
    wide before = __sync_val_compare_and_swap(memory, compare, operand);

    atomic->before[0] = (uint64_t)before;
    atomic->before[1] = (uint64_t)(before >> 64);
}

#define OPERATE(type)                                                                                                  \
    do {                                                                                                               \
        type *place = memory, operand = (type)atomic->operand[0], before = (type)atomic->compare[0];                   \
                                                                                                                       \
        if (atomic->operation == VIO_ATOMIC_ADD)                                                                       \
            before = __atomic_fetch_add(place, operand, __ATOMIC_SEQ_CST);                                             \
        else if (atomic->operation == VIO_ATOMIC_SWAP)                                                                 \
            before = __atomic_exchange_n(place, operand, __ATOMIC_SEQ_CST);                                            \
        else                                                                                                           \
            __atomic_compare_exchange_n(place, &before, operand, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);           \
        atomic->before[0] = before;                                                                                    \
    } while (0)

static int run_atomic(struct guard *guard, void *context)
{
    struct atomic *atomic = context;
    struct request *request = &atomic->job.request;
    void *memory;
    int reason;

    if (request->iova % atomic->width)
        return VIO_REASON_MISALIGNED;
    reason = request_translate(&atomic->job, request, guard);
    if (reason)
        return reason;
    if (IS_FOREIGN(request->hit.hva)) { /* no call of the kernel's reads, changes and writes another process's memory at once */
        process_place(request);
        return VIO_REASON_UNSUPPORTED;
    }
    memory = (void *)(uintptr_t)request->hit.hva;
    about_to_touch(request, guard, 0, atomic->width);
    if (atomic->width == 16)
        swap_wide_if(memory, atomic);
    else if (atomic->width == 8)
        OPERATE(uint64_t);
    else
        OPERATE(uint32_t);
    if (atomic->operation != VIO_ATOMIC_CAS || (atomic->before[0] == atomic->compare[0] &&
                                                atomic->before[1] == atomic->compare[1]))
        dirty_mark(request->dirty, request->hit.gpa, atomic->width);
    atomic->job.done = atomic->width;
    return 0;
}

int vio_atomic(vio_engine *engine, uint32_t rid, uint32_t pasid, uint64_t iova, int operation, uint32_t width,
               const uint64_t *operand, const uint64_t *compare, uint64_t *before)
{
    struct atomic atomic = {
        .job = {.engine = engine, .request = {.rid = rid, .pasid = pasid, .need = RW_BOTH, .iova = iova}},
        .operation = operation,
        .width = width,
        .operand = {operand[0], operand[1]},
        .compare = {compare[0], compare[1]},
    };
    int status;

    if (operation < VIO_ATOMIC_ADD || operation > VIO_ATOMIC_CAS ||
        (width != 4 && width != 8 && !(width == 16 && operation == VIO_ATOMIC_CAS)) ||
        (width == 4 && (operand[0] | compare[0]) >> 32) || (width < 16 && (operand[1] | compare[1])))
        return VIO_ERR_VALUE;
    status = job_run(&atomic.job, run_atomic);
    if (!status) {
        before[0] = atomic.before[0];
        before[1] = atomic.before[1];
    }
    return status;
}
