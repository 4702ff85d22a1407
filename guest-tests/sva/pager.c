/* Files whose pages come late, or never: a pager in user space, a file system of one file by way of /dev/fuse. */
#define _GNU_SOURCE
#include "sva.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define FOLDER "/tmp/sva-pager"
#define PAGES ((size_t)16)
#define ROOT_NODE 1
#define FILE_NODE 2
#define REQUEST (FUSE_MIN_READ_BUFFER + PAGE)

/* Shared with the pager's process. */
struct pager {
	pid_t pid;
	_Atomic int delay_ms, hold; /* hold: no page is brought until it is 0 again */
	_Atomic int asked;
	uint8_t content[PAGES * PAGE];
};

static void reply(int fd, uint64_t unique, int error, const void *data, size_t length)
{
	uint8_t buffer[sizeof(struct fuse_out_header) + PAGE];
	struct fuse_out_header header = { .len = (uint32_t)(sizeof(header) + length), .error = -error, .unique = unique };

	memcpy(buffer, &header, sizeof(header));
	if (length)
		memcpy(buffer + sizeof(header), data, length);
	if (write(fd, buffer, header.len) < 0)
		errno = 0; /* who asked has gone */
}

static struct fuse_attr attributes(uint64_t node)
{
	return (struct fuse_attr){
		.ino = node, .size = PAGES * PAGE, .mode = node == ROOT_NODE ? S_IFDIR | 0755 : S_IFREG | 0644, .nlink = 1
	};
}

static void read_page(struct pager *pager, int fd, const struct fuse_in_header *header, const struct fuse_read_in *in)
{
	size_t length = in->size < PAGE ? in->size : PAGE;

	pager->asked++;
	sleep_ms((unsigned int)pager->delay_ms);
	while (pager->hold)
		sleep_ms(1);
	if (in->offset >= sizeof(pager->content))
		length = 0;
	reply(fd, header->unique, 0, pager->content + (length ? in->offset : 0), length);
}

/* Linux, include/uapi/linux/fuse.h: as much of it as one file that is read takes. */
static void serve(struct pager *pager, int fd)
{
	static uint8_t request[REQUEST];
	const struct fuse_in_header *header = (const void *)request;
	const void *argument = request + sizeof(*header);

	while (read(fd, request, sizeof(request)) >= (ssize_t)sizeof(*header)) {
		switch (header->opcode) {
		case FUSE_INIT: {
			/* no read-ahead: a page a request */
			struct fuse_init_out out = { .major = FUSE_KERNEL_VERSION, .minor = FUSE_KERNEL_MINOR_VERSION, .max_write = PAGE };
			reply(fd, header->unique, 0, &out, sizeof(out));
			break;
		}
		case FUSE_LOOKUP: {
			struct fuse_entry_out out = { .nodeid = FILE_NODE, .entry_valid = 1000, .attr_valid = 1000, .attr = attributes(FILE_NODE) };
			reply(fd, header->unique, 0, &out, sizeof(out));
			break;
		}
		case FUSE_GETATTR: {
			struct fuse_attr_out out = { .attr_valid = 1000, .attr = attributes(header->nodeid) };
			reply(fd, header->unique, 0, &out, sizeof(out));
			break;
		}
		case FUSE_OPEN: {
			struct fuse_open_out out = { .fh = 1 };
			reply(fd, header->unique, 0, &out, sizeof(out));
			break;
		}
		case FUSE_READ:
			read_page(pager, fd, header, argument);
			break;
		case FUSE_RELEASE:
			reply(fd, header->unique, 0, NULL, 0);
			break;
		case FUSE_FORGET:
		case FUSE_BATCH_FORGET:
		case FUSE_INTERRUPT:
			break; /* these want no reply */
		default:
			reply(fd, header->unique, ENOSYS, NULL, 0);
		}
	}
	exit(PASS);
}

