// SPDX-License-Identifier: GPL-2.0
/*
 * The engine on kernel mappings: coherent memory, streaming mappings in each direction, scatter lists. Bytes are compared
 * by the CPU. A program asks for one test after another (VDMA_IOC_SELFTEST).
 */
#include <linux/dma-mapping.h>
#include <linux/dmapool.h>
#include <linux/prandom.h>
#include <linux/random.h>
#include <linux/scatterlist.h>
#include <linux/slab.h>

#include "vdma.h"

#define JOB_SECONDS 10
#define COHERENT_BYTES (256 * 1024)
#define STREAM_BYTES (64 * 1024)
#define SEGMENTS 24

enum { PASSED, FAILED, ERROR = 3, SKIPPED };

struct run {
	struct vdma_queue *queue;
	struct device *dev;
	struct vdma_selftest *test;
	struct rnd_state random;
};

static int said(struct run *run, int outcome, const char *format, ...) __printf(3, 4);

static int said(struct run *run, int outcome, const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	vsnprintf(run->test->text, sizeof(run->test->text), format, arguments);
	va_end(arguments);
	return outcome;
}

static void fill(struct run *run, void *buffer, size_t length)
{
	prandom_bytes_state(&run->random, buffer, length);
}

/* Whether `length` bytes are as wanted; says where they are not. */
static bool same(struct run *run, const u8 *got, const u8 *wanted, size_t length, const char *what)
{
	for (size_t i = 0; i < length; i++) {
		if (got[i] == wanted[i])
			continue;
		said(run, FAILED, "%s: byte %zu of %zu is %#x, not %#x", what, i, length, got[i], wanted[i]);
		return false;
	}
	return true;
}

/* Waits for one result; false, with what was said, when none comes: the queue was stopped, the test may free its memory. */
static bool ended(struct run *run, struct vdma_result *result)
{
	struct vdma_queue *queue = run->queue;
	unsigned long end = jiffies + JOB_SECONDS * HZ;

	for (;;) {
		int seen = atomic_read(&queue->events);

		smp_rmb();
		if (vdma_queue_take(queue, result))
			return true;
		if (time_after(jiffies, end)) {
			said(run, FAILED, "no job ended within %d seconds", JOB_SECONDS);
			vdma_queue_stop(queue);
			return false;
		}
		wait_event_timeout(queue->wait, atomic_read(&queue->events) != seen, end - jiffies + 1);
	}
}

static bool job(struct run *run, const struct vdma_job *job, struct vdma_result *result)
{
	int error = vdma_queue_submit(run->queue, job);

	if (error) {
		said(run, ERROR, "a job was not taken: %d", error);
		return false;
	}
	vdma_queue_ring(run->queue);
	return ended(run, result);
}

/* One job that must end well. */
static bool works(struct run *run, const struct vdma_job *wanted)
{
	struct vdma_result result;

	if (!job(run, wanted, &result))
		return false;
	if (result.status == VDMA_STATUS_SUCCESS && result.done == wanted->length)
		return true;
	said(run, FAILED, "opcode %u of %llu bytes: status %u, reason %u, %llu done, fault at %#llx", wanted->opcode,
	     wanted->length, result.status, result.reason, result.done, result.fault_address);
	return false;
}

static bool copy(struct run *run, dma_addr_t target, dma_addr_t source, size_t length)
{
	return works(run, &(struct vdma_job){ .opcode = VDMA_OP_COPY, .target = target, .source = source, .length = length });
}

/* -- the tests ----------------------------------------------------------------------------------------------------- */

static int test_coherent(struct run *run)
{
	dma_addr_t from_dma, to_dma;
	u8 *from = dma_alloc_coherent(run->dev, COHERENT_BYTES, &from_dma, GFP_KERNEL);
	u8 *to = dma_alloc_coherent(run->dev, COHERENT_BYTES, &to_dma, GFP_KERNEL);
	int outcome = ERROR;

	if (!from || !to) {
		said(run, ERROR, "no coherent memory");
		goto out;
	}
	fill(run, from, COHERENT_BYTES);
	memset(to, 0, COHERENT_BYTES);
	outcome = FAILED;
	if (copy(run, to_dma, from_dma, COHERENT_BYTES) && same(run, to, from, COHERENT_BYTES, "copy"))
		outcome = said(run, PASSED, "%d KiB copied", COHERENT_BYTES / 1024);
out:
	if (to)
		dma_free_coherent(run->dev, COHERENT_BYTES, to, to_dma);
	if (from)
		dma_free_coherent(run->dev, COHERENT_BYTES, from, from_dma);
	return outcome;
}

