/* Several processes, several endpoints: none is taken for another. */
#define _GNU_SOURCE
#include "sva.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#define PROCESSES 8
#define ROUNDS 6
#define PAGES 32
#define SOURCE ((uint8_t *)0x100000000000)
#define TARGET ((uint8_t *)0x100010000000)

struct shared {
	_Atomic int ready, go;
	uint32_t pasids[PROCESSES];
	uint64_t groups;
};

static struct shared *shared_pages(void)
{
	struct shared *shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	if (shared == MAP_FAILED)
		give_up("shared memory");
	return shared;
}

/* The same addresses in each process, other content: all of a round's jobs are in flight at once. */
static int same_addresses(struct shared *shared, int index)
{
	struct engine engine = engine_open(0);
	uint8_t *source = map(SOURCE, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_FIXED_NOREPLACE);
	struct vdma_job jobs[PAGES / 4];
	struct vdma_result results[PAGES / 4];

	shared->pasids[index] = engine.pasid;
	shared->ready++;
	while (!shared->go)
		sleep_ms(1);
	for (int round = 0; round < ROUNDS; round++) {
		uint8_t *target = map(TARGET, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_FIXED_NOREPLACE);

		fill_random(source, PAGES * PAGE, random_seed() + (uint64_t)index);
		for (int i = 0; i < PAGES / 4; i++)
			jobs[i] = copy_job(target + i * 4 * PAGE, source + i * 4 * PAGE, 4 * PAGE);
		submit(&engine, jobs, PAGES / 4);
		take(&engine, results, PAGES / 4, PAGES / 4);
		for (int i = 0; i < PAGES / 4; i++)
			CHECK(results[i].status == VDMA_STATUS_SUCCESS, "process %d, round %d: status %u, fault at %#llx", index, round,
			      results[i].status, (unsigned long long)results[i].fault_address);
		TRY(same(target, source, PAGES * PAGE, "a process's copy"));
		munmap(target, PAGES * PAGE);
	}
	return PASS;
}

static int test_eight_processes(void)
{
	struct shared *shared = shared_pages();
	pid_t children[PROCESSES];
	int worst = PASS;

	for (int i = 0; i < PROCESSES; i++) {
		children[i] = fork();
		if (children[i] < 0)
			give_up("fork");
		if (children[i] == 0)
			exit(same_addresses(shared, i));
	}
	for (int waited = 0; shared->ready < PROCESSES && waited < 5000; waited++)
		sleep_ms(1);
	shared->go = 1;
	for (int i = 0; i < PROCESSES; i++) {
		int outcome = child_outcome(children[i]);

		worst = outcome != PASS ? outcome : worst;
	}
	TRY(worst);
	uint32_t least = shared->pasids[0], most = least;

	for (int i = 0; i < PROCESSES; i++) {
		for (int j = 0; j < i; j++)
			CHECK(shared->pasids[i] != shared->pasids[j], "two processes have PASID %u", shared->pasids[i]);
		least = shared->pasids[i] < least ? shared->pasids[i] : least;
		most = shared->pasids[i] > most ? shared->pasids[i] : most;
	}
	return passed("%d processes, %d rounds of %d untouched pages at %p, PASIDs %u to %u", PROCESSES, ROUNDS, PAGES, (void *)TARGET,
		      least, most);
}

/* One more than there are queues is told so, and gets one as soon as another gives its back. */
static int test_all_queues(void)
{
	struct engine engines[VDMA_QUEUES_MAX];
	struct vdma_bind bind = { 0 };
	int fd = engine_file(0), queues = (int)engine_info(fd).queues;

	for (int i = 0; i < queues; i++) {
		engines[i] = engine_open(0);
		CHECK(engines[i].pasid == engines[0].pasid, "one process has PASIDs %u and %u", engines[0].pasid, engines[i].pasid);
	}
	CHECK(ioctl(fd, VDMA_IOC_BIND, &bind) && errno == ENOSPC, "bind number %d: %s", queues + 1, strerror(errno));
	for (int i = 0; i < queues; i++) {
		uint8_t *source = random_pages(4 * PAGE), *target = fresh(4 * PAGE);

		TRY(copies(&engines[i], target, source, 4 * PAGE, "one of all queues"));
	}
	engine_unbind(&engines[queues / 2]);
	CHECK(!ioctl(fd, VDMA_IOC_BIND, &bind) && bind.queue == engines[queues / 2].queue, "the queue that was given back: %s",
	      strerror(errno));
	return passed("%d queues with one PASID, and none more", queues);
}

