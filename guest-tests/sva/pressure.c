/* Pages that come late, from elsewhere, or in numbers. */
#define _GNU_SOURCE
#include "sva.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/swap.h>
#include <sys/syscall.h>
#include <unistd.h>

#define SWAPPED 64

/* Swaps `length` bytes out; how many pages went. */
static unsigned int swap_out(uint8_t *memory, size_t length)
{
	unsigned int gone = 0;

	if (madvise(memory, length, MADV_PAGEOUT))
		give_up("MADV_PAGEOUT");
	for (size_t i = 0; i < length; i += PAGE)
		gone += (page_entry(memory + i) & PAGE_SWAPPED) != 0;
	return gone;
}

/* The check's script has set up a compressed disk in memory to swap to, where the kernel has the module. */
static int test_swap(void)
{
	struct engine engine = engine_open(0);
	uint8_t *memory = random_pages(SWAPPED * PAGE), *wanted = fresh(SWAPPED * PAGE), *target = random_pages(SWAPPED * PAGE);
	unsigned int out, written;

	memcpy(wanted, memory, SWAPPED * PAGE);
	TRY(succeeded(&engine, copy_job(target, memory, SWAPPED * PAGE), "while it is there"));
	out = swap_out(memory, SWAPPED * PAGE);
	if (!out)
		return skipped("nothing was swapped out: is there swap space?");
	memset(target, 0, SWAPPED * PAGE);
	TRY(succeeded(&engine, copy_job(target, memory, SWAPPED * PAGE), "read of what is swapped out"));
	TRY(same(target, wanted, SWAPPED * PAGE, "read of what was swapped out"));
	/* a part of each page is written: the rest must come from swap */
	written = swap_out(memory, SWAPPED * PAGE);
	for (unsigned int i = 0; i < SWAPPED; i++) {
		TRY(succeeded(&engine, fill_job(memory + i * PAGE + 1000, i, 24), "write to what is swapped out"));
		for (unsigned int j = 0; j < 3; j++)
			memcpy(wanted + i * PAGE + 1000 + j * 8, &(uint64_t){ i }, 8);
	}
	TRY(same(memory, wanted, SWAPPED * PAGE, "written while swapped out"));
	/* and what the device wrote survives another way out and back */
	swap_out(memory, SWAPPED * PAGE);
	TRY(same(memory, wanted, SWAPPED * PAGE, "swapped out after the device wrote"));
	return passed("%u pages read, %u written while they were swapped out", out, written);
}

struct pager {
	int fd;
	uint8_t *from, *memory;
	size_t length;
	unsigned int served, delay_ms;
};

/* Hands a page over, late, whenever somebody misses it. */
static void *serve_pages(void *argument)
{
	struct pager *pager = argument;

	for (;;) {
		struct pollfd wait = { .fd = pager->fd, .events = POLLIN };
		struct uffd_msg message;

		if (poll(&wait, 1, 500) <= 0)
			return NULL;
		if (read(pager->fd, &message, sizeof(message)) != sizeof(message) || message.event != UFFD_EVENT_PAGEFAULT)
			continue;
		uint64_t page = message.arg.pagefault.address & ~(PAGE - 1);
		struct uffdio_copy copy = { .dst = page, .src = (uintptr_t)pager->from + (page - (uintptr_t)pager->memory), .len = PAGE };

		sleep_ms(pager->delay_ms);
		if (!ioctl(pager->fd, UFFDIO_COPY, &copy))
			pager->served++;
	}
}

/* A page that user space must bring. The kernel resolves page requests without the right to wait for a userfaultfd
 * (handle_mm_fault without FAULT_FLAG_ALLOW_RETRY) and answers "invalid"; a kernel that learns to wait passes too. */
