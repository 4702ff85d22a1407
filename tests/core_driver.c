/*
 * Drives the C core under sanitizers; test_core_sanitized.py builds and runs it. Arguments: random SEED STEPS |
 * index SEED | used-bits | iotlb STEPS | bounds | threads MILLISECONDS. Ends with 0 and silence, or with a sanitizer's
 * report or a line that says what did not hold.
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "core_holds.h"
#include "engine.h"

#define PAGE 4096u
#define RAM_PAGES 64u
#define GPA_PAGES 96u /* some of them are never memory */
#define HOST 1u
#define CHILDREN 4u

static uint64_t state;

static uint64_t any(void) /* splitmix64 */
{
    uint64_t z = state += 0x9e3779b97f4a7c15ull;

    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return z ^ z >> 31;
}

static uint64_t below(uint64_t n)
{
    return any() % n;
}

static const vio_table host_table = {.tree = {.levels = 4}};

static int bind(vio_engine *engine, uint32_t ioasid, int format, uint64_t root, uint32_t levels, uint32_t flags)
{
    vio_table table = {.tree = {.root = root, .levels = levels}, .flags = flags};

    return vio_space_bind(engine, ioasid, format, &table);
}

/* The model: where each GPA page was mapped last, 0: nowhere. */
struct model {
    vio_engine *engine;
    int fd;
    uint8_t *ram;
    bool halved; /* second half of the file truncated away */
    uint64_t hva[GPA_PAGES];
    unsigned access[GPA_PAGES];
};

static uint64_t some_iova(void)
{
    uint64_t iova = below(4) ? below(GPA_PAGES + 4) << 12 : any();

    if (!below(3)) /* reach upper slots of upper tables */
        iova += below(4) << (12 + 9 * below(5));
    return iova + (below(2) ? 0 : below(PAGE));
}

static uint64_t some_entry(void)
{
    uint64_t entry = 1 | below(GPA_PAGES) << 12 | below(8) << 9 | (below(4) ? 3 : below(4)) << 61;

    if (!below(4)) /* ones up from bit 12: a coded size */
        entry |= ((1ull << below(41)) - 1) << 12;
    if (!below(6))
        entry ^= 1ull << below(64);
    return below(12) ? entry : any();
}

static void check_found(const struct model *m, const vio_translation *found, unsigned access, bool direct,
                        uint64_t iova)
{
    HOLDS(found->gpa >> 12 < GPA_PAGES);
    HOLDS(m->hva[found->gpa >> 12] + found->gpa % PAGE == found->hva);
    HOLDS(!(access & ~m->access[found->gpa >> 12]) && !(access & ~found->access));
    HOLDS(found->size && (!direct || found->gpa == iova));
    for (uint64_t page = found->gpa >> 12; page <= (found->gpa + found->size - 1) >> 12; page++)
        HOLDS(m->hva[page] == (found->hva & ~(uint64_t)(PAGE - 1)) + ((page - (found->gpa >> 12)) << 12));
}

static void check_stage2_fault(const struct model *m, const vio_fault *fault)
{
    uint64_t page = fault->gpa >> 12;
    unsigned access = page < GPA_PAGES ? m->access[page] : 0;

    if (fault->reason == VIO_REASON_NOT_PRESENT)
        HOLDS(page >= GPA_PAGES || !m->hva[page]);
    else if (fault->reason == VIO_REASON_PERMISSION)
        HOLDS(access && access != RW_BOTH);
    else if (fault->reason == VIO_REASON_MEMORY_GONE)
        HOLDS(m->halved && m->hva[page] >= (uint64_t)(uintptr_t)m->ram + RAM_PAGES / 2 * PAGE);
    else
        HOLDS(fault->reason == VIO_REASON_ADDRESS_WIDTH && fault->gpa >> 48);
}

