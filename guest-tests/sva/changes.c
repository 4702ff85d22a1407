/* Mappings that change beneath translations that the device has: what is gone for the process is gone for the device. */
#define _GNU_SOURCE
#include "sva.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* Writes and reads the range once, so that the device has both translations. */
static int known(const struct engine *engine, uint8_t *memory, size_t length)
{
	uint8_t *copy = fresh(length);

	TRY(succeeded(engine, copy_job(copy, memory, length), "read before the change"));
	TRY(succeeded(engine, copy_job(memory, copy, length), "write before the change"));
	munmap(copy, length);
	return PASS;
}

static int test_munmap(void)
{
	struct engine engine = engine_open(0);
	int file = memory_file(16 * PAGE);
	uint8_t *kept = map_file(file, 16 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED), *before = fresh(16 * PAGE);
	uint8_t *memory = map_file(file, 16 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED);

	fill_random(kept, 16 * PAGE, random_seed());
	memcpy(before, kept, 16 * PAGE);
	TRY(known(&engine, memory, 16 * PAGE));
	if (munmap(memory + 4 * PAGE, 8 * PAGE))
		give_up("munmap");
	TRY(faults(&engine, fill_job(memory + 4 * PAGE, 0, 8 * PAGE), memory + 4 * PAGE, VDMA_ACCESS_WRITE, "write to what is unmapped"));
	TRY(faults(&engine, copy_job(before, memory + 3 * PAGE, 4 * PAGE), memory + 4 * PAGE, VDMA_ACCESS_READ, "read of what is unmapped"));
	memcpy(before, kept, 16 * PAGE);
	TRY(same(kept, before, 16 * PAGE, "the memory that was mapped there"));
	/* another mapping takes the place */
	uint8_t *other = map(memory + 4 * PAGE, 8 * PAGE, PROT_READ | PROT_WRITE, MAP_FIXED_NOREPLACE), *source = random_pages(8 * PAGE);

	TRY(copies(&engine, other, source, 8 * PAGE, "into what is mapped there now"));
	TRY(same(kept, before, 16 * PAGE, "the memory that was mapped there, once another is"));
	return passed("8 of 16 pages unmapped, then another mapping in their place");
}

static int test_mprotect(void)
{
	struct engine engine = engine_open(0);
	uint8_t *memory = random_pages(8 * PAGE), *before = fresh(8 * PAGE);

	memcpy(before, memory, 8 * PAGE);
	TRY(known(&engine, memory, 8 * PAGE));
	if (mprotect(memory + 2 * PAGE, 4 * PAGE, PROT_READ))
		give_up("mprotect");
	TRY(faults(&engine, fill_job(memory + 2 * PAGE, 0, 4 * PAGE), memory + 2 * PAGE, VDMA_ACCESS_WRITE, "write to what is read only"));
	TRY(same(memory, before, 8 * PAGE, "what is read only"));
	uint8_t *copy = fresh(8 * PAGE);

	TRY(copies(&engine, copy, memory, 8 * PAGE, "read of what is read only"));
	if (mprotect(memory + 2 * PAGE, 4 * PAGE, PROT_NONE))
		give_up("mprotect");
	TRY(faults(&engine, copy_job(copy, memory, 8 * PAGE), memory + 2 * PAGE, VDMA_ACCESS_READ, "read of what may not be"));
	if (mprotect(memory + 2 * PAGE, 4 * PAGE, PROT_READ | PROT_WRITE))
		give_up("mprotect");
	uint8_t *source = random_pages(8 * PAGE);

	TRY(copies(&engine, memory, source, 8 * PAGE, "write to what is writable again"));
	return passed("read only, then nothing, then writable again");
}

