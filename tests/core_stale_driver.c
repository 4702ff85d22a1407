/*
 * Nothing stale is used: devices move data without pause while two changers take translations away in every way there
 * is; test_core_stale.py builds and runs it. Arguments: SEED MILLISECONDS. Ends with 0 and silence, or with a line that
 * says what did not hold, or with ThreadSanitizer's report.
 *
 * Once a change has returned, the page that it took away is the changer's own: it fills it with a canary by plain
 * stores, looks at it now and then, and gives it to another place of the tables only after it has been cleared. So a
 * stale write spoils a canary, a stale read brings one home, and either is a data race, which ThreadSanitizer reports
 * even when it does no harm.
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "core_traffic.h"
#include "request.h"

#define STAGE2 1u
#define DEVICES 3u
#define CHANGERS 2u
#define SLOTS 8u                         /* IOVA pages of a device; changer c has those with slot % CHANGERS == c */
#define OWN (DEVICES * SLOTS / CHANGERS) /* slots of a changer */
#define SPARE 6u                         /* pages of a changer beyond those in use */
#define PAGES (OWN + SPARE)
#define TABLES (1 + DEVICES * 3)         /* unused page 0; of each device a root and two leaf tables */
#define RAM_PAGES (TABLES + CHANGERS * PAGES)
#define LEAF 1ull << 61 | 1ull << 62 | 1

static vio_engine *engine;
static uint8_t *ram;

/* Devices. Each has a space, its RID being its number; its IOVA pages 0 to SLOTS - 1 are used by no other. */

static struct device {
    pthread_t thread;
    pthread_mutex_t lock; /* of changers: its tables, and where it leads */
    struct random random;
    uint64_t leaves; /* GPA of the leaf table in use; the other one leads to canaries */
    uint64_t moved;
} devices[DEVICES];

static uint32_t space_of(uint32_t device)
{
    return 2 + device;
}

static uint64_t root_of(uint32_t device)
{
    return (1 + device * 3) * PAGE;
}

static void *device_main(void *argument)
{
    struct device *device = argument;
    uint32_t rid = (uint32_t)(device - devices);
    uint64_t buffer[2 * PAGE / 8], operand[2] = {rid + 1}, compare[2] = {0}, before[2];

    while (!stopped()) {
        uint64_t at = below(&device->random, SLOTS * PAGE / 8 - 2) * 8, other, value;
        uint64_t bytes = 8 * (1 + below(&device->random, sizeof buffer / 8));
        vio_translation found;
        int status = VIO_OK;

        if (at + bytes > SLOTS * PAGE)
            bytes = SLOTS * PAGE - at;
        other = below(&device->random, (SLOTS * PAGE - bytes) / 8 + 1) * 8;
        switch (below(&device->random, 9)) {
        case 0:
            memset(buffer, (int)(16 + rid), bytes);
            status = vio_dma(engine, rid, VIO_NO_PASID, at, buffer, bytes, 1);
            break;
        case 1:
            memset(buffer, 0, bytes);
            status = vio_dma(engine, rid, VIO_NO_PASID, at, buffer, bytes, 0);
            check_no_canary(buffer, bytes);
            break;
        case 2:
            status = vio_dma_fill(engine, rid, VIO_NO_PASID, at, bytes, 0x0102030405060708, 8);
            break;
        case 3:
            status = vio_dma_copy(engine, rid, VIO_NO_PASID, at, rid, VIO_NO_PASID, other, bytes);
            break;
        case 4:
            status = vio_store(engine, rid, VIO_NO_PASID, at, rid, 8);
            break;
        case 5:
            status = vio_load(engine, rid, VIO_NO_PASID, at, 8, &value);
            HOLDS(status || value != CANARY);
            break;
        case 6:
            status = vio_atomic(engine, rid, VIO_NO_PASID, at, VIO_ATOMIC_ADD, 8, operand, compare, before);
            HOLDS(status || before[0] != CANARY);
            break;
        case 7:
            status = vio_atomic(engine, rid, VIO_NO_PASID, at & ~15ull, VIO_ATOMIC_CAS, 16, operand, compare, before);
            HOLDS(status || (before[0] != CANARY && before[1] != CANARY));
            break;
        default:
            status = vio_translate(engine, rid, VIO_NO_PASID, at, VIO_WRITE, &found);
            break;
        }
        HOLDS(status == VIO_OK || status == VIO_FAULT);
        device->moved += status == VIO_OK;
        if (status) {
            unsigned reason = vio_last_fault()->reason;

            HOLDS(reason == VIO_REASON_NOT_PRESENT || reason == VIO_REASON_NO_ROUTE || reason == VIO_REASON_NOT_BOUND ||
                  reason == VIO_REASON_BLOCKED || (reason == VIO_REASON_PERMISSION && vio_last_fault()->stage == 2));
        }
    }
    return NULL;
}