struct buffers {
	u8 *from, *to, *wanted;
};

static bool get(struct run *run, struct buffers *buffers)
{
	*buffers = (struct buffers){
		kmalloc(STREAM_BYTES, GFP_KERNEL), kmalloc(STREAM_BYTES, GFP_KERNEL), kmalloc(STREAM_BYTES, GFP_KERNEL)
	};
	if (!buffers->from || !buffers->to || !buffers->wanted) {
		said(run, ERROR, "no memory");
		return false;
	}
	fill(run, buffers->from, STREAM_BYTES);
	fill(run, buffers->to, STREAM_BYTES);
	memcpy(buffers->wanted, buffers->to, STREAM_BYTES);
	return true;
}

static void put(struct buffers *buffers)
{
	kfree(buffers->from);
	kfree(buffers->to);
	kfree(buffers->wanted);
}

/* TO_DEVICE and FROM_DEVICE: one mapping a transfer, at odd places and of odd lengths; what lies beside stays. */
static int test_streaming(struct run *run)
{
	static const struct {
		u32 from, to, length;
	} shapes[] = { { 0, 0, 4096 }, { 1, 0, 1 }, { 4095, 2049, 4098 }, { 511, 8193, 20000 }, { 0, 0, STREAM_BYTES } };
	struct buffers buffers;
	int outcome = FAILED;

	if (!get(run, &buffers)) {
		outcome = ERROR;
		goto out;
	}
	for (int i = 0; i < ARRAY_SIZE(shapes); i++) {
		u32 length = shapes[i].length;
		dma_addr_t from = dma_map_single(run->dev, buffers.from + shapes[i].from, length, DMA_TO_DEVICE);
		dma_addr_t to = dma_map_single(run->dev, buffers.to + shapes[i].to, length, DMA_FROM_DEVICE);
		bool mapped = !dma_mapping_error(run->dev, from) && !dma_mapping_error(run->dev, to);
		bool copied = mapped && copy(run, to, from, length);

		if (!dma_mapping_error(run->dev, to))
			dma_unmap_single(run->dev, to, length, DMA_FROM_DEVICE);
		if (!dma_mapping_error(run->dev, from))
			dma_unmap_single(run->dev, from, length, DMA_TO_DEVICE);
		if (!mapped)
			outcome = said(run, ERROR, "a buffer of %u bytes was not mapped", length);
		if (!copied)
			goto out;
		memcpy(buffers.wanted + shapes[i].to, buffers.from + shapes[i].from, length);
		if (!same(run, buffers.to, buffers.wanted, STREAM_BYTES, "copy"))
			goto out;
	}
	outcome = said(run, PASSED, "%zu shapes, none touched a byte beside", ARRAY_SIZE(shapes));
out:
	put(&buffers);
	return outcome;
}

