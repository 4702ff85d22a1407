/*
 * Sequences of map, unmap, bind, attach, invalidate, DMA and edits of guest tables, against a dictionary of what must
 * hold: which host address each GPA has, what each child's table says of each of its pages now, what it has said since
 * that page was last invalidated, and the word at the start of each page of memory.
 *
 * A host-managed space must answer exactly. A child must answer by what its table says, or said after the page's last
 * invalidation; through a page that stage 2 maps now in either case.
 */
#include "harness.h"

#define HOST 1u
#define CHILDREN 3u
#define VOID (8ull << 30)  /* host addresses with nothing behind them: for large leaves */
#define MAX_RUNS 96u
#define UNITS 8u           /* pages of the guest, in the leaf size of the child's format */
#define SLOT (1u << 16)    /* of a table: the largest there is */
#define ROOT (16 * SLOT)   /* of a root: as many joined as there can be */
#define DATA (8u << 20)    /* offset of the guest's pages in memory; tables below */
#define RAM (2 * DATA)
#define NOWHERE UNITS

struct run { /* one mapping of stage 2, or what an unmap has left of one */
    uint64_t first, last, hva;
    unsigned access;
};

struct child {
    struct tables tables;
    unsigned levels, unit_lg2;
    uint64_t iova;          /* of its first page */
    uint64_t root;          /* GPA; the other tables follow */
    bool bound;
    unsigned leads[UNITS];  /* page -> page of the guest now, or NOWHERE */
    unsigned perm[UNITS];
    uint32_t may[UNITS];    /* pages it may still be seen to lead to: a bit each */
    unsigned may_perm[UNITS];
};

struct model {
    vio_engine *engine;
    struct tables host;
    unsigned runs;
    struct run run[MAX_RUNS];
    struct child child[CHILDREN];
    unsigned route[CHILDREN + 1], route_access[CHILDREN + 1]; /* by RID: 0 none, 1 host, 2.. child; 99 blocked */
};

static uint8_t *ram, *empty;

/* Stage 2 */

static struct run *run_at(struct model *m, uint64_t gpa)
{
    for (unsigned i = 0; i < m->runs; i++)
        if (gpa >= m->run[i].first && gpa <= m->run[i].last)
            return &m->run[i];
    return NULL;
}

static bool overlaps(struct model *m, uint64_t first, uint64_t last)
{
    for (unsigned i = 0; i < m->runs; i++)
        if (first <= m->run[i].last && last >= m->run[i].first)
            return true;
    return false;
}

static bool all_mapped(struct model *m, uint64_t first, uint64_t last)
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

static void add_run(struct model *m, struct run run)
{
    HOLDS(m->runs < MAX_RUNS);
    m->run[m->runs++] = run;
}

static void take_out(struct model *m, uint64_t first, uint64_t last)
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

/* A range of stage 2 by pages, 2 MiB or 1 GiB; where it lies matters more than that it is large. */
static void take_range(struct input *in, uint64_t *gpa, uint64_t *size)
{
    static const unsigned unit[] = {12, 12, 21, 30};
    uint64_t choice = take(in, 1);
    unsigned lg2 = unit[choice & 3];

    *gpa = (take(in, 1) % 6) << lg2;
    if (choice & 4)
        *gpa += take(in, 1) << 12;
    *size = (1 + take(in, 1) % (lg2 == 12 ? 64 : 3)) << lg2;
    if (choice & 8)
        *size -= take(in, 1) << 12; /* may wrap: then it is refused */
    if (choice & 16)
        *gpa += take(in, 2) << 30;
    if (choice & 32)
        *gpa = ~0ull << 39 | *gpa;
    if (choice & 64)
        *gpa |= take(in, 1);
}

static bool range_ok(const struct model *m, uint64_t gpa, uint64_t size)
{
    uint64_t last = gpa + size - 1;

    return size && !((gpa | size) % PAGE) && last >= gpa && last <= m->host.config.last;
}

