/* A page that a device has just written and may no longer reach: held while a command runs, then looked at again. */
#define _GNU_SOURCE
#include "guest.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096u
#define PRESENT (1ull << 63)          /* Documentation/admin-guide/mm/pagemap.rst: bit 63 page present, bits 0-54 its frame */
#define FRAME ((1ull << 55) - 1)
#define FLUSH_WAIT_US 100000          /* lazy unmapping flushes its queue every 10 ms */

/* Where the page lies in guest memory; 0 where the kernel does not tell (not root). */
static uint64_t physical(const void *page)
{
	uint64_t entry = 0;
	int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);

	if (fd < 0 || pread(fd, &entry, sizeof(entry), (off_t)((uintptr_t)page / PAGE * sizeof(entry))) != (ssize_t)sizeof(entry))
		give_up("/proc/self/pagemap");
	close(fd);
	return entry & PRESENT ? (entry & FRAME) * PAGE : 0;
}

/* Held-page DEVICE OFFSET COMMAND...: reads one page from OFFSET, runs COMMAND with HELD_GPA, HELD_OFFSET and HELD_LENGTH in its
 * environment once the mapping of the transfer is gone, and compares. COMMAND's own exit code comes first if it is not 0. */
int held_page_main(int argc, char **argv)
{
	(void)argc;
	uint64_t offset = number(argv[1]), seed = random_seed();
	uint8_t *page = pages(PAGE), *wanted = pages(PAGE);
	int fd = open_direct(argv[0]), status;
	char text[32];

	if (mlock(page, PAGE))
		give_up("mlock");
	fill_random(wanted, PAGE, seed);
	write_all(fd, wanted, PAGE, offset);
	read_all(fd, page, PAGE, offset);
	uint64_t gpa = physical(page);

	snprintf(text, sizeof(text), "0x%llx", (unsigned long long)gpa);
	setenv("HELD_GPA", text, 1);
	snprintf(text, sizeof(text), "%llu", (unsigned long long)offset);
	setenv("HELD_OFFSET", text, 1);
	snprintf(text, sizeof(text), "%u", PAGE);
	setenv("HELD_LENGTH", text, 1);
	usleep(FLUSH_WAIT_US);

	pid_t child = fork();

	if (child < 0)
		give_up("fork");
	if (child == 0) {
		madvise(page, PAGE, MADV_DONTNEED); /* the child's copy of the mapping goes, so that the page stays ours */
		execvp(argv[2], argv + 2);
		give_up("run %s", argv[2]);
	}
	if (waitpid(child, &status, 0) != child)
		give_up("waitpid");
	if (memcmp(page, wanted, PAGE)) {
		size_t at = 0;

		while (page[at] == wanted[at])
			at++;
		printf("the page at 0x%llx changed from byte %zu on: 0x%02x instead of 0x%02x\n", (unsigned long long)gpa, at, page[at],
		       wanted[at]);
		return FAIL;
	}
	if (physical(page) != gpa) {
		printf("the page moved from 0x%llx while it was held\n", (unsigned long long)gpa);
		return ERROR;
	}
	if (!WIFEXITED(status))
		return ERROR;
	return WEXITSTATUS(status);
}
