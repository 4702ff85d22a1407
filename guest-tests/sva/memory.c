/* Jobs on every kind of memory that a process may have. */
#define _GNU_SOURCE
#include "sva.h"

#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define MIB ((size_t)1 << 20)
#define HUGE ((size_t)2 << 20)
#define HIGH ((void *)(1ull << 52)) /* beyond what four levels of page table reach */

static int test_resident(void)
{
	struct engine engine = engine_open(0);
	uint8_t *source = random_pages(MIB + 2 * PAGE), *target = random_pages(MIB + 2 * PAGE), *wanted = fresh(MIB + 2 * PAGE);

	memcpy(wanted, target, MIB + 2 * PAGE);
	memcpy(wanted + 1234, source + 77, MIB);
	TRY(succeeded(&engine, copy_job(target + 1234, source + 77, MIB), "copy"));
	TRY(same(target, wanted, MIB + 2 * PAGE, "the target and what lies beside"));
	return passed("1 MiB between odd addresses, PASID %u", engine.pasid);
}

/* Whether the engine asked the kernel for pages between two looks. */
static int asked(const struct vdma_info *before, const struct vdma_info *after, unsigned int least, const char *what)
{
	CHECK(after->page_requests - before->page_requests >= least, "%s: %llu page requests, at least %u were due", what,
	      (unsigned long long)(after->page_requests - before->page_requests), least);
	return PASS;
}

static int test_untouched_target(void)
{
	struct engine engine = engine_open(0);
	uint8_t *source = random_pages(64 * PAGE), *target = fresh(64 * PAGE);
	struct vdma_info before = engine_info(engine.fd);

	TRY(copies(&engine, target, source, 64 * PAGE, "copy"));
	struct vdma_info after = engine_info(engine.fd);

	TRY(asked(&before, &after, 64, "64 untouched pages"));
	return passed("64 pages in %llu groups", (unsigned long long)(after.page_groups - before.page_groups));
}

static int test_untouched_source(void)
{
	struct engine engine = engine_open(0);
	int file = memory_file(64 * PAGE);
	uint8_t *zeroes = fresh(16 * PAGE), *target = random_pages(64 * PAGE);
	uint8_t *wanted = map_file(file, 64 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED);
	uint8_t *source = map_file(file, 64 * PAGE, PROT_READ, MAP_PRIVATE);

	fill_random(wanted, 64 * PAGE, random_seed());
	TRY(copies(&engine, target, source, 64 * PAGE, "from a file never looked at"));
	memset(wanted, 0, 16 * PAGE);
	TRY(copies(&engine, target, zeroes, 16 * PAGE, "from anonymous pages never touched"));
	TRY(same(target, wanted, 16 * PAGE, "anonymous pages never touched"));
	return passed("64 pages of a file, 16 of nothing");
}

static int test_untouched_both(void)
{
	struct engine engine = engine_open(0);
	int file = memory_file(256 * PAGE);
	uint8_t *content = map_file(file, 256 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED);
	uint8_t *source = map_file(file, 256 * PAGE, PROT_READ, MAP_SHARED), *target = fresh(257 * PAGE);

	fill_random(content, 256 * PAGE, random_seed());
	TRY(succeeded(&engine, copy_job(target + 100, source, 256 * PAGE), "copy"));
	TRY(same(target + 100, content, 256 * PAGE, "copy"));
	return passed("1 MiB, at offset 100 within the target's pages");
}

