/*
 * Routes: (RID, PASID or none) -> space. A detached route is kept for its counters, which go on when the same
 * (RID, PASID) is attached again; the one detached longest ago makes room when all are taken.
 */
#include "engine.h"

#include <stdlib.h>

static void unlink_route(struct route_list *list, struct route *route)
{
    *(route->older ? &route->older->newer : &list->oldest) = route->newer;
    *(route->newer ? &route->newer->older : &list->newest) = route->older;
    route->older = route->newer = NULL;
}

static void append_route(struct route_list *list, struct route *route)
{
    route->older = list->newest;
    route->newer = NULL;
    *(list->newest ? &list->newest->newer : &list->oldest) = route;
    list->newest = route;
}

static struct route_list *live_routes(struct vio_engine *engine, uint64_t key)
{
    return &engine->of_rid[key & (RIDS - 1)];
}

static void drop_windows(struct route *route)
{
    free(route->windows);
    route->windows = NULL;
}

/* The route of (rid, pasid), made if it is not there, among its RID's, leading nowhere yet. */
static int route_take(struct vio_engine *engine, uint32_t rid, uint32_t pasid, struct route **out)
{
    uint64_t key = route_key(rid, pasid);
    struct route *route = index_find(&engine->routes, key);

    if (route) {
        drop_windows(route);
        if (!route_live(route)) {
            unlink_route(&engine->detached, route);
            append_route(live_routes(engine, key), route);
        } else if (route->space) {
            route->space->routes--;
        }
        *out = route;
        return VIO_OK;
    }
    /* One for each function of a PCI segment, or as many PASIDs: what one VM's guest can set up is bounded by this. */
    if (engine->routes.used >= VIO_MAX_ROUTES) {
        struct route *stale = engine->detached.oldest;

        if (!stale)
            return VIO_ERR_LIMIT;
        unlink_route(&engine->detached, stale);
        index_remove(&engine->routes, stale->key);
        free(stale);
    }
    route = calloc(1, sizeof *route);
    if (!route)
        return VIO_ERR_MEMORY;
    route->key = key;
    if (index_insert(&engine->routes, key, route)) {
        free(route);
        return VIO_ERR_MEMORY;
    }
    append_route(live_routes(engine, key), route);
    *out = route;
    return VIO_OK;
}

static bool identity_ok(uint32_t rid, uint32_t pasid)
{
    return rid <= 0xffff && (pasid == VIO_NO_PASID || pasid == VIO_ANY_PASID || pasid == VIO_TRANSLATED || pasid <= 0xfffff);
}

int vio_route_attach(vio_engine *engine, uint32_t rid, uint32_t pasid, uint32_t ioasid, uint32_t access)
{
    struct space *space;
    struct route *route;
    int status = VIO_ERR_UNKNOWN;

    if (!identity_ok(rid, pasid) || (access & ~(uint32_t)(RW_BOTH | VIO_ATS)))
        return VIO_ERR_VALUE;
    engine_change_begin(engine);
    space = space_find(engine, ioasid);
    if (space && access & VIO_ATS && space->walk == walk_process)
        status = VIO_ERR_KIND; /* its addresses are no memory that others could share */
    else if (space)
        status = route_take(engine, rid, pasid, &route);
    if (!status) {
        route->space = space;
        route->blocked = false;
        route->access = access & RW_BOTH;
        route->ats = access & VIO_ATS;
        space->routes++;
    }
    engine_change_end(engine);
    errands_end_route(engine, rid, pasid);
    return status;
}

int vio_route_block(vio_engine *engine, uint32_t rid, uint32_t pasid)
{
    struct route *route;
    int status;

    if (!identity_ok(rid, pasid))
        return VIO_ERR_VALUE;
    engine_change_begin(engine);
    status = route_take(engine, rid, pasid, &route);
    if (!status) {
        route->space = NULL;
        route->blocked = true;
    }
    engine_change_end(engine);
    errands_end_route(engine, rid, pasid);
    return status;
}

int vio_route_detach(vio_engine *engine, uint32_t rid, uint32_t pasid)
{
    struct route *route;
    int status = VIO_ERR_UNKNOWN;

    engine_change_begin(engine);
    route = index_find(&engine->routes, route_key(rid, pasid));
    if (route && route_live(route)) {
        if (route->space)
            route->space->routes--;
        drop_windows(route);
        route->space = NULL;
        route->blocked = false;
        unlink_route(live_routes(engine, route->key), route);
        append_route(&engine->detached, route);
        status = VIO_OK;
    }
    engine_change_end(engine);
    errands_end_route(engine, rid, pasid);
    return status;
}

int vio_invalidate_device(vio_engine *engine, uint32_t rid)
{
    if (rid >= RIDS)
        return VIO_ERR_VALUE;
    engine_change_begin(engine);
    for (const struct route *route = live_routes(engine, rid)->oldest; route; route = route->newer)
        if (route->space)
            iotlb_forget(&engine->iotlb, &route->space->scope);
    engine_change_end(engine);
    errands_end_device(engine, rid);
    return VIO_OK;
}

int vio_route_counters_get(vio_engine *engine, uint32_t rid, uint32_t pasid, vio_route_counters *out)
{
    struct route *route;

    engine_change_begin(engine);
    route = index_find(&engine->routes, route_key(rid, pasid));
    *out = route ? route->counters : (vio_route_counters){0};
    engine_change_end(engine);
    return route ? VIO_OK : VIO_ERR_UNKNOWN;
}