static int test_remap(void)
{
	struct engine engine = engine_open(0);
	uint8_t *memory = random_pages(8 * PAGE), *wanted = fresh(8 * PAGE), *place = fresh(8 * PAGE), *copy = fresh(8 * PAGE);

	memcpy(wanted, memory, 8 * PAGE);
	TRY(known(&engine, memory, 8 * PAGE));
	TRY(known(&engine, place, 8 * PAGE));
	if (mremap(memory, 8 * PAGE, 8 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, place) != place)
		give_up("mremap");
	TRY(faults(&engine, fill_job(memory, 0, PAGE), memory, VDMA_ACCESS_WRITE, "where it was"));
	TRY(succeeded(&engine, copy_job(copy, place, 8 * PAGE), "where it is"));
	TRY(same(copy, wanted, 8 * PAGE, "where it is"));
	/* a mapping laid over it, without an unmap before */
	uint8_t *over = map(place, 8 * PAGE, PROT_READ | PROT_WRITE, MAP_FIXED);

	memset(wanted, 0, 8 * PAGE);
	TRY(succeeded(&engine, copy_job(copy, over, 8 * PAGE), "a new mapping over it"));
	TRY(same(copy, wanted, 8 * PAGE, "a new mapping over it"));
	return passed("8 pages moved over others, then replaced");
}

static int test_dontneed(void)
{
	struct engine engine = engine_open(0);
	uint8_t *memory = random_pages(16 * PAGE), *copy = random_pages(16 * PAGE), *zeroes = fresh(16 * PAGE);

	TRY(known(&engine, memory, 16 * PAGE));
	if (madvise(memory, 16 * PAGE, MADV_DONTNEED))
		give_up("madvise");
	TRY(succeeded(&engine, copy_job(copy, memory, 16 * PAGE), "read after MADV_DONTNEED"));
	TRY(same(copy, zeroes, 16 * PAGE, "pages that were given up"));
	return passed("16 pages given up are zero for the device too");
}

/* fork() makes what is private read only beneath the device: its next write must copy the page, or the child would see it. */
static int test_fork(void)
{
	struct engine engine = engine_open(0);
	uint8_t *memory = random_pages(16 * PAGE), *at_fork = fresh(16 * PAGE), *source = random_pages(16 * PAGE), *copy = fresh(16 * PAGE);
	int told[2], saw[2];
	char byte;

	if (pipe(told) || pipe(saw))
		give_up("pipe");
	TRY(known(&engine, memory, 16 * PAGE));
	memcpy(at_fork, memory, 16 * PAGE);
	pid_t child = fork();

	if (child < 0)
		give_up("fork");
	if (child == 0) {
		if (read(told[0], &byte, 1) != 1)
			exit(ERROR);
		int outcome = same(memory, at_fork, 16 * PAGE, "the child's memory after the parent's device wrote");

		memset(memory, 0xcc, 16 * PAGE);
		if (write(saw[1], "", 1) != 1)
			exit(ERROR);
		exit(outcome);
	}
	TRY(copies(&engine, memory, source, 16 * PAGE, "write after fork"));
	if (write(told[1], "", 1) != 1 || read(saw[0], &byte, 1) != 1)
		give_up("pipe");
	TRY(succeeded(&engine, copy_job(copy, memory, 16 * PAGE), "read after the child wrote"));
	TRY(same(copy, source, 16 * PAGE, "the parent's memory after the child wrote"));
	TRY(child_outcome(child));
	return passed("16 pages: device and child each write their own copy");
}

/* Forks while jobs run: whatever the moment, no byte is lost and no child sees one. */
static int test_forks_in_flight(void)
{
	struct engine engine = engine_open(0);
	uint8_t *source = random_pages(64 * PAGE), *target = random_pages(64 * PAGE);
	struct vdma_job jobs[16];
	struct vdma_result results[16];

	for (unsigned int round = 0; round < 12; round++) {
		fill_random(source, 64 * PAGE, random_seed());
		for (unsigned int i = 0; i < 16; i++)
			jobs[i] = copy_job(target + i * 4 * PAGE, source + i * 4 * PAGE, 4 * PAGE);
		submit(&engine, jobs, 16);
		pid_t child = fork();

		if (child < 0)
			give_up("fork");
		if (child == 0) {
			memset(target, (int)round, 64 * PAGE);
			memset(source, (int)round, 64 * PAGE);
			_exit(PASS);
		}
		take(&engine, results, 16, 16);
		for (unsigned int i = 0; i < 16; i++)
			CHECK(results[i].status == VDMA_STATUS_SUCCESS, "round %u, job %u: status %u", round, i, results[i].status);
		TRY(child_outcome(child));
		TRY(same(target, source, 64 * PAGE, "after a fork in the middle"));
	}
	return passed("12 rounds of 16 jobs with a fork in the middle");
}

