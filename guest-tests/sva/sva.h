/* Tests of the DMA engine in a process's own addresses: one function a test, listed in the table of its group. */
#ifndef SVA_H
#define SVA_H

#include <stdint.h>
#include <stdio.h>

#include "guest.h"
#include "vioasid_dma.h"
#include "vioasid_dma_regs.h"

#define PAGE ((size_t)4096)
#define WAIT_MS 20000 /* for a job; a thousand times what one takes */

/* A test returns an outcome and has printed one line that says what was seen. It runs in a process of its own. */
struct sva_test {
	const char *name;
	int (*run)(void);
};

struct sva_group {
	const char *name;
	const struct sva_test *tests;
	size_t count;
};

extern const struct sva_group kernel_group, memory_group, changes_group, errors_group, processes_group, lifetime_group,
	pressure_group, pager_group, ring_group, requests_group, timings_group;

#define GROUP(name, tests) { name, tests, sizeof(tests) / sizeof((tests)[0]) }

/* Ends the test as failed, with a line, unless `condition` holds. */
#define CHECK(condition, ...) \
	do { \
		if (!(condition)) { \
			printf(__VA_ARGS__); \
			printf("\n"); \
			return FAIL; \
		} \
	} while (0)

/* Returns from the test whatever is not PASS. */
#define TRY(expression) \
	do { \
		int try_outcome = (expression); \
		if (try_outcome != PASS) \
			return try_outcome; \
	} while (0)

__attribute__((format(printf, 1, 2))) int passed(const char *format, ...);
__attribute__((format(printf, 1, 2))) int skipped(const char *format, ...);

/* -- the engine (engine.c). What cannot be done ends the test with ERROR, unless it says otherwise. */

struct engine {
	int fd;
	uint32_t pasid, queue;
};

int engine_file(int number); /* /dev/vioasid-dmaNUMBER, not bound; -1 where there is none */
int shared_engine(int number); /* the same; -1 also where it knows no PASIDs */
struct engine engine_open(int number); /* bound */
void engine_bind(struct engine *engine);
void engine_unbind(struct engine *engine);
struct vdma_info engine_info(int fd);

struct vdma_job copy_job(void *target, const void *source, size_t length);
struct vdma_job fill_job(void *target, uint64_t value, size_t length);

void submit(const struct engine *engine, const struct vdma_job *jobs, unsigned int count);
/* Results, at least `least` of them unless fewer jobs are outstanding; exits with FAIL when they do not come in WAIT_MS. */
unsigned int take(const struct engine *engine, struct vdma_result *results, unsigned int least, unsigned int count);
struct vdma_result run(const struct engine *engine, struct vdma_job job);

/* PASS, or FAIL with a line. */
int succeeded(const struct engine *engine, struct vdma_job job, const char *what);
int copies(const struct engine *engine, void *target, const void *source, size_t length, const char *what);
int faults(const struct engine *engine, struct vdma_job job, const void *address, int access, const char *what);
int same(const void *got, const void *wanted, size_t length, const char *what);

/* -- memory (engine.c) */

void *map(void *hint, size_t length, int protection, int flags); /* private and anonymous besides; MAP_FAILED: exits */
uint8_t *fresh(size_t length); /* untouched, readable and writable */
uint8_t *random_pages(size_t length); /* touched, of random content */
int memory_file(size_t length); /* a memfd */
void *map_file(int fd, size_t length, int protection, int flags);
uint64_t page_entry(const void *address); /* of /proc/self/pagemap */
#define PAGE_PRESENT (1ull << 63)
#define PAGE_SWAPPED (1ull << 62)
void put_setting(const char *path, const char *text); /* errors are left to who looks for the effect */
double now_ms(void);
void sleep_ms(unsigned int ms);

/* -- processes (engine.c) */

int child_outcome(int pid); /* how it ended: its exit code, ERROR with a line where a signal ended it */

#endif