static void request(struct model *m)
{
    static uint8_t buffer[8 * PAGE];
    uint32_t rid = (uint32_t)below(CHILDREN + 2);
    uint64_t iova = some_iova(), size = below(sizeof buffer + 1), value;
    unsigned access = 1 + (unsigned)below(3);
    vio_segment segments[4];
    vio_translation found;
    int status;

    switch (below(5)) {
    case 0:
        status = vio_translate(m->engine, rid, VIO_NO_PASID, iova, access, &found);
        if (!status)
            check_found(m, &found, access, rid == 0, iova);
        break;
    case 1:
        status = vio_dma(m->engine, rid, VIO_NO_PASID, iova, buffer, size, (int)below(2));
        break;
    case 2:
        for (unsigned i = 0; i < 4; i++)
            segments[i] = (vio_segment){some_iova(), below(2 * PAGE)};
        status = vio_dma_scatter(m->engine, rid, VIO_NO_PASID, segments, 4, buffer, (int)below(2));
        break;
    case 3:
        status = vio_store(m->engine, rid, VIO_NO_PASID, iova & ~7ull, below(2) ? some_entry() : 0, 8);
        break;
    default:
        status = vio_load(m->engine, rid, VIO_NO_PASID, iova, 1u << below(4), &value);
        break;
    }
    HOLDS(status == VIO_OK || status == VIO_FAULT);
    if (status == VIO_FAULT) {
        const vio_fault *fault = vio_last_fault();

        HOLDS(fault->reason > VIO_REASON_NONE && fault->reason <= VIO_REASON_ENTRY_CHANGED && fault->rid == rid);
        if (fault->stage == 2)
            check_stage2_fault(m, fault);
    }
}

static void change(struct model *m)
{
    uint32_t child = 2 + (uint32_t)below(CHILDREN), rid = (uint32_t)below(CHILDREN + 2);
    uint64_t first = below(GPA_PAGES), pages = 1 + below(GPA_PAGES - first), from = below(RAM_PAGES);
    bool all = true, none = true;
    int status;

    if (pages > RAM_PAGES - from)
        pages = RAM_PAGES - from;
    for (uint64_t i = first; i < first + pages; i++) {
        all &= m->hva[i] != 0;
        none &= m->hva[i] == 0;
    }
    switch (below(9)) {
    case 0:
    case 1: {
        unsigned access = below(4) ? RW_BOTH : VIO_READ;
        uint64_t hva = (uint64_t)(uintptr_t)m->ram + from * PAGE;

        status = vio_space_map(m->engine, HOST, first * PAGE, hva, pages * PAGE, access);
        HOLDS(status == (none ? VIO_OK : VIO_ERR_OVERLAP));
        for (uint64_t i = 0; i < pages && !status; i++) {
            m->hva[first + i] = hva + i * PAGE;
            m->access[first + i] = access;
        }
        break;
    }
    case 2:
        status = vio_space_unmap(m->engine, HOST, first * PAGE, pages * PAGE);
        HOLDS(status == (all ? VIO_OK : VIO_ERR_NOT_MAPPED));
        for (uint64_t i = first; i < first + pages && !status; i++)
            m->hva[i] = m->access[i] = 0;
        break;
    case 3: {
        static const uint32_t flags[] = {0, 0, VIO_TABLE_ACCESSED, VIO_TABLE_ACCESSED | VIO_TABLE_DIRTY};

        HOLDS(!bind(m->engine, child, PT_amd_v1, below(GPA_PAGES) << 12, 1 + (uint32_t)below(6),
                              flags[below(4)]));
        break;
    }
    case 4:
        HOLDS(!vio_space_unbind(m->engine, child));
        break;
    case 5:
        status = below(3) ? vio_route_attach(m->engine, rid, VIO_NO_PASID, rid ? child : HOST, 1 + (uint32_t)below(3))
                 : below(2) ? vio_route_block(m->engine, rid, VIO_NO_PASID)
                            : vio_route_detach(m->engine, rid, VIO_NO_PASID);
        HOLDS(status == VIO_OK || status == VIO_ERR_UNKNOWN);
        break;
    case 6:
        HOLDS(!vio_space_invalidate(m->engine, 1 + (uint32_t)below(CHILDREN + 1), first << 12, any() | first << 12));
        break;
    case 7:
        status = vio_space_destroy(m->engine, child);
        HOLDS(status == VIO_OK || status == VIO_ERR_BUSY);
        if (!status)
            HOLDS(!vio_space_create_nested(m->engine, child, HOST));
        break;
    default:
        m->halved = !below(3) && !m->halved;
        HOLDS(!ftruncate(m->fd, (m->halved ? RAM_PAGES / 2 : RAM_PAGES) * PAGE));
        break;
    }
}