static void map(struct model *m, struct input *in)
{
    uint64_t gpa, size, choice, hva;
    unsigned access;
    int status, expected = VIO_OK;

    take_range(in, &gpa, &size);
    choice = take(in, 1);
    access = choice & 3 ? choice & 3 : RW_BOTH;
    if (choice & 4) { /* memory that is there */
        hva = (uintptr_t)ram + (take(in, 2) % (RAM / PAGE)) * PAGE;
        size = size > RAM - (hva - (uintptr_t)ram) ? RAM - (hva - (uintptr_t)ram) : size;
    } else {
        hva = (uintptr_t)empty + (gpa + ((choice & 8 ? 1 : 0) << 12)) % (1ull << 30);
        if (((gpa ^ hva) & ((1u << 21) - 1)) && size > 4u << 20) /* pages of it would fill many tables */
            size = 4u << 20;
    }
    if (m->runs > MAX_RUNS - 4)
        return;
    if (!range_ok(m, gpa, size) || size > (1ull << 47) - hva) /* the half of the address space that is a process's */
        expected = VIO_ERR_VALUE;
    else if (overlaps(m, gpa, gpa + size - 1))
        expected = VIO_ERR_OVERLAP;
    status = vio_space_map(m->engine, HOST, gpa, hva, size, access);
    HOLDS(status == expected);
    if (!status)
        add_run(m, (struct run){gpa, gpa + size - 1, hva, access});
}

static void unmap(struct model *m, struct input *in)
{
    uint64_t gpa, size;
    int status, expected = VIO_OK;

    take_range(in, &gpa, &size);
    if (m->runs > MAX_RUNS - 4 && m->runs) {
        gpa = m->run[0].first;
        size = m->run[0].last - gpa + 1;
    }
    if (!range_ok(m, gpa, size))
        expected = VIO_ERR_VALUE;
    else if (!all_mapped(m, gpa, gpa + size - 1))
        expected = VIO_ERR_NOT_MAPPED;
    status = vio_space_unmap(m->engine, HOST, gpa, size);
    HOLDS(status == expected);
    if (!status)
        take_out(m, gpa, gpa + size - 1);
}

