/*
 * Looking a translation up: the walk with every entry told, by the contract of the formats at run time.
 *
 * It reads tables as a request would at this moment and ends as it would, but sets no accessed or dirty bit, asks and
 * fills no IOTLB, counts nothing and leaves no fault in the ring. It is apart from walk.h, which is written for speed.
 */
#include "request.h"

struct lookup {
    struct request request;
    struct guard guard;
    vio_path *path;
    vio_step *step;    /* the one being read */
    bool pasid_table;  /* steps are of a PASID table, or lead to it */
    bool middle;       /* steps are of the guest's table in the middle, or lead to it */
    unsigned table_of; /* of those: see vio_step */
    struct errand *errand;
    struct space own;  /* what the PASID leads to: a nested space in all but name */
};

#define PASID_MAX_LEVELS 3 /* RISC-V PD20, AMD GLX 2 */

/*
 * Entries of a guest's, each after a walk of what is underneath, and the data's, or a walk again for what it must not
 * write. What is underneath is another guest's table at most, each of its entries after a walk of stage 2.
 */
#define GUEST_ENTRIES (PASID_MAX_LEVELS + PT_MAX_LEVELS)
#define UNDERNEATH (PT_MAX_LEVELS * (PT_MAX_LEVELS + 1) + PT_MAX_LEVELS)
_Static_assert(GUEST_ENTRIES * (UNDERNEATH + 1) + UNDERNEATH <= VIO_PATH_STEPS, "every step has its place");

/* What a stage comes to. */
struct found {
    uint64_t oa, gpa; /* gpa: of stage 2 */
    unsigned size_lg2, perm;
};

static vio_step *add_step(struct lookup *lookup, unsigned stage, unsigned level, uint64_t input, uint64_t address)
{
    vio_step *step = &lookup->path->steps[lookup->path->count++];

    *step = (vio_step){.input = input,
                       .address = address,
                       .stage = (uint8_t)stage,
                       .level = (uint8_t)level,
                       .pasid_table = lookup->pasid_table,
                       .middle = lookup->middle,
                       .table_of = (uint8_t)lookup->table_of,
                       .permissions = VIO_PRIVILEGED,
                       .accessed = -1,
                       .dirty = -1};
    lookup->step = step;
    return step;
}

/* The path ends at a step of this stage; gpa is the one at fault. */
static int end_at(struct lookup *lookup, const vio_step *step, uint64_t gpa, bool table, int reason)
{
    struct walk *walk = &lookup->request.walk;

    walk->stage = step->stage;
    walk->level = step->level;
    walk->entry = step->entry;
    walk->fault_gpa = gpa;
    walk->has_gpa = true;
    walk->table = table;
    walk->pasid_table = step->pasid_table;
    return reason;
}

/*
 * Are an entry's accessed and dirty bits set? Formats keep them in different ways (dirty may be a write permission), so
 * they are asked: a bit is clear if a request would change the entry, and set if without one of its bits it would
 * become what it is.
 */
static int8_t used_state(const struct pt_format *format, const struct pt_config *config, uint64_t entry, bool leaf,
                         bool write)
{
    uint64_t after;

    if (!format->use(config, entry, leaf, write, &after) && after != entry)
        return 0;
    for (unsigned bit = 0; bit < 64; bit++) {
        uint64_t without = entry ^ 1ull << bit, before_write;

        if (write && (format->use(config, without, leaf, false, &before_write) || before_write != without))
            continue; /* it is the accessed bit */
        if (!format->use(config, without, leaf, write, &after) && after == entry)
            return 1;
    }
    return -1;
}

/* `updating`: the table's configuration as if requests set all such bits, whether they are to or not. */
static void tell_used(const struct pt_format *format, const struct pt_config *updating, vio_step *step)
{
    uint64_t accessed;

    step->accessed = used_state(format, updating, step->entry, !step->next, false);
    if (!step->next && !format->use(updating, step->entry, true, false, &accessed))
        step->dirty = used_state(format, updating, accessed, true, true);
}

