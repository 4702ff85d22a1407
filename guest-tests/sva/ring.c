/* A ring in the process's own memory, a doorbell page mapped into it: jobs without a system call. */
#define _GNU_SOURCE
#include "sva.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define ORDER 6
#define SLOTS (1u << ORDER)
#define OWN (VDMA_FLAG_COMPLETION | VDMA_FLAG_SOURCE_PASID | VDMA_FLAG_TARGET_PASID | VDMA_FLAG_COMPLETION_PASID)

struct ring {
	struct engine engine;
	volatile struct vdma_descriptor *slots;
	struct vdma_completion *records;
	volatile uint32_t *doorbell;
	uint32_t tail;
};

/* Ring and records in untouched memory: the device asks for their pages as well. */
static struct ring ring_open(void)
{
	struct ring ring = { .engine.fd = engine_file(0) };
	void *slots = fresh(SLOTS * VDMA_DESCRIPTOR_SIZE);
	struct vdma_bind bind = { .flags = VDMA_BIND_OWN_RING, .order = ORDER, .ring = (uintptr_t)slots };

	ring.slots = slots;
	ring.records = (void *)fresh(SLOTS * VDMA_COMPLETION_SIZE);
	if (ring.engine.fd < 0 || ioctl(ring.engine.fd, VDMA_IOC_BIND, &bind))
		give_up("bind with a ring of its own");
	ring.engine.pasid = bind.pasid;
	ring.engine.queue = bind.queue;
	ring.doorbell = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, ring.engine.fd, 0);
	if (ring.doorbell == MAP_FAILED)
		give_up("map the doorbell page");
	return ring;
}

/* Puts a descriptor into the ring; its record, not yet written. */
static struct vdma_completion *push(struct ring *ring, struct vdma_descriptor descriptor)
{
	struct vdma_completion *record = &ring->records[ring->tail % SLOTS];

	memset(record, 0, sizeof(*record));
	descriptor.completion = (uintptr_t)record;
	descriptor.tag = ring->tail;
	ring->slots[ring->tail++ % SLOTS] = descriptor;
	return record;
}

static void ring_bell(struct ring *ring)
{
	__atomic_thread_fence(__ATOMIC_RELEASE);
	ring->doorbell[VDMA_DB_TAIL / 4] = ring->tail;
}

static uint32_t state(const struct ring *ring)
{
	return ring->doorbell[VDMA_DB_STATUS / 4];
}

/* Until the record is written; exits with FAIL when it never is. */
static uint8_t finished(struct vdma_completion *record)
{
	double end = now_ms() + WAIT_MS;
	uint8_t status;

	while (!(status = __atomic_load_n(&record->status, __ATOMIC_ACQUIRE))) {
		if (now_ms() > end) {
			printf("no record within %d seconds\n", WAIT_MS / 1000);
			exit(FAIL);
		}
		usleep(50);
	}
	return status;
}

static struct vdma_descriptor copy_descriptor(void *target, const void *source, size_t length)
{
	return (struct vdma_descriptor){
		.opcode = VDMA_OP_COPY, .flags = OWN, .target = (uintptr_t)target, .source = (uintptr_t)source, .length = length
	};
}

/* Several times around the ring. */
static int test_copies(void)
{
	enum { ROUNDS = 5, BATCH = 48 };
	struct ring ring = ring_open();
	struct vdma_completion *records[BATCH];

	for (int round = 0; round < ROUNDS; round++) {
		uint8_t *source = random_pages(BATCH * PAGE), *target = fresh(BATCH * PAGE);

		for (int i = 0; i < BATCH; i++)
			records[i] = push(&ring, copy_descriptor(target + i * PAGE, source + i * PAGE, PAGE));
		ring_bell(&ring);
		for (int i = 0; i < BATCH; i++) {
			uint8_t status = finished(records[i]);

			CHECK(status == VDMA_STATUS_SUCCESS && records[i]->done == PAGE, "round %d, job %d: status %u, reason %u", round, i,
			      status, records[i]->reason);
			CHECK(records[i]->tag == (uint32_t)(round * BATCH + i), "job %d has the record of %u", i, records[i]->tag);
		}
		TRY(same(target, source, BATCH * PAGE, "copies"));
		munmap(source, BATCH * PAGE);
		munmap(target, BATCH * PAGE);
	}
	CHECK(ring.doorbell[VDMA_DB_COMPLETED / 4] == ROUNDS * BATCH, "the device counts %u jobs", ring.doorbell[VDMA_DB_COMPLETED / 4]);
	return passed("%d jobs through a ring of %u, no system call", ROUNDS * BATCH, SLOTS);
}