static int test_userfaultfd(void)
{
	int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	struct uffdio_api api = { .api = UFFD_API };
	struct pager pager = { .fd = fd, .delay_ms = 20, .length = 16 * PAGE };
	pthread_t thread;

	if (fd < 0 || ioctl(fd, UFFDIO_API, &api))
		return skipped("no userfaultfd: %s", strerror(errno));
	struct engine engine = engine_open(0);
	uint8_t *target = fresh(16 * PAGE);

	pager.from = random_pages(pager.length);
	pager.memory = fresh(pager.length);
	struct uffdio_register area = {
		.range = { .start = (uintptr_t)pager.memory, .len = pager.length }, .mode = UFFDIO_REGISTER_MODE_MISSING
	};

	if (ioctl(fd, UFFDIO_REGISTER, &area))
		give_up("UFFDIO_REGISTER");
	if (pthread_create(&thread, NULL, serve_pages, &pager))
		give_up("a thread");
	struct vdma_job job = copy_job(target, pager.memory, pager.length);
	struct vdma_result result = run(&engine, job);
	const char *how = "brought for the device";

	if (result.status != VDMA_STATUS_SUCCESS) {
		CHECK(result.status == VDMA_STATUS_FAULT && result.fault_address == (uintptr_t)pager.memory, "status %u, fault at %#llx",
		      result.status, (unsigned long long)result.fault_address);
		CHECK(result.reason == VDMA_REASON_PRI_INVALID, "reason %u", result.reason);
		/* as its process does then: touch the pages, and go on */
		for (size_t i = 0; i < pager.length; i += PAGE)
			*(volatile uint8_t *)(pager.memory + i);
		TRY(succeeded(&engine, job, "after the process brought its pages"));
		how = "brought by the process after the kernel answered invalid";
	}
	pthread_join(thread, NULL);
	TRY(same(target, pager.from, pager.length, "pages from a pager"));
	return passed("%u pages, each 20 ms late, %s", pager.served, how);
}

/* A process waits for slow pages, another does not: the second one's jobs go on meanwhile. */
static int test_slow_beside_fast(void)
{
	const size_t slow_bytes = (size_t)24 << 20;
	struct engine slow = engine_open(0), fast = engine_open(0);
	uint8_t *target = fresh(slow_bytes), *one = random_pages(4 * PAGE), *other = fresh(4 * PAGE);
	struct vdma_job job = fill_job(target, 5, slow_bytes);
	struct vdma_result result;
	unsigned int meanwhile = 0;

	submit(&slow, &job, 1);
	for (;;) {
		struct vdma_wait look = { .results = (uintptr_t)&result, .count = 1 };

		TRY(copies(&fast, other, one, 4 * PAGE, "a resident copy beside"));
		if (ioctl(slow.fd, VDMA_IOC_WAIT, &look))
			give_up("look for the slow job");
		if (look.taken)
			break;
		meanwhile++;
	}
	CHECK(result.status == VDMA_STATUS_SUCCESS, "the slow job: status %u", result.status);
	for (size_t i = 0; i < slow_bytes; i += PAGE)
		CHECK(*(uint64_t *)(target + i) == 5, "the slow job's page %zu", i / PAGE);
	CHECK(meanwhile >= 3, "%u jobs beside", meanwhile);
	return passed("%u jobs ended while another waited for %zu pages", meanwhile, slow_bytes / PAGE);
}

/* Memory that is scarce: the kernel takes back pages that the device has just had. */
static int test_reclaim(void)
{
	struct engine engine = engine_open(0);
	const size_t length = 256 * PAGE;
	uint8_t *source = random_pages(length), *target = random_pages(length), *wanted = fresh(length);
	unsigned int out = 0;

	for (int round = 0; round < 6; round++) {
		struct vdma_job job;
		struct vdma_result result;

		fill_random(source, length, random_seed());
		memcpy(wanted, source, length);
		job = copy_job(target, source, length);
		submit(&engine, &job, 1);
		for (int i = 0; i < 3; i++) {
			out += swap_out(source, length);
			out += swap_out(target, length);
		}
		take(&engine, &result, 1, 1);
		CHECK(result.status == VDMA_STATUS_SUCCESS, "round %d: status %u, fault at %#llx", round, result.status,
		      (unsigned long long)result.fault_address);
		TRY(same(target, wanted, length, "copied while its pages were taken"));
	}
	if (!out)
		return skipped("nothing was swapped out: is there swap space?");
	return passed("6 rounds of 256 pages, %u times a page was taken meanwhile", out);
}

static const struct sva_test tests[] = {
	{ "swap", test_swap },
	{ "reclaim-in-flight", test_reclaim },
	{ "userfaultfd", test_userfaultfd },
	{ "slow-beside-fast", test_slow_beside_fast },
};

const struct sva_group pressure_group = GROUP("pressure", tests);
