/*
 * Nothing stale is used in another process's memory: devices move data there without pause, some of it in pages that come
 * late or not in time, while two changers take translations away. test_core_withheld.py builds and runs it. Arguments: SEED
 * MILLISECONDS. Ends with 0 and silence, or with a line that says what did not hold, or with a sanitizer's report.
 *
 * The memory is shared with the process, at the same addresses, so that changers can look at it by plain loads. Once a
 * change has returned, the page that it took away is the changer's own: full of canaries, as in core_stale_driver.c. What
 * moves by a change's leave is broken off after microseconds, so that most of it is caught in the middle.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "core_traffic.h"
#include "request.h"

#define LENT 1u
#define DEVICES 3u
#define CHANGERS 2u
#define SLOTS 8u  /* IOVA pages of a changer */
#define SPARE 4u  /* pages of memory of a changer beyond those in use */
#define LATE 4u   /* IOVA pages behind the changers' that come late */
#define PAGES (CHANGERS * (SLOTS + SPARE))
#define SPAN ((CHANGERS * SLOTS + LATE) * PAGE)

static vio_engine *engine;
static uint8_t *shared, *late;

/* The process: it withholds its late pages for a while each time, where the system lets it. */

static void withhold(uint64_t seed)
{
    struct random random = {seed};
    int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    struct uffdio_api api = {.api = UFFD_API};
    struct uffdio_register range = {.range = {(uintptr_t)late, LATE * PAGE}, .mode = UFFDIO_REGISTER_MODE_MISSING};

    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (fd < 0 || ioctl(fd, UFFDIO_API, &api) || ioctl(fd, UFFDIO_REGISTER, &range))
        for (;;)
            pause();
    for (;;) {
        struct pollfd ready = {fd, POLLIN, 0};
        struct uffd_msg message;

        madvise(late + below(&random, LATE) * PAGE, PAGE, MADV_DONTNEED);
        if (poll(&ready, 1, 1) > 0 && read(fd, &message, sizeof message) == sizeof message) {
            struct uffdio_zeropage zero = {.range = {message.arg.pagefault.address & ~(uint64_t)(PAGE - 1), PAGE}};

            usleep((useconds_t)below(&random, below(&random, 8) ? 2000 : 80000)); /* or longer than requests wait */
            ioctl(fd, UFFDIO_ZEROPAGE, &zero);
        }
    }
}

/* Devices. Each begins anywhere, in the table or in the process by name. */

static struct device {
    pthread_t thread;
    struct random random;
    uint64_t moved;
} devices[DEVICES];

static void *device_main(void *argument)
{
    struct device *device = argument;
    uint32_t rid = (uint32_t)(device - devices);
    uint64_t buffer[5 * PAGE / 8], value;

    while (!stopped()) {
        uint64_t at = below(&device->random, SPAN / 8) * 8, other;
        uint64_t bytes = 8 * (1 + below(&device->random, sizeof buffer / 8));
        vio_segment segments[] = {{at, 8}, {below(&device->random, SPAN / 8) * 8, 8}, {at, 8}};
        int status;

        if (at + bytes > SPAN)
            bytes = SPAN - at;
        other = below(&device->random, (SPAN - bytes) / 8 + 1) * 8;
        switch (below(&device->random, 8)) {
        case 0:
        case 1:
            memset(buffer, (int)(16 + rid), bytes);
            status = vio_dma(engine, rid, VIO_NO_PASID, at, buffer, bytes, 1);
            break;
        case 2:
            memset(buffer, 0, bytes);
            status = vio_dma(engine, rid, VIO_NO_PASID, at, buffer, bytes, 0);
            check_no_canary(buffer, bytes);
            break;
        case 3: status = vio_dma_fill(engine, rid, VIO_NO_PASID, at, bytes, 0x0102030405060708, 8); break;
        case 4: status = vio_dma_copy(engine, rid, VIO_NO_PASID, at, rid, VIO_NO_PASID, other, bytes); break;
        case 5: status = vio_store(engine, rid, VIO_NO_PASID, at, rid, 8); break;
        case 6:
            status = vio_load(engine, rid, VIO_NO_PASID, at, 8, &value);
            HOLDS(status || value != CANARY);
            break;
        default:
            status = vio_dma_scatter(engine, rid, VIO_NO_PASID, segments, 3, buffer, 0);
            check_no_canary(buffer, status ? 0 : 24);
            break;
        }
        HOLDS(status == VIO_OK || status == VIO_FAULT);
        device->moved += status == VIO_OK;
        if (status) {
            unsigned reason = vio_last_fault()->reason;

            HOLDS(reason == VIO_REASON_NOT_PRESENT || reason == VIO_REASON_NO_ROUTE || reason == VIO_REASON_WITHHELD ||
                  (reason == VIO_REASON_PERMISSION && vio_last_fault()->stage == 2));
            HOLDS(reason != VIO_REASON_WITHHELD || vio_last_fault()->iova >= CHANGERS * SLOTS * PAGE);
        }
    }
    return NULL;
}

