/*
 * Sequences of map, unmap, bind, attach, invalidate, DMA and edits of guest tables, against a dictionary of what must
 * hold: which host address each GPA has, what each child's table says of each of its pages now, what it has said since
 * that page was last invalidated, and the word at the start of each page of memory.
 *
 * A host-managed space must answer exactly. A child must answer by what its table says, or said after the page's last
 * invalidation; through a page that stage 2 maps now in either case.
 */
#include "mappings.h"

#define HOST 1u
#define CHILDREN 3u
#define VOID (8ull << 30)  /* host addresses with nothing behind them: for large leaves */
#define MAX_DIRTY 64u
#define UNITS 8u           /* pages of the guest, in the leaf size of the child's format */
#define SLOT (1u << 16)    /* of a table: the largest there is */
#define ROOT (16 * SLOT)   /* of a root: as many joined as there can be */
#define DATA (8u << 20)    /* offset of the guest's pages in memory; tables below */
#define RAM (2 * DATA)
#define NOWHERE UNITS

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
    struct mappings mapped;
    struct child child[CHILDREN];
    bool tracked;              /* what requests write */
    unsigned dirties;
    uint64_t dirty[MAX_DIRTY]; /* pages of 4 KiB, by GPA */
    unsigned route[CHILDREN + 1], route_access[CHILDREN + 1]; /* by RID: 0 none, 1 host, 2.. child; 99 blocked */
};

static uint8_t *ram, *empty;

/* Stage 2 */

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

/* Can a leaf of stage 2 permit this? */
static bool access_ok(const struct model *m, unsigned access)
{
    return access & VIO_READ || (access && pt_formats[m->host.format]->write_only);
}

static bool range_ok(const struct model *m, uint64_t gpa, uint64_t size)
{
    uint64_t last = gpa + size - 1, page = (1ull << m->host.config.table.tree.granule) - 1;

    return size && !((gpa | size) & page) && last >= gpa && last <= m->host.config.last;
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
    if (m->mapped.runs > MAX_RUNS - 4)
        return;
    if (!range_ok(m, gpa, size) || !access_ok(m, access) || hva & ((1ull << m->host.config.table.tree.granule) - 1) || size > (1ull << 47) - hva) /* the half of the address space that is a process's */
        expected = VIO_ERR_VALUE;
    else if (overlaps(&m->mapped, gpa, gpa + size - 1))
        expected = VIO_ERR_OVERLAP;
    status = vio_space_map(m->engine, HOST, gpa, hva, size, access);
    HOLDS(status == expected);
    if (!status)
        add_run(&m->mapped, (struct run){gpa, gpa + size - 1, hva, access});
}

static void unmap(struct model *m, struct input *in)
{
    uint64_t gpa, size;
    int status, expected = VIO_OK;

    take_range(in, &gpa, &size);
    if (m->mapped.runs > MAX_RUNS - 4 && m->mapped.runs) {
        gpa = m->mapped.run[0].first;
        size = m->mapped.run[0].last - gpa + 1;
    }
    if (!range_ok(m, gpa, size))
        expected = VIO_ERR_VALUE;
    else if (!all_mapped(&m->mapped, gpa, gpa + size - 1))
        expected = VIO_ERR_NOT_MAPPED;
    status = vio_space_unmap(m->engine, HOST, gpa, size);
    HOLDS(status == expected);
    if (!status)
        take_out(&m->mapped, gpa, gpa + size - 1);
}

