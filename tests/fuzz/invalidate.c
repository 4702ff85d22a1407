/*
 * Two engines over the same guest memory, one with caches and one that walks each time: after an invalidation the first
 * must answer as the second does.
 *
 * Entries of the guest's tables change under both. An address of a child is pending from the next change of any entry on,
 * until it is invalidated: while it is, the cached answer may be of any mixture of old and new entries, but must lie in
 * what stage 2 maps now. Changes of stage 2, of bindings and of routes need no invalidation.
 */
#include "harness.h"

#define PAGES 64u
#define SIZE (PAGES * PAGE)
#define HOST 1u
#define CHILDREN 4u
#define PROBES 12u

static uint8_t *ram;

struct child {
    struct tables tables;
    uint64_t pending; /* a bit a probe */
};

struct machine {
    vio_engine *engine[2]; /* with caches, and without */
    uint8_t leads[PAGES];  /* GPA page -> page of memory, PAGES: nowhere */
    uint64_t probe[PROBES];
    int stage2;    /* format */
    uint64_t unit; /* in which it maps, in pages */
    struct child child[CHILDREN];
};

/* The same call for both engines. */
#define BOTH(m, call, ...)                                                                                             \
    do {                                                                                                               \
        int status_ = call((m)->engine[0], __VA_ARGS__);                                                               \
        HOLDS(call((m)->engine[1], __VA_ARGS__) == status_);                                                           \
    } while (0)

static void write_entry(struct machine *m, struct input *in, unsigned kind)
{
    uint64_t at, entry = take_entry(in, &m->child[take(in, 1) % CHILDREN].tables, 0, PAGES, kind, &at), old;

    at = at % SIZE & ~7ull;
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
    uint64_t page = found->gpa / PAGE, last = (found->gpa + (found->size - 1)) / PAGE;

    HOLDS(found->size && found->gpa + (found->size - 1) >= found->gpa && last < PAGES);
    for (; page <= last; page++)
        HOLDS(m->leads[page] < PAGES && (uintptr_t)ram + m->leads[page] * PAGE ==
                                            (found->hva & ~(uint64_t)(PAGE - 1)) + (page - found->gpa / PAGE) * PAGE);
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
    unsigned number = (unsigned)take(in, 1) % CHILDREN, which = (unsigned)take(in, 1), need = 1 + which / 16;
    const struct child *c = &m->child[number];
    vio_translation cached, walked;
    vio_fault fault;
    int status[2];

    which %= PROBES;
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
    unsigned number = (unsigned)take(in, 1) % CHILDREN, choice = (unsigned)take(in, 1);
    uint64_t first = 0, last = UINT64_MAX;

    if (choice & 1) {
        first = m->probe[choice / 2 % PROBES];
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
    uint64_t choice = take(in, 1);

    c->tables = take_tables(in, guest_format(choice >> 2, m->stage2), (choice & 3) * 16 * PAGE, 0);
    BOTH(m, vio_space_bind, HOST + 1 + number, c->tables.format, &c->tables.asked);
    c->pending = 0;
}

static void change_stage2(struct machine *m, struct input *in)
{
    uint64_t first = take(in, 1) % PAGES, count = 1 + take(in, 1) % 8, to = take(in, 1), unit = m->unit;

    for (uint64_t page = first - first % unit; page < first + count && page < PAGES; page += unit) {
        uint64_t lead = to & 128 ? PAGES : (page + to - to % unit) % PAGES;

        if (m->leads[page] < PAGES)
            BOTH(m, vio_space_unmap, HOST, page * PAGE, unit * PAGE);
        for (uint64_t i = 0; i < unit; i++)
            m->leads[page + i] = (uint8_t)(lead < PAGES ? lead + i : PAGES);
        if (lead < PAGES)
            BOTH(m, vio_space_map, HOST, page * PAGE, (uintptr_t)ram + lead * PAGE, unit * PAGE, RW_BOTH);
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
        ram = reserve(SIZE, 1 << 16, PROT_READ | PROT_WRITE);
    host = take_tables(&in, host_format(take(&in, 1)), 0, TABLES_HOST);
    m.stage2 = host.format;
    m.unit = pages_of(&host);
    HOLDS(!vio_engine_create(4 + (uint32_t)take(&in, 1), &m.engine[0]) && !vio_engine_create(0, &m.engine[1]));
    BOTH(&m, vio_space_create_host, HOST, host.format, &host.asked);
    BOTH(&m, vio_space_map, HOST, 0, (uintptr_t)ram, SIZE, RW_BOTH);
    for (uint8_t page = 0; page < PAGES; page++)
        m.leads[page] = page;
    for (unsigned i = 0; i < PROBES; i++)
        m.probe[i] = take_address(&in);
    for (uint32_t number = 0; number < CHILDREN; number++) {
        BOTH(&m, vio_space_create_nested, HOST + 1 + number, HOST);
        BOTH(&m, vio_route_attach, number, VIO_NO_PASID, HOST + 1 + number, RW_BOTH);
        bind(&m, number, &in);
    }
    while (more(&in)) {
        uint64_t op = take(&in, 1);

        switch (op & 15) {
        case 0: change_stage2(&m, &in); break;
        case 1: bind(&m, op / 16 % CHILDREN, &in); break;
        case 2: replace(&m, op / 16 % CHILDREN, &in); break;
        case 3:
        case 4:
        case 5: invalidate(&m, &in); break;
        case 6:
        case 7:
        case 8:
        case 9:
        case 10: write_entry(&m, &in, op >> 4 & 3); break;
        default: probe(&m, &in); break;
        }
    }
    vio_engine_destroy(m.engine[0]);
    vio_engine_destroy(m.engine[1]);
    memset(ram, 0, SIZE);
    return 0;
}
