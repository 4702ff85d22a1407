/* PASID tables: bound, read, and what was found in them kept; see pasid.h. */
#include "pasid.h"

#include <stdlib.h>
#include <string.h>

#include "engine.h"
#include "pasid/tables.h"

static const struct pasid_format *const formats[] = {
#define X(name) &name,
    PASID_FORMATS(X)
#undef X
};

#define FORMATS_COUNT ((int)(sizeof formats / sizeof formats[0]))

/* A PASID that was found: a nested space in all but name. */
struct pasid_space {
    struct space space;
    uint32_t pasid;
    bool privileged;             /* requests with privilege are let in */
    uint64_t generation;         /* above its scope, when the PASID table was read */
    struct pasid_space *older, *newer; /* among all that the engine keeps, in order of first use */
};

static void unlink_found(struct vio_engine *engine, struct pasid_space *found)
{
    *(found->older ? &found->older->newer : &engine->pasids.oldest) = found->newer;
    *(found->newer ? &found->newer->older : &engine->pasids.newest) = found->older;
    engine->pasids.count--;
}

static void append_found(struct vio_engine *engine, struct pasid_space *found)
{
    found->older = engine->pasids.newest;
    *(engine->pasids.newest ? &engine->pasids.newest->newer : &engine->pasids.oldest) = found;
    engine->pasids.newest = found;
    engine->pasids.count++;
}

static void forget_oldest(struct vio_engine *engine)
{
    struct pasid_space *oldest = engine->pasids.oldest;

    unlink_found(engine, oldest);
    index_remove(&oldest->space.bound->pasids->found, oldest->pasid);
    free(oldest); /* its tag is never used again, so its IOTLB entries match nothing */
}

void pasid_table_free(struct vio_engine *engine, struct pasid_table *table)
{
    if (!table)
        return;
    for (size_t i = 0; i <= table->found.mask; i++)
        if (table->found.slots[i].value) {
            unlink_found(engine, table->found.slots[i].value);
            free(table->found.slots[i].value);
        }
    index_deinit(&table->found);
    free(table);
}

static int fault_at(struct walk *walk, unsigned level, uint64_t at, uint64_t entry, int reason)
{
    walk->stage = 1;
    walk->level = level;
    walk->fault_gpa = at;
    walk->entry = entry;
    walk->has_gpa = level;
    walk->table = false;
    walk->pasid_table = true;
    return reason;
}

int pasid_space(const struct space *bound, uint32_t pasid, unsigned need, struct walk *walk, struct space **out)
{
    const struct pasid_table *table = bound->pasids;
    struct pasid_space *found;

    if (pasid == VIO_NO_PASID)
        pasid = table->table.default_pasid;
    if (pasid == VIO_NO_PASID)
        return fault_at(walk, 0, 0, 0, VIO_REASON_BLOCKED);
    found = index_find(&table->found, pasid);
    if (!found || found->generation != iotlb_above(&found->space.scope))
        return PASID_UNREAD;
    if ((need & VIO_PRIVILEGED) && !found->privileged)
        return fault_at(walk, 0, 0, 0, VIO_REASON_PERMISSION);
    *out = &found->space;
    return 0;
}

struct reader {
    struct pasid_reader reader;
    const struct space *parent; /* through which it reads */
    struct guard *guard;
    struct walk *walk;
};

/* A word of the guest's memory, by what is underneath. */
static int load_word(struct pasid_reader *reader, uint64_t at, unsigned level, uint64_t *word)
{
    struct reader *through = (struct reader *)reader;
    struct walk *walk = through->walk;
    int reason = walk_middle(through->parent, through->guard, walk, at, VIO_READ, true);

    walk->has_middle &= through->parent->parent != NULL;
    if (reason)
        return reason;
    walk->reading_gpa = reader->at;
    walk->reading_level = level;
    guard_memory(through->guard, walk->under->hva, sizeof *word);
    *word = __atomic_load_n((const uint64_t *)(uintptr_t)walk->under->hva, __ATOMIC_ACQUIRE);
    return 0;
}

const struct space *pasid_memory(const struct space *bound)
{
    const struct space *parent = bound->parent;

    return parent->parent && !bound->pasids->format->nested ? parent->parent : parent;
}

int pasid_find(const struct pasid_table *table, uint32_t pasid, struct pasid_reader *reader,
               struct pasid_target *target)
{
    struct pasid_entry entry;
    int reason = table->format->find(&table->table, pasid, reader, &entry);

    if (reason)
        return reason;
    *target = (struct pasid_target){.format = -1, .privileged = entry.privileged};
    if (!entry.format)
        return 0;
    target->format = vio_format_find(entry.format);
    target->config.table = entry.table;
    target->config.table.flags |= table->table.flags & pt_formats[target->format]->flags;
    return table_config_ok(target->format, &target->config, false) ? 0 : VIO_REASON_RESERVED_BITS;
}

int pasid_read(const struct space *bound, uint32_t pasid, struct guard *guard, struct walk *walk,
               struct pasid_found *found)
{
    const struct pasid_table *table = bound->pasids;
    struct reader reader = {
        .reader = {.load = load_word}, .parent = pasid_memory(bound), .guard = guard, .walk = walk};
    struct iotlb_scope below = {.above = (struct iotlb_scope *)&bound->scope};
    int reason;

