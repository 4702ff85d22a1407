/* One walker for each host format and each pair of formats, from the templates of walk.h. */
#include "walk.h"

#define X(format)                                                                                                      \
    static int host_##format(const struct space *space, struct guard *guard, struct walk *walk)                        \
    {                                                                                                                  \
        (void)guard; /* our own tables stay */                                                                         \
        return walk_host_space(&format##_format, space, walk);                                                         \
    }
HOST_FORMATS(X)
#undef X

#define X(stage1, stage2)                                                                                              \
    static int nested_##stage1##_##stage2(const struct space *space, struct guard *guard, struct walk *walk)           \
    {                                                                                                                  \
        return walk_nested_space(&stage1##_format, &stage2##_format, space, guard, walk);                              \
    }
PAIRS(X)
#undef X

walk_fn walk_host(int format)
{
#define X(name)                                                                                                        \
    if (format == PT_##name)                                                                                           \
        return host_##name;
    HOST_FORMATS(X)
#undef X
    return NULL;
}

walk_fn walk_nested(int stage1, int stage2)
{
#define X(one, two)                                                                                                    \
    if (stage1 == PT_##one && stage2 == PT_##two)                                                                      \
        return nested_##one##_##two;
    PAIRS(X)
#undef X
    return NULL;
}
