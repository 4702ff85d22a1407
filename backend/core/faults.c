/* The ring of faults; see faults.h. */
#include "faults.h"

#include <stdlib.h>

#include "engine.h"

int fault_ring_init(struct fault_ring *ring)
{
    *ring = (struct fault_ring){0};
    ring->records = calloc(VIO_FAULT_RING, sizeof *ring->records);
    if (!ring->records)
        return VIO_ERR_MEMORY;
    pthread_mutex_init(&ring->lock, NULL);
    return VIO_OK;
}

void fault_ring_deinit(struct fault_ring *ring)
{
    pthread_mutex_destroy(&ring->lock);
    free(ring->records);
}

void fault_ring_put(struct fault_ring *ring, const vio_fault *fault)
{
    pthread_mutex_lock(&ring->lock);
    if (ring->used < VIO_FAULT_RING)
        ring->records[(ring->first + ring->used++) % VIO_FAULT_RING] = *fault;
    else
        ring->dropped++;
    pthread_mutex_unlock(&ring->lock);
}

uint32_t vio_faults(vio_engine *engine, vio_fault *out, uint32_t room)
{
    struct fault_ring *ring = &engine->faults;
    uint32_t taken = 0;

    pthread_mutex_lock(&ring->lock);
    for (; taken < room && ring->used; ring->used--)
        out[taken++] = ring->records[ring->first++ % VIO_FAULT_RING];
    pthread_mutex_unlock(&ring->lock);
    return taken;
}

uint64_t vio_faults_dropped(vio_engine *engine)
{
    uint64_t dropped;

    pthread_mutex_lock(&engine->faults.lock);
    dropped = engine->faults.dropped;
    pthread_mutex_unlock(&engine->faults.lock);
    return dropped;
}
