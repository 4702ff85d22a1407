/* Faults as the kernel logs them: records of /dev/kmsg (Documentation/ABI/testing/dev-kmsg), one a read. */
#define _GNU_SOURCE
#include "guest.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define RECORD 8192 /* the kernel's own limit of a record handed out */

/* How an IOMMU driver words a DMA fault: what marks the record, and what stands before the address. */
struct wording {
	const char *mark, *address;
};

static const struct wording wordings[] = {
	{ "AMD-Vi: Event logged [IO_PAGE_FAULT", "address=" },
};

struct record {
	uint64_t sequence;
	char text[RECORD];
};

static int64_t milliseconds(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

/* The next record: 1 and the record, or 0 if there is none yet. Records lost to a full buffer are passed over. */
static int next(int fd, struct record *record)
{
	char raw[RECORD + 1];

	for (;;) {
		ssize_t got = read(fd, raw, RECORD);

		if (got > 0) {
			unsigned long long sequence;
			char *text;

			raw[got] = '\0';
			text = strchr(raw, ';');
			if (!text || sscanf(raw, "%*u,%llu,", &sequence) != 1)
				continue;
			record->sequence = sequence;
			text[strcspn(text, "\n")] = '\0'; /* what follows are the record's properties */
			memcpy(record->text, text + 1, strlen(text + 1) + 1);
			return 1;
		}
		if (got == 0 || errno == EAGAIN)
			return 0;
		if (errno != EPIPE && errno != EINTR)
			give_up("read the kernel's log");
	}
}

static int open_log(const char *path)
{
	int fd = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);

	if (fd < 0)
		give_up("open %s", path);
	return fd;
}

/* Log-mark LOG: prints the sequence number of the next record to come. */
int log_mark_main(int argc, char **argv)
{
	(void)argc;
	static struct record record;
	uint64_t mark = 0;
	int fd = open_log(argv[0]);

	while (next(fd, &record))
		mark = record.sequence + 1;
	printf("%llu\n", (unsigned long long)mark);
	close(fd);
	return PASS;
}

/* The driver names the device before its own name ("nvme 0000:00:04.0: AMD-Vi: ...") or within the event ("device=0000:00:04.0"). */
static int names_device(const char *text, const char *mark, const char *device)
{
	char within[64];
	size_t length = strlen(device);

	snprintf(within, sizeof(within), "device=%s ", device);
	if (strstr(mark, within))
		return 1;
	const char *before = strstr(text, device);

	return before && before < mark && (before == text || before[-1] == ' ') && before[length] == ':';
}

/* The wording that the record carries, and where its mark stands; NULL if it tells of no DMA fault. */
static const struct wording *fault_in(const char *text, const char **mark)
{
	for (size_t i = 0; i < sizeof(wordings) / sizeof(wordings[0]); i++) {
		*mark = strstr(text, wordings[i].mark);
		if (*mark)
			return &wordings[i];
	}
	return NULL;
}

/* Log-wait LOG MARK DEVICE ADDRESS SECONDS: waits for a fault of DEVICE at ADDRESS in the records from MARK on, and prints it. */
int log_wait_main(int argc, char **argv)
{
	(void)argc;
	static struct record record, other;
	uint64_t mark = number(argv[1]), address = number(argv[3]);
	int64_t end = milliseconds() + (int64_t)number(argv[4]) * 1000;
	int fd = open_log(argv[0]), others = 0;

	for (;;) {
		while (next(fd, &record)) {
			const char *where;
			const struct wording *wording = record.sequence >= mark ? fault_in(record.text, &where) : NULL;

			if (!wording)
				continue;
			const char *value = strstr(where, wording->address);

			if (value && strtoull(value + strlen(wording->address), NULL, 16) == address && names_device(record.text, where, argv[2])) {
				printf("%s\n", record.text);
				close(fd);
				return PASS;
			}
			other = record;
			others++;
		}
		int64_t left = end - milliseconds();
		struct pollfd wait = { .fd = fd, .events = POLLIN };

		if (left <= 0)
			break;
		if (poll(&wait, 1, left < 100 ? (int)left : 100) > 0 && wait.revents & POLLHUP)
			usleep(10000); /* a log without a writer, in tests: not a busy loop */
	}
	if (others)
		printf("no fault of %s at %s in %s s; the last of %d others: %s\n", argv[2], argv[3], argv[4], others, other.text);
	else
		printf("no fault of %s at %s in %s s, and no other fault either\n", argv[2], argv[3], argv[4]);
	close(fd);
	return FAIL;
}
