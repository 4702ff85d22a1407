/* Windows of a route: addresses that its space does not translate; see request.h. */
#include "request.h"

#include <stdlib.h>

int vio_route_windows(vio_engine *engine, uint32_t rid, const vio_window *windows, uint32_t count)
{
    struct windows *made = NULL;
    struct route *route;
    struct space *under;
    int status = VIO_OK;

    if (count > VIO_WINDOWS)
        return VIO_ERR_LIMIT;
    for (uint32_t i = 0; i < count; i++)
        if (windows[i].last < windows[i].first)
            return VIO_ERR_VALUE;
    if (count && !(made = malloc(sizeof *made + count * sizeof made->of[0])))
        return VIO_ERR_MEMORY;
    engine_change_begin(engine);
    route = index_find(&engine->routes, route_key(rid, VIO_NO_PASID));
    under = route ? route->space : NULL;
    if (!under)
        status = VIO_ERR_UNKNOWN;
    while (under && under->parent)
        under = under->parent;
    for (uint32_t i = 0; i < count && !status; i++) {
        /* the one underneath lives as long as the route leads above it */
        if (windows[i].ioasid && windows[i].ioasid != under->ioasid)
            status = space_find(engine, windows[i].ioasid) ? VIO_ERR_KIND : VIO_ERR_UNKNOWN;
        made->of[i] = (struct window){windows[i].first, windows[i].last, windows[i].ioasid ? under : NULL};
    }
    if (!status) {
        struct windows *old = route->windows;

        if (made)
            made->count = count;
        route->windows = made;
        made = old;
    }
    engine_change_end(engine);
    errands_end_route(engine, rid, VIO_NO_PASID);
    free(made);
    return status;
}

/* The window that holds an address, or NULL, *last then telling how far it is to the next one. */
static const struct window *window_at(const struct route *route, uint64_t address, uint64_t *last)
{
    *last = UINT64_MAX;
    for (uint32_t i = 0; route->windows && i < route->windows->count; i++) {
        const struct window *window = &route->windows->of[i];

        if (address >= window->first && address <= window->last) {
            *last = window->last;
            return window;
        }
        if (window->first > address && window->first - 1 < *last)
            *last = window->first - 1;
    }
    return NULL;
}

static int reserved(struct walk *walk)
{
    walk->stage = walk->level = 0;
    walk->entry = walk->fault_gpa = 0;
    walk->has_gpa = walk->table = walk->pasid_table = false;
    return VIO_REASON_RESERVED_RANGE;
}

int window_enter(struct request *request)
{
    uint64_t last;
    const struct window *window = window_at(request->route, request->iova, &last);

    if (!window)
        return 0;
    if (!window->space)
        return reserved(&request->walk);
    request->space = window->space;
    return 0;
}

int window_translate(struct job *job, struct request *request, struct guard *guard)
{
    struct space *space = request->space;
    uint32_t tag = request->tag;
    uint64_t last, left;
    const struct window *window = window_at(request->route, request->iova, &last);
    int reason;

    job->at = request;
    if (window && !window->space)
        return reserved(&request->walk);
    if (window) {
        request->space = window->space;
        request->tag = iotlb_tag(&job->engine->iotlb, &window->space->scope);
    }
    reason = space_translate(job, request, guard);
    request->space = space;
    request->tag = tag;
    left = last - request->iova;
    if (!reason && left != UINT64_MAX && request->hit.size > left + 1)
        request->hit.size = left + 1;
    return reason;
}
