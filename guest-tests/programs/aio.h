/* Linux native AIO by its own system calls: direct I/O kept in flight by one thread, so that a queue depth is what it says. */
#ifndef AIO_H
#define AIO_H

#include <stddef.h>
#include <stdint.h>

#define AIO_MAX_DEPTH 64

struct aio {
	unsigned long context;
	int fd, depth;
	long in_flight;
};

void aio_open(struct aio *aio, int fd, int depth);
void aio_close(struct aio *aio);

/* Starts one transfer; slot (0 to depth - 1) comes back from aio_wait. A slot carries one transfer at a time. */
void aio_start(struct aio *aio, int slot, int is_write, void *buffer, size_t length, uint64_t offset);

/* The slot of a finished transfer; a failed or short one exits with ERROR. */
int aio_wait(struct aio *aio);

#endif