static void protect(struct model *m, struct input *in)
{
    uint64_t gpa, size, choice = take(in, 1), last;
    unsigned access = choice & 7;
    int status, expected = VIO_OK;

    take_range(in, &gpa, &size);
    if (m->mapped.runs > MAX_RUNS / 2)
        return;
    if (choice & 8 && m->mapped.runs) {
        gpa = m->mapped.run[(choice >> 4) % m->mapped.runs].first;
        size = PAGE;
    }
    last = gpa + (size - 1);
    if (!range_ok(m, gpa, size) || !access_ok(m, access) || access & ~(unsigned)RW_BOTH)
        expected = VIO_ERR_VALUE;
    else if (!all_mapped(&m->mapped, gpa, last))
        expected = VIO_ERR_NOT_MAPPED;
    status = vio_space_protect(m->engine, HOST, gpa, size, access);
    HOLDS(status == expected);
    if (!status)
        give_access(&m->mapped, gpa, last, access);
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
    c->tables = take_tables(in, any_format(choice & 63), c->root, TABLES_PLAIN);
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

/* Dirty tracking */

static void note_dirty(struct model *m, uint64_t gpa)
{
    for (unsigned i = 0; i < m->dirties; i++)
        if (m->dirty[i] == gpa / PAGE)
            return;
    HOLDS(m->dirties < MAX_DIRTY);
    m->dirty[m->dirties++] = gpa / PAGE;
}

/* Every page that a request wrote is in the answer, and no other; pages of the guest's tables may be. */
static void read_dirty(struct model *m, struct input *in, bool all)
{
    static uint8_t bitmap[DATA];
    uint64_t gpa = 0, size = 2 * DATA, choice = take(in, 1), bits;
    unsigned lg2 = 12 + (unsigned)(choice & 15), expected = 0, found = 0;
    bool clear = all || choice & 16;

    if (!all && !(choice & 32))
        take_range(in, &gpa, &size);
    if (gpa + size < gpa || size >> lg2 > sizeof bitmap * 8)
        return;
    bits = size >> lg2;
    memset(bitmap, 0, bits / 8 + 1);
    if ((gpa | size) & ((1ull << lg2) - 1) || !size) {
        HOLDS(vio_dirty_read(m->engine, HOST, gpa, size, lg2, clear, bitmap) == VIO_ERR_VALUE);
        return;
    }
    HOLDS(vio_dirty_read(m->engine, HOST, gpa, size, lg2, clear, bitmap) == (m->tracked ? VIO_OK : VIO_ERR_UNTRACKED));
    for (unsigned i = 0; i < m->dirties; i++) {
        uint64_t bit = (m->dirty[i] * PAGE - gpa) >> lg2;
        bool first = true;

        if (m->dirty[i] * PAGE < gpa || bit >= bits)
            continue;
        HOLDS(bitmap[bit / 8] >> bit % 8 & 1);
        for (unsigned j = 0; j < i; j++)
            first &= m->dirty[j] * PAGE < gpa || (m->dirty[j] * PAGE - gpa) >> lg2 != bit;
        expected += first;
    }
    for (uint64_t bit = gpa < DATA ? (DATA - gpa + (1ull << lg2) - 1) >> lg2 : 0; bit < bits; bit++)
        found += bitmap[bit / 8] >> bit % 8 & 1;
    HOLDS(found <= expected);
    for (unsigned i = 0; clear && i < m->dirties;)
        if (m->dirty[i] * PAGE >= gpa && m->dirty[i] * PAGE - gpa < size)
            m->dirty[i] = m->dirty[--m->dirties];
        else
            i++;
}

static void track(struct model *m, struct input *in)
{
    uint64_t choice = take(in, 1);

    if (choice & 6) {
        read_dirty(m, in, false);
        return;
    }
    HOLDS(!vio_dirty_set(m->engine, HOST, choice & 1));
    m->tracked = choice & 1;
    if (!m->tracked)
        m->dirties = 0;
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
    struct run *run = run_at(&m->mapped, gpa);

    if (gpa > m->host.config.last)
        return VIO_REASON_ADDRESS_WIDTH;
    if (!run)
        return VIO_REASON_NOT_PRESENT;
    return need & ~run->access ? VIO_REASON_PERMISSION : 0;
}

static void check_size(struct model *m, const vio_translation *found)
{
    struct run *run = run_at(&m->mapped, found->gpa);

    HOLDS(run && found->hva == run->hva + (found->gpa - run->first));
    HOLDS(found->size && found->gpa + (found->size - 1) <= run->last && found->gpa + (found->size - 1) >= found->gpa);
    HOLDS(!(found->access & ~run->access & RW_BOTH));
}

static bool on_chain(struct model *m, const struct child *c)
{
    for (unsigned level = 1; level <= c->levels; level++) {
        uint64_t gpa = table_gpa(c, level) + entry_offset(&c->tables, c->iova, level);
        struct run *run = run_at(&m->mapped, gpa);

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

static uint64_t word_at(uint64_t hva)
{
    uint64_t word;

    memcpy(&word, (void *)(uintptr_t)hva, sizeof word);
    return word;
}

/* Through a translation just found, one word moves: what is read stands there, what is written stands there then. */
static void move(struct model *m, struct input *in, uint32_t rid, uint64_t iova, unsigned need,
                 const vio_translation *found)
{
    uint64_t hva = found->hva & ~7ull, kind = take(in, 1), word = 0, operand[2] = {kind << 56 | 7}, before[2] = {0};
    vio_engine *engine = m->engine;

    if (hva - (uintptr_t)ram >= RAM) { /* nothing there: a fault, and none but for that */
        if (need == VIO_READ)
            HOLDS(vio_dma(engine, rid, VIO_NO_PASID, iova, &word, sizeof word, 0) == VIO_FAULT &&
                  vio_last_fault()->reason == VIO_REASON_MEMORY_GONE && !vio_last_fault()->done);
        return;
    }
    if (need & VIO_READ) {
        HOLDS(!vio_dma(engine, rid, VIO_NO_PASID, iova, &word, sizeof word, 0) && word == word_at(hva));
        HOLDS(!vio_load(engine, rid, VIO_NO_PASID, iova, 8, &before[0]) && before[0] == word);
    }
    if (!(need & VIO_WRITE) || hva - (uintptr_t)ram < DATA) /* writes go to the guest's pages, not to its tables */
        return;
    if (m->dirties == MAX_DIRTY)
        read_dirty(m, in, true);
    if (m->dirties == MAX_DIRTY)
        return;
    if (m->tracked)
        note_dirty(m, found->gpa);
    word = word_at(hva);
    switch (kind & 7) {
    case 0:
        HOLDS(!vio_dma_fill(engine, rid, VIO_NO_PASID, iova, 8, 0x5a5a0000 + kind, 8));
        HOLDS(word_at(hva) == 0x5a5a0000 + kind);
        break;
    case 1:
        HOLDS(!vio_store(engine, rid, VIO_NO_PASID, iova, kind, 8) && word_at(hva) == kind);
        break;
    case 2:
    case 3:
        if (need != RW_BOTH)
            HOLDS(!vio_store(engine, rid, VIO_NO_PASID, iova, kind, 8));
        else if (kind & 1)
            HOLDS(!vio_atomic(engine, rid, VIO_NO_PASID, iova, VIO_ATOMIC_ADD, 8, operand, before, before) &&
                  before[0] == word && word_at(hva) == word + operand[0]);
        else
            HOLDS(!vio_atomic(engine, rid, VIO_NO_PASID, iova, VIO_ATOMIC_CAS, 8, operand, (uint64_t[2]){word},
                              before) &&
                  before[0] == word && word_at(hva) == operand[0]);
        break;
    case 4:
        if (need == RW_BOTH)
            HOLDS(!vio_dma_copy(engine, rid, VIO_NO_PASID, iova, rid, VIO_NO_PASID, iova, 8) && word_at(hva) == word);
        break;
    default:
        word ^= 0x0123456789abcdef;
        HOLDS(!vio_dma(engine, rid, VIO_NO_PASID, iova, &word, sizeof word, 1) && word_at(hva) == word);
        break;
    }
}

static void request(struct model *m, struct input *in)
{
    uint32_t rid = (uint32_t)take(in, 1) % (CHILDREN + 1);
    uint64_t choice = take(in, 1), place = take(in, 1), iova, size;
    unsigned need = 1 + (unsigned)(choice & 3) % 3, target = m->route[rid];
    struct child *c = target >= 2 && target < 99 ? &m->child[target - 2] : NULL;
    vio_translation found;
    int status;

    if (target == 1 && choice & 64)
        iova = DATA + place % 32 * PAGE + (choice & 4 ? place : 0);
    else if (c && c->bound && choice & 8)
        iova = c->iova + (place % UNITS << c->unit_lg2) + (choice & 4 ? place << 3 : 0);
    else if (m->mapped.runs && choice & 16)
        iova = m->mapped.run[place % m->mapped.runs].first + take(in, 2);
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
    move(m, in, rid, iova & ~7ull, need, &found);
}

/* All of memory where it is expected, as a guest has it. */
static void map_memory(struct model *m)
{
    if (overlaps(&m->mapped, 0, RAM - 1) || !range_ok(m, 0, RAM) || m->mapped.runs >= MAX_RUNS)
        return;
    HOLDS(!vio_space_map(m->engine, HOST, 0, (uintptr_t)ram, RAM, RW_BOTH));
    add_run(&m->mapped, (struct run){0, RAM - 1, (uintptr_t)ram, RW_BOTH});
}

/* Every device attached to a space of its own, the first to stage 2: where most inputs begin. */
static void attach_all(struct model *m)
{
    for (uint32_t rid = 0; rid <= CHILDREN; rid++) {
        HOLDS(!vio_route_attach(m->engine, rid, VIO_NO_PASID, HOST + rid, RW_BOTH));
        m->route[rid] = 1 + rid;
        m->route_access[rid] = RW_BOTH;
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
    m.host = take_tables(&in, any_format(take(&in, 1)), 0, TABLES_HOST);
    HOLDS(!vio_engine_create((uint32_t)take(&in, 1), &m.engine));
    HOLDS(!vio_space_create_host(m.engine, HOST, m.host.format, &m.host.asked));
    for (unsigned i = 0; i < CHILDREN; i++)
        HOLDS(!vio_space_create_nested(m.engine, HOST + 1 + i, HOST));
    if (!(take(&in, 1) & 128)) {
        map_memory(&m);
        attach_all(&m);
    }
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
        case 8: map_memory(&m); break;
        case 9: protect(&m, &in); break;
        case 10: track(&m, &in); break;
        default: request(&m, &in); break;
        }
    vio_engine_destroy(m.engine);
    madvise(ram, RAM, MADV_DONTNEED);
    return 0;
}
