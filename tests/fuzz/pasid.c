/*
 * Guest memory made of an input, a PASID table of any kind in it over a stage 2 of any format, and requests with PASIDs
 * beside invalidations of all kinds.
 *
 * What must hold: a request ends; it touches nothing but what stage 2 maps (the rest is poisoned); a translation lies
 * where stage 2 says, as far as it says; once all is invalidated, a request ends as a look-up does, which keeps nothing.
 */
#include "harness.h"

#define PAGES 48u /* a bit each */
#define SIZE (PAGES * PAGE)
#define HOST 1
#define BOUND 2
#define RID 8
#define UNITS 16u /* of 4 KiB, the largest that a stage 2 maps */

static uint8_t *ram;

struct machine {
    vio_engine *engine;
    struct tables stage1; /* what page-table entries are laid for */
    uint64_t mapped, writable;
};

static const char *const kinds[] = {"amd-gcr3", "vtd-pasid", "arm-cd", "riscv-pdt"};

/* Any options, legal or not; what the kind has no use for is mostly 0. */
static vio_pasid_table take_options(struct input *in, unsigned kind)
{
    uint64_t choice = take(in, 1), any = take(in, 1);
    vio_pasid_table table = {
        .root = (choice & 3) * PAGE,
        .levels = kind == 1 ? 0 : 1 + (uint32_t)(choice >> 2) % (kind == 2 ? 2 : 3),
        .default_pasid = choice & 64 ? (uint32_t)any & 15 : VIO_NO_PASID,
    };

    if (kind == 2) {
        table.pasid_bits = (uint32_t)any % 21;
        table.leaf_bits = table.levels == 1 ? 0 : choice & 32 ? 6 : 10;
        table.output_bits = choice & 16 ? 52 : 0;
    }
    if (choice & 128) {
        table.root ^= take(in, 2) << 4;
        table.flags = (uint32_t)take(in, 4);
        table.pasid_bits = (uint32_t)take(in, 1);
        table.output_bits = (uint32_t)take(in, 1);
        table.table_levels = (uint32_t)take(in, 1) & 7;
    }
    return table;
}

static uint32_t take_pasid(struct input *in)
{
    uint64_t kind = take(in, 1);

    return kind < 200 ? (uint32_t)kind & 15 : kind < 210 ? VIO_NO_PASID : (uint32_t)take(in, 3) & 0xfffff;
}

static void put(const struct machine *m, uint64_t at, uint64_t word, bool flip)
{
    uint64_t old;

    at = at % SIZE & ~7ull;
    ASAN_UNPOISON_MEMORY_REGION(ram + at / PAGE * PAGE, PAGE);
    memcpy(&old, ram + at, sizeof old);
    word = flip ? old ^ word : word;
    memcpy(ram + at, &word, sizeof word);
    if (!(m->mapped >> (at / PAGE) & 1))
        ASAN_POISON_MEMORY_REGION(ram + at / PAGE * PAGE, PAGE);
}

/* A word as PASID tables have it: a page's address, where each kind keeps it, with bits beside. */
static void write_word(const struct machine *m, struct input *in)
{
    uint64_t at = take(in, 1) % PAGES * PAGE, kind = take(in, 1), page = take(in, 1) % PAGES, low = take(in, 2);

    at += kind & 128 ? take(in, 2) * 8 : (kind & 15) * 8;
    switch (kind >> 4 & 7) {
    case 0:
    case 1: put(m, at, page * PAGE | (low & 0xfff), false); break;
    case 2: put(m, at, page << 10 | (low & 0x3ff), false); break;
    case 3: put(m, at, page | (uint64_t)(8 + low % 4) << 60, false); break;
    case 4: put(m, at, 1ull << (low & 63), true); break;
    case 5: /* a context descriptor's first word: valid, AArch64, TTBR1 off */
        put(m, at, 1ull << 31 | 1ull << 41 | 1ull << 30 | (low & 0x3f) | (low >> 6 & 7) << 32 | (low >> 9 & 3) << 42,
            false);
        break;
    case 6: put(m, at, low, false); break;
    default: put(m, at, take(in, 8), false); break;
    }
}

static void write_entry(const struct machine *m, struct input *in, unsigned kind)
{
    uint64_t at, entry = take_entry(in, &m->stage1, 0, PAGES, kind, &at);

    put(m, at, entry, kind == ENTRY_FLIP);
}

static void check_found(const struct machine *m, const vio_translation *found)
{
    uint64_t last = found->gpa + found->size - 1;

    HOLDS(found->size && last >= found->gpa && last < SIZE);
    HOLDS(found->hva == (uintptr_t)ram + found->gpa);
    for (uint64_t page = found->gpa / PAGE; page <= last / PAGE; page++) {
        HOLDS(m->mapped >> page & 1);
        HOLDS(!(found->access & VIO_WRITE) || m->writable >> page & 1);
    }
}