/* BIDIRECTIONAL, with ownership going to and fro by dma_sync: the device adds to what the CPU wrote, four times. */
static int test_bidirectional(struct run *run)
{
	struct buffers buffers;
	struct vdma_result result;
	dma_addr_t address = DMA_MAPPING_ERROR;
	u64 *word, seen;
	int outcome = ERROR;

	if (!get(run, &buffers))
		goto out;
	word = (u64 *)(buffers.to + 128);
	address = dma_map_single(run->dev, buffers.to, STREAM_BYTES, DMA_BIDIRECTIONAL);
	if (dma_mapping_error(run->dev, address)) {
		said(run, ERROR, "the buffer was not mapped");
		goto out;
	}
	outcome = FAILED;
	for (u64 i = 1; i <= 4; i++) {
		dma_sync_single_for_cpu(run->dev, address, STREAM_BYTES, DMA_BIDIRECTIONAL);
		seen = *word += i << 40;
		dma_sync_single_for_device(run->dev, address, STREAM_BYTES, DMA_BIDIRECTIONAL);
		if (!job(run, &(struct vdma_job){ .opcode = VDMA_OP_FETCH_ADD, .target = address + 128, .length = 8, .value = i },
			 &result))
			goto out;
		dma_sync_single_for_cpu(run->dev, address, STREAM_BYTES, DMA_BIDIRECTIONAL);
		if (result.status != VDMA_STATUS_SUCCESS || result.result != seen || *word != seen + i) {
			said(run, FAILED, "status %u; %#llx before (%#llx), %#llx after (%#llx)", result.status, result.result, seen,
			     *word, seen + i);
			goto out;
		}
		dma_sync_single_for_device(run->dev, address, STREAM_BYTES, DMA_BIDIRECTIONAL);
	}
	dma_sync_single_for_cpu(run->dev, address, STREAM_BYTES, DMA_BIDIRECTIONAL);
	*(u64 *)(buffers.wanted + 128) = *word;
	if (same(run, buffers.to, buffers.wanted, STREAM_BYTES, "beside the word"))
		outcome = said(run, PASSED, "four rounds of CPU and device on one mapping");
out:
	if (address != DMA_MAPPING_ERROR && !dma_mapping_error(run->dev, address))
		dma_unmap_single(run->dev, address, STREAM_BYTES, DMA_BIDIRECTIONAL);
	put(&buffers);
	return outcome;
}

/* Segments of single pages, each at another offset and of another length, gathered into one buffer and scattered back. */
static int test_scatter_gather(struct run *run)
{
	struct page *pages[SEGMENTS] = {};
	struct scatterlist list[SEGMENTS], *entry;
	u8 *all = kmalloc(SEGMENTS * PAGE_SIZE, GFP_KERNEL);
	size_t total = 0, at = 0;
	dma_addr_t buffer;
	int outcome = ERROR, mapped, i;

	if (!all)
		return said(run, ERROR, "no memory");
	sg_init_table(list, SEGMENTS);
	for (i = 0; i < SEGMENTS; i++) {
		u32 offset = i * 67 % 1024, length = PAGE_SIZE - offset - i * 131 % 2048;

		pages[i] = alloc_page(GFP_KERNEL);
		if (!pages[i]) {
			said(run, ERROR, "no memory");
			goto free;
		}
		fill(run, page_address(pages[i]), PAGE_SIZE);
		sg_set_page(&list[i], pages[i], length, offset);
		total += length;
	}
	mapped = dma_map_sg(run->dev, list, SEGMENTS, DMA_BIDIRECTIONAL);
	buffer = dma_map_single(run->dev, all, total, DMA_FROM_DEVICE);
	if (!mapped || dma_mapping_error(run->dev, buffer)) {
		said(run, ERROR, "%d segments were mapped", mapped);
		goto unmap;
	}
	outcome = FAILED;
	for_each_sg(list, entry, mapped, i) {
		if (!copy(run, buffer + at, sg_dma_address(entry), sg_dma_len(entry)))
			goto unmap;
		at += sg_dma_len(entry);
	}
	if (at != total) {
		said(run, FAILED, "the mapped segments have %zu bytes of %zu", at, total);
		goto unmap;
	}
	dma_sync_single_for_cpu(run->dev, buffer, total, DMA_FROM_DEVICE);
	at = 0;
	for_each_sg(list, entry, SEGMENTS, i) {
		if (!same(run, all + at, sg_virt(entry), entry->length, "gathered"))
			goto unmap;
		at += entry->length;
	}
	for_each_sg(list, entry, mapped, i) {
		if (!works(run, &(struct vdma_job){ .opcode = VDMA_OP_FILL, .target = sg_dma_address(entry),
						    .length = sg_dma_len(entry), .value = 0x0101010101010101ull * 0x5a }))
			goto unmap;
	}
	dma_sync_sg_for_cpu(run->dev, list, SEGMENTS, DMA_BIDIRECTIONAL);
	memset(all, 0x5a, PAGE_SIZE);
	for_each_sg(list, entry, SEGMENTS, i) {
		if (!same(run, sg_virt(entry), all, entry->length, "scattered"))
			goto unmap;
	}
	outcome = said(run, PASSED, "%d segments in %d mappings, %zu bytes", SEGMENTS, mapped, total);
unmap:
	if (!dma_mapping_error(run->dev, buffer))
		dma_unmap_single(run->dev, buffer, total, DMA_FROM_DEVICE);
	if (mapped)
		dma_unmap_sg(run->dev, list, SEGMENTS, DMA_BIDIRECTIONAL);
free:
	for (i = 0; i < SEGMENTS; i++) {
		if (pages[i])
			__free_page(pages[i]);
	}
	kfree(all);
	return outcome;
}