static int test_two_endpoints(void)
{
	int fd = shared_engine(1);

	if (fd < 0)
		return skipped("this machine has one DMA engine for processes");
	close(fd);
	struct engine one = engine_open(0), other = engine_open(1);
	uint8_t *source = random_pages(32 * PAGE), *middle = fresh(32 * PAGE), *target = fresh(32 * PAGE);

	CHECK(one.pasid == other.pasid, "PASIDs %u and %u", one.pasid, other.pasid);
	TRY(copies(&one, middle, source, 32 * PAGE, "the first endpoint"));
	TRY(copies(&other, target, middle, 32 * PAGE, "the second endpoint, from the first one's target"));
	TRY(same(target, source, 32 * PAGE, "through both"));
	/* both at work at once, on the same untouched pages */
	uint8_t *both = fresh(32 * PAGE);
	struct vdma_job job = copy_job(both, source, 32 * PAGE);
	struct vdma_result results[2];

	submit(&one, &job, 1);
	submit(&other, &job, 1);
	take(&one, &results[0], 1, 1);
	take(&other, &results[1], 1, 1);
	CHECK(results[0].status == VDMA_STATUS_SUCCESS && results[1].status == VDMA_STATUS_SUCCESS, "statuses %u and %u",
	      results[0].status, results[1].status);
	TRY(same(both, source, 32 * PAGE, "the same pages by both"));
	/* what goes is gone for both; what one unbinds stays bound to the other */
	munmap(target, PAGE);
	munmap(middle, PAGE);
	TRY(faults(&other, fill_job(target, 0, 8), target, VDMA_ACCESS_WRITE, "the second endpoint, unmapped"));
	TRY(faults(&one, fill_job(middle, 0, 8), middle, VDMA_ACCESS_WRITE, "the first endpoint, unmapped"));
	TRY(faults(&other, copy_job(both, middle, 8), middle, VDMA_ACCESS_READ, "the second endpoint, what the first one had"));
	engine_unbind(&one);
	TRY(copies(&other, both + PAGE, source, 8 * PAGE, "the second endpoint, the first one unbound"));
	return passed("one PASID, %u, on both; unmapped for both", one.pasid);
}

/* A file that a child has inherited is its parent's: the child cannot reach its parent's memory by it. */
static int test_inherited_file(void)
{
	struct engine engine = engine_open(0);
	uint8_t *memory = random_pages(PAGE), *before = fresh(PAGE);

	memcpy(before, memory, PAGE);
	pid_t child = fork();

	if (child < 0)
		give_up("fork");
	if (child == 0) {
		struct vdma_job job = fill_job(memory, 0, PAGE);
		struct vdma_submit request = { .jobs = (uintptr_t)&job, .count = 1 };

		exit(ioctl(engine.fd, VDMA_IOC_SUBMIT, &request) && errno == EPERM ? PASS : FAIL);
	}
	int outcome = child_outcome(child);

	CHECK(outcome == PASS, "the child was not refused");
	TRY(same(memory, before, PAGE, "the parent's memory"));
	TRY(succeeded(&engine, fill_job(memory, 0, PAGE), "the parent's job afterwards"));
	return passed("the child is refused (EPERM), the parent goes on");
}

/* Processes come and go, one after the other, with the same PASID and the same addresses: none sees another's page. */
static int test_pasid_reuse(void)
{
	struct shared *shared = shared_pages();
	unsigned int reused = 0;

	for (int i = 0; i < PROCESSES; i++) {
		pid_t child = fork();

		if (child < 0)
			give_up("fork");
		if (child == 0) {
			struct engine engine = engine_open(0);
			uint8_t *source = map(SOURCE, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_FIXED_NOREPLACE);
			uint8_t *target = map(TARGET, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_FIXED_NOREPLACE);

			shared->pasids[i] = engine.pasid;
			fill_random(source, 4 * PAGE, random_seed() + (uint64_t)i);
			int outcome = copies(&engine, target, source, 4 * PAGE, "a process's copy");

			_exit(outcome); /* with everything bound and mapped */
		}
		TRY(child_outcome(child));
	}
	for (int i = 1; i < PROCESSES; i++) {
		int before = 0;

		for (int j = 0; j < i; j++)
			before |= shared->pasids[j] == shared->pasids[i];
		reused += before != 0;
	}
	CHECK(reused, "no PASID came twice: %u, %u, %u...", shared->pasids[0], shared->pasids[1], shared->pasids[2]);
	return passed("%d processes in a row, %u with the PASID of one before", PROCESSES, reused);
}

static const struct sva_test tests[] = {
	{ "eight-processes", test_eight_processes },
	{ "all-queues", test_all_queues },
	{ "two-endpoints", test_two_endpoints },
	{ "inherited-file", test_inherited_file },
	{ "pasid-reuse", test_pasid_reuse },
};

const struct sva_group processes_group = GROUP("processes", tests);
