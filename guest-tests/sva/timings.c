/* How long things take in this guest. Figures, not limits: none of these fails for being slow. */
#define _GNU_SOURCE
#include "sva.h"

#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#define MIB ((size_t)1 << 20)
#define FAULTS 101
#define ROUNDS 15

static int by_size(const void *left, const void *right)
{
	double a = *(const double *)left, b = *(const double *)right;

	return (a > b) - (a < b);
}

static double median(double *values, size_t count)
{
	qsort(values, count, sizeof(*values), by_size);
	return values[count / 2];
}

static int test_bind(void)
{
	struct engine engine = { .fd = engine_file(0) };
	double bind[ROUNDS], unbind[ROUNDS];

	for (int i = 0; i < ROUNDS; i++) {
		double begin = now_ms();

		engine_bind(&engine);
		double middle = now_ms();

		engine_unbind(&engine);
		bind[i] = middle - begin;
		unbind[i] = now_ms() - middle;
	}
	return passed("bind %.2f ms, unbind %.2f ms (median of %d)", median(bind, ROUNDS), median(unbind, ROUNDS), ROUNDS);
}

static int test_empty_job(void)
{
	struct engine engine = engine_open(0);
	double took[FAULTS];

	for (int i = 0; i < FAULTS; i++) {
		double begin = now_ms();

		TRY(succeeded(&engine, (struct vdma_job){ .opcode = VDMA_OP_NOP }, "nothing"));
		took[i] = now_ms() - begin;
	}
	double middle = median(took, FAULTS);

	return passed("a job that does nothing: %.2f ms (median of %d), %.2f at best", middle, FAULTS, took[0]);
}

/* The time of a job with one fault less that of the same job without. */
static int test_fault(void)
{
	struct engine engine = engine_open(0);
	uint8_t *memory = fresh(FAULTS * PAGE);
	double missing[FAULTS], there[FAULTS];

	for (int i = 0; i < FAULTS; i++) {
		double begin = now_ms();

		TRY(succeeded(&engine, fill_job(memory + (size_t)i * PAGE, 1, 8), "an untouched page"));
		double middle = now_ms();

		TRY(succeeded(&engine, fill_job(memory + (size_t)i * PAGE, 2, 8), "the page again"));
		missing[i] = middle - begin;
		there[i] = now_ms() - middle;
	}
	double with = median(missing, FAULTS), without = median(there, FAULTS);

	return passed("fault round trip %.2f ms: a job with one %.2f, without %.2f (median of %d), %.2f at best", with - without, with,
		      without, FAULTS, missing[0]);
}

static int test_untouched_mebibyte(void)
{
	struct engine engine = engine_open(0);
	double took[ROUNDS];
	struct vdma_info before = engine_info(engine.fd);

	for (int i = 0; i < ROUNDS; i++) {
		uint8_t *memory = fresh(MIB);

		madvise(memory, MIB, MADV_NOHUGEPAGE);
		double begin = now_ms();

		TRY(succeeded(&engine, fill_job(memory, 1, MIB), "1 MiB untouched"));
		took[i] = now_ms() - begin;
		munmap(memory, MIB);
	}
	struct vdma_info after = engine_info(engine.fd);
	double middle = median(took, ROUNDS);

	return passed("1 MiB untouched, 256 pages in %.1f groups: %.1f ms (median of %d), %.1f at best",
		      (double)(after.page_groups - before.page_groups) / ROUNDS, middle, ROUNDS, took[0]);
}

static int test_resident_mebibyte(void)
{
	struct engine engine = engine_open(0);
	uint8_t *source = random_pages(MIB), *target = random_pages(MIB);
	double took[FAULTS];

	for (int i = 0; i < FAULTS; i++) {
		double begin = now_ms();

		TRY(succeeded(&engine, copy_job(target, source, MIB), "1 MiB resident"));
		took[i] = now_ms() - begin;
	}
	TRY(same(target, source, MIB, "1 MiB resident"));
	double middle = median(took, FAULTS);

	return passed("1 MiB resident: %.2f ms (median of %d), %.2f at best", middle, FAULTS, took[0]);
}

/* Resident for the process, unknown to the device: translations alone. */
static int test_cold_mebibyte(void)
{
	struct engine engine = engine_open(0);
	double took[ROUNDS];

	for (int i = 0; i < ROUNDS; i++) {
		uint8_t *source = random_pages(MIB), *target = random_pages(MIB);
		double begin = now_ms();

		TRY(succeeded(&engine, copy_job(target, source, MIB), "1 MiB that the device does not know"));
		took[i] = now_ms() - begin;
		munmap(source, MIB);
		munmap(target, MIB);
	}
	double middle = median(took, ROUNDS);

	return passed("1 MiB resident, not yet in the device TLB: %.2f ms (median of %d), %.2f at best", middle, ROUNDS, took[0]);
}

static const struct sva_test tests[] = {
	{ "bind", test_bind },
	{ "empty-job", test_empty_job },
	{ "fault", test_fault },
	{ "untouched-1-mib", test_untouched_mebibyte },
	{ "resident-1-mib", test_resident_mebibyte },
	{ "cold-1-mib", test_cold_mebibyte },
};

const struct sva_group timings_group = GROUP("timings", tests);
