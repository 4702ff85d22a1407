/*
 * A guest's table of any format, built in guest memory by map and unmap, against a dictionary; walked by the core after
 * each change. Then the memory under it is written by others: the builder must keep to its part of memory, whatever it
 * finds there.
 */
#include "mappings.h"

#define HOST 1u
#define CHILD 2u
#define RID 8u
#define SIZE (16u << 20)
#define FIRST (4u << 20) /* of the part in which tables lie */
#define PART (8u << 20)

static uint8_t *ram;

struct machine {
    vio_engine *engine;
    vio_guest_table *table;
    struct tables tables;
    uint64_t base;            /* lowest address used: the range may be the upper one */
    struct mappings mapped;   /* hva: GPA */
    bool overwritten;
};

static void take_range(const struct machine *m, struct input *in, uint64_t *iova, uint64_t *size)
{
    unsigned granule = m->tables.config.table.tree.granule;
    uint64_t choice = take(in, 1);
    unsigned lg2 = choice & 2 ? pt_entry_lg2(granule, 2) : granule;

    *iova = m->base + ((take(in, 1) % 4) << lg2) + (choice & 4 ? take(in, 1) << granule : 0);
    *size = (1 + take(in, 1) % 3) << lg2;
    if (choice & 8)
        *size -= take(in, 1) << granule;
    if (choice & 16)
        *iova += take(in, 1);
}

static bool legal(const struct machine *m, uint64_t iova, uint64_t size)
{
    const struct pt_format *f = pt_formats[m->tables.format];
    uint64_t page = (1ull << m->tables.config.table.tree.granule) - 1;
    struct pt_start start;

    return size && !((iova | size) & page) && iova + (size - 1) >= iova && size < 1ull << 40 &&
           !f->start(&m->tables.config, iova, &start) && !f->start(&m->tables.config, iova + (size - 1), &start);
}

static void map(struct machine *m, struct input *in)
{
    uint64_t iova, size, choice = take(in, 1), gpa;
    unsigned access = choice & 1 ? RW_BOTH : VIO_READ;
    int status, expected;

    take_range(m, in, &iova, &size);
    if (m->mapped.runs > MAX_RUNS - 4 || size >= 1ull << 40)
        return;
    gpa = (iova & ~(((uint64_t)1 << m->tables.config.table.tree.granule) - 1)) % (1ull << 34);
    if (choice & 2)
        gpa += 1ull << m->tables.config.table.tree.granule;
    expected = !legal(m, iova, size) || (gpa + (size - 1)) >> m->tables.config.table.output_bits ? VIO_ERR_VALUE
               : overlaps(&m->mapped, iova, iova + (size - 1)) ? VIO_ERR_OVERLAP : VIO_OK;
    status = vio_guest_table_map(m->table, iova, gpa, size, access);
    if (m->overwritten)
        return;
    HOLDS(status == expected || (expected == VIO_OK && status == VIO_ERR_LIMIT));
    if (!status)
        add_run(&m->mapped, (struct run){iova, iova + (size - 1), gpa, access});
}

static void unmap(struct machine *m, struct input *in)
{
    uint64_t iova, size;
    int status, expected;

    take_range(m, in, &iova, &size);
    if (m->mapped.runs > MAX_RUNS - 4 || size >= 1ull << 40)
        return;
    expected = !legal(m, iova, size) ? VIO_ERR_VALUE
               : !all_mapped(&m->mapped, iova, iova + (size - 1)) ? VIO_ERR_NOT_MAPPED : VIO_OK;
    status = vio_guest_table_unmap(m->table, iova, size);
    if (m->overwritten)
        return;
    HOLDS(status == expected || (expected == VIO_OK && status == VIO_ERR_LIMIT));
    if (!status)
        take_out(&m->mapped, iova, iova + (size - 1));
}