/* A table of the guest's lies in another process: the path ends at the leaf of stage 2 that says so. */
static int end_foreign(struct lookup *lookup, uint64_t gpa)
{
    vio_step *leaf = &lookup->path->steps[lookup->path->count - 1];

    leaf->reason = VIO_REASON_UNSUPPORTED;
    return end_at(lookup, leaf, gpa, true, VIO_REASON_UNSUPPORTED);
}

/* Decode an entry into its step; 0 or a reason. */
static int decode_step(const struct pt_format *format, const struct pt_config *config, const struct pt_start *start,
                       bool trusted, vio_step *step, struct pt_entry *entry)
{
    int reason = format->decode(config, start, step->entry, step->level, trusted, entry);
    struct pt_config updating = *config;

    step->read = 1;
    step->reason = (uint8_t)reason;
    updating.table.flags |= format->flags & (VIO_TABLE_ACCESSED | VIO_TABLE_DIRTY);
    if (reason && (trusted || reason != VIO_REASON_ACCESS_FLAG ||
                   format->decode(&updating, start, step->entry, step->level, trusted, entry)))
        return reason;
    step->decoded = 1;
    step->output = entry->oa;
    step->next = (uint8_t)entry->next;
    step->size_lg2 = (uint8_t)(entry->next ? 0 : entry->size_lg2);
    if (!trusted)
        tell_used(format, &updating, step);
    return reason;
}

/* Of rights in the order of PT_BOTH, those of the request's privilege. */
static uint8_t own_rights(const struct lookup *lookup, unsigned perm)
{
    return (uint8_t)(perm >> (lookup->request.need & VIO_PRIVILEGED ? PT_PRIVILEGED : 0) & PT_RWX);
}

/* Through the parent's table, or the host-managed space's own. table_of: see vio_step. */
static int lookup_stage2(struct lookup *lookup, const struct space *space, uint64_t address, unsigned need,
                         unsigned table_of, struct found *out)
{
    const struct pt_format *format = pt_formats[space->format];
    const struct pt_config *config = &space->table;
    const vio_tree *tree = &config->table.tree;
    uint32_t first = lookup->path->count;
    struct pt_start start = {.table = tree->root, .index = address, .levels = tree->levels, .granule = tree->granule};
    uint64_t at = start.table + pt_root_offset(start.granule, address, start.levels);

    if (address > config->last) {
        const vio_step none = {.stage = 2, .pasid_table = lookup->pasid_table};

        return end_at(lookup, &none, address, table_of, VIO_REASON_ADDRESS_WIDTH);
    }
    for (unsigned level = start.levels;; level--) {
        vio_step *step = add_step(lookup, 2, level, address, at);
        struct pt_entry entry;
        int reason;

        step->table_of = (uint8_t)table_of;
        step->entry = __atomic_load_n((const uint64_t *)(uintptr_t)at, __ATOMIC_ACQUIRE);
        reason = decode_step(format, config, &start, true, step, &entry);
        if (reason)
            return end_at(lookup, step, address, table_of, reason);
        if (entry.next) {
            at = entry.oa + pt_offset(start.granule, address, level - 1);
            continue;
        }
        out->perm = format->permissions(config, &start, ~0ull, step->entry, true);
        out->size_lg2 = entry.size_lg2;
        out->oa = entry.oa | (address & ((1ull << entry.size_lg2) - 1));
        out->gpa = address;
        for (uint32_t i = first; i < lookup->path->count; i++) /* tables of ours take nothing away */
            lookup->path->steps[i].permissions = own_rights(lookup, out->perm);
        if (need & ~out->perm) {
            step->reason = VIO_REASON_PERMISSION;
            return end_at(lookup, step, address, table_of, VIO_REASON_PERMISSION);
        }
        return 0;
    }
}

static int lookup_parent(struct lookup *lookup, const struct space *space, uint64_t address, unsigned need,
                         unsigned table_of, struct found *out);

