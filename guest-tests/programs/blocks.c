/* Write Zeroes and Dataset Management as the block layer sends them: what they cover changes, what lies beside it does not. */
#define _GNU_SOURCE
#include "guest.h"

#include <errno.h>
#include <linux/fs.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#define GUARD 4096u /* bytes on either side that must stay */

struct range {
	int fd;
	uint64_t offset, length, seed;
	uint8_t *was, *now;
};

static int prepare(struct range *range, char **argv)
{
	*range = (struct range){ .offset = number(argv[1]), .length = number(argv[2]), .seed = random_seed() };
	if (range->offset % GUARD || range->offset < GUARD || range->length % GUARD || range->length == 0) {
		printf("offset and length are multiples of %u, the offset at least that\n", GUARD);
		return USAGE;
	}
	size_t whole = range->length + 2 * GUARD;

	range->was = pages(whole);
	range->now = pages(whole);
	range->fd = open_direct(argv[0]);
	fill_random(range->was, whole, range->seed);
	write_all(range->fd, range->was, whole, range->offset - GUARD);
	return PASS;
}

static int order(struct range *range, unsigned long request, const char *name)
{
	uint64_t what[2] = { range->offset, range->length };

	if (ioctl(range->fd, request, what) == 0)
		return PASS;
	if (errno == EOPNOTSUPP || errno == ENOTTY) {
		printf("the device takes no %s\n", name);
		return SKIP;
	}
	give_up("%s of %llu bytes at %llu", name, (unsigned long long)range->length, (unsigned long long)range->offset);
}

static int guards_changed(struct range *range)
{
	size_t behind = GUARD + range->length;

	read_all(range->fd, range->now, behind + GUARD, range->offset - GUARD);
	for (size_t at = 0; at < behind + GUARD; at++) {
		if (at == GUARD)
			at = behind;
		if (range->now[at] != range->was[at]) {
			printf("byte %llu outside the range changed\n", (unsigned long long)(range->offset - GUARD + at));
			return 1;
		}
	}
	return 0;
}

static int is_zero(const uint8_t *byte, size_t length)
{
	return byte[0] == 0 && !memcmp(byte, byte + 1, length - 1);
}

/* Zeroes DEVICE OFFSET LENGTH. */
int zeroes_main(int argc, char **argv)
{
	(void)argc;
	struct range range;
	int outcome = prepare(&range, argv);

	if (outcome == PASS)
		outcome = order(&range, BLKZEROOUT, "write zeroes");
	if (outcome != PASS)
		return outcome;
	if (guards_changed(&range))
		return FAIL;
	if (!is_zero(range.now + GUARD, range.length)) {
		printf("the range does not read as zeros\n");
		return FAIL;
	}
	printf("%llu bytes read as zeros\n", (unsigned long long)range.length);
	return PASS;
}

/* Discard DEVICE OFFSET LENGTH: each block may read as zeros, as ones or as before (NVMe, Deallocate), the same at each read. */
int discard_main(int argc, char **argv)
{
	(void)argc;
	struct range range;
	int outcome = prepare(&range, argv);

	if (outcome == PASS)
		outcome = order(&range, BLKDISCARD, "discard");
	if (outcome != PASS)
		return outcome;
	if (guards_changed(&range))
		return FAIL;
	uint8_t *first = range.now + GUARD;
	uint64_t zero = 0;

	for (uint64_t at = 0; at < range.length; at += 512) {
		int ones = first[at] == 0xff && !memcmp(first + at, first + at + 1, 511);

		if (is_zero(first + at, 512))
			zero += 512;
		else if (!ones && memcmp(first + at, range.was + GUARD + at, 512)) {
			printf("byte %llu reads neither as zeros, as ones nor as before\n", (unsigned long long)(range.offset + at));
			return FAIL;
		}
	}
	read_all(range.fd, range.was, range.length, range.offset);
	if (memcmp(range.was, first, range.length)) {
		printf("a second read differs from the first\n");
		return FAIL;
	}
	printf("%llu of %llu bytes read as zeros now\n", (unsigned long long)zero, (unsigned long long)range.length);
	return PASS;
}
