/* Processes, bindings and drivers that end in the middle of jobs. */
#define _GNU_SOURCE
#include "sva.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define JOBS 16
#define JOB_BYTES ((size_t)1 << 20)
#define BYTES (JOBS * JOB_BYTES)
#define TARGET ((uint8_t *)0x110000000000)
#define ROUNDS 8

/* JOBS jobs into untouched memory, from one untouched source: far more than can be done before what follows. */
static void long_work(const struct engine *engine)
{
	uint8_t *target = map(TARGET, BYTES, PROT_READ | PROT_WRITE, MAP_FIXED_NOREPLACE | MAP_NORESERVE);
	uint8_t *source = fresh(JOB_BYTES);
	struct vdma_job jobs[JOBS];

	for (int i = 0; i < JOBS; i++)
		jobs[i] = copy_job(target + (size_t)i * JOB_BYTES, source, JOB_BYTES);
	submit(engine, jobs, JOBS);
}

/* This process's own memory at the addresses at which its children have jobs, and its own queue: neither may change. */
struct bystander {
	struct engine engine;
	uint8_t *memory, *before, *copy;
};

static struct bystander stand_by(void)
{
	struct bystander bystander = { .engine = engine_open(0), .before = fresh(64 * PAGE), .copy = fresh(64 * PAGE) };

	bystander.memory = map(TARGET, 64 * PAGE, PROT_READ | PROT_WRITE, MAP_FIXED_NOREPLACE);
	fill_random(bystander.memory, 64 * PAGE, random_seed());
	memcpy(bystander.before, bystander.memory, 64 * PAGE);
	return bystander;
}

static int unharmed(struct bystander *bystander)
{
	TRY(same(bystander->memory, bystander->before, 64 * PAGE, "memory of another process at the same addresses"));
	return copies(&bystander->engine, bystander->copy, bystander->memory, 64 * PAGE, "another process's copy");
}

/* fork(), for a child that has jobs where the bystander, its parent, has memory. */
static pid_t fork_beside(void)
{
	pid_t child = fork();

	if (child < 0)
		give_up("fork");
	if (child == 0)
		munmap(TARGET, 64 * PAGE);
	return child;
}

/* How much of its jobs' bytes a child did not see done, over all rounds: that they ended in the middle. */
static int cut_short(const struct vdma_info *before, const struct vdma_info *after, unsigned int rounds)
{
	uint64_t done = after->bytes - before->bytes;

	CHECK(done < rounds * BYTES, "all %llu bytes were done: no job was cut short", (unsigned long long)done);
	return PASS;
}

static int test_kill(void)
{
	struct bystander bystander = stand_by();
	struct vdma_info before = engine_info(bystander.engine.fd);

	for (unsigned int round = 0; round < ROUNDS; round++) {
		int told[2];
		char byte;

		if (pipe(told))
			give_up("pipe");
		pid_t child = fork_beside();

		if (child == 0) {
			struct engine engine = engine_open(0);
			struct vdma_result results[JOBS];

			long_work(&engine);
			if (write(told[1], "", 1) != 1)
				exit(ERROR);
			take(&engine, results, JOBS, JOBS); /* killed in here */
			exit(PASS);
		}
		close(told[1]);
		if (read(told[0], &byte, 1) != 1)
			return child_outcome(child);
		close(told[0]);
		sleep_ms(round * 3);
		kill(child, SIGKILL);
		if (waitpid(child, NULL, 0) != child)
			give_up("waitpid");
		TRY(unharmed(&bystander));
	}
	struct vdma_info after = engine_info(bystander.engine.fd);

	TRY(cut_short(&before, &after, ROUNDS));
	return passed("%d processes killed, %llu of %zu KiB done", ROUNDS, (unsigned long long)(after.bytes - before.bytes) >> 10,
		      ROUNDS * BYTES >> 10);
}

