/*
 * Two engines over the same guest memory, one with caches and one that walks each time: after an invalidation the first
 * must answer as the second does.
 *
 * Each child has a table that maps the addresses asked for; its entries change under both engines. An address of a child
 * is pending from then on, until it is invalidated: while it is, the cached answer may be of any mixture of old and new
 * entries, but must lie in what stage 2 maps now. Changes of stage 2, of bindings and of routes need no invalidation.
 */
#include "harness.h"

#define UNIT (128u << 10) /* in which stage 2 is changed: a page of every granule, and more */
#define UNITS 64u
#define SIZE (UNITS * UNIT)
#define PART (12 * UNIT) /* tables of a child; data lie above those of the last */
#define HOST 1u
#define CHILDREN 4u
#define PROBES 12u

static uint8_t *ram;

struct child {
    struct tables tables;
    vio_guest_table *table; /* NULL: of a kind that cannot be built */
    uint64_t pending;       /* a bit a probe */
};

struct machine {
    vio_engine *engine[2]; /* with caches, and without */
    uint8_t leads[UNITS];  /* unit of GPAs -> unit of memory, UNITS: nowhere */
    uint64_t probe[PROBES];
    int stage2; /* format */
    struct child child[CHILDREN];
    unsigned number, which; /* child and probe that ops are about, until one turns to others: else they would not meet */
};

/* The same call for both engines. */
#define BOTH(m, call, ...)                                                                                             \
    do {                                                                                                               \
        int status_ = call((m)->engine[0], __VA_ARGS__);                                                               \
        HOLDS(call((m)->engine[1], __VA_ARGS__) == status_);                                                           \
    } while (0)

static uint64_t page_of(const struct child *c, uint64_t iova)
{
    return iova & ~((1ull << c->tables.config.table.tree.granule) - 1);
}

/* Lead the page of a probe to some data; `large`: the page of the level above. */
static void lead(struct machine *m, struct child *c, unsigned which, uint64_t target, bool large)
{
    unsigned granule = c->tables.config.table.tree.granule, lg2 = large ? pt_entry_lg2(granule, 2) : granule;
    uint64_t size = 1ull << lg2, page = m->probe[which] & ~(size - 1);
    uint64_t gpa = (CHILDREN * PART + (target << granule) % (SIZE - CHILDREN * PART)) & ~(size - 1);

    if (!c->table)
        return;
    vio_guest_table_unmap(c->table, page, size);
    if (target != 255)
        vio_guest_table_map(c->table, page, gpa, size, target & 64 ? VIO_READ : RW_BOTH);
    for (unsigned i = 0; i < PROBES; i++)
        if (large || page_of(c, m->probe[i]) == page)
            c->pending |= 1ull << i;
}

/* Any entry anywhere, the tables of all children among them. */
static void write_entry(struct machine *m, struct input *in, unsigned kind)
{
    const struct child *c = &m->child[m->number];
    unsigned part = (unsigned)(c - m->child);
    uint64_t at, old, entry = take_entry(in, &c->tables, part * PART, PART / PAGE, kind, &at);

    at = (part * PART + at) % SIZE & ~7ull;
    memcpy(&old, ram + at, sizeof old);
    if (kind == ENTRY_FLIP)
        entry ^= old;
    if (entry == old)
        return;
    memcpy(ram + at, &entry, sizeof entry);
    for (unsigned i = 0; i < CHILDREN; i++)
        m->child[i].pending = ~0ull;
}

static void check_safe(const struct machine *m, const vio_translation *found)
{
    uint64_t unit = found->gpa / UNIT, last = (found->gpa + (found->size - 1)) / UNIT;

    HOLDS(found->size && found->gpa + (found->size - 1) >= found->gpa && last < UNITS);
    for (uint64_t i = unit; i <= last; i++)
        HOLDS(m->leads[i] < UNITS &&
              (uintptr_t)ram + m->leads[i] * UNIT == found->hva - found->gpa % UNIT + (i - unit) * UNIT);
}

static void check_equal(const struct child *c, int status, const vio_translation *cached, const vio_fault *fault,
                        const vio_translation *walked)
{
    const vio_fault *expected = vio_last_fault();
    bool updates = c->tables.asked.flags; /* one engine's walk may have set bits since the other's */

    if (!status) {
        HOLDS(cached->hva == walked->hva && cached->gpa == walked->gpa && cached->size == walked->size);
        HOLDS(!(cached->access & ~walked->access));
        HOLDS(updates || cached->access == walked->access);
        return;
    }
    HOLDS(fault->reason == expected->reason && fault->stage == expected->stage && fault->level == expected->level);
    HOLDS(fault->gpa == expected->gpa && (updates || fault->entry == expected->entry));
}

static void probe(struct machine *m, struct input *in)
{
    unsigned number = m->number, which = m->which, need = (unsigned)take(in, 1);
    const struct child *c = &m->child[number];
    vio_translation cached, walked;
    vio_fault fault;
    int status[2];

    need = need < 128 ? VIO_READ : need & 15;
    status[0] = vio_translate(m->engine[0], number, VIO_NO_PASID, m->probe[which], need, &cached);
    fault = *vio_last_fault();
    status[1] = vio_translate(m->engine[1], number, VIO_NO_PASID, m->probe[which], need, &walked);
    HOLDS((status[0] < 0) == (status[1] < 0));
    if (status[0] < 0)
        return;
    if (!status[0])
        check_safe(m, &cached);
    if (c->pending >> which & 1)
        return;
    HOLDS(status[0] == status[1]);
    check_equal(c, status[0], &cached, &fault, &walked);
}

