/* What the guest's programs share: exit codes, errors, random data, and the verbs that main.c lists. */
#ifndef GUEST_H
#define GUEST_H

#include <stddef.h>
#include <stdint.h>

/* Exit codes, the same for programs and for the scripts in checks/. */
enum outcome {
	PASS = 0,
	FAIL = 1,   /* what was checked is not so; one line on stdout says what was seen */
	USAGE = 2,
	ERROR = 3,  /* the check could not be made: a system call failed */
	SKIP = 4,   /* the device or the kernel does not offer it; stdout says what */
};

/* Prints one line "what: strerror(errno)" on stdout and exits with ERROR. */
__attribute__((noreturn, format(printf, 1, 2))) void give_up(const char *what, ...);

/* A number, decimal or 0x, with K or M behind it; exits with USAGE if it is none. */
uint64_t number(const char *text);

/* Page-aligned zeroed memory; exits with ERROR where there is none. */
void *pages(size_t length);

/* A block device (or, in tests, a file) for direct I/O; exits with ERROR. */
int open_direct(const char *path);

/* Whole transfers or exit with ERROR. */
void write_all(int fd, const void *buffer, size_t length, uint64_t offset);
void read_all(int fd, void *buffer, size_t length, uint64_t offset);

/* Different at each call, without waiting for the kernel's entropy pool: data, not secrets. */
uint64_t random_seed(void);

/* Pseudorandom bytes that depend on seed alone (xorshift64*); length is a multiple of 8. Never all zero. */
void fill_random(void *buffer, size_t length, uint64_t seed);

int bulk_main(int argc, char **argv);
int queues_main(int argc, char **argv);
int zeroes_main(int argc, char **argv);
int discard_main(int argc, char **argv);
int held_page_main(int argc, char **argv);
int files_make_main(int argc, char **argv);
int files_compare_main(int argc, char **argv);
int log_mark_main(int argc, char **argv);
int log_wait_main(int argc, char **argv);
int sva_main(int argc, char **argv);
int sva_after_exec_main(int argc, char **argv);
int sha256_main(int argc, char **argv);
int sha256_plain_main(int argc, char **argv);

#endif
