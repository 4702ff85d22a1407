/* Slow paths of the gate; see gate.h. */
#include "gate.h"

void gate_init(struct gate *gate)
{
    gate->state = gate->phase = gate->waiting = 0;
    pthread_mutex_init(&gate->changes, NULL);
    pthread_mutex_init(&gate->lock, NULL);
    pthread_cond_init(&gate->opened, NULL);
    pthread_cond_init(&gate->emptied, NULL);
}

void gate_deinit(struct gate *gate)
{
    pthread_cond_destroy(&gate->emptied);
    pthread_cond_destroy(&gate->opened);
    pthread_mutex_destroy(&gate->lock);
    pthread_mutex_destroy(&gate->changes);
}

void gate_reserve(struct gate *gate)
{
    pthread_mutex_lock(&gate->changes);
}

void gate_release(struct gate *gate)
{
    pthread_mutex_unlock(&gate->changes);
}

void gate_close(struct gate *gate)
{
    pthread_mutex_lock(&gate->lock);
    __atomic_fetch_or(&gate->state, GATE_CLOSED, __ATOMIC_RELAXED);
    while (__atomic_load_n(&gate->state, __ATOMIC_ACQUIRE) & GATE_PASSED)
        pthread_cond_wait(&gate->emptied, &gate->lock);
    pthread_mutex_unlock(&gate->lock);
}

void gate_open(struct gate *gate)
{
    pthread_mutex_lock(&gate->lock);
    /* Who waits has passed with this, before any later change can find the gate empty. */
    __atomic_fetch_add(&gate->state, gate->waiting - GATE_CLOSED, __ATOMIC_RELEASE);
    gate->phase++;
    if (gate->waiting)
        pthread_cond_broadcast(&gate->opened);
    gate->waiting = 0;
    pthread_mutex_unlock(&gate->lock);
}

/* The gate was closed when we counted ourselves in: count out, and wait for the opening that counts us in again. */
void gate_wait(struct gate *gate)
{
    uint64_t phase;

    gate_leave(gate);
    pthread_mutex_lock(&gate->lock);
    if (!(__atomic_load_n(&gate->state, __ATOMIC_RELAXED) & GATE_CLOSED)) { /* opened meanwhile, closed under `lock` */
        __atomic_fetch_add(&gate->state, 1, __ATOMIC_ACQUIRE);
    } else {
        gate->waiting++;
        for (phase = gate->phase; phase == gate->phase;)
            pthread_cond_wait(&gate->opened, &gate->lock);
    }
    pthread_mutex_unlock(&gate->lock);
}

void gate_emptied(struct gate *gate)
{
    pthread_mutex_lock(&gate->lock);
    pthread_cond_signal(&gate->emptied);
    pthread_mutex_unlock(&gate->lock);
}