static void protect(struct model *m, struct input *in)
{
    uint64_t gpa, size, choice = take(in, 1), last;
    unsigned access = choice & 7, before;
    int status, expected = VIO_OK;

    take_range(in, &gpa, &size);
    if (m->runs > MAX_RUNS / 2)
        return;
    if (choice & 8 && m->runs) {
        gpa = m->run[(choice >> 4) % m->runs].first;
        size = PAGE;
    }
    last = gpa + (size - 1);
    if (!range_ok(m, gpa, size) || !access || access & ~(unsigned)RW_BOTH)
        expected = VIO_ERR_VALUE;
    else if (!all_mapped(m, gpa, last))
        expected = VIO_ERR_NOT_MAPPED;
    status = vio_space_protect(m->engine, HOST, gpa, size, access);
    HOLDS(status == expected);
    before = m->runs;
    for (unsigned i = 0; i < before && !status; i++) { /* its parts within the range become runs of their own */
        struct run run = m->run[i], part = run;

        if (gpa > run.last || last < run.first)
            continue;
        part.first = gpa > run.first ? gpa : run.first;
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

/* The guest's tables: one chain down to a last table that holds its pages */

static uint64_t table_gpa(const struct child *c, unsigned level)
{
    return level == c->levels ? c->root : c->root + ROOT + (level - 1) * SLOT;
}

static uint8_t *table_entry(const struct child *c, unsigned level, uint64_t iova)
{
    return ram + table_gpa(c, level) + entry_offset(&c->tables, iova, level);
}

static void guest_writes(uint8_t *at, uint64_t entry)
{
    __atomic_store_n((uint64_t *)(void *)at, entry, __ATOMIC_RELEASE);
}

static uint64_t page_gpa(const struct child *c, unsigned page)
{
    return DATA + ((uint64_t)page << c->unit_lg2);
}

static void edit(struct model *m, struct input *in, bool all)
{
    struct child *c = &m->child[take(in, 1) % CHILDREN];
    const struct pt_format *format = pt_formats[c->tables.format];

    if (!c->bound)
        return;
    for (unsigned page = all ? 0 : (unsigned)take(in, 1) % UNITS; page < UNITS; page++) {
        uint64_t choice = take(in, 1), entry = 0;

        c->leads[page] = choice & 64 ? NOWHERE : (unsigned)choice % UNITS;
        c->perm[page] = choice & 8 ? VIO_READ : RW_BOTH;
        if (c->leads[page] != NOWHERE)
            entry = format->make_leaf(&c->tables.config, page_gpa(c, c->leads[page]), 1, c->unit_lg2, c->perm[page]);
        guest_writes(table_entry(c, 1, c->iova + ((uint64_t)page << c->unit_lg2)), entry);
        c->may[page] |= 1u << c->leads[page];
        c->may_perm[page] |= c->leads[page] == NOWHERE ? 0 : c->perm[page];
        if (!all)
            break;
    }
}

static void forget(struct child *c, uint64_t first, uint64_t last)
{
    for (unsigned page = 0; page < UNITS; page++) {
        uint64_t start = c->iova + ((uint64_t)page << c->unit_lg2), end = start + ((1ull << c->unit_lg2) - 1);

        if (first > end || last < start)
            continue;
        c->may[page] = 1u << c->leads[page];
        c->may_perm[page] = c->leads[page] == NOWHERE ? 0 : c->perm[page];
    }
}

static void bind(struct model *m, struct input *in)
{
    unsigned number = (unsigned)take(in, 1) % CHILDREN;
    struct child *c = &m->child[number];
    uint64_t choice = take(in, 1), place = take(in, 1);
    const struct pt_format *format;
    struct pt_start start;

    c->root = number * (2 * ROOT);
    c->tables = take_tables(in, guest_format(choice & 63, m->host.format), c->root, TABLES_PLAIN);
    format = pt_formats[c->tables.format];
    c->unit_lg2 = c->tables.config.table.tree.granule;
    place = (choice & 64 ? take(in, 3) << 24 : 0) + place * UNITS;
    c->iova = (choice & 128 ? ~place : place) << c->unit_lg2;
    c->iova &= ~(((uint64_t)UNITS << c->unit_lg2) - 1); /* so that all lie in one table */
    if (format->start(&c->tables.config, c->iova, &start))
        c->iova = 0;
    HOLDS(!format->start(&c->tables.config, c->iova, &start) && start.granule == c->unit_lg2);
    c->levels = start.levels;
    memset(ram + c->root, 0, pt_root_bytes(&c->tables.config.table.tree));
    for (unsigned level = c->levels; level > 1; level--) {
        memset(ram + table_gpa(c, level - 1), 0, 1u << c->unit_lg2);
        guest_writes(table_entry(c, level, c->iova),
                     format->make_table(&c->tables.config, table_gpa(c, level - 1), level));
    }
    HOLDS(!vio_space_bind(m->engine, HOST + 1 + number, c->tables.format, &c->tables.asked));
    c->bound = true;
    for (unsigned page = 0; page < UNITS; page++) {
        c->leads[page] = NOWHERE;
        c->may[page] = 1u << NOWHERE;
        c->may_perm[page] = 0;
    }
}

static void invalidate(struct model *m, struct input *in)
{
    unsigned number = (unsigned)take(in, 1) % (CHILDREN + 1);
    uint64_t choice = take(in, 1), first = 0, last = UINT64_MAX;
    struct child *c = number ? &m->child[number - 1] : NULL;

    if (c && c->bound && choice & 1) {
        first = c->iova + ((choice >> 1 & 7) << c->unit_lg2);
        last = first + ((choice >> 4 & 7) << c->unit_lg2) + (1ull << c->unit_lg2) - 1;
        if (last < first)
            last = UINT64_MAX;
    }
    HOLDS(!vio_space_invalidate(m->engine, HOST + number, first, last));
    if (c)
        forget(c, first, last);
}

/* Requests */

static void attach(struct model *m, struct input *in)
{
    uint32_t rid = (uint32_t)take(in, 1) % (CHILDREN + 1);
    uint64_t choice = take(in, 1);
    unsigned target = (unsigned)(choice % (CHILDREN + 3)), access = choice >> 4 & 3;

    if (target == 0) {
        HOLDS(vio_route_detach(m->engine, rid, VIO_NO_PASID) == (m->route[rid] ? VIO_OK : VIO_ERR_UNKNOWN));
        m->route[rid] = 0;
    } else if (target == CHILDREN + 2) {
        HOLDS(!vio_route_block(m->engine, rid, VIO_NO_PASID));
        m->route[rid] = 99;
    } else {
        HOLDS(!vio_route_attach(m->engine, rid, VIO_NO_PASID, HOST + target - 1, access));
        m->route[rid] = target;
        m->route_access[rid] = access;
    }
}

/* What stage 2 says of an access to a GPA: 0 or the reason. */
static int stage2_says(struct model *m, uint64_t gpa, unsigned need)
{
    struct run *run = run_at(m, gpa);

    if (gpa > m->host.config.last)
        return VIO_REASON_ADDRESS_WIDTH;
    if (!run)
        return VIO_REASON_NOT_PRESENT;
    return need & ~run->access ? VIO_REASON_PERMISSION : 0;
}

static void check_size(struct model *m, const vio_translation *found)
{
    struct run *run = run_at(m, found->gpa);

    HOLDS(run && found->hva == run->hva + (found->gpa - run->first));
    HOLDS(found->size && found->gpa + (found->size - 1) <= run->last && found->gpa + (found->size - 1) >= found->gpa);
    HOLDS(!(found->access & ~run->access & RW_BOTH));
}

static bool on_chain(struct model *m, const struct child *c)
{
    for (unsigned level = 1; level <= c->levels; level++) {
        uint64_t gpa = table_gpa(c, level) + entry_offset(&c->tables, c->iova, level);
        struct run *run = run_at(m, gpa);

        if (!run || !(run->access & VIO_READ) || run->hva + (gpa - run->first) != (uintptr_t)ram + gpa ||
            !(run->access & VIO_WRITE))
            return false;
    }
    return true;
}

/* A child whose whole chain of tables is visible must answer exactly, but for what was edited and not invalidated. */
static void check_child(struct model *m, const struct child *c, uint64_t iova, unsigned need, int status,
                        const vio_translation *found)
{
    unsigned page = (unsigned)((iova - c->iova) >> c->unit_lg2), settled = NOWHERE;
    uint64_t offset = iova & ((1ull << c->unit_lg2) - 1);

    if (iova < c->iova || page >= UNITS || !on_chain(m, c))
        return;
    for (unsigned i = 0; i <= NOWHERE; i++)
        if (c->may[page] == 1u << i)
            settled = i;
    if (!status) {
        unsigned target = (unsigned)((found->gpa - DATA) >> c->unit_lg2);

        HOLDS(found->gpa >= DATA && target < UNITS && found->gpa == page_gpa(c, target) + offset);
        HOLDS(c->may[page] >> target & 1);
        HOLDS(!(need & ~c->may_perm[page]));
    } else if (settled != NOWHERE && c->may[page] == 1u << settled && c->may_perm[page] == c->perm[page]) {
        int reason = stage2_says(m, page_gpa(c, settled) + offset, need);

        if (!reason && need & ~c->perm[page])
            reason = VIO_REASON_PERMISSION;
        HOLDS(reason);
    }
}

static void request(struct model *m, struct input *in)
{
    uint32_t rid = (uint32_t)take(in, 1) % (CHILDREN + 1);
    uint64_t choice = take(in, 1), place = take(in, 1), iova, word = 0, size;
    unsigned need = 1 + (unsigned)(choice & 3) % 3, target = m->route[rid];
    struct child *c = target >= 2 && target < 99 ? &m->child[target - 2] : NULL;
    vio_translation found;
    int status;

    if (c && c->bound && choice & 8)
        iova = c->iova + (place % UNITS << c->unit_lg2) + (choice & 4 ? place << 3 : 0);
    else if (m->runs && choice & 16)
        iova = m->run[place % m->runs].first + take(in, 2);
    else
        take_range(in, &iova, &size);
    status = vio_translate(m->engine, rid, VIO_NO_PASID, iova, need, &found);
    HOLDS(status == VIO_OK || status == VIO_FAULT);
    if (!target || target == 99)
        HOLDS(status && vio_last_fault()->reason == (target ? VIO_REASON_BLOCKED : VIO_REASON_NO_ROUTE));
    else if (need & ~m->route_access[rid])
        HOLDS(status && vio_last_fault()->reason == VIO_REASON_PERMISSION && !vio_last_fault()->stage);
    else if (c && !c->bound)
        HOLDS(status && vio_last_fault()->reason == VIO_REASON_NOT_BOUND);
    else if (c)
        check_child(m, c, iova, need, status, &found);
    else
        HOLDS((status ? vio_last_fault()->reason : 0) == stage2_says(m, iova, need));
    if (status)
        return;
    check_size(m, &found);
    if (choice & 32) /* through tables it would change them: the guest's pages only */
        return;
    status = vio_dma(m->engine, rid, VIO_NO_PASID, iova & ~7ull, &word, sizeof word, 0);
    if (need & VIO_READ && found.hva - (uintptr_t)ram < RAM) {
        uint64_t there;

        memcpy(&there, (void *)(uintptr_t)(found.hva & ~7ull), sizeof there);
        HOLDS(!status && word == there);
    }
    if (need & VIO_WRITE && found.hva - (uintptr_t)ram - DATA < DATA) {
        uint64_t there;

        word ^= 0x0123456789abcdef;
        HOLDS(!vio_dma(m->engine, rid, VIO_NO_PASID, iova & ~7ull, &word, sizeof word, 1));
        memcpy(&there, (void *)(uintptr_t)(found.hva & ~7ull), sizeof there);
        HOLDS(word == there);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input in = {data, data + size};
    struct model m = {0};

    if (!ram) {
        ram = reserve(RAM, 2u << 20, PROT_READ | PROT_WRITE);
        empty = reserve(VOID, 1u << 30, PROT_NONE);
    }
    m.host = take_tables(&in, host_format(take(&in, 1)), 0, TABLES_HOST);
    HOLDS(!vio_engine_create((uint32_t)take(&in, 1), &m.engine));
    HOLDS(!vio_space_create_host(m.engine, HOST, m.host.format, &m.host.asked));
    for (unsigned i = 0; i < CHILDREN; i++)
        HOLDS(!vio_space_create_nested(m.engine, HOST + 1 + i, HOST));
    while (more(&in))
        switch (take(&in, 1) & 15) {
        case 0:
        case 1: map(&m, &in); break;
        case 2: unmap(&m, &in); break;
        case 3: bind(&m, &in); break;
        case 4: edit(&m, &in, false); break;
        case 5: edit(&m, &in, true); break;
        case 6: invalidate(&m, &in); break;
        case 7: attach(&m, &in); break;
        case 9: protect(&m, &in); break;
        case 8: /* all of memory where it is expected, as a guest has it */
            if (!overlaps(&m, 0, RAM - 1) && range_ok(&m, 0, RAM) && m.runs < MAX_RUNS) {
                HOLDS(!vio_space_map(m.engine, HOST, 0, (uintptr_t)ram, RAM, RW_BOTH));
                add_run(&m, (struct run){0, RAM - 1, (uintptr_t)ram, RW_BOTH});
            }
            break;
        default: request(&m, &in); break;
        }
    vio_engine_destroy(m.engine);
    madvise(ram, RAM, MADV_DONTNEED);
    return 0;
}