    if (pasid == VIO_NO_PASID)
        pasid = table->table.default_pasid;
    walk->pasid_table = true;
    reason = pasid_find(table, pasid, &reader.reader, &found->target);
    if (reason && reader.reader.unreadable)
        return reason; /* load_word has told where */
    walk->reading_level = 0;
    if (reason)
        return fault_at(walk, reader.reader.level, reader.reader.at, reader.reader.entry, reason);
    walk->pasid_table = false;
    found->ioasid = bound->ioasid;
    found->pasid = pasid;
    found->serial = table->serial;
    found->generation = iotlb_above(&below);
    return 0;
}

/* Without stage 1, an address is the parent's. */
static int walk_parent(const struct space *space, struct guard *guard, struct walk *walk)
{
    return space->parent->walk ? space->parent->walk(space->parent, guard, walk) : VIO_REASON_NOT_BOUND;
}

static struct pasid_space *make_found(struct vio_engine *engine, struct space *bound, uint32_t pasid)
{
    struct pasid_space *made = calloc(1, sizeof *made);

    if (!made || index_insert(&bound->pasids->found, pasid, made)) {
        free(made);
        return NULL;
    }
    made->pasid = pasid;
    made->generation = IOTLB_STALE;
    made->space = (struct space){.ioasid = bound->ioasid, .parent = bound->parent, .bound = bound};
    iotlb_scope_begin(&engine->iotlb, &made->space.scope, &bound->scope);
    append_found(engine, made);
    /* As many as routes: what a device with a full PASID table uses at a time is far less. */
    if (engine->pasids.count > VIO_MAX_PASIDS)
        forget_oldest(engine);
    return made;
}

int pasid_keep(struct vio_engine *engine, const struct pasid_found *found)
{
    const struct pasid_target *target = &found->target;
    struct pasid_space *kept;
    struct space *bound;
    int status = VIO_OK;

    engine_change_begin(engine);
    bound = space_find(engine, found->ioasid);
    if (bound && bound->pasids && bound->pasids->serial == found->serial) {
        kept = index_find(&bound->pasids->found, found->pasid);
        if (!kept)
            kept = make_found(engine, bound, found->pasid);
        status = kept ? VIO_OK : VIO_ERR_MEMORY;
        if (kept && iotlb_above(&kept->space.scope) == found->generation) {
            iotlb_forget(&engine->iotlb, &kept->space.scope);
            kept->generation = found->generation;
            kept->privileged = target->privileged;
            kept->space.walk = walk_parent;
            if (target->format >= 0) {
                kept->space.format = target->format;
                kept->space.table = target->config;
                kept->space.walk = walk_nested(target->format, &target->config, bound->parent);
            }
        }
    }
    engine_change_end(engine);
    return status;
}

int vio_pasid_format_find(const char *name)
{
    for (int id = 0; id < FORMATS_COUNT; id++)
        if (!strcmp(formats[id]->name, name))
            return id;
    return VIO_ERR_UNKNOWN;
}

/* Does some stage-1 format that the table can lead to take each of the options? */
static bool flags_ok(const struct pasid_format *format, uint32_t flags)
{
    for (const char *const *name = format->leads_to; *name; name++)
        flags &= ~pt_formats[vio_format_find(*name)]->flags;
    return !flags;
}

int vio_pasid_bind(vio_engine *engine, uint32_t ioasid, int format, const vio_pasid_table *options)
{
    struct pasid_table *table;
    struct space *space;
    int status = VIO_ERR_UNKNOWN;

    if (format < 0 || format >= FORMATS_COUNT)
        return VIO_ERR_KIND;
    table = calloc(1, sizeof *table);
    if (!table || index_init(&table->found)) {
        free(table);
        return VIO_ERR_MEMORY;
    }
    table->format = formats[format];
    table->table = *options;
    engine_change_begin(engine);
    table->serial = ++engine->pasids.serial;
    space = space_find(engine, ioasid);
    if (!table->format->prepare(&table->table) || !flags_ok(table->format, table->table.flags) ||
        (table->table.default_pasid >> 20 && table->table.default_pasid != VIO_NO_PASID))
        status = VIO_ERR_VALUE;
    else if (space)
        status = space->parent ? VIO_OK : VIO_ERR_KIND;
    if (!status) {
        pasid_table_free(engine, space->pasids);
        space->pasids = table;
        space->walk = NULL;
        iotlb_forget(&engine->iotlb, &space->scope);
    } else {
        pasid_table_free(engine, table);
    }
    engine_change_end(engine);
    errands_end_space(engine, status ? NULL : space);
    return status;
}

int vio_pasid_invalidate(vio_engine *engine, uint32_t ioasid, uint32_t pasid, uint64_t first, uint64_t last)
{
    struct pasid_space *found;
    struct space *space;
    int status = VIO_ERR_UNKNOWN;

    if (last < first)
        return VIO_ERR_VALUE;
    engine_change_begin(engine);
    space = space_find(engine, ioasid);
    if (space)
        status = space->pasids ? VIO_OK : VIO_ERR_KIND;
    found = status ? NULL : index_find(&space->pasids->found, pasid);
    if (!status)
        space->pasids->serial = ++engine->pasids.serial; /* what a request has read and not yet kept is stale */
    if (found && !first && last == UINT64_MAX) {
        found->generation = IOTLB_STALE; /* of the PASID table, too */
        iotlb_forget(&engine->iotlb, &found->space.scope);
    } else if (found) {
        iotlb_forget_range(&engine->iotlb, &found->space.scope, first, last);
    }
    engine_change_end(engine);
    errands_end_space(engine, status ? NULL : space);
    return status;
}
