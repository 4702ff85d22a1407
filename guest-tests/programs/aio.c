/* Linux native AIO: io_setup(2), io_submit(2), io_getevents(2), io_destroy(2), which the C library does not wrap. */
#define _GNU_SOURCE
#include "aio.h"

#include "guest.h"

#include <errno.h>
#include <linux/aio_abi.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define WAIT_SECONDS 40 /* longer than the NVMe driver's own time limit for a command, so that its message comes first */

static size_t lengths[AIO_MAX_DEPTH];

void aio_open(struct aio *aio, int fd, int depth)
{
	if (depth < 1 || depth > AIO_MAX_DEPTH) {
		printf("a queue depth is 1 to %d\n", AIO_MAX_DEPTH);
		exit(USAGE);
	}
	*aio = (struct aio){ .fd = fd, .depth = depth };
	if (syscall(SYS_io_setup, depth, &aio->context) < 0)
		give_up("io_setup with depth %d", depth);
}

void aio_close(struct aio *aio)
{
	syscall(SYS_io_destroy, aio->context);
}

void aio_start(struct aio *aio, int slot, int is_write, void *buffer, size_t length, uint64_t offset)
{
	struct iocb command = {
		.aio_data = (uint64_t)slot,
		.aio_lio_opcode = is_write ? IOCB_CMD_PWRITE : IOCB_CMD_PREAD,
		.aio_fildes = (uint32_t)aio->fd,
		.aio_buf = (uintptr_t)buffer,
		.aio_nbytes = length,
		.aio_offset = (int64_t)offset,
	};
	struct iocb *commands[] = { &command };

	lengths[slot] = length;
	if (syscall(SYS_io_submit, aio->context, 1, commands) != 1)
		give_up("io_submit of %zu bytes at %llu", length, (unsigned long long)offset);
	aio->in_flight++;
}

int aio_wait(struct aio *aio)
{
	struct timespec limit = { .tv_sec = WAIT_SECONDS };
	struct io_event event;
	long got = syscall(SYS_io_getevents, aio->context, 1, 1, &event, &limit);

	if (got < 0)
		give_up("io_getevents");
	if (got == 0) {
		errno = ETIMEDOUT;
		give_up("%ld transfers in flight did not finish", aio->in_flight);
	}
	aio->in_flight--;
	int slot = (int)event.data;

	if (event.res != (int64_t)lengths[slot]) {
		errno = event.res < 0 ? (int)-event.res : EIO;
		give_up("a transfer of %zu bytes ended with %lld", lengths[slot], (long long)event.res);
	}
	return slot;
}
