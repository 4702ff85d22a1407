/*
 * Guest memory made of an input, a table of any format in it over a stage 2 of any other, and requests; or two tables of
 * the guest's, one upon the other.
 *
 * What must hold: a request ends; it touches nothing but what stage 2 maps (the rest is poisoned), and writes only where
 * stage 2 permits; a translation lies where stage 2 says, as far as it says, with no more permission; in memory that no
 * request wrote, only accessed and dirty bits changed; a fault of stage 2 is one.
 */
#include "harness.h"

#define PAGES 64u /* a bit each */
#define SIZE (PAGES * PAGE)
#define HOST 1
#define CHILD 2
#define TOP 3
#define RID 8
#define MIDDLE_TABLES 32u /* page of guest memory, and as many as 16 for each level */

static uint8_t *ram, *before; /* before: what the guest, not the core, wrote */

struct machine {
    vio_engine *engine;
    struct tables stage1;
    struct tables middle;        /* three stages: of the table between stage 1 and ours */
    bool three;
    uint64_t base;               /* GPA of the first page */
    uint64_t mapped, writable;   /* a bit a page */
    uint64_t written;            /* pages that requests may have written */
};

/* The same bit for all pages of a unit that stage 2 can map. */
static uint64_t whole_units(uint64_t pages, uint64_t unit)
{
    for (uint64_t page = 0; page < PAGES; page++)
        if (page % unit)
            pages = (pages & ~(1ull << page)) | (pages >> (page - page % unit) & 1) << page;
    return pages;
}

static bool holds_page(uint64_t pages, uint64_t offset)
{
    return offset < SIZE && pages >> (offset / PAGE) & 1;
}

/* In runs of pages alike: each call costs as much as many walks. */
static void map_pages(struct machine *m)
{
    for (uint64_t first = 0, end; first < PAGES; first = end) {
        bool mapped = m->mapped >> first & 1, writable = m->writable >> first & 1;

        for (end = first + 1; end < PAGES; end++)
            if ((m->mapped >> end & 1) != mapped || (m->writable >> end & 1) != writable)
                break;
        if (mapped)
            HOLDS(!vio_space_map(m->engine, HOST, m->base + first * PAGE, (uintptr_t)ram + first * PAGE,
                                 (end - first) * PAGE, writable ? RW_BOTH : VIO_READ));
        else
            ASAN_POISON_MEMORY_REGION(ram + first * PAGE, (end - first) * PAGE);
    }
}

/* The guest writes an entry; the memory need not be mapped for requests. */
static void put(uint64_t offset, uint64_t entry, bool flip)
{
    offset = offset % SIZE & ~7ull;
    if (flip) {
        uint64_t old;

        memcpy(&old, before + offset, sizeof old);
        entry ^= old;
    }
    memcpy(before + offset, &entry, sizeof entry);
    ASAN_UNPOISON_MEMORY_REGION(ram + (offset & ~(uint64_t)(PAGE - 1)), PAGE);
    memcpy(ram + offset, &entry, sizeof entry);
}

static void write_entry(const struct machine *m, struct input *in, const struct tables *t, unsigned kind)
{
    uint64_t at, entry = take_entry(in, t, m->base, PAGES, kind, &at);

    put(at, entry, kind == ENTRY_FLIP);
    if (!holds_page(m->mapped, at % SIZE))
        ASAN_POISON_MEMORY_REGION(ram + (at % SIZE & ~(uint64_t)(PAGE - 1)), PAGE);
}

/* The table in the middle begins by leading the guest's memory to itself, if there is room for it. */
static void lay_middle(const struct machine *m)
{
    const struct pt_format *f = pt_formats[m->middle.format];
    const vio_tree *tree = &m->middle.config.table.tree;
    uint64_t table = MIDDLE_TABLES * PAGE, unit = pages_of(&m->middle);

    if (table + tree->levels * unit * PAGE > SIZE || tree->input_bits > pt_entry_lg2(tree->granule, tree->levels + 1))
        return;
    for (unsigned level = tree->levels; level > 1; level--, table += unit * PAGE)
        put(table + entry_offset(&m->middle, m->base, level),
            f->make_table(&m->middle.config, m->base + table + unit * PAGE, level), false);
    for (uint64_t at = 0; at < SIZE; at += unit * PAGE)
        put(table + entry_offset(&m->middle, m->base + at, 1),
            f->make_leaf(&m->middle.config, m->base + at, 1, tree->granule, RW_BOTH), false);
}

static void check_found(const struct machine *m, const vio_translation *found, unsigned need)
{
    uint64_t offset = found->gpa - m->base, last = offset + found->size - 1;

    HOLDS(found->size && last >= offset && last < SIZE);
    HOLDS(found->hva == (uintptr_t)ram + offset);
    HOLDS(!(need & ~found->access & PT_RWX));
    for (uint64_t page = offset / PAGE; page <= last / PAGE; page++) {
        HOLDS(m->mapped >> page & 1);
        HOLDS(!(found->access & VIO_WRITE) || m->writable >> page & 1);
    }
}

static void check_fault(const struct machine *m, const vio_fault *fault)
{
    uint64_t offset = fault->gpa - m->base;

    HOLDS(fault->reason > VIO_REASON_NONE && fault->rid == RID && fault->stage <= 2 && fault->level <= PT_MAX_LEVELS);
    HOLDS(fault->stage != 1 || fault->has_gpa || !fault->level);
    HOLDS(m->three || !fault->has_middle);
    if (fault->stage == 1 && fault->entry && m->three == fault->has_middle) /* read, so stage 2 maps it */
        HOLDS(holds_page(m->mapped, offset & ~7ull));
    if (fault->stage == 2 && fault->reason == VIO_REASON_NOT_PRESENT)
        HOLDS(!holds_page(m->mapped, offset));
    if (fault->stage == 2 && fault->reason == VIO_REASON_PERMISSION)
        HOLDS(holds_page(m->mapped, offset) && !holds_page(m->writable, offset));
}

