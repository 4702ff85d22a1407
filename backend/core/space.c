/* Spaces: what an IOASID stands for. Host-managed: a table of ours; nested: a table of the guest's over such a one. */
#include "engine.h"

#include <stdlib.h>

/* Addresses of a process's own half on x86-64 with 4-level paging; Linux gives no others unless asked. */
#define HVA_BITS 47
#define HVA_END (1ull << HVA_BITS)
#define PAGE_BITS 4095ull

int space_add(struct vio_engine *engine, uint32_t ioasid, struct space **out)
{
    struct space *space;

    if (space_find(engine, ioasid))
        return VIO_ERR_EXISTS;
    /* As many as a 20-bit PASID can tell apart: one IOASID for each address space a guest can have on a device. */
    if (engine->spaces.used >= VIO_MAX_SPACES)
        return VIO_ERR_LIMIT;
    space = calloc(1, sizeof *space);
    if (!space)
        return VIO_ERR_MEMORY;
    if (index_insert(&engine->spaces, ioasid, space)) {
        free(space);
        return VIO_ERR_MEMORY;
    }
    space->ioasid = ioasid;
    *out = space;
    return VIO_OK;
}

static void space_remove(struct vio_engine *engine, struct space *space)
{
    index_remove(&engine->spaces, space->ioasid);
    free(space);
}

bool table_config_ok(int format, struct pt_config *config, bool host)
{
    const struct pt_format *f = pt_formats[format];
    vio_table *table = &config->table;

    if (table->flags & ~(host ? 0 : f->flags))
        return false;
    if (!f->any_granule) {
        if (table->tree.levels < f->min_levels || table->tree.levels > f->max_levels || table->upper.levels ||
            (table->tree.granule && table->tree.granule != PT_GRANULE))
            return false;
        table->tree.granule = PT_GRANULE;
    }
    /* a table of ours must hold any address of this process */
    return f->prepare(config, host) && (!host || table->output_bits >= HVA_BITS);
}

int vio_space_create_host(vio_engine *engine, uint32_t ioasid, int format, const vio_table *table)
{
    struct pt_config config = {.table = *table};
    struct space *space;
    int status;

    if (format < 0 || format >= PT_FORMATS)
        return VIO_ERR_KIND;
    if (!table_config_ok(format, &config, true))
        return VIO_ERR_VALUE;
    engine_change_begin(engine);
    status = space_add(engine, ioasid, &space);
    if (!status) {
        space->format = format;
        space->table = config;
        status = host_table_create(&engine->pool, &space->table);
        if (status) {
            space_remove(engine, space);
        } else {
            space->walk = walk_host(format, &config);
            iotlb_scope_begin(&engine->iotlb, &space->scope, NULL);
        }
    }
    engine_change_end(engine);
    return status;
}

int vio_space_create_nested(vio_engine *engine, uint32_t ioasid, uint32_t parent_ioasid)
{
    struct space *space, *parent;
    int status = VIO_ERR_UNKNOWN;

    engine_change_begin(engine);
    parent = space_find(engine, parent_ioasid);
    if (parent)
        status = space_has_table(parent->parent ? parent->parent : parent) ? VIO_OK : VIO_ERR_KIND;
    if (!status)
        status = space_add(engine, ioasid, &space);
    if (!status) {
        space->parent = parent;
        parent->children++;
        iotlb_scope_begin(&engine->iotlb, &space->scope, &parent->scope);
    }
    engine_change_end(engine);
    return status;
}

int vio_space_destroy(vio_engine *engine, uint32_t ioasid)
{
    struct space *space;
    int status = VIO_ERR_UNKNOWN;

    engine_change_begin(engine);
    space = space_find(engine, ioasid);
    if (space) {
        status = space->children || space->routes ? VIO_ERR_BUSY : VIO_OK;
        if (!status) {
            if (space->parent) {
                space->parent->children--;
                pasid_table_free(engine, space->pasids);
            } else if (space_has_table(space)) {
                host_table_destroy(&engine->pool, space->format, &space->table);
                dirty_free(space->dirty, &engine->pool);
            }
            vio_process_release(space->process);
            space_remove(engine, space); /* its tag is never used again, so its IOTLB entries match nothing */
        }
    }
    engine_change_end(engine);
    errands_end_space(engine, status ? NULL : space);
    return status;
}

