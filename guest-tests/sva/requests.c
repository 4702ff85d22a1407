/* The page request interface of the function itself, set as an administrator could: few requests, many, none. */
#define _GNU_SOURCE
#include "sva.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/pci_regs.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define STOP_MS 5000

/* The function's configuration space, and where its page request capability stands in it. */
struct pri {
	int fd;
	off_t at;
	uint32_t allocation; /* what the kernel chose */
};

static uint32_t get(const struct pri *pri, off_t offset, size_t width)
{
	uint32_t value = 0;

	if (pread(pri->fd, &value, width, pri->at + offset) != (ssize_t)width)
		give_up("read the configuration space");
	return value;
}

static void put(const struct pri *pri, off_t offset, uint32_t value, size_t width)
{
	if (pwrite(pri->fd, &value, width, pri->at + offset) != (ssize_t)width)
		give_up("write the configuration space");
}

/* 0, or -1 where there is no engine of that number; exits with SKIP where it has no enabled page requests. */
static int open_pri(struct pri *pri, int number)
{
	char path[80];

	snprintf(path, sizeof(path), "/sys/class/misc/vioasid-dma%d/device/config", number);
	*pri = (struct pri){ .fd = open(path, O_RDWR | O_CLOEXEC) };
	if (pri->fd < 0)
		return -1;
	for (off_t at = 0x100; at;) {
		pri->at = at;
		uint32_t header = get(pri, 0, 4);

		if (PCI_EXT_CAP_ID(header) == PCI_EXT_CAP_ID_PRI)
			break;
		at = PCI_EXT_CAP_NEXT(header);
		pri->at = at;
	}
	if (!pri->at || !(get(pri, PCI_PRI_CTRL, 2) & PCI_PRI_CTRL_ENABLE))
		exit(skipped("the function has no page requests enabled"));
	pri->allocation = get(pri, PCI_PRI_ALLOC_REQ, 4);
	return 0;
}

/* Page requests with another allocation, begun anew; 0: none. */
static void set_pri(const struct pri *pri, uint32_t allocation)
{
	put(pri, PCI_PRI_CTRL, 0, 2);
	for (int waited = 0; waited < STOP_MS && !(get(pri, PCI_PRI_STATUS, 2) & PCI_PRI_STATUS_STOPPED); waited++)
		sleep_ms(1);
	put(pri, PCI_PRI_CTRL, PCI_PRI_CTRL_RESET, 2);
	if (!allocation)
		return;
	put(pri, PCI_PRI_ALLOC_REQ, allocation, 4);
	put(pri, PCI_PRI_CTRL, PCI_PRI_CTRL_ENABLE, 2);
}

/* Runs `work` with other allocations, and sets back what the kernel chose, whatever comes of it. */
static int with_allocation(uint32_t allocation, int (*work)(void))
{
	struct pri one, other;
	int two;

	if (open_pri(&one, 0))
		return skipped("sysfs does not say which function /dev/vioasid-dma0 is");
	int second = shared_engine(1);

	two = second >= 0 && !open_pri(&other, 1);
	if (second >= 0)
		close(second);
	set_pri(&one, allocation);
	if (two)
		set_pri(&other, allocation);
	pid_t child = fork();

	if (child < 0)
		give_up("fork");
	if (child == 0)
		exit(work());
	int outcome = child_outcome(child);

	set_pri(&one, one.allocation);
	if (two)
		set_pri(&other, other.allocation);
	if (outcome != PASS)
		return outcome;
	/* and as it was */
	struct engine engine = engine_open(0);
	uint8_t *source = random_pages(32 * PAGE), *target = fresh(32 * PAGE);
	int status = (int)get(&one, PCI_PRI_STATUS, 2);

	CHECK(!(status & PCI_PRI_STATUS_RF), "page requests failed for good: status %#x", status);
	return copies(&engine, target, source, 32 * PAGE, "with the kernel's allocation again");
}

static int one_at_a_time(void)
{
	struct engine engine = engine_open(0);
	uint8_t *source = random_pages(32 * PAGE), *target = fresh(32 * PAGE);
	struct vdma_info before = engine_info(engine.fd);

	TRY(copies(&engine, target, source, 32 * PAGE, "copy"));
	struct vdma_info after = engine_info(engine.fd);

	unsigned int groups = (unsigned int)(after.page_groups - before.page_groups);

	CHECK(groups >= 32 && after.page_requests - before.page_requests == groups, "32 pages, %llu requests in %u groups",
	      (unsigned long long)(after.page_requests - before.page_requests), groups);
	return passed("32 pages in %u groups, one request outstanding", groups);
}

static int test_one_at_a_time(void)
{
	return with_allocation(1, one_at_a_time);
}

static int many_at_once(void)
{
	struct engine engine = engine_open(0);
	uint8_t *target = fresh(256 * PAGE);
	struct vdma_info before = engine_info(engine.fd);
	double begin = now_ms();

	madvise(target, 256 * PAGE, MADV_NOHUGEPAGE);
	TRY(succeeded(&engine, fill_job(target, 3, 256 * PAGE), "fill"));
	double took = now_ms() - begin;
	struct vdma_info after = engine_info(engine.fd);

	for (size_t i = 0; i < 256; i++)
		CHECK(*(uint64_t *)(target + i * PAGE) == 3, "page %zu", i);
	return passed("256 pages in %llu groups: %.1f ms", (unsigned long long)(after.page_groups - before.page_groups), took);
}