/* Changers */

struct changer {
    pthread_t thread;
    struct random random;
    uint64_t used[SLOTS], retired[SPARE]; /* pages of the shared memory */
    uint64_t changes;
};

static struct changer changers[CHANGERS];
static pthread_mutex_t routes = PTHREAD_MUTEX_INITIALIZER;

static uint64_t *page_of(uint64_t page)
{
    return (uint64_t *)(shared + page * PAGE);
}

static void check_retired(uint64_t page)
{
    for (unsigned i = 0; i < PAGE / 8; i++)
        HOLDS(page_of(page)[i] == CANARY);
}

static void retire(uint64_t page)
{
    for (unsigned i = 0; i < PAGE / 8; i++)
        page_of(page)[i] = CANARY;
}

static uint64_t iova_of(const struct changer *changer, uint64_t slot)
{
    return ((uint64_t)(changer - changers) * SLOTS + slot) * PAGE;
}

static void map(const struct changer *changer, uint64_t slot)
{
    HOLDS(!vio_space_map(engine, LENT, iova_of(changer, slot),
                         (uint64_t)(uintptr_t)page_of(changer->used[slot]) | VIO_FOREIGN, PAGE, RW_BOTH));
}

static uint64_t sum(const struct changer *changer)
{
    uint64_t sum = 0;

    for (unsigned slot = 0; slot < SLOTS; slot++)
        for (unsigned i = 0; i < PAGE / 8; i++)
            sum += page_of(changer->used[slot])[i] * (slot * PAGE + i + 1);
    return sum;
}

static void route_all(bool lead)
{
    for (uint32_t rid = 0; rid < DEVICES; rid++)
        HOLDS(!(lead ? vio_route_attach(engine, rid, VIO_NO_PASID, LENT, RW_BOTH)
                     : vio_route_detach(engine, rid, VIO_NO_PASID)));
}

static void lead_elsewhere(struct changer *changer)
{
    uint64_t slot = below(&changer->random, SLOTS), spare = below(&changer->random, SPARE), old = changer->used[slot];

    HOLDS(!vio_space_unmap(engine, LENT, iova_of(changer, slot), PAGE));
    retire(old);
    check_retired(changer->retired[spare]);
    changer->used[slot] = changer->retired[spare];
    changer->retired[spare] = old;
    memset(page_of(changer->used[slot]), 0, PAGE);
    map(changer, slot);
}

/* All without a way to memory, or to write it: it is still. */
static void hold_still(struct changer *changer, bool cut_off)
{
    uint64_t before;

    if (cut_off) {
        pthread_mutex_lock(&routes);
        route_all(false);
    } else {
        HOLDS(!vio_space_protect(engine, LENT, iova_of(changer, 0), SLOTS * PAGE, VIO_READ));
    }
    before = sum(changer);
    HOLDS(sum(changer) == before);
    if (cut_off) {
        route_all(true);
        pthread_mutex_unlock(&routes);
    } else {
        HOLDS(!vio_space_protect(engine, LENT, iova_of(changer, 0), SLOTS * PAGE, RW_BOTH));
    }
}

