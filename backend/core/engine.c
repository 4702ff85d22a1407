/* Engine: creation, IOTLB tags, totals. */
#define _GNU_SOURCE
#include "engine.h"

#include <stdlib.h>
#include <string.h>

/*
 * Tags are given out upward; before they run out, at a change, all start again. Between two
 * such changes only children renew theirs, each at most once, so VIO_MAX_SPACES of headroom are enough.
 */
#define LAST_TAG (UINT32_MAX - 2 * VIO_MAX_SPACES)

int vio_engine_create(uint32_t iotlb_entries, vio_engine **out)
{
    struct vio_engine *engine = calloc(1, sizeof *engine);
    int status;

    if (!engine)
        return VIO_ERR_MEMORY;
    status = iotlb_init(&engine->iotlb, iotlb_entries);
    if (status) {
        free(engine);
        return status;
    }
    if (guard_install() || index_init(&engine->spaces) || index_init(&engine->routes)) {
        index_deinit(&engine->spaces);
        index_deinit(&engine->routes);
        iotlb_deinit(&engine->iotlb);
        free(engine);
        return VIO_ERR_MEMORY;
    }
    pool_init(&engine->pool);
    gate_init(&engine->gate);
    pthread_mutex_init(&engine->tag_lock, NULL);
    engine->next_tag = 1;
    *out = engine;
    return VIO_OK;
}

void vio_engine_destroy(vio_engine *engine)
{
    for (size_t i = 0; i <= engine->spaces.mask; i++)
        free(engine->spaces.slots[i].value); /* its table pages go with the pool */
    for (size_t i = 0; i <= engine->routes.mask; i++)
        free(engine->routes.slots[i].value);
    index_deinit(&engine->spaces);
    index_deinit(&engine->routes);
    iotlb_deinit(&engine->iotlb);
    pool_deinit(&engine->pool);
    pthread_mutex_destroy(&engine->tag_lock);
    gate_deinit(&engine->gate);
    free(engine);
}

void vio_engine_counters(vio_engine *engine, vio_counters *out)
{
    engine_change_begin(engine);
    *out = engine->counters;
    out->spaces = engine->spaces.used;
    out->routes = engine->routes.used;
    out->table_pages = engine->pool.pages;
    engine_change_end(engine);
}

static void restart_tags(struct vio_engine *engine)
{
    iotlb_flush(&engine->iotlb);
    engine->next_tag = 1;
    for (size_t i = 0; i <= engine->spaces.mask; i++) {
        struct space *space = engine->spaces.slots[i].value;

        if (!space)
            continue;
        space->tag = engine->next_tag++;
        space->sizes = 0;
    }
}

void engine_forget_space(struct vio_engine *engine, struct space *space)
{
    if (engine->next_tag >= LAST_TAG)
        restart_tags(engine);
    space->tag = engine->next_tag++;
    space->sizes = 0;
    space->seen = space->parent ? space->parent->epoch : 0;
}

void engine_forget_range(struct vio_engine *engine, struct space *space, uint64_t first, uint64_t last)
{
    if (!iotlb_forget(&engine->iotlb, space->tag, space->sizes, first, last))
        engine_forget_space(engine, space);
    /* Children's entries are found by their IOVA, not by ours: they get a new tag when next used. */
    space->epoch++;
    if (engine->next_tag >= LAST_TAG)
        restart_tags(engine);
}

void space_renew_tag(struct vio_engine *engine, struct space *space)
{
    pthread_mutex_lock(&engine->tag_lock);
    if (space->seen != space->parent->epoch) {
        space->tag = engine->next_tag++;
        space->sizes = 0;
        __atomic_store_n(&space->seen, space->parent->epoch, __ATOMIC_RELEASE);
    }
    pthread_mutex_unlock(&engine->tag_lock);
}

const struct pt_format *const pt_formats[PT_FORMATS] = {
#define X(name) &name##_format,
    FORMATS(X)
#undef X
};

int vio_format_find(const char *name)
{
    for (int id = 0; id < PT_FORMATS; id++)
        if (!strcmp(pt_formats[id]->name, name))
            return id;
    return VIO_ERR_UNKNOWN;
}
