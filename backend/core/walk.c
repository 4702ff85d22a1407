/* One walker for each host format, each pair of formats, and each format over two, from the templates of walk.h. */
#include "walk.h"

#define X(format)                                                                                                      \
    static int host_##format(const struct space *space, struct guard *guard, struct walk *walk)                        \
    {                                                                                                                  \
        (void)guard; /* our own tables stay */                                                                         \
        return walk_host_space(&format##_format, space, walk);                                                         \
    }
FORMATS(X)
#undef X

#define PAIR(stage1, stage2)                                                                                           \
    static int nested_##stage1##_##stage2(const struct space *space, struct guard *guard, struct walk *walk)           \
    {                                                                                                                  \
        return walk_nested_space(&stage1##_format, &stage2##_format, space, guard, walk);                              \
    }
#define X(stage2) FORMATS_OVER(PAIR, stage2)
FORMATS(X)
#undef X
#undef PAIR

#define X(format)                                                                                                      \
    static int over_guest_##format(const struct space *space, struct guard *guard, struct walk *walk)                  \
    {                                                                                                                  \
        return walk_nested_space(&format##_format, NULL, space, guard, walk);                                          \
    }
FORMATS(X)
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

static const walk_fn host_walks[PT_FORMATS] = {
#define X(format) [PT_##format] = host_##format,
    FORMATS(X)
#undef X
};

static const walk_fn nested_walks[PT_FORMATS][PT_FORMATS] = {
#define PAIR(stage1, stage2) [PT_##stage1][PT_##stage2] = nested_##stage1##_##stage2,
#define X(stage2) FORMATS_OVER(PAIR, stage2)
    FORMATS(X)
#undef X
#undef PAIR
};

static const walk_fn over_guest_walks[PT_FORMATS] = {
#define X(format) [PT_##format] = over_guest_##format,
    FORMATS(X)
#undef X
};

walk_fn walk_host(int format)
{
    return host_walks[format];
}

walk_fn walk_nested(int stage1, const struct space *parent)
{
    return parent->parent ? over_guest_walks[stage1] : nested_walks[stage1][parent->format];
}