/* Changers. Each has pages of its own: GPAs and, by stage 2, RAM. What is not in use is retired, full of canaries. */

struct changer {
    pthread_t thread;
    struct random random;
    uint64_t ram_of[PAGES];     /* GPA page -> RAM page, both counted from `first` */
    uint64_t retired[SPARE];    /* RAM pages of the GPAs that no slot uses */
    uint64_t gpas[OWN];         /* of each own slot */
    uint64_t free_gpas[SPARE];
    uint64_t first;             /* page */
    uint64_t changes;
};

static struct changer changers[CHANGERS];

static uint64_t *ram_page(const struct changer *changer, uint64_t page)
{
    return (uint64_t *)(ram + (changer->first + page) * PAGE);
}

static void check_retired(const struct changer *changer, uint64_t page)
{
    const uint64_t *words = ram_page(changer, page);

    for (unsigned i = 0; i < PAGE / 8; i++)
        HOLDS(words[i] == CANARY);
}

static void retire(const struct changer *changer, uint64_t page)
{
    uint64_t *words = ram_page(changer, page);

    for (unsigned i = 0; i < PAGE / 8; i++)
        words[i] = CANARY;
}

/* Take a retired RAM page into use; the caller retires another one in its place. */
static uint64_t take_retired(struct changer *changer, unsigned spare)
{
    uint64_t page = changer->retired[spare];

    check_retired(changer, page);
    memset(ram_page(changer, page), 0, PAGE);
    return page;
}

static uint64_t *entry_of(uint64_t table, uint64_t index)
{
    return (uint64_t *)(ram + table + 8 * index);
}

static uint64_t leaf_of(const struct changer *changer, uint64_t gpa)
{
    return (changer->first + gpa) * PAGE | LEAF;
}

static void invalidate(struct changer *changer, uint32_t device, uint64_t slot)
{
    uint64_t at = slot * PAGE;

    switch (below(&changer->random, 6)) {
    case 0: HOLDS(!vio_space_invalidate(engine, space_of(device), 0, UINT64_MAX)); break;
    case 1: vio_invalidate_all(engine); break;
    case 2: HOLDS(!vio_invalidate_device(engine, device)); break;
    case 3: HOLDS(!vio_space_invalidate(engine, space_of(device), 0, SLOTS * PAGE - 1)); break;
    default: HOLDS(!vio_space_invalidate(engine, space_of(device), at, at + PAGE - 1)); break;
    }
}

/* The guest leads an IOVA page elsewhere, and invalidates. */
static void change_leaf(struct changer *changer, unsigned own)
{
    uint32_t device = own / (SLOTS / CHANGERS);
    uint64_t slot = own % (SLOTS / CHANGERS) * CHANGERS + (uint64_t)(changer - changers);
    unsigned spare = (unsigned)below(&changer->random, SPARE);
    uint64_t old = changer->gpas[own], new = changer->free_gpas[spare];

    for (unsigned i = 0; i < SPARE; i++) /* free GPAs lead to retired pages */
        if (changer->retired[i] == changer->ram_of[new])
            spare = i;
    take_retired(changer, spare);
    pthread_mutex_lock(&devices[device].lock);
    __atomic_store_n(entry_of(devices[device].leaves, slot), leaf_of(changer, new), __ATOMIC_RELEASE);
    pthread_mutex_unlock(&devices[device].lock);
    invalidate(changer, device, slot);
    for (unsigned i = 0; i < SPARE; i++)
        if (changer->free_gpas[i] == new)
            changer->free_gpas[i] = old;
    changer->gpas[own] = new;
    changer->retired[spare] = changer->ram_of[old];
    retire(changer, changer->ram_of[old]);
}