static int test_operations(void)
{
	struct engine engine = engine_open(0);
	uint8_t *memory = random_pages(4 * PAGE), *other = fresh(4 * PAGE);
	uint64_t *words = (uint64_t *)memory;
	struct vdma_result result;

	TRY(succeeded(&engine, fill_job(other, 0x8877665544332211, 3 * PAGE + 5), "fill"));
	for (size_t i = 0; i < 3 * PAGE + 5; i++)
		CHECK(other[i] == (i % 8 + 1) * 0x11, "fill: byte %zu is 0x%02x", i, other[i]);
	CHECK(other[3 * PAGE + 5] == 0, "fill went beyond its length");
	memcpy(other, memory, 4 * PAGE);
	other[3 * PAGE + 9] ^= 4;
	struct vdma_job compare = { .opcode = VDMA_OP_COMPARE, .target = (uintptr_t)memory, .source = (uintptr_t)other, .length = 4 * PAGE };

	result = run(&engine, compare);
	CHECK(result.status == VDMA_STATUS_DIFFERENT && result.done == 3 * PAGE + 9, "compare: status %u at byte %llu", result.status,
	      (unsigned long long)result.done);
	memcpy(memory, "123456789", 9);
	result = run(&engine, (struct vdma_job){ .opcode = VDMA_OP_CRC32, .source = (uintptr_t)memory, .length = 9 });
	CHECK(result.status == VDMA_STATUS_SUCCESS && result.result == 0xcbf43926, "crc32: status %u, %#llx", result.status,
	      (unsigned long long)result.result); /* the check value of CRC-32/ISO-HDLC */
	words[2] = 40;
	result = run(&engine, (struct vdma_job){
				      .opcode = VDMA_OP_FETCH_ADD, .target = (uintptr_t)&words[2], .value = 2, .length = 8 });
	CHECK(result.result == 40 && words[2] == 42, "fetch-add: %llu before, %llu after", (unsigned long long)result.result,
	      (unsigned long long)words[2]);
	uint64_t *untouched = (uint64_t *)fresh(PAGE);

	result = run(&engine, (struct vdma_job){ .opcode = VDMA_OP_SWAP, .target = (uintptr_t)untouched, .value = 9, .length = 8 });
	CHECK(result.status == VDMA_STATUS_SUCCESS && result.result == 0 && *untouched == 9, "swap in an untouched page: status %u",
	      result.status);
	return passed("fill, compare, crc32, fetch-add, swap in an untouched page");
}

#define ADDS 2000

struct adder {
	_Atomic uint64_t *word;
	_Atomic int stop;
	uint64_t added;
};

static void *add_all_the_time(void *argument)
{
	struct adder *adder = argument;

	while (!adder->stop) {
		++*adder->word;
		adder->added++;
	}
	return NULL;
}

/* The device's additions and a CPU's, to one word at once: none is lost. */
static int test_atomic_beside_cpu(void)
{
	struct engine engine = engine_open(0);
	struct adder adder = { .word = (_Atomic uint64_t *)random_pages(PAGE) };
	struct vdma_job jobs[50];
	struct vdma_result results[50];
	pthread_t thread;

	*adder.word = 0;
	for (int i = 0; i < 50; i++)
		jobs[i] = (struct vdma_job){ .opcode = VDMA_OP_FETCH_ADD, .target = (uintptr_t)adder.word, .value = 1, .length = 8 };
	if (pthread_create(&thread, NULL, add_all_the_time, &adder))
		give_up("a thread");
	for (int round = 0; round < ADDS / 50; round++) {
		submit(&engine, jobs, 50);
		take(&engine, results, 50, 50);
		for (int i = 0; i < 50; i++)
			CHECK(results[i].status == VDMA_STATUS_SUCCESS, "status %u", results[i].status);
	}
	adder.stop = 1;
	pthread_join(thread, NULL);
	CHECK(*adder.word == adder.added + ADDS, "%llu, not %llu by the CPU and %d by the device", (unsigned long long)*adder.word,
	      (unsigned long long)adder.added, ADDS);
	return passed("%d additions beside %llu of the CPU", ADDS, (unsigned long long)adder.added);
}

