/* What a process may not do by itself it may not have the device do: errors with the right address, and nothing else. */
#define _GNU_SOURCE
#include "sva.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

static int test_read_only(void)
{
	struct engine engine = engine_open(0);
	uint8_t *source = random_pages(4 * PAGE), *memory = random_pages(4 * PAGE), *before = fresh(4 * PAGE);

	memcpy(before, memory, 4 * PAGE);
	if (mprotect(memory + PAGE, PAGE, PROT_READ))
		give_up("mprotect");
	TRY(faults(&engine, copy_job(memory + PAGE, source, PAGE), memory + PAGE, VDMA_ACCESS_WRITE, "a page that is read only"));
	TRY(same(memory, before, 4 * PAGE, "memory that is read only"));
	TRY(faults(&engine, copy_job(memory + 100, source, 3 * PAGE), memory + PAGE, VDMA_ACCESS_WRITE, "from 100 before it"));
	memcpy(before + 100, source, PAGE - 100);
	TRY(same(memory, before, 4 * PAGE, "what lies before it, and it"));
	/* the program's own text: a file, mapped private */
	uint8_t *text = (uint8_t *)((uintptr_t)test_read_only & ~(PAGE - 1));

	memcpy(before, text, PAGE);
	TRY(faults(&engine, fill_job(text, 0, PAGE), text, VDMA_ACCESS_WRITE, "the program's text"));
	TRY(same(text, before, PAGE, "the program's text"));
	return passed("a page, what lies before it, the program's text");
}

static int test_no_access(void)
{
	struct engine engine = engine_open(0);
	uint8_t *memory = map(NULL, 4 * PAGE, PROT_NONE, 0), *target = fresh(4 * PAGE);

	TRY(faults(&engine, copy_job(target, memory, PAGE), memory, VDMA_ACCESS_READ, "read"));
	TRY(faults(&engine, fill_job(memory + PAGE, 1, PAGE), memory + PAGE, VDMA_ACCESS_WRITE, "write"));
	return passed("PROT_NONE, read and written");
}

static int test_beyond_end_of_file(void)
{
	struct engine engine = engine_open(0);
	int file = memory_file(PAGE + 100);
	uint8_t *memory = map_file(file, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED), *target = random_pages(4 * PAGE);

	fill_random(memory, PAGE, random_seed());
	TRY(faults(&engine, copy_job(target, memory, 4 * PAGE), memory + 2 * PAGE, VDMA_ACCESS_READ, "read"));
	TRY(same(target, memory, 2 * PAGE, "what the file has"));
	TRY(faults(&engine, fill_job(memory + 3 * PAGE, 1, 8), memory + 3 * PAGE, VDMA_ACCESS_WRITE, "write"));
	/* a file that becomes shorter while the device knows its pages */
	TRY(succeeded(&engine, fill_job(memory, 7, 2 * PAGE), "write to what the file has"));
	if (ftruncate(file, 0))
		give_up("truncate");
	TRY(faults(&engine, fill_job(memory, 7, PAGE), memory, VDMA_ACCESS_WRITE, "write after it was truncated"));
	return passed("a file of 4196 bytes in a mapping of 4 pages, then of none");
}

static int test_hole(void)
{
	struct engine engine = engine_open(0);
	uint8_t *source = random_pages(8 * PAGE), *memory = fresh(8 * PAGE);

	if (munmap(memory + 3 * PAGE, 2 * PAGE))
		give_up("munmap");
	TRY(faults(&engine, copy_job(memory + 1, source, 7 * PAGE), memory + 3 * PAGE, VDMA_ACCESS_WRITE, "write"));
	TRY(same(memory + 1, source, 3 * PAGE - 1, "what lies before the hole"));
	TRY(faults(&engine, copy_job(source, memory + 3 * PAGE + 17, 5), memory + 3 * PAGE + 17, VDMA_ACCESS_READ, "within a page"));
	return passed("two pages missing in the middle of untouched ones");
}