static void invalidate(struct machine *m, struct input *in)
{
    unsigned number = m->number, choice = (unsigned)take(in, 1);
    uint64_t first = 0, last = UINT64_MAX;

    if (choice & 1) {
        first = m->probe[m->which];
        last = first + ((take(in, 1) + 1) << (choice >> 5) * 5) - 1;
        if (last < first)
            last = UINT64_MAX;
    }
    if (choice == 2) {
        vio_invalidate_all(m->engine[0]);
        for (unsigned i = 0; i < CHILDREN; i++)
            m->child[i].pending = 0;
        return;
    }
    if (choice == 4)
        HOLDS(!vio_invalidate_device(m->engine[0], number));
    else
        HOLDS(!vio_space_invalidate(m->engine[0], HOST + 1 + number, first, last));
    for (unsigned i = 0; i < PROBES; i++)
        if (m->probe[i] >= first && m->probe[i] <= last)
            m->child[number].pending &= ~(1ull << i);
}

static void bind(struct machine *m, unsigned number, struct input *in)
{
    struct child *c = &m->child[number];
    uint64_t choice = take(in, 1), place = number * PART;

    if (c->table)
        vio_guest_table_destroy(c->table);
    c->table = NULL;
    c->tables = take_tables(in, any_format(choice >> 1), place, choice & 1 ? 0 : TABLES_PLAIN);
    memset(ram + place, 0, 2 * PAGE); /* of any root: enough to be new */
    if (!vio_guest_table_create(c->tables.format, &c->tables.asked, ram, place, PART, &c->table)) {
        vio_guest_table_get(c->table, &c->tables.asked);
        c->tables.config.table = c->tables.asked;
    }
    BOTH(m, vio_space_bind, HOST + 1 + number, c->tables.format, &c->tables.asked);
    for (unsigned i = 0; i < PROBES; i++)
        lead(m, c, i, i * 5, false);
    c->pending = 0;
    for (unsigned i = 0; i < CHILDREN; i++) /* their tables may have led here */
        if (i != number)
            m->child[i].pending = ~0ull;
}

static void change_stage2(struct machine *m, struct input *in)
{
    uint64_t first = take(in, 1) % UNITS, count = 1 + take(in, 1) % 4, to = take(in, 1);

    for (uint64_t unit = first; unit < first + count && unit < UNITS; unit++) {
        if (m->leads[unit] < UNITS)
            BOTH(m, vio_space_unmap, HOST, unit * UNIT, UNIT);
        m->leads[unit] = to & 128 ? UNITS : to & 64 ? (uint8_t)unit : (uint8_t)((unit + to) % UNITS);
        if (m->leads[unit] < UNITS)
            BOTH(m, vio_space_map, HOST, unit * UNIT, (uintptr_t)ram + m->leads[unit] * UNIT, UNIT, RW_BOTH);
    }
}

static void replace(struct machine *m, unsigned number, struct input *in)
{
    BOTH(m, vio_route_detach, number, VIO_NO_PASID);
    BOTH(m, vio_space_destroy, HOST + 1 + number);
    BOTH(m, vio_space_create_nested, HOST + 1 + number, HOST);
    BOTH(m, vio_route_attach, number, VIO_NO_PASID, HOST + 1 + number, RW_BOTH);
    bind(m, number, in);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input in = {data, data + size};
    struct machine m = {0};
    struct tables host;

    if (!ram)
        ram = reserve(SIZE, 2u << 20, PROT_READ | PROT_WRITE);
    host = take_tables(&in, any_format(take(&in, 1)), 0, TABLES_HOST);
    if (host.config.last < SIZE)
        return 0;
    m.stage2 = host.format;
    HOLDS(!vio_engine_create(4 + (uint32_t)take(&in, 1), &m.engine[0]) && !vio_engine_create(0, &m.engine[1]));
    BOTH(&m, vio_space_create_host, HOST, host.format, &host.asked);
    BOTH(&m, vio_space_map, HOST, 0, (uintptr_t)ram, SIZE, RW_BOTH);
    for (uint8_t unit = 0; unit < UNITS; unit++)
        m.leads[unit] = unit;
    for (unsigned i = 0; i < PROBES; i++)
        m.probe[i] = i < 2 ? take_address(&in) : (uint64_t)(i * 37 % 128) << 12 | (uint64_t)(i & 3) << 21;
    for (uint32_t number = 0; number < CHILDREN; number++) {
        BOTH(&m, vio_space_create_nested, HOST + 1 + number, HOST);
        BOTH(&m, vio_route_attach, number, VIO_NO_PASID, HOST + 1 + number, RW_BOTH);
        bind(&m, number, &in);
    }
    while (more(&in)) {
        uint64_t op = take(&in, 1);

        if (op >> 6 == 3) {
            m.number = (unsigned)(op >> 4 & 3) % CHILDREN;
            m.which = (unsigned)take(&in, 1) % PROBES;
        }
        switch (op & 15) {
        case 0: change_stage2(&m, &in); break;
        case 1:
            if (op & 16)
                bind(&m, m.number, &in);
            else
                replace(&m, m.number, &in);
            break;
        case 2:
        case 3:
        case 4: invalidate(&m, &in); break;
        case 5: write_entry(&m, &in, op >> 4 & 3); break;
        case 6:
        case 7:
        case 8: lead(&m, &m.child[m.number], m.which, take(&in, 1), (op >> 4 & 3) == 3); break;
        default: probe(&m, &in); break;
        }
    }
    for (unsigned i = 0; i < CHILDREN; i++)
        if (m.child[i].table)
            vio_guest_table_destroy(m.child[i].table);
    vio_engine_destroy(m.engine[0]);
    vio_engine_destroy(m.engine[1]);
    madvise(ram, SIZE, MADV_DONTNEED);
    return 0;
}