uint32_t stint_entries = STINT_ENTRIES;

void stint_begin(struct stint *stint)
{
    stint->entries = 0;
    gate_close(&stint->engine->gate);
}

void stint_end(struct stint *stint)
{
    struct iotlb *iotlb = &stint->engine->iotlb;
    struct iotlb_scope *scope = &stint->space->scope;

    if (stint->ending) {
        iotlb_forget_range(iotlb, scope, stint->first, stint->last);
        iotlb_forget_below(iotlb, scope); /* children's entries are found by their IOVA, not by ours */
    }
    gate_open(&stint->engine->gate);
}

/* Have bits for what is to be mapped, or give back those that it no longer needs. */
static int change_dirty(const struct stint *stint, bool cover)
{
    struct space *space = stint->space;
    int status = VIO_OK;

    if (!space->dirty)
        return VIO_OK;
    gate_close(&stint->engine->gate);
    if (cover)
        status = dirty_cover(space->dirty, &stint->engine->pool, stint->first, stint->last);
    if (!cover || status == VIO_ERR_MEMORY)
        dirty_trim(&stint->engine->pool, space, stint->first, stint->last);
    gate_open(&stint->engine->gate);
    return status;
}

/* The host-managed space to change; the gate is reserved. */
static int host_space(struct vio_engine *engine, uint32_t ioasid, struct space **out)
{
    *out = space_find(engine, ioasid);
    return !*out ? VIO_ERR_UNKNOWN : !space_has_table(*out) ? VIO_ERR_KIND : VIO_OK;
}

int vio_space_map(vio_engine *engine, uint32_t ioasid, uint64_t iova, uint64_t hva, uint64_t size, uint32_t access)
{
    struct stint stint = {.engine = engine, .first = iova, .last = iova + (size - 1)};
    uint64_t address = hva & ~VIO_FOREIGN;
    int status;

    if (!size || ((iova | hva | size) & PAGE_BITS) || stint.last < iova || !address || address >= HVA_END ||
        size > HVA_END - address || !access || (access & ~(uint32_t)RW_BOTH))
        return VIO_ERR_VALUE;
    if (guard_install())
        return VIO_ERR_MEMORY;
    gate_reserve(&engine->gate);
    status = host_space(engine, ioasid, &stint.space);
    if (!status && address != hva) {
        if (!stint.space->process)
            status = VIO_ERR_VALUE;
        else if (stint.space->process->own)
            hva = address;
    }
    if (!status)
        status = host_table_may_map(stint.space->format, &stint.space->table, hva, access, &stint);
    if (!status)
        status = change_dirty(&stint, true); /* before anything can be written */
    if (!status) {
        status = host_table_map(&engine->pool, stint.space->format, &stint.space->table, hva, access, &stint);
        if (status)
            change_dirty(&stint, false);
    }
    gate_release(&engine->gate);
    return status;
}

int vio_space_unmap(vio_engine *engine, uint32_t ioasid, uint64_t iova, uint64_t size)
{
    struct stint stint = {.engine = engine, .first = iova, .last = iova + (size - 1), .ending = true};
    int status;

    if (!size || ((iova | size) & PAGE_BITS) || stint.last < iova)
        return VIO_ERR_VALUE;
    gate_reserve(&engine->gate);
    status = host_space(engine, ioasid, &stint.space);
    if (!status)
        status = host_table_unmap(&engine->pool, stint.space->format, &stint.space->table, &stint);
    if (!status)
        change_dirty(&stint, false);
    gate_release(&engine->gate);
    errands_end_space(engine, status ? NULL : stint.space);
    return status;
}

