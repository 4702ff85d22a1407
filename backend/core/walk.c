/* One walker for each host format, each pair of formats, and each format over two, from the templates of walk.h. */
#include "walk.h"

#define X(format, granule)                                                                                             \
    static int host_##format##_##granule(const struct space *space, struct guard *guard, struct walk *walk)            \
    {                                                                                                                  \
        (void)guard; /* our own tables stay */                                                                         \
        return walk_host_space(&format##_format, granule, space, walk);                                                \
    }
WALKS(X)
#undef X

#define PAIR(stage1, granule1, stage2, granule2)                                                                       \
    static int nested_##stage1##_##granule1##_##stage2##_##granule2(const struct space *space, struct guard *guard,    \
                                                                    struct walk *walk)                                 \
    {                                                                                                                  \
        return walk_nested_space(&stage1##_format, granule1, &stage2##_format, granule2, space, guard, walk);          \
    }
#define X(stage2, granule2) WALKS_OVER(PAIR, stage2, granule2)
WALKS(X)
#undef X
#undef PAIR

#define X(format, granule)                                                                                             \
    static int over_guest_##format##_##granule(const struct space *space, struct guard *guard, struct walk *walk)      \
    {                                                                                                                  \
        return walk_nested_space(&format##_format, granule, NULL, 0, space, guard, walk);                              \
    }
WALKS(X)
#undef X

int walk_middle(const struct space *middle, struct guard *guard, struct walk *walk, uint64_t address, unsigned need,
                bool table)
{
    struct walk *under = walk->under;
    int reason = VIO_REASON_NOT_BOUND;

    *under = (struct walk){.iova = address, .need = need, .cache = walk->cache};
    if (table && middle->walk)
        under->need = space_entry_rights(middle, need);
    if (middle->walk)
        reason = middle->walk(middle, guard, under);
    if (!reason && table && IS_FOREIGN(under->hva)) { /* see place_entry */
        under->stage = 2;
        under->fault_gpa = under->gpa;
        under->has_gpa = true;
        reason = VIO_REASON_UNSUPPORTED;
    }
    if (__builtin_expect(!reason, 1))
        return 0;
    walk->stage = under->stage;
    walk->level = under->level;
    walk->entry = under->entry;
    walk->fault_gpa = under->fault_gpa;
    walk->has_gpa = under->has_gpa;
    walk->table = table || under->table;
    walk->middle = address;
    walk->has_middle = true;
    return reason;
}

/* Granules, as indices. */
#define GRANULES 3
#define INDEX(granule) (((granule) - 12) / 2)

static const walk_fn host_walks[PT_FORMATS][GRANULES] = {
#define X(format, granule) [PT_##format][INDEX(granule)] = host_##format##_##granule,
    WALKS(X)
#undef X
};

static const walk_fn nested_walks[PT_FORMATS][GRANULES][PT_FORMATS][GRANULES] = {
#define PAIR(stage1, granule1, stage2, granule2)                                                                       \
    [PT_##stage1][INDEX(granule1)][PT_##stage2][INDEX(granule2)] = nested_##stage1##_##granule1##_##stage2##_##granule2,
#define X(stage2, granule2) WALKS_OVER(PAIR, stage2, granule2)
    WALKS(X)
#undef X
#undef PAIR
};

static const walk_fn over_guest_walks[PT_FORMATS][GRANULES] = {
#define X(format, granule) [PT_##format][INDEX(granule)] = over_guest_##format##_##granule,
    WALKS(X)
#undef X
};

walk_fn walk_host(int format, const struct pt_config *table)
{
    return host_walks[format][INDEX(table->table.tree.granule)];
}

static walk_fn nested_walk(int stage1, unsigned granule, const struct space *parent)
{
    return parent->parent ? over_guest_walks[stage1][INDEX(granule)]
                          : nested_walks[stage1][INDEX(granule)][parent->format][INDEX(parent->table.table.tree.granule)];
}

/* Two ranges with granules of their own: the address says which. */
static int walk_ranges(const struct space *space, struct guard *guard, struct walk *walk)
{
    struct pt_start start = {.granule = PT_GRANULE};

    pt_formats[space->format]->start(&space->table, walk->iova, &start);
    return nested_walk(space->format, start.granule, space->parent)(space, guard, walk);
}

walk_fn walk_nested(int stage1, const struct pt_config *table, const struct space *parent)
{
    const vio_tree *tree = &table->table.tree, *upper = &table->table.upper;
    unsigned granule = PT_GRANULE; /* of a table without a tree: any will tell */

    if (tree->levels && upper->levels && tree->granule != upper->granule)
        return walk_ranges;
    if (tree->levels || upper->levels)
        granule = tree->levels ? tree->granule : upper->granule;
    return nested_walk(stage1, granule, parent);
}