/* MADV_FREE clears the accessed and the dirty bits and leaves pages writable: only the bit that the device's write sets
 * keeps the kernel from dropping the page. */
static int test_free_pageout(void)
{
	struct engine engine = engine_open(0);
	uint8_t *memory = random_pages(16 * PAGE), *source = random_pages(16 * PAGE);
	unsigned int lost = 0;

	TRY(known(&engine, memory, 16 * PAGE));
	if (madvise(memory, 16 * PAGE, MADV_FREE))
		give_up("MADV_FREE");
	TRY(succeeded(&engine, copy_job(memory, source, 16 * PAGE), "write after MADV_FREE"));
	if (madvise(memory, 16 * PAGE, MADV_PAGEOUT))
		give_up("MADV_PAGEOUT");
	for (int i = 0; i < 16; i++)
		lost += memcmp(memory + i * PAGE, source + i * PAGE, PAGE) != 0;
	CHECK(!lost, "%u of 16 pages lost what the device wrote", lost);
	/* and without a write the kernel may drop them: what then is read is old or zero */
	if (madvise(memory, 16 * PAGE, MADV_FREE) || madvise(memory, 16 * PAGE, MADV_PAGEOUT))
		give_up("madvise");
	unsigned int dropped = 0;

	for (int i = 0; i < 16; i++)
		dropped += !(page_entry(memory + i * PAGE) & PAGE_PRESENT);
	TRY(succeeded(&engine, copy_job(source, memory, 16 * PAGE), "read of dropped pages"));
	TRY(same(source, memory, 16 * PAGE, "dropped pages"));
	return passed("16 pages kept what the device wrote; of those it did not write the kernel dropped %u", dropped);
}

/* A job at work on a range that goes in the middle of it: it ends, and never reaches what takes the place. */
static int test_munmap_in_flight(void)
{
	struct engine engine = engine_open(0);
	const size_t length = 512 * PAGE;
	unsigned int cut = 0;

	for (unsigned int round = 0; round < 6; round++) {
		uint8_t *target = fresh(length), *source = random_pages(length);
		struct vdma_job job = copy_job(target, source, length);
		struct vdma_result result;

		submit(&engine, &job, 1);
		sleep_ms(round * 4);
		if (munmap(target + length / 2, length / 2))
			give_up("munmap");
		uint8_t *over = map(target + length / 2, length / 2, PROT_READ, MAP_FIXED_NOREPLACE);

		take(&engine, &result, 1, 1);
		if (result.status == VDMA_STATUS_FAULT) {
			cut++;
			CHECK(result.fault_address >= (uintptr_t)over && result.fault_address < (uintptr_t)over + length / 2,
			      "fault at %#llx, outside of what was unmapped", (unsigned long long)result.fault_address);
		} else {
			CHECK(result.status == VDMA_STATUS_SUCCESS, "status %u", result.status);
		}
		for (size_t i = 0; i < length / 2; i++)
			CHECK(!over[i], "byte %zu of the mapping that took the place is 0x%02x", i, over[i]);
		munmap(target, length);
		munmap(source, length);
	}
	return passed("%u of 6 jobs met the change in the middle", cut);
}

static const struct sva_test tests[] = {
	{ "munmap", test_munmap },
	{ "mprotect", test_mprotect },
	{ "remap", test_remap },
	{ "dontneed", test_dontneed },
	{ "fork", test_fork },
	{ "forks-in-flight", test_forks_in_flight },
	{ "free-pageout", test_free_pageout },
	{ "munmap-in-flight", test_munmap_in_flight },
};

const struct sva_group changes_group = GROUP("changes", tests);