/* Small coherent blocks and a page mapping. */
static int test_pool(struct run *run)
{
	struct dma_pool *pool = dma_pool_create("vioasid-dma", run->dev, 96, 32, 4096);
	dma_addr_t small_dma = 0, page_dma;
	struct page *page = alloc_page(GFP_KERNEL | __GFP_ZERO);
	u8 *small = pool ? dma_pool_alloc(pool, GFP_KERNEL, &small_dma) : NULL;
	int outcome = ERROR;

	if (!page || !small) {
		said(run, ERROR, "no memory");
		goto out;
	}
	fill(run, small, 96);
	page_dma = dma_map_page(run->dev, page, 1000, 96, DMA_FROM_DEVICE);
	if (dma_mapping_error(run->dev, page_dma)) {
		said(run, ERROR, "the page was not mapped");
		goto out;
	}
	outcome = copy(run, page_dma, small_dma, 96) ? PASSED : FAILED;
	dma_unmap_page(run->dev, page_dma, 96, DMA_FROM_DEVICE);
	if (outcome == PASSED && !same(run, page_address(page) + 1000, small, 96, "copy"))
		outcome = FAILED;
	if (outcome == PASSED)
		said(run, PASSED, "96 bytes from a pool to a part of a page");
out:
	if (small)
		dma_pool_free(pool, small, small_dma);
	dma_pool_destroy(pool);
	if (page)
		__free_page(page);
	return outcome;
}

/* Each operation against the CPU's own result. */
static int test_operations(struct run *run)
{
	static const u8 digits[] = "123456789";
	struct vdma_result result;
	dma_addr_t address;
	u8 *memory = dma_alloc_coherent(run->dev, PAGE_SIZE, &address, GFP_KERNEL);
	u64 *words = (u64 *)memory;
	int outcome = FAILED;

	if (!memory)
		return said(run, ERROR, "no memory");
	fill(run, memory, PAGE_SIZE);
	memcpy(memory + 2048, memory, 2048);
	memory[2048 + 1500] ^= 1;
	if (!job(run, &(struct vdma_job){ .opcode = VDMA_OP_COMPARE, .target = address, .source = address + 2048, .length = 2048 },
		 &result))
		goto out;
	if (result.status != VDMA_STATUS_DIFFERENT || result.done != 1500) {
		said(run, FAILED, "compare: status %u at byte %llu, not 1500", result.status, result.done);
		goto out;
	}
	memcpy(memory, digits, 9);
	if (!job(run, &(struct vdma_job){ .opcode = VDMA_OP_CRC32, .source = address, .length = 9 }, &result))
		goto out;
	/* the check value of CRC-32/ISO-HDLC */
	if (result.status != VDMA_STATUS_SUCCESS || result.result != 0xcbf43926) {
		said(run, FAILED, "crc32: status %u, %#llx", result.status, result.result);
		goto out;
	}
	words[0] = 5;
	words[1] = 7;
	if (!job(run, &(struct vdma_job){ .opcode = VDMA_OP_CAS, .target = address, .source = 5, .compare_high = 7, .value = 11,
					  .value_high = 13, .length = 16 }, &result))
		goto out;
	if (words[0] != 11 || words[1] != 13 || result.result != 5) {
		said(run, FAILED, "cas: status %u, memory %llu %llu, before %llu", result.status, words[0], words[1], result.result);
		goto out;
	}
	if (!job(run, &(struct vdma_job){ .opcode = VDMA_OP_SWAP, .target = address, .value = 17, .length = 8 }, &result))
		goto out;
	if (words[0] != 17 || result.result != 11) {
		said(run, FAILED, "swap: status %u, memory %llu, before %llu", result.status, words[0], result.result);
		goto out;
	}
	if (!job(run, &(struct vdma_job){ .opcode = 200, .target = address, .length = 8 }, &result))
		goto out;
	if (result.status != VDMA_STATUS_INVALID || result.reason != VDMA_REASON_OPCODE) {
		said(run, FAILED, "opcode 200: status %u, reason %u", result.status, result.reason);
		goto out;
	}
	outcome = said(run, PASSED, "compare, crc32, cas, swap, an unknown opcode");
out:
	dma_free_coherent(run->dev, PAGE_SIZE, memory, address);
	return outcome;
}