/* Through the guest's table, each entry read through its parent's. */
static int lookup_stage1(struct lookup *lookup, const struct space *space, uint64_t address, unsigned need,
                         struct found *out)
{
    const struct pt_format *format = pt_formats[space->format];
    const struct pt_config *config = &space->table;
    vio_step *steps[PT_MAX_LEVELS], *step;
    unsigned levels = 0, level, stage2_perm[PT_MAX_LEVELS];
    uint64_t tables = ~0ull, at, after;
    struct pt_start start;
    struct pt_entry entry;
    int reason = format->start(config, address, &start);

    if (reason) {
        lookup->request.walk.stage = 1;
        return reason;
    }
    level = start.levels;
    at = start.table + pt_root_offset(start.granule, start.index, level);
    for (;;) {
        struct found place;

        reason = lookup_parent(lookup, space->parent, at, VIO_READ, level, &place);
        if (reason)
            return reason;
        step = steps[levels] = add_step(lookup, 1, level, address, at);
        stage2_perm[levels++] = place.perm;
        if (IS_FOREIGN(place.oa)) {
            lookup->path->count--;
            return end_foreign(lookup, place.gpa);
        }
        guard_memory(&lookup->guard, place.oa, sizeof step->entry);
        step->entry = __atomic_load_n((const uint64_t *)(uintptr_t)place.oa, __ATOMIC_ACQUIRE);
        reason = decode_step(format, config, &start, false, step, &entry);
        if (reason)
            return end_at(lookup, step, at, false, reason);
        if (!entry.next)
            break;
        if (entry.next != level - 1) { /* address bits that skipped levels would have indexed must be zero */
            uint64_t covered = (1ull << pt_entry_lg2(start.granule, entry.next + 1)) - 1;

            if (address & ((1ull << pt_entry_lg2(start.granule, level)) - 1) & ~covered) {
                step->reason = VIO_REASON_ADDRESS_WIDTH;
                return end_at(lookup, step, at, false, VIO_REASON_ADDRESS_WIDTH);
            }
        }
        tables &= step->entry ^ format->denies;
        level = entry.next;
        at = entry.oa + pt_offset(start.granule, start.index, level);
    }
    for (unsigned i = 0; i < levels; i++) {
        uint64_t table = steps[i]->next ? steps[i]->entry ^ format->denies : ~0ull;

        steps[i]->permissions = own_rights(lookup, format->permissions(config, &start, table, step->entry, false));
    }
    out->perm = format->permissions(config, &start, tables, step->entry, false);
    out->size_lg2 = entry.size_lg2;
    out->oa = entry.oa | (address & ((1ull << entry.size_lg2) - 1));
    reason = need & ~out->perm ? VIO_REASON_PERMISSION
                               : format->use(config, step->entry, true, need & PT_WRITES, &after);
    if (reason) {
        step->reason = (uint8_t)reason;
        return end_at(lookup, step, at, false, reason);
    }
    for (unsigned i = 0; i < levels; i++) { /* what a request would have to set, stage 2 must let it */
        bool leaf = !steps[i]->next;
        struct found place;

        if (format->use(config, steps[i]->entry, leaf, leaf && (need & PT_WRITES), &after) ||
            after == steps[i]->entry || (!space->parent->parent && (stage2_perm[i] & VIO_WRITE)))
            continue;
        lookup->path->count = (uint32_t)(step - lookup->path->steps) + 1;
        reason = lookup_parent(lookup, space->parent, steps[i]->address, VIO_WRITE, steps[i]->level, &place);
        if (reason)
            return reason;
        lookup->path->count = (uint32_t)(step - lookup->path->steps) + 1; /* it may: no step of what leads on */
    }
    return 0;
}