static void start(struct model *m, uint32_t iotlb_entries)
{
    *m = (struct model){.fd = memfd_create("ram", 0)};
    HOLDS(m->fd >= 0 && !ftruncate(m->fd, RAM_PAGES * PAGE));
    m->ram = mmap(NULL, RAM_PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, m->fd, 0);
    HOLDS(m->ram != MAP_FAILED && !vio_engine_create(iotlb_entries, &m->engine));
    HOLDS(!vio_space_create_host(m->engine, HOST, PT_amd_v1, &host_table));
    for (uint32_t child = 2; child < 2 + CHILDREN; child++)
        HOLDS(!vio_space_create_nested(m->engine, child, HOST));
}

static void end(struct model *m)
{
    vio_engine_destroy(m->engine);
    munmap(m->ram, RAM_PAGES * PAGE);
    close(m->fd);
}

static void run_random(uint64_t seed, uint64_t steps)
{
    struct model m;

    state = seed;
    start(&m, (uint32_t)(below(2) ? below(64) : 4096));
    for (uint64_t step = 0; step < steps; step++) {
        if (!below(8))
            change(&m);
        if (!m.halved || below(2))
            for (unsigned i = 0; i < 8; i++) {
                uint64_t at = below(m.halved ? RAM_PAGES / 2 : RAM_PAGES) * PAGE + below(below(2) ? 8 : 512) * 8;
                uint64_t entry = some_entry();

                memcpy(m.ram + at, &entry, sizeof entry);
            }
        request(&m);
    }
    end(&m);
}

/* The first page of each of the first four 2 MiB must lead to pages `first`, first + 1 ... of RAM. */
static void check_direct(struct model *m, uint64_t first)
{
    for (uint64_t i = 0; i < 4; i++) {
        vio_translation found;

        HOLDS(!vio_translate(m->engine, 0, VIO_NO_PASID, i << 21, VIO_READ, &found));
        HOLDS(found.hva == (uint64_t)(uintptr_t)m->ram + (first + i) * PAGE);
    }
}

static void map_again(struct model *m, uint64_t i, uint64_t page)
{
    HOLDS(!vio_space_unmap(m->engine, HOST, i << 21, PAGE));
    HOLDS(!vio_space_map(m->engine, HOST, i << 21, (uint64_t)(uintptr_t)m->ram + page * PAGE, PAGE, RW_BOTH));
}

