/*
 * Dirty tracking and PASID tables under sanitizers, with devices in threads; test_core_sanitized.py builds and runs it.
 * Argument: MILLISECONDS. Ends with 0 and silence, or with a sanitizer's report or a line that says what did not hold.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "core_holds.h"
#include "engine.h"

#define PAGE 4096u
#define RAM_PAGES 64u
#define HOST 1u
#define PASIDS 2u /* the space of all PASIDs */
#define RID 7u
#define DEVICES 3u
#define PLACES 4u      /* pages that each device writes */
#define GCR3_PAGE 63u  /* the PASID table */
#define DATA_PAGE 40u  /* the first page that is written; below it lie page tables */
#define IOVA 0x12345000ull

static vio_engine *engine;
static uint8_t *ram;
static int stop;

/* Writes of each device to each of its pages: how many were begun, and how many have returned. */
static uint64_t begun[DEVICES][PLACES], ended[DEVICES][PLACES];

static uint64_t *word(unsigned page, unsigned index)
{
    return (uint64_t *)(void *)(ram + page * PAGE) + index;
}

/* x86 tables in four pages from `first` on that lead PLACES pages from IOVA on to those from `data` on. */
static void lay_tree(unsigned first, unsigned data)
{
    for (unsigned level = 4; level > 1; level--)
        *word(first + 4 - level, IOVA >> (3 + 9 * level) & 511) = (uint64_t)(first + 5 - level) * PAGE | 7;
    for (unsigned place = 0; place < PLACES; place++)
        *word(first + 3, (IOVA >> 12 & 511) + place) = (uint64_t)(data + place) * PAGE | 7;
}

static unsigned tree_of(unsigned pasid, unsigned which)
{
    return (2 * pasid + which) * 4;
}

static unsigned data_of(unsigned pasid)
{
    return DATA_PAGE + pasid * PLACES;
}

/* Both trees of a device lead to the same data, so it may write while its entry changes. */
static void point(unsigned pasid, unsigned which)
{
    __atomic_store_n(word(GCR3_PAGE, pasid), (uint64_t)tree_of(pasid, which) * PAGE | 1, __ATOMIC_RELEASE);
}

static void *device_main(void *argument)
{
    unsigned device = (unsigned)(uintptr_t)argument;
    uint8_t bytes[PAGE];

    memset(bytes, (int)device, sizeof bytes);
    for (uint64_t turn = 0; !__atomic_load_n(&stop, __ATOMIC_RELAXED); turn++) {
        unsigned place = turn % PLACES;
        uint64_t iova = IOVA + place * PAGE;
        int status;

        __atomic_fetch_add(&begun[device][place], 1, __ATOMIC_SEQ_CST);
        if (turn / PLACES % 2)
            status = vio_dma(engine, RID, device, iova, bytes, sizeof bytes, 1);
        else
            status = vio_store(engine, RID, device, iova + 8 * (turn % 64), turn, 8);
        HOLDS(!status || vio_last_fault()->reason == VIO_REASON_NOT_PRESENT ||
              vio_last_fault()->reason == VIO_REASON_PERMISSION || vio_last_fault()->reason == VIO_REASON_ENTRY_CHANGED);
        if (!status)
            __atomic_fetch_add(&ended[device][place], 1, __ATOMIC_SEQ_CST);
        else
            __atomic_fetch_sub(&begun[device][place], 1, __ATOMIC_SEQ_CST);
    }
    return NULL;
}

/* Read and clear: what was begun after the read before, and has ended, is dirty. */
static void check_dirty(void)
{
    static uint64_t known[DEVICES][PLACES];
    uint64_t now[DEVICES][PLACES];
    uint8_t bitmap[RAM_PAGES / 8] = {0};

    for (unsigned device = 0; device < DEVICES; device++)
        for (unsigned place = 0; place < PLACES; place++)
            now[device][place] = __atomic_load_n(&ended[device][place], __ATOMIC_SEQ_CST);
    HOLDS(!vio_dirty_read(engine, HOST, 0, RAM_PAGES * PAGE, 12, 1, bitmap));
    for (unsigned device = 0; device < DEVICES; device++)
        for (unsigned place = 0; place < PLACES; place++) {
            unsigned page = data_of(device) + place;

            if (now[device][place] > known[device][place])
                HOLDS(bitmap[page / 8] >> page % 8 & 1);
            known[device][place] = __atomic_load_n(&begun[device][place], __ATOMIC_SEQ_CST);
        }
}