/* As many jobs as there are slots, more than the device keeps in flight, each with a result of its own. */
static int test_many(struct run *run)
{
	DECLARE_BITMAP(seen, VDMA_SLOTS) = {};
	struct vdma_result result;
	dma_addr_t address;
	u32 *words = dma_alloc_coherent(run->dev, VDMA_SLOTS * 8, &address, GFP_KERNEL);
	int outcome = FAILED, error = 0;
	u32 i;

	if (!words)
		return said(run, ERROR, "no memory");
	memset(words, 0, VDMA_SLOTS * 8);
	for (i = 0; i < VDMA_SLOTS && !error; i++)
		error = vdma_queue_submit(run->queue, &(struct vdma_job){ .opcode = VDMA_OP_FILL, .target = address + i * 8,
									  .length = 4, .value = i + 1, .cookie = i });
	vdma_queue_ring(run->queue);
	if (error) {
		said(run, FAILED, "job %u was not taken: %d", i, error);
		goto out;
	}
	for (i = 0; i < VDMA_SLOTS; i++) {
		if (!ended(run, &result))
			goto out;
		if (result.status != VDMA_STATUS_SUCCESS || result.cookie >= VDMA_SLOTS || __test_and_set_bit(result.cookie, seen)) {
			said(run, FAILED, "result %u: status %u, cookie %u", i, result.status, result.cookie);
			goto out;
		}
	}
	for (i = 0; i < VDMA_SLOTS * 2; i++) {
		u32 wanted = i % 2 ? 0 : i / 2 + 1;

		if (words[i] != wanted) {
			said(run, FAILED, "word %u is %#x, not %#x", i, words[i], wanted);
			goto out;
		}
	}
	outcome = said(run, PASSED, "%d jobs at once", VDMA_SLOTS);
out:
	dma_free_coherent(run->dev, VDMA_SLOTS * 8, words, address);
	return outcome;
}

static const struct {
	const char *name;
	int (*run)(struct run *run);
} tests[] = {
	{ "coherent", test_coherent },
	{ "streaming", test_streaming },
	{ "bidirectional", test_bidirectional },
	{ "scatter-gather", test_scatter_gather },
	{ "pool-and-page", test_pool },
	{ "operations", test_operations },
	{ "many-jobs", test_many },
};

/* Each test has a queue of its own. */
int vdma_selftest(struct vdma *vdma, struct vdma_selftest *test)
{
	struct run run = { .dev = &vdma->pdev->dev, .test = test };
	int error;

	if (test->index >= ARRAY_SIZE(tests))
		return -ENOENT;
	strscpy(test->name, tests[test->index].name);
	run.queue = vdma_queue_claim(vdma);
	if (!run.queue)
		return -ENOSPC;
	prandom_seed_state(&run.random, get_random_u64());
	error = vdma_queue_start(run.queue, IOMMU_PASID_INVALID);
	if (!error) {
		test->outcome = tests[test->index].run(&run);
		vdma_queue_stop(run.queue);
	}
	vdma_queue_release(run.queue);
	return error;
}
