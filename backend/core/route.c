/*
 * Routes: (RID, PASID or none) -> space. A detached route is kept for its counters, which go on when the same
 * (RID, PASID) is attached again; the one detached longest ago makes room when all are taken.
 */
#include "engine.h"

#include <stdlib.h>

static void detached_unlink(struct vio_engine *engine, struct route *route)
{
    *(route->older ? &route->older->newer : &engine->oldest) = route->newer;
    *(route->newer ? &route->newer->older : &engine->newest) = route->older;
    route->older = route->newer = NULL;
}

static void detached_append(struct vio_engine *engine, struct route *route)
{
    route->older = engine->newest;
    route->newer = NULL;
    *(engine->newest ? &engine->newest->newer : &engine->oldest) = route;
    engine->newest = route;
}

static bool live(const struct route *route)
{
    return route->space || route->blocked;
}

/* The route of (rid, pasid), made if it is not there, in no list and leading nowhere yet. */
static int route_take(struct vio_engine *engine, uint32_t rid, uint32_t pasid, struct route **out)
{
    uint64_t key = route_key(rid, pasid);
    struct route *route = index_find(&engine->routes, key);

    if (route) {
        if (!live(route))
            detached_unlink(engine, route);
        else if (route->space)
            route->space->routes--;
        *out = route;
        return VIO_OK;
    }
    /* One for each function of a PCI segment, or as many PASIDs: what one VM's guest can set up is bounded by this. */
    if (engine->routes.used >= VIO_MAX_ROUTES) {
        struct route *stale = engine->oldest;

        if (!stale)
            return VIO_ERR_LIMIT;
        detached_unlink(engine, stale);
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
    *out = route;
    return VIO_OK;
}

static bool identity_ok(uint32_t rid, uint32_t pasid)
{
    return rid <= 0xffff && (pasid == VIO_NO_PASID || pasid <= 0xfffff);
}

int vio_route_attach(vio_engine *engine, uint32_t rid, uint32_t pasid, uint32_t ioasid, uint32_t access)
{
    struct space *space;
    struct route *route;
    int status = VIO_ERR_UNKNOWN;

    if (!identity_ok(rid, pasid) || (access & ~(uint32_t)RW_BOTH))
        return VIO_ERR_VALUE;
    engine_change_begin(engine);
    space = space_find(engine, ioasid);
    if (space)
        status = route_take(engine, rid, pasid, &route);
    if (!status) {
        route->space = space;
        route->blocked = false;
        route->access = access;
        space->routes++;
    }
    engine_change_end(engine);
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
    return status;
}

int vio_route_detach(vio_engine *engine, uint32_t rid, uint32_t pasid)
{
    struct route *route;
    int status = VIO_ERR_UNKNOWN;

    engine_change_begin(engine);
    route = index_find(&engine->routes, route_key(rid, pasid));
    if (route && live(route)) {
        if (route->space)
            route->space->routes--;
        route->space = NULL;
        route->blocked = false;
        detached_append(engine, route);
        status = VIO_OK;
    }
    engine_change_end(engine);
    return status;
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