/* What the process may not say in its own ring: an address that is not in its PASID. It would be the kernel's. */
static int test_untagged(void)
{
	static const uint16_t missing[] = { VDMA_FLAG_TARGET_PASID, VDMA_FLAG_SOURCE_PASID };
	struct ring ring = ring_open();
	uint8_t *source = random_pages(PAGE), *target = random_pages(PAGE), *before = fresh(PAGE);

	memcpy(before, target, PAGE);
	for (size_t i = 0; i < sizeof(missing) / sizeof(missing[0]); i++) {
		struct vdma_descriptor descriptor = copy_descriptor(target, source, PAGE);

		descriptor.flags &= ~missing[i];
		struct vdma_completion *record = push(&ring, descriptor);

		ring_bell(&ring);
		CHECK(finished(record) == VDMA_STATUS_INVALID && record->reason == VDMA_REASON_UNTAGGED, "flags %#x: status %u, reason %u",
		      descriptor.flags, record->status, record->reason);
	}
	TRY(same(target, before, PAGE, "the target"));
	/* a record at a physical address stops the queue: there is nowhere to say so */
	struct vdma_descriptor descriptor = copy_descriptor(target, source, PAGE);

	descriptor.flags &= ~VDMA_FLAG_COMPLETION_PASID;
	push(&ring, descriptor);
	ring_bell(&ring);
	for (int waited = 0; (state(&ring) & VDMA_STATE_MASK) != VDMA_STATE_ERROR && waited < WAIT_MS; waited++)
		sleep_ms(1);
	CHECK(state(&ring) == (VDMA_STATE_ERROR | VDMA_ERROR_COMPLETION << VDMA_ERROR_SHIFT), "state %#x", state(&ring));
	return passed("operands: refused; a record: the queue stops");
}

/* Bells that cannot be, and a ring that is gone, stop this queue and no other. */
static int test_errors(void)
{
	struct engine other = engine_open(0);
	uint8_t *source = random_pages(4 * PAGE), *target = fresh(4 * PAGE);

	for (int way = 0; way < 3; way++) {
		struct ring ring = ring_open();
		uint32_t error = way == 2 ? VDMA_ERROR_RING : VDMA_ERROR_DOORBELL;
		struct vdma_info info;

		if (way == 0)
			ring.tail += SLOTS + 1;
		else if (way == 1)
			ring.tail -= 1;
		else if (munmap((void *)ring.slots, SLOTS * VDMA_DESCRIPTOR_SIZE) == 0)
			ring.tail += 3;
		ring_bell(&ring);
		for (int waited = 0; (state(&ring) & VDMA_STATE_MASK) != VDMA_STATE_ERROR && waited < WAIT_MS; waited++)
			sleep_ms(1);
		CHECK(state(&ring) == (VDMA_STATE_ERROR | error << VDMA_ERROR_SHIFT), "way %d: state %#x", way, state(&ring));
		info = engine_info(ring.engine.fd);
		CHECK(way != 2 || info.error_address == (uintptr_t)ring.slots, "a ring at %p that is gone: error at %#llx",
		      (void *)ring.slots, (unsigned long long)info.error_address);
		TRY(copies(&other, target, source, 4 * PAGE, "another queue"));
		close(ring.engine.fd);
		munmap((void *)ring.doorbell, PAGE);
	}
	return passed("a bell beyond the ring, one behind, a ring that is gone");
}