/* The host leads a GPA page elsewhere. */
static void change_stage2(struct changer *changer, unsigned own)
{
    uint64_t gpa = changer->gpas[own], old = changer->ram_of[gpa], at = (changer->first + gpa) * PAGE, new, other = 0;
    unsigned spare = (unsigned)below(&changer->random, SPARE);

    HOLDS(!vio_space_unmap(engine, STAGE2, at, PAGE));
    retire(changer, old);
    new = take_retired(changer, spare);
    for (uint64_t i = 0; i < PAGES; i++) /* the free GPA that led to the new page leads to the old one */
        if (changer->ram_of[i] == new)
            other = i;
    HOLDS(!vio_space_unmap(engine, STAGE2, (changer->first + other) * PAGE, PAGE));
    changer->ram_of[other] = old;
    changer->ram_of[gpa] = new;
    changer->retired[spare] = old;
    HOLDS(!vio_space_map(engine, STAGE2, (changer->first + other) * PAGE,
                         (uint64_t)(uintptr_t)ram_page(changer, old), PAGE, RW_BOTH));
    HOLDS(!vio_space_map(engine, STAGE2, at, (uint64_t)(uintptr_t)ram_page(changer, new), PAGE, RW_BOTH));
}

/* The guest leads upper entries to another leaf table; the old one then leads to canaries. */
static void change_table(struct changer *changer, uint32_t device)
{
    uint64_t root = root_of(device), old, new;

    pthread_mutex_lock(&devices[device].lock);
    old = devices[device].leaves;
    new = old == root + PAGE ? root + 2 * PAGE : root + PAGE;
    for (unsigned i = 0; i < SLOTS; i++)
        __atomic_store_n(entry_of(new, i), __atomic_load_n(entry_of(old, i), __ATOMIC_RELAXED), __ATOMIC_RELAXED);
    __atomic_store_n(entry_of(root, 0), new | 1ull << 9 | LEAF, __ATOMIC_RELEASE);
    devices[device].leaves = new;
    HOLDS(!vio_space_invalidate(engine, space_of(device), 0, UINT64_MAX));
    for (unsigned i = 0; i < SLOTS; i++)
        __atomic_store_n(entry_of(old, i), leaf_of(changer, changer->free_gpas[i % SPARE]), __ATOMIC_RELAXED);
    pthread_mutex_unlock(&devices[device].lock);
}

/* A device without a way to memory: its pages, those of this changer at least, are still. */
static void cut_off(struct changer *changer, uint32_t device)
{
    unsigned way = (unsigned)below(&changer->random, 3), own = device * (SLOTS / CHANGERS);
    uint64_t sum = 0, again = 0;

    pthread_mutex_lock(&devices[device].lock);
    if (way == 0)
        HOLDS(!vio_route_detach(engine, device, VIO_NO_PASID));
    else if (way == 1)
        HOLDS(!vio_route_block(engine, device, VIO_NO_PASID));
    else
        HOLDS(!vio_space_unbind(engine, space_of(device)));
    for (unsigned i = 0; i < SLOTS / CHANGERS * PAGE / 8; i++)
        sum += ram_page(changer, changer->ram_of[changer->gpas[own + i / (PAGE / 8)]])[i % (PAGE / 8)] * (i + 1);
    for (unsigned i = 0; i < SLOTS / CHANGERS * PAGE / 8; i++)
        again += ram_page(changer, changer->ram_of[changer->gpas[own + i / (PAGE / 8)]])[i % (PAGE / 8)] * (i + 1);
    HOLDS(sum == again);
    if (way == 2) {
        const vio_table table = {.tree = {.root = root_of(device), .levels = 2}};

        HOLDS(!vio_space_bind(engine, space_of(device), PT_amd_v1, &table));
    } else {
        HOLDS(!vio_route_attach(engine, device, VIO_NO_PASID, space_of(device), RW_BOTH));
    }
    pthread_mutex_unlock(&devices[device].lock);
}

/* The host takes a range away, or its permission to write, in several stints: then its pages are still. */
static void take_range(struct changer *changer)
{
    uint64_t first = below(&changer->random, PAGES), count = 1 + below(&changer->random, PAGES - first);
    uint64_t at = (changer->first + first) * PAGE, sum[2] = {0};
    bool away = below(&changer->random, 2);

    HOLDS(!(away ? vio_space_unmap(engine, STAGE2, at, count * PAGE)
                 : vio_space_protect(engine, STAGE2, at, count * PAGE, VIO_READ)));
    for (unsigned pass = 0; pass < 2; pass++)
        for (uint64_t i = 0; i < count * PAGE / 8; i++)
            sum[pass] += ram_page(changer, changer->ram_of[first + i / (PAGE / 8)])[i % (PAGE / 8)] * (i + 1);
    HOLDS(sum[0] == sum[1]);
    if (!away)
        HOLDS(!vio_space_protect(engine, STAGE2, at, count * PAGE, RW_BOTH));
    for (uint64_t i = 0; away && i < count; i++)
        HOLDS(!vio_space_map(engine, STAGE2, at + i * PAGE,
                             (uint64_t)(uintptr_t)ram_page(changer, changer->ram_of[first + i]), PAGE, RW_BOTH));
}

