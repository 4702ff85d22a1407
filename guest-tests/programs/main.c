/* One static program for the guest, its first argument the verb: a C library once in the initramfs, not once a verb. */
#define _GNU_SOURCE
#include "guest.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>

struct verb {
	const char *name, *arguments;
	int count;      /* arguments it needs */
	int open_ended; /* whether more may follow */
	int (*run)(int argc, char **argv);
};

static const struct verb verbs[] = {
	{ "bulk", "DEVICE OFFSET LENGTH", 3, 0, bulk_main },
	{ "queues", "DEVICE OFFSET DEPTH SIZE COUNT", 5, 0, queues_main },
	{ "zeroes", "DEVICE OFFSET LENGTH", 3, 0, zeroes_main },
	{ "discard", "DEVICE OFFSET LENGTH", 3, 0, discard_main },
	{ "held-page", "DEVICE OFFSET COMMAND...", 3, 1, held_page_main },
	{ "files-make", "FOLDER SEED", 2, 0, files_make_main },
	{ "files-compare", "FOLDER SEED", 2, 0, files_compare_main },
	{ "log-mark", "LOG", 1, 0, log_mark_main },
	{ "log-wait", "LOG MARK DEVICE ADDRESS SECONDS", 5, 0, log_wait_main },
	{ "sha256", "FILE", 1, 0, sha256_main },
	{ "sva", "GROUP [TEST]", 1, 1, sva_main },
	{ "sva-after-exec", "FD", 1, 0, sva_after_exec_main },
	{ "sha256-plain", "FILE", 1, 0, sha256_plain_main },
};

int main(int argc, char **argv)
{
	setvbuf(stdout, NULL, _IOLBF, 0);
	for (size_t i = 0; i < sizeof(verbs) / sizeof(verbs[0]); i++) {
		const struct verb *verb = &verbs[i];
		int given = argc - 2;

		if (argc < 2 || strcmp(argv[1], verb->name) != 0)
			continue;
		if (given == verb->count || (verb->open_ended && given > verb->count))
			return verb->run(given, argv + 2);
		printf("usage: %s %s\n", verb->name, verb->arguments);
		return USAGE;
	}
	printf("usage: one of these verbs\n");
	for (size_t i = 0; i < sizeof(verbs) / sizeof(verbs[0]); i++)
		printf("  %s %s\n", verbs[i].name, verbs[i].arguments);
	return USAGE;
}

void give_up(const char *what, ...)
{
	int error = errno;
	va_list arguments;

	va_start(arguments, what);
	vprintf(what, arguments);
	va_end(arguments);
	printf(": %s\n", strerror(error));
	exit(ERROR);
}

uint64_t number(const char *text)
{
	char *end;

	errno = 0;
	uint64_t value = strtoull(text, &end, 0);
	int shift = *end == 'K' ? 10 : *end == 'M' ? 20 : 0;

	if (errno || end == text || end[shift != 0] != '\0' || value > UINT64_MAX >> shift) {
		printf("%s is no number\n", text);
		exit(USAGE);
	}
	return value << shift;
}

void *pages(size_t length)
{
	void *memory = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);

	if (memory == MAP_FAILED)
		give_up("%zu bytes of memory", length);
	return memory;
}

int open_direct(const char *path)
{
	int fd = open(path, O_RDWR | O_DIRECT | O_CLOEXEC);

	if (fd < 0)
		give_up("open %s", path);
	return fd;
}

void write_all(int fd, const void *buffer, size_t length, uint64_t offset)
{
	ssize_t done = pwrite(fd, buffer, length, (off_t)offset);

	if (done < 0)
		give_up("write of %zu bytes at %llu", length, (unsigned long long)offset);
	if ((size_t)done != length) {
		errno = ENOSPC;
		give_up("write at %llu took %zd of %zu bytes", (unsigned long long)offset, done, length);
	}
}

void read_all(int fd, void *buffer, size_t length, uint64_t offset)
{
	ssize_t done = pread(fd, buffer, length, (off_t)offset);

	if (done < 0)
		give_up("read of %zu bytes at %llu", length, (unsigned long long)offset);
	if ((size_t)done != length) {
		errno = ENODATA;
		give_up("read at %llu gave %zd of %zu bytes", (unsigned long long)offset, done, length);
	}
}

uint64_t random_seed(void)
{
	uint64_t seed = 0;
	struct timespec now;

	if (getrandom(&seed, sizeof(seed), GRND_INSECURE) != (ssize_t)sizeof(seed)) {
		clock_gettime(CLOCK_MONOTONIC, &now);
		seed = (uint64_t)now.tv_nsec << 32 ^ (uint64_t)now.tv_sec ^ (uint64_t)getpid() << 20;
	}
	return seed;
}

void fill_random(void *buffer, size_t length, uint64_t seed)
{
	uint64_t *word = buffer, state = seed * 0x9E3779B97F4A7C15u | 1; /* odd, so never the generator's fixed point 0 */

	for (size_t i = 0; i < length / sizeof(*word); i++) {
		state ^= state >> 12;
		state ^= state << 25;
		state ^= state >> 27;
		word[i] = state * 0x2545F4914F6CDD1Du;
	}
}