/* Jobs that wait for pages among jobs that need none: each with its own result. */
static int test_many_in_flight(void)
{
	struct engine engine = engine_open(0);
	uint8_t *source = random_pages(96 * PAGE), *resident = random_pages(48 * PAGE), *untouched = fresh(48 * PAGE);
	struct vdma_job jobs[96];
	struct vdma_result results[96];
	uint8_t seen[96] = { 0 };

	for (unsigned int i = 0; i < 96; i++) {
		uint8_t *target = (i % 2 ? untouched : resident) + i / 2 * PAGE;

		jobs[i] = copy_job(target, source + i * PAGE, PAGE);
		jobs[i].cookie = i;
	}
	submit(&engine, jobs, 96);
	take(&engine, results, 96, 96);
	for (unsigned int i = 0; i < 96; i++) {
		CHECK(results[i].cookie < 96 && !seen[results[i].cookie]++, "the result of job %u came twice", results[i].cookie);
		CHECK(results[i].status == VDMA_STATUS_SUCCESS, "job %u: status %u", results[i].cookie, results[i].status);
	}
	for (unsigned int i = 0; i < 96; i++)
		TRY(same((i % 2 ? untouched : resident) + i / 2 * PAGE, source + i * PAGE, PAGE, "a job"));
	return passed("96 jobs, every other one into an untouched page");
}

/* A fence waits for jobs that wait for pages: each reads what the one before it has written. */
static int test_fence(void)
{
	struct engine engine = engine_open(0);
	uint8_t *memory = fresh(33 * PAGE);
	struct vdma_job jobs[32];
	struct vdma_result results[32];

	fill_random(memory, PAGE, random_seed());
	for (unsigned int i = 0; i < 32; i++) {
		jobs[i] = copy_job(memory + (i + 1) * PAGE, memory + i * PAGE, PAGE);
		jobs[i].flags = VDMA_FLAG_FENCE;
	}
	submit(&engine, jobs, 32);
	take(&engine, results, 32, 32);
	for (unsigned int i = 0; i < 32; i++)
		CHECK(results[i].status == VDMA_STATUS_SUCCESS, "job %u: status %u", results[i].cookie, results[i].status);
	TRY(same(memory + 32 * PAGE, memory, PAGE, "the last of 32 pages"));
	return passed("32 copies in a row, each from the target of the one before");
}

static int test_shared_memory(void)
{
	struct engine engine = engine_open(0);
	int file = memory_file(32 * PAGE), told[2];
	uint8_t *source = random_pages(32 * PAGE);
	uint8_t *one = map_file(file, 32 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED);
	uint8_t *other = map_file(file, 32 * PAGE, PROT_READ, MAP_SHARED);
	char byte;

	if (pipe(told))
		give_up("pipe");
	pid_t child = fork();

	if (child == 0) { /* its own mapping of the same memory */
		uint8_t *mine = map_file(file, 32 * PAGE, PROT_READ, MAP_SHARED);

		if (read(told[0], &byte, 1) != 1)
			exit(ERROR);
		exit(same(mine, source, 32 * PAGE, "another process's view"));
	}
	TRY(copies(&engine, one, source, 32 * PAGE, "copy"));
	TRY(same(other, source, 32 * PAGE, "another mapping"));
	if (write(told[1], "", 1) != 1)
		give_up("pipe");
	TRY(child_outcome(child));
	return passed("32 pages, seen by another mapping and by another process");
}