/* None of these is this process's, whatever its page table maps there. */
static int test_foreign_addresses(void)
{
	static const uint64_t addresses[] = {
		0,		    /* nothing is ever mapped at 0 */
		0x1000,
		0xffffffff81000000, /* the kernel's text */
		0xffff888000000000, /* all of memory, with four levels */
		0xff11000000000000, /* and with five */
		0xfffffe0000000000, /* the CPU entry area, mapped for every process */
		0xffffffffff600000, /* vsyscall */
		0xffffffffffffe000, /* the last page but one */
		0x0000800000000000, /* not canonical, with four levels */
		0x8000000000000000, /* with five */
	};
	struct engine engine = engine_open(0);
	uint8_t *memory = random_pages(PAGE), *before = fresh(PAGE);

	memcpy(before, memory, PAGE);
	for (size_t i = 0; i < sizeof(addresses) / sizeof(addresses[0]); i++) {
		void *address = (void *)(uintptr_t)addresses[i];
		char what[40];

		snprintf(what, sizeof(what), "%#llx", (unsigned long long)addresses[i]);
		TRY(faults(&engine, copy_job(memory, address, 64), address, VDMA_ACCESS_READ, what));
		TRY(faults(&engine, fill_job(address, 0, 64), address, VDMA_ACCESS_WRITE, what));
	}
	TRY(same(memory, before, PAGE, "the target of reads that faulted"));
	TRY(succeeded(&engine, fill_job(memory, 0, PAGE), "the queue afterwards"));
	return passed("%zu addresses, read and written", sizeof(addresses) / sizeof(addresses[0]));
}

static int test_no_page_requests(void)
{
	struct engine engine = engine_open(0);
	uint8_t *memory = fresh(PAGE);
	struct vdma_job job = fill_job(memory, 1, PAGE);
	struct vdma_info before = engine_info(engine.fd);

	job.flags = VDMA_FLAG_NO_PAGE_REQUESTS;
	struct vdma_result result = run(&engine, job);
	struct vdma_info after = engine_info(engine.fd);

	CHECK(result.status == VDMA_STATUS_FAULT && result.fault_address == (uintptr_t)memory, "status %u, fault at %#llx",
	      result.status, (unsigned long long)result.fault_address);
	CHECK(after.page_requests == before.page_requests, "a page was asked for");
	CHECK(!(page_entry(memory) & PAGE_PRESENT), "the page came all the same");
	memory[0] = 1;
	result = run(&engine, job);
	CHECK(result.status == VDMA_STATUS_SUCCESS, "with the page there: status %u", result.status);
	return passed("a missing page is a fault, and stays missing");
}

/* The response to a page request is "invalid" for every address that is not the process's. One such page within a group
 * must not cost the pages before it, and asking for one after another must not wear anything out. */
static int test_invalid_responses(void)
{
	struct engine engine = engine_open(0);
	uint8_t *memory = fresh(64 * PAGE);
	struct vdma_info before = engine_info(engine.fd);

	for (unsigned int i = 1; i < 64; i += 2)
		if (munmap(memory + i * PAGE, PAGE))
			give_up("munmap");
	for (unsigned int i = 0; i < 64; i += 2) {
		struct vdma_result result = run(&engine, fill_job(memory + i * PAGE, i + 1, 2 * PAGE));

		CHECK(result.status == VDMA_STATUS_FAULT && result.done == PAGE, "page %u: status %u, %llu bytes done", i, result.status,
		      (unsigned long long)result.done);
		CHECK(result.reason == VDMA_REASON_PRI_INVALID, "page %u: reason %u", i, result.reason);
		CHECK(result.fault_address == (uintptr_t)memory + (i + 1) * PAGE, "page %u: fault at %#llx", i,
		      (unsigned long long)result.fault_address);
		CHECK(*(uint64_t *)(memory + i * PAGE) == i + 1, "page %u was not written", i);
	}
	struct vdma_info after = engine_info(engine.fd);

	CHECK(after.page_groups - before.page_groups == after.page_answers - before.page_answers, "%llu groups asked, %llu answered",
	      (unsigned long long)(after.page_groups - before.page_groups),
	      (unsigned long long)(after.page_answers - before.page_answers));
	return passed("32 faults, %llu groups, each answered", (unsigned long long)(after.page_groups - before.page_groups));
}

