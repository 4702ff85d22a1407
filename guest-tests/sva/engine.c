/* What tests of the engine share: its device file, jobs, memory to work on. */
#define _GNU_SOURCE
#include "sva.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static void say(const char *format, va_list arguments)
{
	vprintf(format, arguments);
	printf("\n");
}

int passed(const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	say(format, arguments);
	va_end(arguments);
	return PASS;
}

int skipped(const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	say(format, arguments);
	va_end(arguments);
	return SKIP;
}

int engine_file(int number)
{
	char path[40];
	int fd;

	snprintf(path, sizeof(path), "/dev/vioasid-dma%d", number);
	fd = open(path, O_RDWR | O_CLOEXEC);
	if (fd < 0 && errno != ENOENT)
		give_up("open %s", path);
	return fd;
}

int shared_engine(int number)
{
	int fd = engine_file(number);

	if (fd >= 0 && !(engine_info(fd).features & VDMA_FEATURE_PASID)) {
		close(fd);
		return -1;
	}
	return fd;
}

struct engine engine_open(int number)
{
	struct engine engine = { .fd = engine_file(number) };

	if (engine.fd < 0)
		give_up("/dev/vioasid-dma%d", number);
	engine_bind(&engine);
	return engine;
}

void engine_bind(struct engine *engine)
{
	struct vdma_bind bind = { 0 };

	if (ioctl(engine->fd, VDMA_IOC_BIND, &bind))
		give_up("bind this process to the engine");
	engine->pasid = bind.pasid;
	engine->queue = bind.queue;
}

void engine_unbind(struct engine *engine)
{
	if (ioctl(engine->fd, VDMA_IOC_UNBIND))
		give_up("unbind");
}

struct vdma_info engine_info(int fd)
{
	struct vdma_info info;

	if (ioctl(fd, VDMA_IOC_INFO, &info))
		give_up("the engine's counters");
	return info;
}

struct vdma_job copy_job(void *target, const void *source, size_t length)
{
	return (struct vdma_job){
		.opcode = VDMA_OP_COPY, .target = (uintptr_t)target, .source = (uintptr_t)source, .length = length
	};
}

struct vdma_job fill_job(void *target, uint64_t value, size_t length)
{
	return (struct vdma_job){ .opcode = VDMA_OP_FILL, .target = (uintptr_t)target, .value = value, .length = length };
}

void submit(const struct engine *engine, const struct vdma_job *jobs, unsigned int count)
{
	struct vdma_submit request = { .jobs = (uintptr_t)jobs, .count = count };

	if (ioctl(engine->fd, VDMA_IOC_SUBMIT, &request))
		give_up("submit %u jobs", count);
	if (request.submitted != count) {
		errno = EAGAIN;
		give_up("%u of %u jobs were taken", request.submitted, count);
	}
}

unsigned int take(const struct engine *engine, struct vdma_result *results, unsigned int least, unsigned int count)
{
	struct vdma_wait request = { .results = (uintptr_t)results, .count = count, .least = least, .timeout_ms = WAIT_MS };

	if (ioctl(engine->fd, VDMA_IOC_WAIT, &request))
		give_up("wait for %u jobs", least);
	if (request.taken < least) {
		printf("%u of %u jobs ended within %d seconds\n", request.taken, least, WAIT_MS / 1000);
		exit(FAIL);
	}
	return request.taken;
}

struct vdma_result run(const struct engine *engine, struct vdma_job job)
{
	struct vdma_result result;

	submit(engine, &job, 1);
	take(engine, &result, 1, 1);
	return result;
}

int succeeded(const struct engine *engine, struct vdma_job job, const char *what)
{
	struct vdma_result result = run(engine, job);

	CHECK(result.status == VDMA_STATUS_SUCCESS && result.done == job.length,
	      "%s: status %u, reason %u, %llu of %llu bytes, fault at %#llx", what, result.status, result.reason,
	      (unsigned long long)result.done, (unsigned long long)job.length, (unsigned long long)result.fault_address);
	return PASS;
}

