/* The driver's own tests, on kernel mappings: it makes them, this only asks for one after another. */
#define _GNU_SOURCE
#include "sva.h"

#include <sys/ioctl.h>
#include <unistd.h>

static int ask(unsigned int index)
{
	struct vdma_selftest test = { .index = index };
	int fd = engine_file(0);

	if (fd < 0 || ioctl(fd, VDMA_IOC_SELFTEST, &test))
		give_up("self-test %u", index);
	close(fd);
	printf("%s\n", test.text);
	return (int)test.outcome;
}

/* In the order of the driver's table (vdma_selftest.c), whose names these repeat. */
#define SELFTEST(index, name) \
	static int test_##name(void) \
	{ \
		return ask(index); \
	}
SELFTEST(0, coherent)
SELFTEST(1, streaming)
SELFTEST(2, bidirectional)
SELFTEST(3, scatter_gather)
SELFTEST(4, pool_and_page)
SELFTEST(5, operations)
SELFTEST(6, many_jobs)

static int test_no_other(void)
{
	struct vdma_selftest test = { .index = 7 };
	int fd = engine_file(0);

	CHECK(fd >= 0 && ioctl(fd, VDMA_IOC_SELFTEST, &test), "the driver has a test that is not listed here: %s", test.name);
	return passed("all of the driver's tests are listed");
}

static const struct sva_test tests[] = {
	{ "coherent", test_coherent },
	{ "streaming", test_streaming },
	{ "bidirectional", test_bidirectional },
	{ "scatter-gather", test_scatter_gather },
	{ "pool-and-page", test_pool_and_page },
	{ "operations", test_operations },
	{ "many-jobs", test_many_jobs },
	{ "all-listed", test_no_other },
};

const struct sva_group kernel_group = GROUP("kernel", tests);