static void run_bounds(void)
{
    uint64_t hva, before;
    struct model m;

    start(&m, 64);
    hva = (uint64_t)(uintptr_t)m.ram;
    HOLDS(!vio_route_attach(m.engine, 0, VIO_NO_PASID, HOST, RW_BOTH));
    /* Table pages: none left but five, and each 2 MiB needs one: what does not fit leaves no trace. */
    for (uint64_t page = 0; page < 4; page++)
        HOLDS(!vio_space_map(m.engine, HOST, page << 21, hva + page * PAGE, PAGE, RW_BOTH));
    before = m.engine->pool.pages;
    m.engine->pool.pages = VIO_MAX_TABLE_PAGES - 5;
    for (uint64_t room = 0; room < 5; room++) {
        HOLDS(vio_space_map(m.engine, HOST, (1ull << 30) + PAGE, hva + PAGE, 12ull << 20, RW_BOTH) == VIO_ERR_LIMIT);
        HOLDS(m.engine->pool.pages == VIO_MAX_TABLE_PAGES - 5 + room);
        HOLDS(!vio_space_map(m.engine, HOST, (8 + room) << 21, hva, PAGE, RW_BOTH));
    }
    HOLDS(vio_space_create_host(m.engine, 99, PT_amd_v1, &host_table) == VIO_ERR_LIMIT);
    HOLDS(vio_space_destroy(m.engine, 99) == VIO_ERR_UNKNOWN);
    check_direct(&m, 0);
    for (uint64_t room = 0; room < 5; room++)
        HOLDS(!vio_space_unmap(m.engine, HOST, (8 + room) << 21, PAGE));
    m.engine->pool.pages = before;
    /* A split that finds no page leaves the large leaf as it was. */
    HOLDS(!vio_space_map(m.engine, HOST, 1ull << 32, 1ull << 32, 1ull << 30, RW_BOTH));
    before = m.engine->pool.pages;
    m.engine->pool.pages = VIO_MAX_TABLE_PAGES - 1;
    HOLDS(vio_space_unmap(m.engine, HOST, (1ull << 32) + PAGE, PAGE) == VIO_ERR_LIMIT);
    for (uint64_t page = 0; page < 512; page++) {
        vio_translation found;

        HOLDS(!vio_translate(m.engine, 0, VIO_NO_PASID, (1ull << 32) + page * PAGE, VIO_READ, &found));
        HOLDS(found.hva == (1ull << 32) + page * PAGE);
    }
    m.engine->pool.pages = before + 1; /* the first of the two splits was done */
    HOLDS(!vio_space_unmap(m.engine, HOST, 1ull << 32, 1ull << 30));
    /* Tags run out: all start again, and nothing entered under an old tag answers for the same number given anew. */
    m.engine->iotlb.next_tag = 1;
    for (uint64_t turn = 0; turn < 20; turn++) {
        HOLDS(!vio_space_invalidate(m.engine, HOST, 0, UINT64_MAX));
        check_direct(&m, 0);
    }
    HOLDS(!vio_space_invalidate(m.engine, HOST, 0, UINT64_MAX));
    for (uint64_t i = 0; i < 4; i++)
        map_again(&m, i, 20 + i);
    m.engine->iotlb.next_tag = UINT32_MAX - 2 * VIO_MAX_SPACES - 20;
    for (uint64_t turn = 0; turn < 60; turn++) {
        check_direct(&m, 20);
        map_again(&m, turn % 4, 9);
        map_again(&m, turn % 4, 20 + turn % 4);
        HOLDS(!vio_space_invalidate(m.engine, HOST, 0, UINT64_MAX));
        HOLDS(!bind(m.engine, 2, PT_amd_v1, 0, 1 + (uint32_t)turn % 6, 0));
    }
    HOLDS(m.engine->iotlb.next_tag < 1000);
    end(&m);
}

/* The hash index against an array, with keys that share homes often. */
static void run_index(uint64_t seed)
{
    static uint64_t values[512]; /* what each key leads to; 0: not there */
    struct index index;

    state = seed;
    HOLDS(!index_init(&index));
    for (unsigned step = 0; step < 200000; step++) {
        uint64_t number = below(512), key = number * number * 0x100000001ull;

        if (values[number]) {
            index_remove(&index, key);
            values[number] = 0;
        } else if (index.used < 60 + step / 1000) {
            values[number] = 1 + any() % 1000;
            HOLDS(!index_insert(&index, key, &values[number]));
        }
        for (unsigned probe = 0; probe < 4; probe++) {
            number = below(512);
            HOLDS(index_find(&index, number * number * 0x100000001ull) == (values[number] ? &values[number] : NULL));
        }
    }
    index_deinit(&index);
}

struct device {
    struct model *m;
    pthread_t thread;
    uint32_t rid;
    int *stop;
};

