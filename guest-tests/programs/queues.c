/* Transfers of one size at one queue depth, in shuffled order, from buffers that start anywhere in a page. */
#define _GNU_SOURCE
#include "aio.h"
#include "guest.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define SECTOR 512u
#define PAGE 4096u

static void shuffle(uint32_t *order, uint32_t count, uint64_t seed)
{
	for (uint32_t i = 0; i < count; i++)
		order[i] = i;
	for (uint32_t i = count - 1; i > 0; i--) {
		uint32_t other;

		seed = seed * 6364136223846793005u + 1442695040888963407u;
		other = (uint32_t)(seed >> 33) % (i + 1);
		uint32_t swap = order[i];

		order[i] = order[other];
		order[other] = swap;
	}
}

/* Each slot's buffer starts at another sector of its page, so the first entry of an address list carries an offset. */
static uint8_t *buffer_of(uint8_t *memory, int slot, size_t size)
{
	return memory + (size_t)slot * (size + PAGE) + (size_t)slot % (PAGE / SECTOR) * SECTOR;
}

static uint32_t verify(const uint8_t *buffer, uint8_t *wanted, size_t size, uint64_t seed, uint32_t block)
{
	fill_random(wanted, size, seed + block);
	if (!memcmp(buffer, wanted, size))
		return 0;
	size_t at = 0;

	while (buffer[at] == wanted[at])
		at++;
	printf("transfer %u of %zu bytes: byte %zu read back as 0x%02x, written as 0x%02x\n", block, size, at, buffer[at], wanted[at]);
	return 1;
}

/* Queues DEVICE OFFSET DEPTH SIZE COUNT: COUNT transfers of SIZE bytes written, then read in another order and compared. */
int queues_main(int argc, char **argv)
{
	(void)argc;
	uint64_t offset = number(argv[1]), size = number(argv[3]), count = number(argv[4]), seed = random_seed();
	int depth = (int)number(argv[2]);

	if (size == 0 || size % SECTOR || offset % SECTOR || count == 0 || count > 1 << 20) {
		printf("size and offset are multiples of %u, the count is 1 to 1048576\n", SECTOR);
		return USAGE;
	}
	if (depth < 1 || depth > AIO_MAX_DEPTH) {
		printf("a queue depth is 1 to %d\n", AIO_MAX_DEPTH);
		return USAGE;
	}
	uint8_t *memory = pages((size_t)depth * (size + PAGE) + PAGE), *wanted = pages(size);
	uint32_t *order = pages(count * sizeof(*order)), block_of[AIO_MAX_DEPTH], wrong = 0;
	int fd = open_direct(argv[0]);
	struct aio aio;

	aio_open(&aio, fd, depth);
	for (int is_write = 1; is_write >= 0; is_write--) {
		shuffle(order, (uint32_t)count, seed + (uint64_t)is_write);
		for (uint32_t i = 0; i < count || aio.in_flight; i++) {
			int slot = (int)i;

			if (i >= (uint32_t)depth || i >= count) {
				slot = aio_wait(&aio);
				if (!is_write)
					wrong += verify(buffer_of(memory, slot, size), wanted, size, seed, block_of[slot]);
			}
			if (i >= count)
				continue;
			uint8_t *buffer = buffer_of(memory, slot, size);

			block_of[slot] = order[i];
			if (is_write)
				fill_random(buffer, size, seed + order[i]);
			else
				memset(buffer, 0, size);
			aio_start(&aio, slot, is_write, buffer, size, offset + order[i] * size);
		}
	}
	aio_close(&aio);
	close(fd);
	if (wrong == 0)
		printf("%llu transfers of %llu bytes, %d in flight\n", (unsigned long long)count, (unsigned long long)size, depth);
	return wrong ? FAIL : PASS;
}