/* The core's walk must find what the dictionary has; GPAs beyond memory are told by the fault of stage 2. */
static void look(struct machine *m, struct input *in)
{
    uint64_t choice = take(in, 1), iova, size, gpa;
    unsigned need = 1 + choice % 3;
    struct run *run;
    vio_translation found;
    int status;

    take_range(m, in, &iova, &size);
    if (choice & 128 && m->mapped.runs)
        iova = m->mapped.run[choice % m->mapped.runs].first + take(in, 3) % 0x10000;
    status = vio_translate(m->engine, RID, VIO_NO_PASID, iova, need, &found);
    HOLDS(status == VIO_OK || status == VIO_FAULT);
    if (m->overwritten)
        return;
    run = run_at(&m->mapped, iova);
    gpa = run ? run->hva + (iova - run->first) : 0;
    if (!run || need & ~run->access)
        HOLDS(status && vio_last_fault()->stage < 2);
    else if (status)
        HOLDS(vio_last_fault()->stage == 2 && !vio_last_fault()->table && vio_last_fault()->gpa == gpa && gpa >= SIZE);
    else
        HOLDS(found.gpa == gpa && found.hva == (uintptr_t)ram + gpa && !(found.access & RW_BOTH & ~run->access));
}

/* Anybody writes where the tables lie. */
static void overwrite(struct machine *m, struct input *in)
{
    uint64_t at, entry = take_entry(in, &m->tables, FIRST, PART / PAGE, (unsigned)take(in, 1) & 3, &at), old;

    at = FIRST + at % PART / 8 * 8;
    memcpy(&old, ram + at, sizeof old);
    entry ^= take(in, 1) & 1 ? old : 0;
    memcpy(ram + at, &entry, sizeof entry);
    m->overwritten = true;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input in = {data, data + size};
    struct machine m = {0};
    const vio_table host = {.tree = {.levels = 4}};
    struct pt_start start;
    vio_table made;
    uint64_t place;
    int status;

    if (!ram) { /* nothing can be touched but the part */
        ram = reserve(SIZE, 2u << 20, PROT_NONE);
        HOLDS(!mprotect(ram + FIRST, PART, PROT_READ | PROT_WRITE));
    }
    m.tables = take_tables(&in, any_format(take(&in, 1)), 0, 0);
    place = take(&in, 3) << 21;
    m.base = take(&in, 1) & 1 ? ~0ull << 36 | place : place;
    if (pt_formats[m.tables.format]->start(&m.tables.config, m.base, &start) ||
        start.levels != m.tables.config.table.tree.levels || start.upper)
        m.base = 0;
    status = vio_guest_table_create(m.tables.format, &m.tables.asked, ram, FIRST, PART, &m.table);
    if (status) { /* not a table that can be built: without a lower range, or with a root beyond its output */
        HOLDS(status == VIO_ERR_VALUE);
        return 0;
    }
    vio_guest_table_get(m.table, &made);
    HOLDS(made.tree.root >= FIRST && made.tree.root < FIRST + PART);
    HOLDS(!vio_engine_create(0, &m.engine));
    HOLDS(!vio_space_create_host(m.engine, HOST, PT_amd_v1, &host));
    HOLDS(!vio_space_map(m.engine, HOST, 0, (uintptr_t)ram, SIZE, RW_BOTH));
    HOLDS(!vio_space_create_nested(m.engine, CHILD, HOST) && !vio_space_bind(m.engine, CHILD, m.tables.format, &made));
    HOLDS(!vio_route_attach(m.engine, RID, VIO_NO_PASID, CHILD, RW_BOTH));
    while (more(&in))
        switch (take(&in, 1) & 7) {
        case 0:
        case 1:
        case 2: map(&m, &in); break;
        case 3: unmap(&m, &in); break;
        case 4: overwrite(&m, &in); break;
        default: look(&m, &in); break;
        }
    vio_guest_table_destroy(m.table);
    vio_engine_destroy(m.engine);
    madvise(ram + FIRST, PART, MADV_DONTNEED);
    return 0;
}