static int test_bad_jobs(void)
{
	struct engine engine = engine_open(0);
	uint8_t *memory = random_pages(4 * PAGE), *before = fresh(4 * PAGE);
	const struct {
		struct vdma_job job;
		uint8_t reason;
	} bad[] = {
		{ { .opcode = 99, .target = (uintptr_t)memory, .length = 8 }, VDMA_REASON_OPCODE },
		{ copy_job(memory + 8, memory, PAGE), VDMA_REASON_OVERLAP },
		{ fill_job((void *)-8, 0, 4096), VDMA_REASON_WRAP },
		{ fill_job(memory, 0, ~0ull), VDMA_REASON_LENGTH },
		{ { .opcode = VDMA_OP_FETCH_ADD, .target = (uintptr_t)memory, .length = 3 }, VDMA_REASON_LENGTH },
		{ { .opcode = VDMA_OP_FETCH_ADD, .target = (uintptr_t)memory + 4, .length = 8 }, VDMA_REASON_ALIGNMENT },
	};

	memcpy(before, memory, 4 * PAGE);
	for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
		struct vdma_result result = run(&engine, bad[i].job);

		CHECK(result.status == VDMA_STATUS_INVALID && result.reason == bad[i].reason, "job %zu: status %u, reason %u, not %u", i,
		      result.status, result.reason, bad[i].reason);
	}
	TRY(same(memory, before, 4 * PAGE, "memory after jobs that are none"));
	return passed("%zu jobs refused by the device", sizeof(bad) / sizeof(bad[0]));
}

/* The driver's own refusals. */
static int test_bad_calls(void)
{
	struct engine engine = engine_open(0);
	struct vdma_job job = fill_job(random_pages(PAGE), 0, 8);
	struct vdma_submit request = { .jobs = (uintptr_t)&job, .count = 1 };
	struct vdma_bind bind = { 0 };
	struct vdma_wait wait = { .count = 1, .least = 1 };
	struct vdma_result result;

	CHECK(ioctl(engine.fd, VDMA_IOC_BIND, &bind) && errno == EBUSY, "a second BIND: %s", strerror(errno));
	job.flags = VDMA_FLAG_SOURCE_PASID;
	CHECK(ioctl(engine.fd, VDMA_IOC_SUBMIT, &request) && errno == EINVAL, "a flag that is the driver's: %s", strerror(errno));
	job.flags = 0;
	request.jobs = 8;
	CHECK(ioctl(engine.fd, VDMA_IOC_SUBMIT, &request) && errno == EFAULT, "jobs at address 8: %s", strerror(errno));
	CHECK(!ioctl(engine.fd, VDMA_IOC_WAIT, &wait) && wait.taken == 0, "a wait for nothing: %u results", wait.taken);
	engine_unbind(&engine);
	CHECK(ioctl(engine.fd, VDMA_IOC_UNBIND) && errno == ENXIO, "UNBIND of nothing: %s", strerror(errno));
	request.jobs = (uintptr_t)&job;
	CHECK(ioctl(engine.fd, VDMA_IOC_SUBMIT, &request) && errno == ENXIO, "SUBMIT without BIND: %s", strerror(errno));
	CHECK(ioctl(engine.fd, _IO('V', 0xff)) && errno == ENOTTY, "an unknown call: %s", strerror(errno));
	engine_bind(&engine);
	/* more jobs than there are slots */
	struct vdma_job many[VDMA_SLOTS + 1];
	unsigned int ended = 0;

	for (unsigned int i = 0; i <= VDMA_SLOTS; i++)
		many[i] = job;
	request = (struct vdma_submit){ .jobs = (uintptr_t)many, .count = VDMA_SLOTS + 1 };
	CHECK(!ioctl(engine.fd, VDMA_IOC_SUBMIT, &request) && request.submitted == VDMA_SLOTS, "%u jobs were taken", request.submitted);
	while (ended < VDMA_SLOTS)
		ended += take(&engine, &result, 1, 1);
	return passed("EBUSY, EINVAL, EFAULT, ENXIO, ENOTTY; %d jobs and no more", VDMA_SLOTS);
}

static const struct sva_test tests[] = {
	{ "read-only", test_read_only },
	{ "no-access", test_no_access },
	{ "beyond-end-of-file", test_beyond_end_of_file },
	{ "hole", test_hole },
	{ "foreign-addresses", test_foreign_addresses },
	{ "no-page-requests", test_no_page_requests },
	{ "invalid-responses", test_invalid_responses },
	{ "bad-jobs", test_bad_jobs },
	{ "bad-calls", test_bad_calls },
};

const struct sva_group errors_group = GROUP("errors", tests);