static void *device_main(void *argument)
{
    struct device *device = argument;
    uint64_t value, ram = (uint64_t)(uintptr_t)device->m->ram;
    uint8_t out[2 * PAGE], in[2 * PAGE];

    memset(out, (int)device->rid, sizeof out);
    while (!__atomic_load_n(device->stop, __ATOMIC_RELAXED)) {
        uint64_t iova = (uint64_t)device->rid * 4 * PAGE;
        vio_translation found;

        vio_dma(device->m->engine, device->rid, VIO_NO_PASID, iova + 100, out, sizeof out, 1);
        vio_dma(device->m->engine, device->rid, VIO_NO_PASID, iova + 100, in, sizeof in, 0);
        vio_store(device->m->engine, device->rid, VIO_NO_PASID, iova + 3 * PAGE, 7, 4);
        vio_load(device->m->engine, device->rid, VIO_NO_PASID, iova + 3 * PAGE, 4, &value);
        for (iova = 0; iova < 16 * PAGE; iova += PAGE) /* all devices share the one set there is */
            if (!vio_translate(device->m->engine, device->rid, VIO_NO_PASID, iova, VIO_READ, &found))
                HOLDS(found.hva == ram + iova && found.gpa == iova);
    }
    return NULL;
}

/* A guest that takes its leaf away and puts it back, while walks set bits in it: never in what is no leaf. */
static void *flip_main(void *argument)
{
    uint64_t *entry = argument, leaf = 1 | 3ull << 61 | PAGE, used = 1 << 5 | 1 << 6;

    for (unsigned step = 0; step < 300000; step++) {
        uint64_t old = __atomic_exchange_n(entry, step & 1 ? leaf : 0, __ATOMIC_ACQ_REL);

        HOLDS(step & 1 ? !old : old == leaf || old == (leaf | used) || !step);
    }
    return NULL;
}

static void run_used_bits(void)
{
    struct model m;
    pthread_t guest;
    unsigned found = 0;

    start(&m, 0);
    HOLDS(!vio_space_map(m.engine, HOST, 0, (uint64_t)(uintptr_t)m.ram, RAM_PAGES * PAGE, RW_BOTH));
    HOLDS(!bind(m.engine, 2, PT_amd_v1, 0, 1, VIO_TABLE_ACCESSED | VIO_TABLE_DIRTY));
    HOLDS(!vio_route_attach(m.engine, 1, VIO_NO_PASID, 2, RW_BOTH));
    HOLDS(!pthread_create(&guest, NULL, flip_main, m.ram));
    for (unsigned step = 0; step < 300000; step++) {
        vio_translation where;
        int status = vio_translate(m.engine, 1, VIO_NO_PASID, 0, VIO_WRITE, &where);

        HOLDS(!status || vio_last_fault()->reason == VIO_REASON_NOT_PRESENT ||
              vio_last_fault()->reason == VIO_REASON_ENTRY_CHANGED);
        found += !status;
    }
    pthread_join(guest, NULL);
    HOLDS(found);
    end(&m);
}

/* One set, two threads that fill and look up at once: what is found belongs together. */
static uint64_t iotlb_steps;

static void *iotlb_main(void *argument)
{
    struct iotlb *iotlb = argument;
    uint64_t random = (uint64_t)(uintptr_t)&random;

    for (uint64_t step = 0; step < iotlb_steps; step++) {
        uint64_t page = (random = random * 6364136223846793005ull + 1) >> 61;
        struct iotlb_hit hit;

        if (iotlb_lookup(iotlb, 1, 1 << 12, page << 12, &hit))
            HOLDS(hit.hva == page << 20 && hit.gpa == page << 24 && hit.perm == (page & 3));
        else
            iotlb_fill(iotlb, 1, page << 12, 12, page << 20, page << 24, page & 3);
    }
    return NULL;
}