int copies(const struct engine *engine, void *target, const void *source, size_t length, const char *what)
{
	TRY(succeeded(engine, copy_job(target, source, length), what));
	return same(target, source, length, what);
}

/* A job must end with a fault at `address`, for `access`, having done all that lies before it. */
int faults(const struct engine *engine, struct vdma_job job, const void *address, int access, const char *what)
{
	struct vdma_result result = run(engine, job);
	uint64_t wanted = (uintptr_t)address, begin = access == VDMA_ACCESS_WRITE ? job.target : job.source;

	CHECK(result.status == VDMA_STATUS_FAULT, "%s: status %u, reason %u, %llu bytes done: no fault", what, result.status,
	      result.reason, (unsigned long long)result.done);
	CHECK(result.fault_address == wanted, "%s: fault at %#llx, not at %#llx", what, (unsigned long long)result.fault_address,
	      (unsigned long long)wanted);
	CHECK(result.access & access, "%s: access %#x at fault, not %#x", what, result.access, access);
	CHECK(result.done == wanted - begin, "%s: %llu bytes done, not %llu", what, (unsigned long long)result.done,
	      (unsigned long long)(wanted - begin));
	return PASS;
}

int same(const void *got, const void *wanted, size_t length, const char *what)
{
	const uint8_t *left = got, *right = wanted;

	if (!memcmp(got, wanted, length))
		return PASS;
	for (size_t i = 0; i < length; i++)
		CHECK(left[i] == right[i], "%s: byte %zu of %zu is 0x%02x, not 0x%02x", what, i, length, left[i], right[i]);
	return PASS;
}

void *map(void *hint, size_t length, int protection, int flags)
{
	void *memory = mmap(hint, length, protection, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);

	if (memory == MAP_FAILED)
		give_up("map %zu bytes at %p", length, hint);
	return memory;
}

uint8_t *fresh(size_t length)
{
	return map(NULL, length, PROT_READ | PROT_WRITE, MAP_NORESERVE);
}

uint8_t *random_pages(size_t length)
{
	uint8_t *memory = fresh(length);

	fill_random(memory, length, random_seed());
	return memory;
}

int memory_file(size_t length)
{
	int fd = memfd_create("sva", MFD_CLOEXEC);

	if (fd < 0 || ftruncate(fd, (off_t)length))
		give_up("a memfd of %zu bytes", length);
	return fd;
}

void *map_file(int fd, size_t length, int protection, int flags)
{
	void *memory = mmap(NULL, length, protection, flags, fd, 0);

	if (memory == MAP_FAILED)
		give_up("map %zu bytes of a file", length);
	return memory;
}

uint64_t page_entry(const void *address)
{
	uint64_t entry;
	int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);

	if (fd < 0 || pread(fd, &entry, sizeof(entry), (off_t)((uintptr_t)address / PAGE * sizeof(entry))) != sizeof(entry))
		give_up("/proc/self/pagemap");
	close(fd);
	return entry;
}

void put_setting(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);

	if (fd < 0)
		return;
	if (write(fd, text, strlen(text)) < 0)
		errno = 0;
	close(fd);
}

double now_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (double)now.tv_sec * 1e3 + (double)now.tv_nsec / 1e6;
}

void sleep_ms(unsigned int ms)
{
	struct timespec left = { ms / 1000, (long)(ms % 1000) * 1000000 };

	while (nanosleep(&left, &left) && errno == EINTR)
		;
}

int child_outcome(int pid)
{
	int status;

	if (waitpid(pid, &status, 0) != pid)
		give_up("waitpid");
	if (WIFEXITED(status))
		return WEXITSTATUS(status);
	printf("a child was ended by signal %d\n", WTERMSIG(status));
	return ERROR;
}
