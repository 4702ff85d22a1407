/*
 * The walk as simply as it can be written, without a single check, over the tables that the core walks; specialised, as
 * the core's is, for what tells formats apart here: the granule, and where an entry holds its address.
 */
#include <stdlib.h>

#include "bench_clock.h"
#include "engine.h"

static const struct pt_format *const formats[] = {
#define X(name) &name##_format,
    FORMATS(X)
#undef X
};

int bench_formats(void)
{
    return PT_FORMATS;
}

const char *bench_format_name(int format)
{
    return formats[format]->name;
}

/* The configuration to measure: 4 levels where the format has them, else as many as come nearest. */
int bench_config(int format, unsigned granule, int host, vio_table *out)
{
    static const unsigned wanted[] = {4, 3, 5, 2, 1, 6};
    const struct pt_format *f = formats[format];

    if (granule != 12 && !f->any_granule)
        return 0;
    for (unsigned i = 0; i < sizeof wanted / sizeof *wanted; i++) {
        struct pt_config config = {.table.tree = {.levels = wanted[i], .granule = granule}};

        if (!f->any_granule && (wanted[i] < f->min_levels || wanted[i] > f->max_levels))
            continue;
        if (f->prepare(&config, host) && config.table.tree.levels == wanted[i]) {
            *out = (vio_table){.tree = {.levels = wanted[i], .granule = granule}};
            return 1;
        }
    }
    return 0;
}

/* Does an entry hold its address two bits lower, as RISC-V's do? */
int bench_shifted(int format)
{
    struct pt_config config = {0};
    vio_table table;

    if (!bench_config(format, 12, 0, &table))
        return 0;
    config.table = table;
    formats[format]->prepare(&config, false);
    return (formats[format]->make_leaf(&config, 1ull << 30, 1, 12, VIO_READ) >> 28 & 5) == 1;
}

#define OA(entry, granule, shifted)                                                                                    \
    ((shifted) ? (entry) << 2 & PT_MASK(47, 12) : (entry) & PT_MASK(47, granule))

PT_INLINE uint64_t index_of(uint64_t address, unsigned level, unsigned levels, unsigned granule)
{
    uint64_t index = address >> (3 + (granule - 3) * level);

    return level == levels ? index : index & ((1ull << (granule - 3)) - 1);
}

/* A table of ours: entries and root are addresses of this process. */
PT_INLINE uint64_t bare_stage2(uint64_t root, unsigned levels, uint64_t gpa, unsigned granule, int shifted)
{
    for (unsigned level = levels; level; level--) {
        uint64_t entry = ((const uint64_t *)(uintptr_t)root)[index_of(gpa, level, levels, granule)];

        root = OA(entry, granule, shifted);
    }
    return root | (gpa & ((1ull << granule) - 1));
}

PT_INLINE uint64_t bare_nested(const struct floor_tables *t, uint64_t iova, unsigned granule1, int shifted1,
                               unsigned granule2, int shifted2)
{
    uint64_t gpa = t->root1;

    for (unsigned level = t->levels1; level; level--) {
        uint64_t at = gpa + index_of(iova, level, t->levels1, granule1) * 8;
        uint64_t entry = *(const uint64_t *)(uintptr_t)bare_stage2(t->root2, t->levels2, at, granule2, shifted2);

        gpa = OA(entry, granule1, shifted1);
    }
    return bare_stage2(t->root2, t->levels2, gpa | (iova & ((1ull << granule1) - 1)), granule2, shifted2);
}

PT_INLINE uint64_t run(const struct floor_tables *t, const uint64_t *iovas, uint64_t count, uint64_t rounds,
                       unsigned granule1, int shifted1, unsigned granule2, int shifted2)
{
    uint64_t last = 0;

    for (uint64_t round = 0; round < rounds; round++)
        for (uint64_t i = 0; i < count; i++)
            last = bare_nested(t, iovas[i] + after(last), granule1, shifted1, granule2, shifted2);
    return last;
}

#define STAGE2(g1, s1)                                                                                                 \
    switch (t->granule2 + t->shifted2) {                                                                               \
    case 12: last = run(t, iovas, count, rounds, g1, s1, 12, 0); break;                                                \
    case 13: last = run(t, iovas, count, rounds, g1, s1, 12, 1); break;                                                \
    case 14: last = run(t, iovas, count, rounds, g1, s1, 14, 0); break;                                                \
    default: last = run(t, iovas, count, rounds, g1, s1, 16, 0); break;                                                \
    }

double floor_walk(const struct floor_tables *t, const uint64_t *iovas, uint64_t count, uint64_t rounds)
{
    uint64_t last;
    double start = now();

    switch (t->granule1 + t->shifted1) {
    case 12: STAGE2(12, 0) break;
    case 13: STAGE2(12, 1) break;
    case 14: STAGE2(14, 0) break;
    default: STAGE2(16, 0) break;
    }
    if (after(last))
        abort();
    return (now() - start) / (double)(rounds * count);
}

uint64_t floor_walk_one(const struct floor_tables *t, uint64_t iova)
{
    switch (t->granule1 * 100 + t->granule2 + (t->shifted1 ? 50 : 0) + t->shifted2) {
    default: return 0;
#define ONE(g1, s1, g2, s2)                                                                                            \
    case g1 * 100 + g2 + (s1 ? 50 : 0) + s2: return bare_nested(t, iova, g1, s1, g2, s2);
        ONE(12, 0, 12, 0) ONE(12, 0, 12, 1) ONE(12, 0, 14, 0) ONE(12, 0, 16, 0)
        ONE(12, 1, 12, 0) ONE(12, 1, 12, 1) ONE(12, 1, 14, 0) ONE(12, 1, 16, 0)
        ONE(14, 0, 12, 0) ONE(14, 0, 12, 1) ONE(14, 0, 14, 0) ONE(14, 0, 16, 0)
        ONE(16, 0, 12, 0) ONE(16, 0, 12, 1) ONE(16, 0, 14, 0) ONE(16, 0, 16, 0)
    }
}