/* A file on a disk that no one has read: the fault waits for another endpoint's DMA. */
static int test_disk(void)
{
	int disk = open("/dev/nvme0n1", O_RDWR | O_CLOEXEC), direct = open("/dev/nvme0n1", O_RDWR | O_DIRECT | O_CLOEXEC);
	const size_t length = 64 * PAGE;
	const uint64_t offset = 16 * MIB;

	if (disk < 0 || direct < 0)
		return skipped("no /dev/nvme0n1 in this machine");
	struct engine engine = engine_open(0);
	uint8_t *wanted = random_pages(length), *target = fresh(length);

	write_all(direct, wanted, length, offset);
	posix_fadvise(disk, (off_t)offset, (off_t)length, POSIX_FADV_DONTNEED);
	uint8_t *mapped = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED, disk, (off_t)offset);

	if (mapped == MAP_FAILED)
		give_up("map the disk");
	TRY(copies(&engine, target, mapped, length, "from the disk"));
	/* what the device writes must reach the disk: its write has made the page dirty */
	fill_random(wanted, length, random_seed());
	TRY(succeeded(&engine, copy_job(mapped, wanted, length), "to the disk"));
	if (msync(mapped, length, MS_SYNC) || fsync(disk))
		give_up("msync");
	read_all(direct, target, length, offset);
	TRY(same(target, wanted, length, "what the disk has after msync"));
	return passed("64 pages read through a mapping, written through it, found on the disk");
}

static int test_five_levels(void)
{
	uint8_t *source = map(HIGH, 64 * PAGE, PROT_READ | PROT_WRITE, 0);

	if ((uintptr_t)source >> 47 == 0)
		return skipped("this guest's kernel has four levels of page table: give its CPU la57");
	struct engine engine = engine_open(0);
	uint8_t *target = map((void *)(3ull << 52), 64 * PAGE, PROT_READ | PROT_WRITE, 0), *low = fresh(64 * PAGE);

	fill_random(source, 64 * PAGE, random_seed());
	TRY(copies(&engine, target, source, 64 * PAGE, "from high to high"));
	TRY(copies(&engine, low, target, 64 * PAGE, "from high to low"));
	TRY(same(low, source, 64 * PAGE, "through both"));
	if (munmap(target, 64 * PAGE))
		give_up("munmap");
	TRY(faults(&engine, copy_job(target, source, PAGE), target, VDMA_ACCESS_WRITE, "unmapped"));
	return passed("64 pages at %p and %p", (void *)source, (void *)target);
}

static uint8_t *huge_pages(size_t length)
{
	uint8_t *memory = fresh(length + HUGE);

	put_setting("/sys/kernel/mm/transparent_hugepage/enabled", "madvise");
	put_setting("/proc/sys/vm/compact_memory", "1");
	memory = (uint8_t *)(((uintptr_t)memory + HUGE - 1) & ~(HUGE - 1));
	madvise(memory, length, MADV_HUGEPAGE);
	return memory;
}

/* KiB of huge pages in this process's mapping of `memory`. */
static unsigned int huge_kib(const void *memory)
{
	FILE *file = fopen("/proc/self/smaps", "re");
	char line[256];
	uintptr_t begin, end;
	unsigned int kib;
	int here = 0;

	if (!file)
		give_up("/proc/self/smaps");
	while (fgets(line, sizeof(line), file)) {
		if (sscanf(line, "%lx-%lx ", &begin, &end) == 2)
			here = begin <= (uintptr_t)memory && (uintptr_t)memory < end;
		else if (here && sscanf(line, "AnonHugePages: %u kB", &kib) == 1) {
			fclose(file);
			return kib;
		}
	}
	fclose(file);
	return 0;
}