/* By what is underneath: stage 2, or a guest's table in the middle and then stage 2. */
static int lookup_parent(struct lookup *lookup, const struct space *space, uint64_t address, unsigned need,
                         unsigned table_of, struct found *out)
{
    struct walk *walk = &lookup->request.walk;
    struct found one;
    int reason = VIO_REASON_NOT_BOUND;

    if (!space->parent)
        return lookup_stage2(lookup, space, address, need, table_of, out);
    walk->stage = 0;
    walk->has_gpa = walk->table = false;
    lookup->middle = true;
    lookup->table_of = table_of;
    if (table_of && space->walk)
        need = space_entry_rights(space, need);
    if (space->walk)
        reason = lookup_stage1(lookup, space, address, need, &one);
    lookup->middle = false;
    lookup->table_of = 0;
    if (!reason)
        reason = lookup_stage2(lookup, space->parent, one.oa, need, table_of, out);
    if (reason) {
        walk->table |= table_of != 0;
        walk->has_middle = true;
        walk->middle = address;
        return reason;
    }
    out->perm &= one.perm;
    out->size_lg2 = out->size_lg2 < one.size_lg2 ? out->size_lg2 : one.size_lg2;
    return 0;
}

struct pasid_lookup {
    struct pasid_reader reader;
    struct lookup *lookup;
    const struct space *parent; /* through which it reads */
    vio_step *step; /* of the entry */
};

/* A word of a PASID table; the first one of an entry is told. */
static int load_word(struct pasid_reader *reader, uint64_t at, unsigned level, uint64_t *word)
{
    struct pasid_lookup *through = (struct pasid_lookup *)reader;
    struct lookup *lookup = through->lookup;
    uint32_t told = lookup->path->count;
    struct found place;
    int reason = lookup_parent(lookup, through->parent, at, VIO_READ, level, &place);

    if (reason)
        return reason;
    if (at == reader->at) {
        through->step = add_step(lookup, 1, level, lookup->request.pasid, at);
    } else { /* beside the first one */
        lookup->path->count = told;
        lookup->step = through->step;
    }
    if (IS_FOREIGN(place.oa)) {
        if (at == reader->at)
            lookup->path->count--;
        return end_foreign(lookup, place.gpa);
    }
    guard_memory(&lookup->guard, place.oa, sizeof *word);
    *word = __atomic_load_n((const uint64_t *)(uintptr_t)place.oa, __ATOMIC_ACQUIRE);
    if (at == reader->at) {
        lookup->step->entry = *word;
        lookup->step->read = 1;
    }
    return 0;
}

/* The PASID's address space into lookup->own; 0, or a reason. */
static int lookup_pasid(struct lookup *lookup, const struct space *bound)
{
    struct request *request = &lookup->request;
    const struct pasid_table *table = bound->pasids;
    struct pasid_lookup through = {.reader = {.load = load_word}, .lookup = lookup, .parent = pasid_memory(bound)};
    const vio_step none = {.stage = 1, .pasid_table = 1};
    uint32_t pasid = request->pasid == VIO_NO_PASID ? table->table.default_pasid : request->pasid;
    struct pasid_target target;
    struct space *own = &lookup->own;
    int reason;

    request->walk.pasid_table = true;
    if (pasid == VIO_NO_PASID) {
        request->walk.stage = 1;
        return VIO_REASON_BLOCKED;
    }
    lookup->pasid_table = true;
    reason = pasid_find(table, pasid, &through.reader, &target);
    lookup->pasid_table = false;
    if (reason && through.reader.unreadable)
        return reason;
    if (reason) {
        if (!through.reader.level) {
            request->walk.stage = 1;
            return reason;
        }
        lookup->step->reason = (uint8_t)reason;
        return end_at(lookup, lookup->step, lookup->step->address, false, reason);
    }
    own->parent = bound->parent;
    own->format = lookup->path->format = target.format;
    own->table = target.config;
    own->walk = target.format >= 0 ? walk_nested(target.format, &target.config, own->parent) : NULL;
    request->walk.pasid_table = false;
    if ((request->need & VIO_PRIVILEGED) && !target.privileged) {
        end_at(lookup, &none, 0, false, 0);
        request->walk.has_gpa = false;
        return VIO_REASON_PERMISSION;
    }
    request->space = target.format >= 0 ? own : own->parent;
    return 0;
}