static void run_iotlb(uint64_t steps)
{
    struct iotlb iotlb;
    pthread_t other;

    iotlb_steps = steps;
    HOLDS(!iotlb_init(&iotlb, 4));
    HOLDS(!pthread_create(&other, NULL, iotlb_main, &iotlb));
    iotlb_main(&iotlb);
    pthread_join(other, NULL);
    iotlb_deinit(&iotlb);
}

/* Each device has 16 KiB of its own, reached by a guest table; their mappings come and go. */
static void run_threads(long milliseconds)
{
    struct device devices[3];
    struct timespec now, until;
    struct model m;
    int stop = 0;

    start(&m, 4);
    HOLDS(!vio_space_map(m.engine, HOST, 0, (uint64_t)(uintptr_t)m.ram, RAM_PAGES * PAGE, RW_BOTH));
    for (uint64_t page = 0; page < 16; page++) {
        uint64_t entry = 1 | 3ull << 61 | page << 12;

        memcpy(m.ram + RAM_PAGES / 2 * PAGE + page * 8, &entry, sizeof entry);
    }
    for (uint32_t i = 0; i < 3; i++) {
        devices[i] = (struct device){.m = &m, .rid = i + 1, .stop = &stop};
        HOLDS(!bind(m.engine, 2 + i, PT_amd_v1, RAM_PAGES / 2 * PAGE, 1, 0));
        HOLDS(!vio_route_attach(m.engine, i + 1, VIO_NO_PASID, i ? 2 + i : HOST, RW_BOTH));
        HOLDS(!pthread_create(&devices[i].thread, NULL, device_main, &devices[i]));
    }
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_nsec += milliseconds % 1000 * 1000000;
    until.tv_sec += milliseconds / 1000 + until.tv_nsec / 1000000000;
    until.tv_nsec %= 1000000000;
    do {
        uint64_t page = 4 + below(12);
        uint8_t before[PAGE];
        vio_counters counters;

        HOLDS(!vio_space_unmap(m.engine, HOST, page * PAGE, PAGE));
        memcpy(before, m.ram + page * PAGE, PAGE);
        for (unsigned i = 0; i < 4; i++)
            HOLDS(!memcmp(before, m.ram + page * PAGE, PAGE)); /* no device reaches it any more */
        HOLDS(!vio_space_map(m.engine, HOST, page * PAGE, (uint64_t)(uintptr_t)m.ram + page * PAGE, PAGE, RW_BOTH));
        HOLDS(!vio_space_invalidate(m.engine, 1 + (uint32_t)below(4), 0, below(2) ? UINT64_MAX : PAGE));
        HOLDS(!bind(m.engine, 3, PT_amd_v1, RAM_PAGES / 2 * PAGE, 1, 0));
        HOLDS(!vio_route_attach(m.engine, 2, VIO_NO_PASID, 3, RW_BOTH));
        vio_engine_counters(m.engine, &counters);
        clock_gettime(CLOCK_MONOTONIC, &now);
    } while (now.tv_sec < until.tv_sec || (now.tv_sec == until.tv_sec && now.tv_nsec < until.tv_nsec));
    __atomic_store_n(&stop, 1, __ATOMIC_RELAXED);
    for (uint32_t i = 0; i < 3; i++)
        pthread_join(devices[i].thread, NULL);
    end(&m);
}

int main(int argc, char **argv)
{
    if (argc == 4 && !strcmp(argv[1], "random"))
        run_random(strtoull(argv[2], NULL, 0), strtoull(argv[3], NULL, 0));
    else if (argc == 3 && !strcmp(argv[1], "index"))
        run_index(strtoull(argv[2], NULL, 0));
    else if (argc == 2 && !strcmp(argv[1], "used-bits"))
        run_used_bits();
    else if (argc == 3 && !strcmp(argv[1], "iotlb"))
        run_iotlb(strtoull(argv[2], NULL, 0));
    else if (argc == 2 && !strcmp(argv[1], "bounds"))
        run_bounds();
    else if (argc == 3 && !strcmp(argv[1], "threads"))
        run_threads(strtol(argv[2], NULL, 0));
    else
        return 2;
    return 0;
}