/* Faulted in by the device as one huge page, then split beneath its cached translation in each way there is. */
static int test_huge_pages(void)
{
	struct engine engine = engine_open(0);
	uint8_t *source = random_pages(2 * HUGE), *target = huge_pages(2 * HUGE), *wanted = fresh(2 * HUGE);

	TRY(copies(&engine, target, source, 2 * HUGE, "into huge pages"));
	unsigned int kib = huge_kib(target);

	if (!kib)
		return skipped("the kernel gave no huge page");
	memcpy(wanted, source, 2 * HUGE);
	/* one page of the first one may be read only: splits the mapping, not the memory */
	if (mprotect(target + 5 * PAGE, PAGE, PROT_READ))
		give_up("mprotect");
	TRY(faults(&engine, fill_job(target + 4 * PAGE, 1, 3 * PAGE), target + 5 * PAGE, VDMA_ACCESS_WRITE, "a page that is read only"));
	memcpy(wanted + 4 * PAGE, target + 4 * PAGE, PAGE);
	for (size_t i = 0; i < PAGE; i++)
		CHECK(target[4 * PAGE + i] == (i % 8 ? 0 : 1), "byte %zu before the page that is read only", i);
	/* one page given up: splits the memory too */
	if (madvise(target + HUGE + 9 * PAGE, PAGE, MADV_DONTNEED))
		give_up("madvise");
	memset(wanted + HUGE + 9 * PAGE, 0, PAGE);
	uint8_t *copy = fresh(2 * HUGE);

	TRY(succeeded(&engine, copy_job(copy, target, 2 * HUGE), "out of split huge pages"));
	TRY(same(copy, wanted, 2 * HUGE, "out of split huge pages"));
	/* one page unmapped */
	if (munmap(target + HUGE + 20 * PAGE, PAGE))
		give_up("munmap");
	TRY(faults(&engine, copy_job(copy, target + HUGE + 19 * PAGE, 2 * PAGE), target + HUGE + 20 * PAGE, VDMA_ACCESS_READ, "a hole"));
	TRY(succeeded(&engine, fill_job(target + HUGE + 21 * PAGE, 0, PAGE), "behind the hole"));
	return passed("%u KiB of huge pages; mprotect, MADV_DONTNEED and munmap of single pages", kib);
}

static int test_hugetlb(void)
{
	put_setting("/proc/sys/vm/compact_memory", "1");
	put_setting("/proc/sys/vm/nr_hugepages", "2");
	uint8_t *target = mmap(NULL, 2 * HUGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB, -1, 0);

	if (target == MAP_FAILED)
		return skipped("the kernel has no two huge pages to give");
	struct engine engine = engine_open(0);
	uint8_t *source = random_pages(2 * HUGE);

	TRY(copies(&engine, target + 100, source, 2 * HUGE - 100, "into huge pages"));
	munmap(target, 2 * HUGE);
	TRY(faults(&engine, fill_job(target + HUGE, 0, 8), target + HUGE, VDMA_ACCESS_WRITE, "unmapped"));
	put_setting("/proc/sys/vm/nr_hugepages", "0");
	return passed("two pages of 2 MiB");
}

static void *run_in_thread(void *argument)
{
	struct engine *engine = argument;
	uint8_t *source = random_pages(16 * PAGE), *target = fresh(16 * PAGE);

	return (void *)(intptr_t)copies(engine, target, source, 16 * PAGE, "a thread's copy");
}

/* All threads of a process share its queue, each with memory of its own. Results go to whoever waits: so one at a time. */
static int test_threads(void)
{
	struct engine engine = engine_open(0);
	void *outcome;

	for (int i = 0; i < 4; i++) {
		pthread_t thread;

		if (pthread_create(&thread, NULL, run_in_thread, &engine))
			give_up("a thread");
		pthread_join(thread, &outcome);
		TRY((int)(intptr_t)outcome);
	}
	return passed("four threads on a queue that the first one bound");
}

static const struct sva_test tests[] = {
	{ "resident", test_resident },
	{ "untouched-target", test_untouched_target },
	{ "untouched-source", test_untouched_source },
	{ "untouched-both", test_untouched_both },
	{ "operations", test_operations },
	{ "atomic-beside-cpu", test_atomic_beside_cpu },
	{ "many-in-flight", test_many_in_flight },
	{ "fence", test_fence },
	{ "shared-memory", test_shared_memory },
	{ "disk", test_disk },
	{ "five-levels", test_five_levels },
	{ "huge-pages", test_huge_pages },
	{ "hugetlb", test_hugetlb },
	{ "threads", test_threads },
};

const struct sva_group memory_group = GROUP("memory", tests);
