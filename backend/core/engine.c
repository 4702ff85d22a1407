/* Engine: creation, totals. */
#define _GNU_SOURCE
#include "engine.h"

#include <stdlib.h>
#include <string.h>

int vio_walk_caches(vio_engine *engine, int on)
{
    struct walk_cache *made = on ? aligned_alloc(_Alignof(struct walk_cache), sizeof *made) : NULL, *before;

    if (on && !made)
        return VIO_ERR_MEMORY;
    if (made)
        memset(made, 0, sizeof *made);
    engine_change_begin(engine);
    before = engine->walk_cache;
    engine->walk_cache = made;
    engine_change_end(engine);
    free(before);
    return VIO_OK;
}

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
    status = fault_ring_init(&engine->faults);
    if (status) {
        iotlb_deinit(&engine->iotlb);
        free(engine);
        return status;
    }
    engine->of_rid = calloc(RIDS, sizeof *engine->of_rid); /* 1 MiB of zeroes, of which the host gives what is used */
    if (!engine->of_rid || guard_install() || index_init(&engine->spaces) || index_init(&engine->routes)) {
        free(engine->of_rid);
        fault_ring_deinit(&engine->faults);
        index_deinit(&engine->spaces);
        index_deinit(&engine->routes);
        iotlb_deinit(&engine->iotlb);
        free(engine);
        return VIO_ERR_MEMORY;
    }
    pool_init(&engine->pool);
    gate_init(&engine->gate);
    errands_init(&engine->errands);
    status = vio_walk_caches(engine, iotlb_entries != 0);
    if (status) {
        vio_engine_destroy(engine);
        return status;
    }
    *out = engine;
    return VIO_OK;
}

void vio_engine_destroy(vio_engine *engine)
{
    for (size_t i = 0; i <= engine->spaces.mask; i++) {
        struct space *space = engine->spaces.slots[i].value;

        if (!space)
            continue;
        dirty_free(space->dirty, &engine->pool);
        pasid_table_free(engine, space->pasids);
        vio_process_release(space->process);
        free(space); /* its table pages go with the pool */
    }
    for (size_t i = 0; i <= engine->routes.mask; i++) {
        struct route *route = engine->routes.slots[i].value;

        if (route)
            free(route->windows);
        free(route);
    }
    index_deinit(&engine->spaces);
    index_deinit(&engine->routes);
    iotlb_deinit(&engine->iotlb);
    free(engine->walk_cache);
    free(engine->of_rid);
    fault_ring_deinit(&engine->faults);
    pool_deinit(&engine->pool);
    errands_deinit(&engine->errands);
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
    out->faults_dropped = vio_faults_dropped(engine);
    engine_change_end(engine);
}

uint64_t vio_table_pages(const vio_engine *engine)
{
    return engine->pool.pages;
}

void vio_invalidate_all(vio_engine *engine)
{
    engine_change_begin(engine);
    iotlb_forget(&engine->iotlb, &engine->iotlb.all);
    engine_change_end(engine);
    errands_end_all(engine);
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

const char *vio_format_name(int format)
{
    return pt_formats[format]->name;
}