/* Without anything kept, a request ends as a look-up made before it: the look-up leaves accessed bits as they are. */
static void compare(const struct machine *m, uint32_t pasid, uint64_t iova, unsigned need)
{
    static vio_path path;
    const vio_fault *fault = &path.fault;
    vio_translation found;
    int status;

    vio_invalidate_all(m->engine);
    HOLDS(!vio_lookup(m->engine, RID, pasid, iova, need, &path));
    status = vio_translate(m->engine, RID, pasid, iova, need, &found);
    HOLDS(status == (path.found ? VIO_OK : VIO_FAULT));
    if (path.found) {
        HOLDS(found.gpa == path.translation.gpa && found.hva == path.translation.hva);
        HOLDS(found.size == path.translation.size && found.access == path.translation.access);
    } else {
        const vio_fault *told = vio_last_fault();

        HOLDS(told->reason == fault->reason && told->stage == fault->stage && told->level == fault->level);
        HOLDS(told->pasid_table == fault->pasid_table && told->has_gpa == fault->has_gpa);
        HOLDS(!told->has_gpa || told->gpa == fault->gpa);
        HOLDS(told->entry == fault->entry && told->ioasid == BOUND && told->pasid == pasid);
    }
}

static void request(const struct machine *m, struct input *in)
{
    static uint8_t buffer[2 * PAGE];
    uint32_t pasid = take_pasid(in);
    uint64_t kind = take(in, 1), iova = take_address(in);
    unsigned need = 1 + kind % 15;
    vio_translation found;
    int status;

    if (!(need & PT_RWX))
        return;
    switch (kind >> 5) {
    case 0:
    case 1:
    case 2: compare(m, pasid, iova, need); break;
    case 3: {
        static vio_path path;

        HOLDS(!vio_lookup(m->engine, RID, pasid, iova, need, &path));
        break;
    }
    case 4:
        status = vio_dma(m->engine, RID, pasid, iova, buffer, take(in, 2) % sizeof buffer, (int)(kind & 1));
        HOLDS(status >= 0);
        break;
    default:
        status = vio_translate(m->engine, RID, pasid, iova, need, &found);
        HOLDS(status >= 0);
        if (!status)
            check_found(m, &found);
        break;
    }
}

static void invalidate(const struct machine *m, struct input *in, uint64_t how)
{
    uint32_t pasid = take_pasid(in);

    switch (how & 7) {
    case 0: HOLDS(!vio_space_invalidate(m->engine, BOUND, 0, UINT64_MAX)); break;
    case 1: HOLDS(!vio_pasid_invalidate(m->engine, BOUND, pasid, 0, UINT64_MAX)); break;
    case 2: HOLDS(!vio_pasid_invalidate(m->engine, BOUND, pasid, 0x1000, 0xffff)); break;
    case 3: HOLDS(!vio_invalidate_device(m->engine, RID)); break;
    case 4: HOLDS(!vio_space_protect(m->engine, HOST, 0, UNITS * PAGE, RW_BOTH)); break;
    default: vio_invalidate_all(m->engine); break;
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const char *const found[] = {"x86", "vtd-second-stage", "arm-s1", "riscv"};
    struct input in = {data, data + size};
    struct machine m = {0};
    struct tables host;
    vio_pasid_table options;
    unsigned kind = (unsigned)take(&in, 1);
    int status;

    if (!ram)
        ram = reserve(SIZE, 1 << 16, PROT_READ | PROT_WRITE);
    host = take_tables(&in, any_format(take(&in, 1)), 0, TABLES_HOST);
    m.stage1 = take_tables(&in, vio_format_find(found[kind >> 2 & 3]), 0, TABLES_PLAIN);
    options = take_options(&in, kind & 3);
    HOLDS(!vio_engine_create(kind & 16 ? 64 : 0, &m.engine));
    HOLDS(!vio_space_create_host(m.engine, HOST, host.format, &host.asked));
    /* The first units may be written, and one of the others is not mapped. */
    m.mapped = kind & 32 ? (1ull << 2 * UNITS) - 1 : (1ull << PAGES) - 1;
    m.writable = (1ull << UNITS * (kind & 64 ? 1 : 2)) - 1;
    for (unsigned first = 0; first < PAGES; first += UNITS)
        if (m.mapped >> first & 1)
            HOLDS(!vio_space_map(m.engine, HOST, first * PAGE, (uintptr_t)ram + first * PAGE, UNITS * PAGE,
                                 m.writable >> first & 1 ? RW_BOTH : VIO_READ));
        else
            ASAN_POISON_MEMORY_REGION(ram + first * PAGE, UNITS * PAGE);
    HOLDS(!vio_space_create_nested(m.engine, BOUND, HOST));
    HOLDS(!vio_route_attach(m.engine, RID, VIO_ANY_PASID, BOUND, RW_BOTH));
    HOLDS(!vio_route_attach(m.engine, RID, VIO_NO_PASID, BOUND, RW_BOTH));
    status = vio_pasid_bind(m.engine, BOUND, vio_pasid_format_find(kinds[kind & 3]), &options);
    HOLDS(!status || status == VIO_ERR_VALUE);
    while (!status && more(&in)) {
        uint64_t op = take(&in, 1);

        if (op & 1)
            request(&m, &in);
        else if ((op & 14) == 2)
            invalidate(&m, &in, op >> 4);
        else if ((op & 14) < 8)
            write_word(&m, &in);
        else
            write_entry(&m, &in, op >> 1 & 3);
    }
    vio_engine_destroy(m.engine);
    ASAN_UNPOISON_MEMORY_REGION(ram, SIZE);
    memset(ram, 0, SIZE);
    return 0;
}