static int test_exit(void)
{
	struct bystander bystander = stand_by();
	struct vdma_info before = engine_info(bystander.engine.fd);

	for (unsigned int round = 0; round < ROUNDS; round++) {
		pid_t child = fork_beside();

		if (child == 0) {
			struct engine engine = engine_open(0);

			long_work(&engine);
			sleep_ms(round * 2);
			_exit(PASS);
		}
		TRY(child_outcome(child));
		TRY(unharmed(&bystander));
	}
	struct vdma_info after = engine_info(bystander.engine.fd);

	TRY(cut_short(&before, &after, ROUNDS));
	return passed("%d processes left in the middle, %llu of %zu KiB done", ROUNDS,
		      (unsigned long long)(after.bytes - before.bytes) >> 10, ROUNDS * BYTES >> 10);
}

/* sva-after-exec FD: what the program that took the process over finds. FD is bound to an address space that is gone. */
int sva_after_exec_main(int argc, char **argv)
{
	(void)argc;
	struct engine engine = { .fd = (int)number(argv[0]) };
	uint8_t *source = random_pages(16 * PAGE), *target = fresh(16 * PAGE);
	struct vdma_job job = copy_job(target, source, PAGE);
	struct vdma_submit request = { .jobs = (uintptr_t)&job, .count = 1 };
	struct vdma_result results[JOBS];

	CHECK(ioctl(engine.fd, VDMA_IOC_SUBMIT, &request) && errno == EPERM, "a job for the program before: %s", strerror(errno));
	unsigned int ended = take(&engine, results, JOBS, JOBS), cut = 0;

	for (unsigned int i = 0; i < ended; i++) {
		CHECK(results[i].status == VDMA_STATUS_SUCCESS || results[i].status == VDMA_STATUS_FAULT, "job %u: status %u", i,
		      results[i].status);
		cut += results[i].status == VDMA_STATUS_FAULT;
	}
	engine_unbind(&engine);
	engine_bind(&engine);
	TRY(copies(&engine, target, source, 16 * PAGE, "the new program's copy"));
	CHECK(cut, "no job was cut short");
	return PASS;
}

static int test_exec(void)
{
	struct bystander bystander = stand_by();

	for (unsigned int round = 0; round < 4; round++) {
		pid_t child = fork_beside();

		if (child == 0) {
			struct engine engine = engine_open(0);
			char text[16];

			snprintf(text, sizeof(text), "%d", engine.fd);
			long_work(&engine);
			if (round % 2 == 0) /* the file stays open in the new program */
				fcntl(engine.fd, F_SETFD, 0);
			sleep_ms(round * 2);
			if (round % 2 == 0)
				execl("/proc/self/exe", "guest", "sva-after-exec", text, NULL);
			else
				execl("/bin/busybox", "true", NULL);
			_exit(ERROR);
		}
		TRY(child_outcome(child));
		TRY(unharmed(&bystander));
	}
	return passed("4 programs replaced in the middle, two with the file open: its jobs end, it can be bound anew");
}

static int test_rebind(void)
{
	struct engine engine = engine_open(0);
	uint8_t *source = random_pages(8 * PAGE), *target = fresh(8 * PAGE);
	uint32_t first = engine.pasid, other = 0;

	for (unsigned int round = 0; round < 40; round++) {
		engine_unbind(&engine);
		engine_bind(&engine);
		other += engine.pasid != first;
		fill_random(source, 8 * PAGE, random_seed());
		TRY(copies(&engine, target, source, 8 * PAGE, "after a rebind"));
	}
	close(engine.fd);
	engine = engine_open(0);
	TRY(copies(&engine, target, source, 8 * PAGE, "after a reopen"));
	return passed("40 times; another PASID in %u of them", other);
}

struct waiter {
	struct engine engine;
	int error;
};