/* After UNBIND the page is gone, for the queue may be another process's; a child never has it. */
static int test_doorbell_taken(void)
{
	struct ring ring = ring_open();
	int status;

	CHECK(state(&ring) == VDMA_STATE_RUNNING, "state %#x", state(&ring));
	for (int way = 0; way < 2; way++) {
		pid_t child = fork();

		if (child < 0)
			give_up("fork");
		if (child == 0) {
			struct ring own;

			if (way == 0) { /* its parent's page */
				ring.doorbell[0] = 1;
				_exit(PASS);
			}
			own = ring_open();
			own.doorbell[0] = own.tail;
			engine_unbind(&own.engine);
			own.doorbell[0] = 1;
			_exit(PASS);
		}
		if (waitpid(child, &status, 0) != child)
			give_up("waitpid");
		int wanted = way ? SIGBUS : SIGSEGV;

		CHECK(WIFSIGNALED(status) && WTERMSIG(status) == wanted, "%s: status %#x", way ? "after UNBIND" : "a child", status);
	}
	struct vdma_job job = fill_job(fresh(PAGE), 0, 8);
	struct vdma_submit request = { .jobs = (uintptr_t)&job, .count = 1 };

	CHECK(ioctl(ring.engine.fd, VDMA_IOC_SUBMIT, &request) && errno == EINVAL, "SUBMIT beside its own ring: %s", strerror(errno));
	struct engine plain = engine_open(0);

	CHECK(mmap(NULL, PAGE, PROT_READ, MAP_SHARED, plain.fd, 0) == MAP_FAILED && errno == ENXIO, "a doorbell page without a ring: %s",
	      strerror(errno));
	struct vdma_bind bind = { .flags = VDMA_BIND_OWN_RING, .order = 30, .ring = (uintptr_t)ring.slots };
	int fd = engine_file(0);

	CHECK(ioctl(fd, VDMA_IOC_BIND, &bind) && errno == EINVAL, "a ring of 2^30 descriptors: %s", strerror(errno));
	return passed("a child: SIGSEGV; after UNBIND: SIGBUS; EINVAL, ENXIO beside");
}

/* Killed while the device reads its ring. */
static int test_kill(void)
{
	struct engine other = engine_open(0);
	uint8_t *source = random_pages(4 * PAGE), *target = fresh(4 * PAGE);

	for (int round = 0; round < 5; round++) {
		int told[2];
		char byte;

		if (pipe(told))
			give_up("pipe");
		pid_t child = fork();

		if (child < 0)
			give_up("fork");
		if (child == 0) {
			struct ring ring = ring_open();
			uint8_t *from = fresh(256 * PAGE), *to = fresh(SLOTS * 256 * PAGE);

			for (unsigned int i = 0; i < SLOTS; i++)
				push(&ring, copy_descriptor(to + i * 256 * PAGE, from, 256 * PAGE));
			ring_bell(&ring);
			if (write(told[1], "", 1) != 1)
				_exit(ERROR);
			pause();
		}
		if (read(told[0], &byte, 1) != 1)
			give_up("pipe");
		sleep_ms((unsigned int)round * 4);
		kill(child, SIGKILL);
		if (waitpid(child, NULL, 0) != child)
			give_up("waitpid");
		close(told[0]);
		close(told[1]);
		TRY(copies(&other, target, source, 4 * PAGE, "another process's copy"));
	}
	return passed("5 processes with 64 jobs in their rings");
}

static const struct sva_test tests[] = {
	{ "copies", test_copies },
	{ "untagged", test_untagged },
	{ "errors", test_errors },
	{ "doorbell-taken", test_doorbell_taken },
	{ "kill", test_kill },
};

const struct sva_group ring_group = GROUP("ring", tests);
