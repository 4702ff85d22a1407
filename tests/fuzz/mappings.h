/* A dictionary of mappings: what map, unmap and protect must have left. */
#ifndef VIOASID_FUZZ_MAPPINGS_H
#define VIOASID_FUZZ_MAPPINGS_H

#include "harness.h"

#define MAX_RUNS 96u

struct run { /* one mapping of stage 2, or what an unmap has left of one */
    uint64_t first, last, hva;
    unsigned access;
};

struct mappings {
    unsigned runs;
    struct run run[MAX_RUNS];
};

static inline struct run *run_at(struct mappings *m, uint64_t gpa)
{
    for (unsigned i = 0; i < m->runs; i++)
        if (gpa >= m->run[i].first && gpa <= m->run[i].last)
            return &m->run[i];
    return NULL;
}

static inline bool overlaps(struct mappings *m, uint64_t first, uint64_t last)
{
    for (unsigned i = 0; i < m->runs; i++)
        if (first <= m->run[i].last && last >= m->run[i].first)
            return true;
    return false;
}

static inline bool all_mapped(struct mappings *m, uint64_t first, uint64_t last)
{
    for (;;) {
        struct run *run = run_at(m, first);

        if (!run)
            return false;
        if (run->last >= last)
            return true;
        first = run->last + 1;
    }
}

static inline void add_run(struct mappings *m, struct run run)
{
    HOLDS(m->runs < MAX_RUNS);
    m->run[m->runs++] = run;
}

static inline void take_out(struct mappings *m, uint64_t first, uint64_t last)
{
    for (unsigned i = 0; i < m->runs;) {
        struct run run = m->run[i];

        if (first > run.last || last < run.first) {
            i++;
            continue;
        }
        m->run[i] = m->run[--m->runs];
        if (run.first < first)
            add_run(m, (struct run){run.first, first - 1, run.hva, run.access});
        if (run.last > last)
            add_run(m, (struct run){last + 1, run.last, run.hva + (last + 1 - run.first), run.access});
    }
}

static inline void give_access(struct mappings *m, uint64_t first, uint64_t last, unsigned access)
{
    unsigned before = m->runs;

    for (unsigned i = 0; i < before; i++) { /* its parts within the range become runs of their own */
        struct run run = m->run[i], part = run;

        if (first > run.last || last < run.first)
            continue;
        part.first = first > run.first ? first : run.first;
        part.last = last < run.last ? last : run.last;
        part.hva += part.first - run.first;
        part.access = access;
        m->run[i] = part;
        if (run.first < part.first)
            add_run(m, (struct run){run.first, part.first - 1, run.hva, run.access});
        if (run.last > part.last)
            add_run(m, (struct run){part.last + 1, run.last, run.hva + (part.last + 1 - run.first), run.access});
    }
}

#endif