static int test_many_at_once(void)
{
	return with_allocation(256, many_at_once);
}

static int none(void)
{
	struct engine engine = engine_open(0);
	uint8_t *source = random_pages(8 * PAGE), *target = fresh(16 * PAGE), *there = random_pages(8 * PAGE);
	struct vdma_info info = engine_info(engine.fd);

	CHECK(!(info.features & VDMA_FEATURE_PAGE_REQUESTS), "the engine would ask for pages: features %#x", info.features);
	TRY(copies(&engine, there, source, 8 * PAGE, "resident memory"));
	TRY(faults(&engine, copy_job(target, source, 8 * PAGE), target, VDMA_ACCESS_WRITE, "an untouched page"));
	CHECK(!(page_entry(target) & PAGE_PRESENT), "the page came all the same");
	return passed("what is there works, what is not is a fault");
}

static int test_none(void)
{
	return with_allocation(0, none);
}

/* Asks for a page under every index that a group can have. The kernel keeps the requests of a group until its last one
 * comes; where the log lost that one, the next group of that index is answered together with what is left of the old. */
static int use_every_index(int number)
{
	enum { INDICES = 512, AT_ONCE = 16 };
	struct engine engine = engine_open(number);
	uint8_t *memory = fresh(INDICES * PAGE);
	struct vdma_job jobs[AT_ONCE];
	struct vdma_result results[AT_ONCE];

	madvise(memory, INDICES * PAGE, MADV_NOHUGEPAGE);
	for (size_t i = 0; i < INDICES; i += AT_ONCE) {
		for (size_t j = 0; j < AT_ONCE; j++)
			jobs[j] = fill_job(memory + (i + j) * PAGE, 1, PAGE);
		submit(&engine, jobs, AT_ONCE);
		take(&engine, results, AT_ONCE, AT_ONCE);
		for (size_t j = 0; j < AT_ONCE; j++)
			CHECK(results[j].status == VDMA_STATUS_SUCCESS, "a page afterwards: status %u, reason %u", results[j].status,
			      results[j].reason);
	}
	close(engine.fd);
	return PASS;
}

/* Linux gives its log 512 entries. Both engines ask for more than that at once, and what the log cannot take the kernel
 * never answers: those jobs wait until the IOMMU gives up for it, and may fail. Nothing else may. */
static int overflow(void)
{
	enum { QUEUES = 4, JOBS = 2, PAGES = 128 };
	const size_t job_bytes = PAGES * PAGE, length = QUEUES * JOBS * job_bytes;
	struct engine engines[QUEUES];
	struct vdma_result result;
	unsigned int good = 0, bad = 0, queues = 0;
	uint8_t *target = fresh(length), *kept = random_pages(16 * PAGE), *before = fresh(16 * PAGE);
	double begin = now_ms();

	memcpy(before, kept, 16 * PAGE);
	madvise(target, length, MADV_NOHUGEPAGE);
	for (int i = 0; i < QUEUES; i++) {
		int fd = shared_engine(i % 2);

		if (fd < 0)
			continue;
		engines[queues].fd = fd;
		engine_bind(&engines[queues++]);
	}
	for (unsigned int i = 0; i < queues; i++) {
		struct vdma_job jobs[JOBS];

		for (unsigned int j = 0; j < JOBS; j++) {
			jobs[j] = fill_job(target + (i * JOBS + j) * job_bytes, 9, job_bytes);
			jobs[j].cookie = i * JOBS + j;
		}
		submit(&engines[i], jobs, JOBS);
	}
	for (unsigned int i = 0; i < queues * JOBS; i++) {
		take(&engines[i / JOBS], &result, 1, 1);
		uint8_t *part = target + result.cookie * job_bytes;

		if (result.status == VDMA_STATUS_SUCCESS) {
			good++;
		} else {
			CHECK(result.status == VDMA_STATUS_FAULT, "status %u", result.status);
			CHECK(result.fault_address == (uintptr_t)part + result.done, "fault at %#llx, %llu bytes done of a job at %p",
			      (unsigned long long)result.fault_address, (unsigned long long)result.done, (void *)part);
			bad++;
		}
		for (size_t at = 0; at < result.done; at += PAGE)
			CHECK(*(uint64_t *)(part + at) == 9, "what a job has done is not there, at byte %zu", at);
	}
	TRY(same(kept, before, 16 * PAGE, "memory beside"));
	double took = now_ms() - begin;

	for (unsigned int i = 0; i < queues; i++)
		close(engines[i].fd);
	for (int i = 0; i < 2; i++) {
		int fd = shared_engine(i);

		if (fd >= 0) {
			close(fd);
			TRY(use_every_index(i));
		}
	}
	return passed("%u jobs of %d pages at once: %u done, %u ended with a fault, after %.0f ms", good + bad, PAGES, good, bad, took);
}

static int test_overflow(void)
{
	return with_allocation(512, overflow);
}

static const struct sva_test tests[] = {
	{ "one-at-a-time", test_one_at_a_time },
	{ "many-at-once", test_many_at_once },
	{ "none", test_none },
	{ "overflow", test_overflow },
};

const struct sva_group requests_group = GROUP("requests", tests);