static void *changer_main(void *argument)
{
    struct changer *changer = argument;

    for (; !stopped(); changer->changes++) {
        unsigned own = (unsigned)below(&changer->random, OWN);

        switch (below(&changer->random, 9)) {
        case 0:
        case 1: change_stage2(changer, own); break;
        case 2: change_table(changer, own % DEVICES); break;
        case 3: cut_off(changer, own % DEVICES); break;
        case 4: take_range(changer); break;
        default: change_leaf(changer, own); break;
        }
        check_retired(changer, changer->retired[below(&changer->random, SPARE)]);
    }
    for (unsigned i = 0; i < SPARE; i++)
        check_retired(changer, changer->retired[i]);
    return NULL;
}

static void start(uint64_t seed)
{
    ram = mmap(NULL, RAM_PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    HOLDS(ram != MAP_FAILED && !vio_engine_create(seed % 3 ? 64 : 4, &engine));
    HOLDS(!vio_space_create_host(engine, STAGE2, PT_amd_v1, &(vio_table){.tree = {.levels = 4}}));
    for (uint64_t page = 0; page < RAM_PAGES; page++) /* one by one: pages of 4 KiB, never to be split */
        HOLDS(!vio_space_map(engine, STAGE2, page * PAGE, (uint64_t)(uintptr_t)ram + page * PAGE, PAGE, RW_BOTH));
    for (unsigned c = 0; c < CHANGERS; c++) {
        struct changer *changer = &changers[c];

        changer->first = TABLES + c * PAGES;
        changer->random.state = seed * 100 + c;
        for (unsigned i = 0; i < PAGES; i++)
            changer->ram_of[i] = i;
        for (unsigned i = 0; i < OWN; i++)
            changer->gpas[i] = i;
        for (unsigned i = 0; i < SPARE; i++) {
            changer->free_gpas[i] = changer->retired[i] = OWN + i;
            retire(changer, OWN + i);
        }
    }
    for (uint32_t d = 0; d < DEVICES; d++) {
        const vio_table table = {.tree = {.root = root_of(d), .levels = 2}};

        devices[d].random.state = seed * 100 + 50 + d;
        devices[d].leaves = root_of(d) + PAGE;
        pthread_mutex_init(&devices[d].lock, NULL);
        *entry_of(root_of(d), 0) = devices[d].leaves | 1ull << 9 | LEAF;
        for (uint64_t slot = 0; slot < SLOTS; slot++) {
            const struct changer *changer = &changers[slot % CHANGERS];

            *entry_of(devices[d].leaves, slot) =
                leaf_of(changer, changer->gpas[d * (SLOTS / CHANGERS) + slot / CHANGERS]);
        }
        HOLDS(!vio_space_create_nested(engine, space_of(d), STAGE2));
        HOLDS(!vio_space_bind(engine, space_of(d), PT_amd_v1, &table));
        HOLDS(!vio_route_attach(engine, d, VIO_NO_PASID, space_of(d), RW_BOTH));
    }
}

int main(int argc, char **argv)
{
    struct timespec time = {0};
    uint64_t milliseconds, moved = 0;

    if (argc != 3)
        return 2;
    job_budget = 2048; /* requests of several pages give way to changes in the middle, */
    stint_entries = 1;    /* and changes of several to requests */
    start(strtoull(argv[1], NULL, 0));
    milliseconds = strtoull(argv[2], NULL, 0);
    for (unsigned i = 0; i < DEVICES; i++)
        HOLDS(!pthread_create(&devices[i].thread, NULL, device_main, &devices[i]));
    for (unsigned i = 0; i < CHANGERS; i++)
        HOLDS(!pthread_create(&changers[i].thread, NULL, changer_main, &changers[i]));
    time.tv_sec = (time_t)(milliseconds / 1000);
    time.tv_nsec = (long)(milliseconds % 1000) * 1000000;
    nanosleep(&time, NULL);
    __atomic_store_n(&stop, 1, __ATOMIC_RELAXED);
    for (unsigned i = 0; i < DEVICES; i++) {
        pthread_join(devices[i].thread, NULL);
        moved += devices[i].moved;
    }
    for (unsigned i = 0; i < CHANGERS; i++)
        pthread_join(changers[i].thread, NULL);
    printf("%llu changes, %llu requests served\n", (unsigned long long)(changers[0].changes + changers[1].changes),
           (unsigned long long)moved);
    vio_engine_destroy(engine);
    munmap(ram, RAM_PAGES * PAGE);
    return 0;
}