int vio_space_protect(vio_engine *engine, uint32_t ioasid, uint64_t iova, uint64_t size, uint32_t access)
{
    struct stint stint = {.engine = engine, .first = iova, .last = iova + (size - 1), .ending = true};
    int status;

    if (!size || ((iova | size) & PAGE_BITS) || stint.last < iova || !access || (access & ~(uint32_t)RW_BOTH))
        return VIO_ERR_VALUE;
    gate_reserve(&engine->gate);
    status = host_space(engine, ioasid, &stint.space);
    if (!status)
        status = host_table_protect(&engine->pool, stint.space->format, &stint.space->table, access, &stint);
    gate_release(&engine->gate);
    errands_end_space(engine, status ? NULL : stint.space);
    return status;
}

int vio_space_bind(vio_engine *engine, uint32_t ioasid, int format, const vio_table *table)
{
    struct pt_config config = {.table = *table};
    struct space *space;
    int status = VIO_ERR_UNKNOWN;

    if (format < 0 || format >= PT_FORMATS)
        return VIO_ERR_KIND;
    if (!table_config_ok(format, &config, false))
        return VIO_ERR_VALUE;
    engine_change_begin(engine);
    space = space_find(engine, ioasid);
    if (space) {
        walk_fn walk = space->parent ? walk_nested(format, &config, space->parent) : NULL;

        status = walk ? VIO_OK : VIO_ERR_KIND;
        if (walk) {
            space->format = format;
            space->table = config;
            space->walk = walk;
            pasid_table_free(engine, space->pasids);
            space->pasids = NULL;
            iotlb_forget(&engine->iotlb, &space->scope);
        }
    }
    engine_change_end(engine);
    errands_end_space(engine, status ? NULL : space);
    return status;
}

int vio_space_unbind(vio_engine *engine, uint32_t ioasid)
{
    struct space *space;
    int status = VIO_ERR_UNKNOWN;

    engine_change_begin(engine);
    space = space_find(engine, ioasid);
    if (space) {
        status = space->parent ? VIO_OK : VIO_ERR_KIND;
        if (!status) {
            space->walk = NULL;
            pasid_table_free(engine, space->pasids);
            space->pasids = NULL;
            iotlb_forget(&engine->iotlb, &space->scope);
        }
    }
    engine_change_end(engine);
    errands_end_space(engine, status ? NULL : space);
    return status;
}

int vio_space_invalidate(vio_engine *engine, uint32_t ioasid, uint64_t first, uint64_t last)
{
    struct space *space;
    int status = VIO_ERR_UNKNOWN;

    if (last < first)
        return VIO_ERR_VALUE;
    engine_change_begin(engine);
    space = space_find(engine, ioasid);
    if (space) {
        status = VIO_OK;
        iotlb_forget_range(&engine->iotlb, &space->scope, first, last);
        if (space->pasids || space->children) /* what is under it is found by other IOVAs */
            iotlb_forget_below(&engine->iotlb, &space->scope);
    }
    engine_change_end(engine);
    errands_end_space(engine, status ? NULL : space);
    return status;
}

int vio_space_table_get(vio_engine *engine, uint32_t ioasid, vio_table *out)
{
    struct space *space;
    int status = VIO_ERR_UNKNOWN;

    engine_change_begin(engine);
    space = space_find(engine, ioasid);
    if (space)
        status = space->walk && space->format >= 0 ? VIO_OK : VIO_ERR_KIND;
    if (!status)
        *out = space->table.table;
    engine_change_end(engine);
    return status;
}

int vio_space_counters_get(vio_engine *engine, uint32_t ioasid, vio_space_counters *out)
{
    struct space *space;

    engine_change_begin(engine); /* alone: no request is half counted */
    space = space_find(engine, ioasid);
    if (space)
        *out = space->counters;
    engine_change_end(engine);
    return space ? VIO_OK : VIO_ERR_UNKNOWN;
}