/* A pager at work on FOLDER, and its file mapped; exits with SKIP where the kernel has no FUSE. */
static uint8_t *start(struct pager **pager, int delay_ms)
{
	int fd = open("/dev/fuse", O_RDWR | O_CLOEXEC);
	char options[80];

	if (fd < 0)
		exit(skipped("no /dev/fuse: the kernel has not its module here"));
	*pager = mmap(NULL, sizeof(**pager), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (*pager == MAP_FAILED)
		give_up("shared memory");
	(*pager)->delay_ms = delay_ms;
	fill_random((*pager)->content, sizeof((*pager)->content), random_seed());
	mkdir(FOLDER, 0700);
	umount2(FOLDER, MNT_DETACH); /* of a test that did not come to its end */
	snprintf(options, sizeof(options), "fd=%d,rootmode=40000,user_id=0,group_id=0", fd);
	if (mount("sva", FOLDER, "fuse", MS_NOSUID | MS_NODEV, options))
		give_up("mount " FOLDER);
	pid_t child = fork();

	if (child < 0)
		give_up("fork");
	if (child == 0)
		serve(*pager, fd);
	(*pager)->pid = child;
	close(fd);
	int file = open(FOLDER "/file", O_RDONLY | O_CLOEXEC);

	if (file < 0)
		give_up("open the pager's file");
	uint8_t *mapped = map_file(file, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE);

	close(file);
	madvise(mapped, PAGES * PAGE, MADV_RANDOM);
	return mapped;
}

static void wait_until_asked(struct pager *pager)
{
	for (int waited = 0; !pager->asked; waited++) {
		if (waited > WAIT_MS) {
			printf("the pager was never asked for a page\n");
			exit(FAIL);
		}
		sleep_ms(1);
	}
}

static int stop(struct pager *pager, int outcome)
{
	kill(pager->pid, SIGKILL);
	waitpid(pager->pid, NULL, 0);
	umount2(FOLDER, MNT_DETACH);
	return outcome;
}

/* A job of one queue waits for the pager, those of another go on. */
static int slow(struct pager *pager, uint8_t *mapped)
{
	struct engine waits = engine_open(0), goes_on = engine_open(0);
	uint8_t *target = fresh(PAGES * PAGE), *source = random_pages(PAGE), *copy = fresh(PAGE);
	struct vdma_job job = copy_job(target, mapped, PAGES * PAGE);
	struct vdma_wait look = { .count = 1 };
	struct vdma_result result;
	unsigned int meanwhile = 0;
	double begin = now_ms();

	look.results = (uintptr_t)&result;
	submit(&waits, &job, 1);
	for (;;) {
		if (ioctl(waits.fd, VDMA_IOC_WAIT, &look))
			give_up("look for the job");
		if (look.taken)
			break;
		TRY(copies(&goes_on, copy, source, PAGE, "a job beside"));
		meanwhile++;
	}
	begin = now_ms() - begin;
	CHECK(result.status == VDMA_STATUS_SUCCESS, "status %u, reason %u", result.status, result.reason);
	TRY(same(target, pager->content, PAGES * PAGE, "the pager's pages"));
	/* a page of the file is written: the device gets a copy of its own, of what the pager brought */
	TRY(succeeded(&waits, fill_job(mapped + 3 * PAGE + 8, 5, 8), "a write to the pager's file, mapped private"));
	CHECK(!memcmp(mapped + 3 * PAGE, pager->content + 3 * PAGE, 8) && *(uint64_t *)(mapped + 3 * PAGE + 8) == 5, "its page");
	CHECK(meanwhile >= 3, "%u jobs beside in %.0f ms", meanwhile, begin);
	return passed("%zu pages, each %d ms late, in %.0f ms; %u jobs of another queue meanwhile", PAGES, pager->delay_ms, begin,
		      meanwhile);
}

static int test_slow_pager(void)
{
	struct pager *pager;
	uint8_t *mapped = start(&pager, 20);

	return stop(pager, slow(pager, mapped));
}

/* The pager dies with the page owed: the kernel answers "invalid". */
static int test_pager_gone(void)
{
	struct pager *pager;
	uint8_t *mapped = start(&pager, 0), *target = random_pages(PAGE), *before = fresh(PAGE);
	struct engine engine = engine_open(0);
	struct vdma_job job = copy_job(target, mapped + 2 * PAGE, PAGE);
	struct vdma_result result;

	memcpy(before, target, PAGE);
	pager->hold = 1;
	submit(&engine, &job, 1);
	wait_until_asked(pager);
	stop(pager, PASS);
	take(&engine, &result, 1, 1);
	CHECK(result.status == VDMA_STATUS_FAULT && result.fault_address == (uintptr_t)mapped + 2 * PAGE, "status %u, fault at %#llx",
	      result.status, (unsigned long long)result.fault_address);
	TRY(same(target, before, PAGE, "the target of a job without a source"));
	TRY(succeeded(&engine, fill_job(target, 0, PAGE), "the queue afterwards"));
	return passed("a fault at the page that was owed");
}

/* A process dies while the kernel resolves its device's page request, which takes until the pager brings the page. */
static int killed(struct pager *pager, uint8_t *mapped)
{
	uint8_t *source = random_pages(PAGE), *target = fresh(PAGE);

	pager->hold = 1;
	pid_t child = fork();

	if (child < 0)
		give_up("fork");
	if (child == 0) {
		struct engine engine = engine_open(0);

		run(&engine, copy_job(target, mapped, PAGES * PAGE));
		exit(FAIL);
	}
	wait_until_asked(pager);
	kill(child, SIGKILL);
	sleep_ms(100);
	/* another process is served meanwhile */
	struct engine engine = engine_open(0);

	TRY(copies(&engine, target, source, PAGE, "another process's copy"));
	pager->hold = 0;
	if (waitpid(child, NULL, 0) != child)
		give_up("waitpid");
	TRY(copies(&engine, target, source, PAGE, "another process's copy afterwards"));
	return passed("its process ended once the page had come, another's job went on before");
}

static int test_kill_while_paging(void)
{
	struct pager *pager;
	uint8_t *mapped = start(&pager, 0);

	return stop(pager, killed(pager, mapped));
}

static const struct sva_test tests[] = {
	{ "slow-pager", test_slow_pager },
	{ "pager-gone", test_pager_gone },
	{ "kill-while-paging", test_kill_while_paging },
};

const struct sva_group pager_group = GROUP("pager", tests);
