/*
 * The ring of faults not yet read. It holds VIO_FAULT_RING of them, drops later ones until it is read, and counts what
 * it drops, as an IOMMU's own log does: the first faults of a storm tell more than the last.
 */
#ifndef VIOASID_FAULTS_H
#define VIOASID_FAULTS_H

#include <pthread.h>

#include "vio.h"

struct fault_ring {
    pthread_mutex_t lock;
    vio_fault *records;
    uint64_t first, used; /* position of the oldest, and how many there are */
    uint64_t dropped;
};

int fault_ring_init(struct fault_ring *ring); /* 0 or a vio_status */
void fault_ring_deinit(struct fault_ring *ring);
void fault_ring_put(struct fault_ring *ring, const vio_fault *fault);

#endif
