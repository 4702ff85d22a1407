/* The driver's own tests, on kernel mappings: it makes them, this only asks for one after another, of every engine. One that
 * knows no PASIDs has a translated domain, where an IOVA is no physical address; the others' is an identity. */
#define _GNU_SOURCE
#include "sva.h"

#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

static int ask(unsigned int index)
{
	int number = 0, fd;

	for (; (fd = engine_file(number)) >= 0; number++) {
		struct vdma_selftest test = { .index = index };

		if (ioctl(fd, VDMA_IOC_SELFTEST, &test))
			give_up("self-test %u of engine %d", index, number);
		close(fd);
		if (test.outcome != PASS) {
			printf("engine %d: %s\n", number, test.text);
			return (int)test.outcome;
		}
		if (!number)
			printf("%s", test.text);
	}
	printf(", on each of %d engines\n", number);
	return number ? PASS : ERROR;
}

/* The group's type of an engine, "" where sysfs does not tell. */
static void domain_of(int number, char *type, int size)
{
	char path[80];

	snprintf(path, sizeof(path), "/sys/class/misc/vioasid-dma%d/device/iommu_group/type", number);
	FILE *file = fopen(path, "re");

	type[0] = '\0';
	if (!file)
		return;
	if (fgets(type, size, file))
		type[strcspn(type, "\n")] = '\0';
	fclose(file);
}

/* Processes' engines bypass translation for the kernel's own DMA, plain ones must not. */
static int test_domains(void)
{
	char type[32];
	int number = 0, fd, plain = 0;

	for (; (fd = engine_file(number)) >= 0; number++) {
		int tagged = engine_info(fd).features & VDMA_FEATURE_PASID;

		close(fd);
		domain_of(number, type, sizeof(type));
		plain += !tagged;
		CHECK(tagged ? !strcmp(type, "identity") : !strncmp(type, "DMA", 3), "engine %d, with%s PASIDs, is in a group of type %s",
		      number, tagged ? "" : "out", type);
	}
	return passed("%d engines, %d of them in a translated domain", number, plain);
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
	{ "domains", test_domains },
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