static void check_pasid(unsigned pasid, unsigned which)
{
    vio_translation found;
    uint64_t marks = 0;

    point(pasid, which);
    HOLDS(!vio_pasid_invalidate(engine, PASIDS, pasid, 0, UINT64_MAX));
    /* The tree that is not in use loses its accessed bits: whoever walks it still would set them again. */
    *word(tree_of(pasid, !which) + 3, IOVA >> 12 & 511) &= ~0x60ull;
    HOLDS(!vio_translate(engine, RID, pasid, IOVA, VIO_READ, &found));
    HOLDS(found.gpa == data_of(pasid) * PAGE);
    for (unsigned turn = 0; turn < 100; turn++)
        marks |= __atomic_load_n(word(tree_of(pasid, !which) + 3, IOVA >> 12 & 511), __ATOMIC_RELAXED) & 0x60;
    HOLDS(!marks);
}

static void change_stage2(unsigned turn)
{
    uint64_t at = (DATA_PAGE + turn % (DEVICES * PLACES)) * PAGE;

    if (turn % 3) {
        HOLDS(!vio_space_protect(engine, HOST, at, PAGE, VIO_READ));
        HOLDS(!vio_space_protect(engine, HOST, at, PAGE, RW_BOTH));
    } else {
        HOLDS(!vio_space_unmap(engine, HOST, at, PAGE));
        HOLDS(!vio_space_map(engine, HOST, at, (uint64_t)(uintptr_t)ram + at, PAGE, RW_BOTH));
    }
}

static double seconds(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

int main(int argc, char **argv)
{
    vio_table host = {.tree = {.levels = 4}};
    vio_pasid_table table = {.root = GCR3_PAGE * PAGE, .levels = 1, .default_pasid = VIO_NO_PASID};
    pthread_t threads[DEVICES];
    double until;

    if (argc != 2)
        return 2;
    ram = mmap(NULL, RAM_PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    HOLDS(ram != MAP_FAILED && !vio_engine_create(64, &engine));
    HOLDS(!vio_space_create_host(engine, HOST, vio_format_find("ept"), &host));
    HOLDS(!vio_space_map(engine, HOST, 0, (uint64_t)(uintptr_t)ram, RAM_PAGES * PAGE, RW_BOTH));
    HOLDS(!vio_space_create_nested(engine, PASIDS, HOST));
    for (unsigned pasid = 0; pasid < DEVICES; pasid++)
        for (unsigned which = 0; which < 2; which++) {
            lay_tree(tree_of(pasid, which), data_of(pasid));
            point(pasid, which);
        }
    HOLDS(!vio_pasid_bind(engine, PASIDS, vio_pasid_format_find("amd-gcr3"), &table));
    HOLDS(!vio_route_attach(engine, RID, VIO_ANY_PASID, PASIDS, RW_BOTH));
    HOLDS(!vio_dirty_set(engine, HOST, 1));
    for (uintptr_t device = 0; device < DEVICES; device++)
        HOLDS(!pthread_create(&threads[device], NULL, device_main, (void *)device));
    until = seconds() + strtod(argv[1], NULL) / 1000;
    for (unsigned turn = 0; seconds() < until; turn++) {
        check_dirty();
        if (turn % 4 == 0)
            check_pasid(turn / 4 % DEVICES, turn / 12 % 2);
        if (turn % 8 == 1)
            change_stage2(turn / 8);
        if (turn % 64 == 3)
            HOLDS(!vio_pasid_bind(engine, PASIDS, vio_pasid_format_find("amd-gcr3"), &table));
        if (turn % 64 == 35)
            vio_invalidate_all(engine);
    }
    __atomic_store_n(&stop, 1, __ATOMIC_RELAXED);
    for (unsigned device = 0; device < DEVICES; device++)
        pthread_join(threads[device], NULL);
    check_dirty();
    vio_engine_destroy(engine);
    munmap(ram, RAM_PAGES * PAGE);
    return 0;
}