static void *wait_for_jobs(void *argument)
{
	struct waiter *waiter = argument;
	struct vdma_result results[JOBS];
	struct vdma_wait request = { .results = (uintptr_t)results, .count = JOBS, .least = JOBS, .timeout_ms = WAIT_MS };

	waiter->error = ioctl(waiter->engine.fd, VDMA_IOC_WAIT, &request) ? errno : 0;
	return NULL;
}

static int test_unbind_in_flight(void)
{
	struct bystander bystander = stand_by();

	for (unsigned int round = 0; round < 4; round++) {
		pid_t child = fork_beside();

		if (child == 0) {
			struct waiter waiter = { .engine = engine_open(0) };
			pthread_t thread;
			double begin;

			long_work(&waiter.engine);
			if (pthread_create(&thread, NULL, wait_for_jobs, &waiter))
				give_up("a thread");
			sleep_ms(2 + round * 4);
			begin = now_ms();
			engine_unbind(&waiter.engine);
			begin = now_ms() - begin;
			pthread_join(thread, NULL);
			if (waiter.error != ENXIO)
				printf("who waited for the jobs got error %d\n", waiter.error);
			exit(waiter.error == ENXIO ? PASS : FAIL);
		}
		TRY(child_outcome(child));
		TRY(unharmed(&bystander));
	}
	return passed("4 queues given back with jobs in flight; who waits for them is told (ENXIO)");
}

/* Where sysfs has the function behind /dev/vioasid-dma0. */
static int find_function(char *name, size_t size)
{
	char path[512];
	ssize_t length = readlink("/sys/class/misc/vioasid-dma0/device", path, sizeof(path) - 1);

	if (length < 0)
		return -1;
	path[length] = '\0';
	char *last = strrchr(path, '/') ? strrchr(path, '/') + 1 : path;

	if (strlen(last) >= size)
		return -1;
	memcpy(name, last, strlen(last) + 1);
	return 0;
}

/* The driver lets its device go while a process has jobs in flight, and takes it back. */
static int test_driver_removed(void)
{
	char function[32];
	int told[2];
	char byte;

	if (find_function(function, sizeof(function)))
		return skipped("sysfs does not say which function /dev/vioasid-dma0 is");
	if (pipe(told))
		give_up("pipe");
	pid_t child = fork();

	if (child < 0)
		give_up("fork");
	if (child == 0) {
		struct waiter waiter = { .engine = engine_open(0) };
		struct vdma_bind bind = { 0 };

		long_work(&waiter.engine);
		if (write(told[1], "", 1) != 1)
			exit(ERROR);
		wait_for_jobs(&waiter);
		CHECK(waiter.error == ENXIO, "who waited for jobs got error %d", waiter.error);
		CHECK(ioctl(waiter.engine.fd, VDMA_IOC_BIND, &bind) && errno == ENODEV, "bind without a device: %s", strerror(errno));
		exit(PASS);
	}
	if (read(told[0], &byte, 1) != 1)
		return child_outcome(child);
	put_setting("/sys/bus/pci/drivers/vioasid-dma/unbind", function);
	int gone = access("/dev/vioasid-dma0", F_OK), outcome = child_outcome(child);

	put_setting("/sys/bus/pci/drivers/vioasid-dma/bind", function);
	CHECK(gone, "/dev/vioasid-dma0 was still there");
	TRY(outcome);
	struct engine engine = engine_open(0);
	uint8_t *source = random_pages(8 * PAGE), *target = fresh(8 * PAGE);

	TRY(copies(&engine, target, source, 8 * PAGE, "after the driver came back"));
	return passed("%s taken from its driver in the middle of jobs, and given back", function);
}

static const struct sva_test tests[] = {
	{ "kill", test_kill },
	{ "exit", test_exit },
	{ "exec", test_exec },
	{ "rebind", test_rebind },
	{ "unbind-in-flight", test_unbind_in_flight },
	{ "driver-removed", test_driver_removed },
};

const struct sva_group lifetime_group = GROUP("lifetime", tests);