/* What is not in a bitmap of dirty pages is as it was when the bitmap before was read. */
static void read_dirty(struct changer *changer)
{
    static uint64_t copies[CHANGERS][SLOTS * PAGE / 8];
    uint64_t *copy = copies[changer - changers];
    uint8_t bitmap[SLOTS / 8];

    HOLDS(!vio_dirty_read(engine, LENT, iova_of(changer, 0), SLOTS * PAGE, 12, 1, bitmap));
    for (unsigned slot = 0; slot < SLOTS; slot++)
        for (unsigned i = 0; i < PAGE / 8; i++)
            copy[slot * PAGE / 8 + i] = __atomic_load_n(&page_of(changer->used[slot])[i], __ATOMIC_RELAXED);
    pthread_mutex_lock(&routes);
    route_all(false);
    memset(bitmap, 0, sizeof bitmap);
    HOLDS(!vio_dirty_read(engine, LENT, iova_of(changer, 0), SLOTS * PAGE, 12, 1, bitmap));
    for (unsigned slot = 0; slot < SLOTS; slot++)
        HOLDS((bitmap[slot / 8] >> slot % 8 & 1) ||
              !memcmp(copy + slot * PAGE / 8, page_of(changer->used[slot]), PAGE));
    route_all(true);
    pthread_mutex_unlock(&routes);
}

static void *changer_main(void *argument)
{
    struct changer *changer = argument;

    for (; !stopped(); changer->changes++) {
        switch (below(&changer->random, 8)) {
        case 0: hold_still(changer, true); break;
        case 1: hold_still(changer, false); break;
        case 2: read_dirty(changer); break;
        default: lead_elsewhere(changer); break;
        }
        check_retired(changer->retired[below(&changer->random, SPARE)]);
    }
    for (unsigned i = 0; i < SPARE; i++)
        check_retired(changer->retired[i]);
    return NULL;
}

static void start(uint64_t seed, pid_t child)
{
    vio_process *process;
    char path[32];
    int pagemap;

    snprintf(path, sizeof path, "/proc/%d/pagemap", child);
    pagemap = open(path, O_RDONLY);
    HOLDS(pagemap >= 0 && !vio_engine_create(seed % 3 ? 64 : 4, &engine));
    HOLDS(!vio_patience(engine, 40000000) && !vio_process_hold((uint32_t)child, pagemap, &process));
    close(pagemap);
    HOLDS(!vio_space_create_host(engine, LENT, PT_amd_v1, &(vio_table){.tree = {.levels = 4}}));
    HOLDS(!vio_space_lend_process(engine, LENT, process));
    vio_process_release(process);
    HOLDS(!vio_dirty_set(engine, LENT, 1));
    HOLDS(!vio_space_map(engine, LENT, CHANGERS * SLOTS * PAGE, (uint64_t)(uintptr_t)late | VIO_FOREIGN, LATE * PAGE,
                         RW_BOTH));
    for (unsigned c = 0; c < CHANGERS; c++) {
        struct changer *changer = &changers[c];

        changer->random.state = seed * 100 + c;
        for (unsigned i = 0; i < SLOTS; i++) {
            changer->used[i] = c * (SLOTS + SPARE) + i;
            map(changer, i);
        }
        for (unsigned i = 0; i < SPARE; i++) {
            changer->retired[i] = c * (SLOTS + SPARE) + SLOTS + i;
            retire(changer->retired[i]);
        }
    }
    route_all(true);
}

int main(int argc, char **argv)
{
    uint64_t seed, milliseconds, moved = 0;
    pid_t child;

    if (argc != 3)
        return 2;
    seed = strtoull(argv[1], NULL, 0);
    milliseconds = strtoull(argv[2], NULL, 0);
    shared = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    late = mmap(NULL, LATE * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    HOLDS(shared != MAP_FAILED && late != MAP_FAILED);
    child = fork();
    if (!child)
        withhold(seed);
    job_budget = 2048;
    helper_haste = 20000;
    start(seed, child);
    for (unsigned i = 0; i < DEVICES; i++) {
        devices[i].random.state = seed * 100 + 50 + i;
        HOLDS(!pthread_create(&devices[i].thread, NULL, device_main, &devices[i]));
    }
    for (unsigned i = 0; i < CHANGERS; i++)
        HOLDS(!pthread_create(&changers[i].thread, NULL, changer_main, &changers[i]));
    nanosleep(&(struct timespec){(time_t)(milliseconds / 1000), (long)(milliseconds % 1000) * 1000000}, NULL);
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
    kill(child, SIGKILL);
    waitpid(child, NULL, 0);
    HOLDS(waitpid(-1, NULL, __WALL | WNOHANG) < 0); /* no helper is left */
    return 0;
}