static int run_lookup(struct guard *guard, void *context)
{
    struct lookup *lookup = context;
    struct request *request = &lookup->request;
    struct found one = {.oa = request->iova, .size_lg2 = 63, .perm = ~0u}, two;
    const struct space *space;
    int reason = 0;

    if (request->space->pasids) {
        reason = lookup_pasid(lookup, request->space);
        if (reason)
            return reason;
    }
    space = request->space;
    if (space->walk == walk_process) {
        request->walk.iova = request->iova;
        reason = space->walk(space, guard, &request->walk);
        if (!reason)
            reason = process_look(lookup->errand, request);
        if (!reason)
            lookup->path->translation = (vio_translation){request->walk.hva, request->hit.size, request->iova,
                                                          request_permitted(request, request->hit.perm)};
        return reason;
    }
    if (space->parent) {
        reason = space->walk ? lookup_stage1(lookup, space, request->iova, request->rights, &one)
                             : VIO_REASON_NOT_BOUND;
        if (reason)
            return reason;
    }
    reason = lookup_parent(lookup, space->parent ? space->parent : space, one.oa, request->rights, 0, &two);
    if (reason)
        return reason;
    one.size_lg2 = one.size_lg2 < two.size_lg2 ? one.size_lg2 : two.size_lg2;
    lookup->path->translation = (vio_translation){
        .hva = two.oa,
        .size = (1ull << one.size_lg2) - (request->iova & ((1ull << one.size_lg2) - 1)),
        .gpa = two.gpa,
        .access = request_permitted(request, one.perm & two.perm),
    };
    return 0;
}

/* In the gate: look it up, into the path; 0 or a reason, or an errand is to be run first. */
static int look_up(struct vio_engine *engine, struct lookup *lookup)
{
    struct request *request = &lookup->request;
    vio_path *out = lookup->path;
    struct space *space;
    int reason, result = 0;

    out->count = out->ioasid = out->parent = 0;
    out->format = out->middle_format = out->parent_format = -1;
    reason = request_route(engine, request);
    if (!reason)
        reason = window_enter(request);
    space = request->space;
    if (space) {
        out->ioasid = space->ioasid;
        out->format = space->walk ? space->format : -1;
        out->parent = space->parent ? space->parent->ioasid : 0;
        out->parent_format = space->parent ? space_bottom(space)->format : -1;
        if (space->parent && space->parent->parent && space->parent->walk)
            out->middle_format = space->parent->format;
    }
    if (!reason && guard_run(&lookup->guard, run_lookup, lookup, &result) == GUARD_OK) {
        reason = result;
    } else if (!reason) { /* of an entry of the guest's: our own tables stay */
        lookup->step->reason = VIO_REASON_MEMORY_GONE;
        reason = end_at(lookup, lookup->step, lookup->step->address, true, VIO_REASON_MEMORY_GONE);
        request->walk.has_middle = lookup->step->middle;
        request->walk.middle = lookup->step->input;
    }
    request->space = space;
    return reason;
}

int vio_lookup(vio_engine *engine, uint32_t rid, uint32_t pasid, uint64_t iova, uint32_t access, vio_path *out)
{
    struct errand errand;
    struct lookup lookup = {
        .request = {.rid = rid, .pasid = pasid, .need = access, .iova = iova}, .path = out, .errand = &errand};
    int reason;

    if (!(access & PT_RWX) || (access & ~(uint32_t)(PT_RWX | VIO_PRIVILEGED)))
        return VIO_ERR_VALUE;
    errand_init(&errand);
    for (;;) {
        gate_pass(&engine->gate);
        reason = look_up(engine, &lookup);
        if (!errand.pieces)
            break;
        errand_run(engine, &errand);
    }
    out->found = !reason;
    if (reason)
        out->fault = request_fault(&lookup.request, reason, 0);
    gate_leave(&engine->gate);
    return VIO_OK;
}
