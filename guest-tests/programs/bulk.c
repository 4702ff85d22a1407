/* Random data through the device and back: written in flight, made durable, caches dropped, read back, compared and hashed. */
#define _GNU_SOURCE
#include "aio.h"
#include "guest.h"
#include "sha256.h"

#include <errno.h>
#include <linux/fs.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

#define CHUNK (256u << 10)
#define DEPTH 8

static double seconds(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

/* Each chunk's data depends on the run's seed and its own place: a chunk that lands elsewhere is noticed. */
static void expect(uint8_t *buffer, uint64_t seed, uint64_t chunk)
{
	fill_random(buffer, CHUNK, seed + chunk);
}

/* Bulk DEVICE OFFSET LENGTH: prints "sha256=HEX bytes=N written=SECONDS read=SECONDS"; the hash is of what was read back. */
int bulk_main(int argc, char **argv)
{
	(void)argc;
	uint64_t offset = number(argv[1]), length = number(argv[2]), count = length / CHUNK, seed = random_seed();
	uint8_t *buffers = pages(DEPTH * CHUNK), *wanted = pages(CHUNK);
	uint64_t chunk_of[DEPTH] = { 0 };
	uint8_t done[DEPTH] = { 0 };
	int fd = open_direct(argv[0]);
	struct sha256 hash;
	struct aio aio;
	char hex[65];

	if (length == 0 || length % CHUNK || offset % 4096) {
		printf("the length is a multiple of %u, the offset of 4096\n", CHUNK);
		return USAGE;
	}
	aio_open(&aio, fd, DEPTH);
	double start = seconds();

	for (uint64_t chunk = 0; chunk < count; chunk++) {
		int slot = chunk < DEPTH ? (int)chunk : aio_wait(&aio);

		expect(buffers + (size_t)slot * CHUNK, seed, chunk);
		aio_start(&aio, slot, 1, buffers + (size_t)slot * CHUNK, CHUNK, offset + chunk * CHUNK);
	}
	while (aio.in_flight)
		aio_wait(&aio);
	if (fsync(fd))
		give_up("fsync");
	double written = seconds() - start;

	/* Direct I/O leaves nothing in the page cache; what others may have left there goes too. A plain file in tests has no BLKFLSBUF. */
	if (ioctl(fd, BLKFLSBUF, 0) && errno != ENOTTY && errno != EACCES)
		give_up("BLKFLSBUF");
	memset(buffers, 0, DEPTH * CHUNK);
	sha256_choose(0);
	sha256_init(&hash);
	start = seconds();
	uint64_t asked = 0;

	for (uint64_t chunk = 0; chunk < count; chunk++) {
		for (; asked < count && asked < chunk + DEPTH; asked++) {
			int slot = (int)(asked % DEPTH);

			done[slot] = 0;
			chunk_of[slot] = asked;
			aio_start(&aio, slot, 0, buffers + (size_t)slot * CHUNK, CHUNK, offset + asked * CHUNK);
		}
		int slot = (int)(chunk % DEPTH);

		while (!done[slot])
			done[aio_wait(&aio)] = 1;
		uint8_t *buffer = buffers + (size_t)slot * CHUNK;

		expect(wanted, seed, chunk_of[slot]);
		if (memcmp(buffer, wanted, CHUNK)) {
			size_t at = 0;

			while (buffer[at] == wanted[at])
				at++;
			printf("byte %llu read back as 0x%02x, written as 0x%02x\n",
			       (unsigned long long)(offset + chunk * CHUNK + at), buffer[at], wanted[at]);
			return FAIL;
		}
		sha256_update(&hash, buffer, CHUNK);
	}
	sha256_hex(&hash, hex);
	printf("sha256=%s bytes=%llu written=%.2f read=%.2f\n", hex, (unsigned long long)length, written, seconds() - start);
	aio_close(&aio);
	close(fd);
	return PASS;
}
