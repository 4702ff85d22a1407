/* One walker for each host format and each pair of formats, from the templates of walk.h. */
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

walk_fn walk_host(int format)
{
    return host_walks[format];
}

walk_fn walk_nested(int stage1, int stage2)
{
    return nested_walks[stage1][stage2];
}