static void request(struct machine *m, struct input *in)
{
    static uint8_t buffer[3 * PAGE];
    uint64_t kind = take(in, 1), iova = take_address(in), value;
    unsigned need = 1 + kind / 8 % 15, width = 1u << (kind & 3);
    vio_translation found;
    int status;

    switch (kind >> 5) {
    case 0:
    case 1:
    case 2:
    case 3:
        status = vio_translate(m->engine, RID, VIO_NO_PASID, iova, need, &found);
        if (!status)
            check_found(m, &found, need);
        break;
    case 4:
        status = vio_dma(m->engine, RID, VIO_NO_PASID, iova, buffer, take(in, 2) % sizeof buffer, 0);
        break;
    case 5:
        m->written = m->writable;
        status = vio_dma(m->engine, RID, VIO_NO_PASID, iova, buffer, take(in, 2) % sizeof buffer, 1);
        break;
    case 6:
        status = vio_load(m->engine, RID, VIO_NO_PASID, iova, width, &value);
        break;
    default:
        m->written = m->writable;
        status = vio_store(m->engine, RID, VIO_NO_PASID, iova, take(in, width), width);
        break;
    }
    if (status < 0) {
        HOLDS(kind >> 5 < 4 && !(need & PT_RWX));
        return;
    }
    if (status)
        check_fault(m, vio_last_fault());
}

/* Bits of an entry that stands in both tables. */
static uint64_t used_by_both(const struct machine *m, uint64_t entry)
{
    uint64_t changes = may_change(&m->stage1, entry) | may_change(&m->middle, entry);

    return changes | may_change(&m->stage1, entry ^ changes) | may_change(&m->middle, entry ^ changes);
}

static void check_memory(const struct machine *m)
{
    ASAN_UNPOISON_MEMORY_REGION(ram, SIZE);
    for (uint64_t page = 0; page < PAGES; page++) {
        bool writable = m->writable >> page & 1;
        uint64_t now, then;

        if (m->written >> page & 1 || !memcmp(ram + page * PAGE, before + page * PAGE, PAGE))
            continue;
        for (uint64_t at = page * PAGE; at < (page + 1) * PAGE; at += 8) {
            memcpy(&now, ram + at, sizeof now);
            memcpy(&then, before + at, sizeof then);
            HOLDS(now == then || (writable && !((now ^ then) & ~may_change(&m->stage1, then))) ||
                  (writable && m->three && !((now ^ then) & ~used_by_both(m, then))));
        }
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input in = {data, data + size};
    struct machine m = {0};
    struct tables host;
    uint64_t choice;
    unsigned stage1;

    if (!ram) {
        ram = reserve(SIZE, 1 << 16, PROT_READ | PROT_WRITE);
        before = reserve(SIZE, 1 << 16, PROT_READ | PROT_WRITE);
    }
    stage1 = (unsigned)take(&in, 1);
    host = take_tables(&in, any_format(take(&in, 1)), 0, TABLES_HOST);
    choice = take(&in, 1);
    m.base = choice & 8 ? 1ull << (17 + (choice >> 4) * 2) : 0;
    if (m.base + SIZE - 1 > host.config.last)
        m.base = 0;
    m.stage1 = take_tables(&in, any_format(stage1), m.base + (choice & 3) * 16 * PAGE, 0);
    m.three = stage1 & 128;
    if (m.three)
        m.middle = take_tables(&in, any_format(stage1 >> 3), m.base + MIDDLE_TABLES * PAGE, 0);
    m.mapped = whole_units(~take(&in, 8), pages_of(&host));
    m.writable = m.mapped & whole_units(~take(&in, 8), pages_of(&host));
    HOLDS(!vio_engine_create(choice & 4 ? 64 : 0, &m.engine));
    HOLDS(!vio_space_create_host(m.engine, HOST, host.format, &host.asked));
    map_pages(&m);
    HOLDS(!vio_space_create_nested(m.engine, CHILD, HOST));
    HOLDS(!vio_space_bind(m.engine, CHILD, m.stage1.format, &m.stage1.asked));
    if (m.three) {
        lay_middle(&m);
        HOLDS(!vio_space_bind(m.engine, CHILD, m.middle.format, &m.middle.asked));
        HOLDS(!vio_space_create_nested(m.engine, TOP, CHILD));
        HOLDS(!vio_space_bind(m.engine, TOP, m.stage1.format, &m.stage1.asked));
    }
    HOLDS(!vio_route_attach(m.engine, RID, VIO_NO_PASID, m.three ? TOP : CHILD, RW_BOTH));
    while (more(&in)) {
        uint64_t op = take(&in, 1);

        if (op & 1)
            request(&m, &in);
        else if (op == 2)
            HOLDS(!vio_space_invalidate(m.engine, CHILD, 0, UINT64_MAX));
        else
            write_entry(&m, &in, m.three && op & 128 ? &m.middle : &m.stage1, op >> 1 & 3);
    }
    vio_engine_destroy(m.engine);
    check_memory(&m);
    memset(ram, 0, SIZE);
    memset(before, 0, SIZE);
    return 0;
}
