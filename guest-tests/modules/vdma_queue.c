// SPDX-License-Identifier: GPL-2.0
/* A queue: ring and records in coherent memory, jobs in, results out. */
#include <linux/dma-mapping.h>
#include <linux/iopoll.h>

#include "vdma.h"

#define RING_ORDER 8
#define STOP_US (2 * USEC_PER_SEC) /* a device that does not stop within is broken */
#define ANSWER_US (20 * USEC_PER_SEC) /* the IOMMU answers page requests itself when the kernel has not within 10 s */

static_assert(VDMA_SLOTS == 1 << RING_ORDER);
static_assert(sizeof(struct vdma_descriptor) == VDMA_DESCRIPTOR_SIZE);
static_assert(sizeof(struct vdma_completion) == VDMA_COMPLETION_SIZE);

static void queue_write(struct vdma_queue *queue, u32 offset, u32 value)
{
	writel(value, queue->vdma->bar + VDMA_QUEUE(queue->number) + offset);
}

static u32 queue_read(struct vdma_queue *queue, u32 offset)
{
	return vdma_read(queue->vdma, VDMA_QUEUE(queue->number) + offset);
}

/* A queue that nobody else has; it is not started, and has neither ring nor records. */
struct vdma_queue *vdma_queue_claim(struct vdma *vdma)
{
	struct vdma_queue *queue = NULL;

	spin_lock(&vdma->queues_lock);
	for (u32 i = 0; i < vdma->queue_count && !queue; i++) {
		if (!vdma->queues[i].claimed) {
			queue = &vdma->queues[i];
			queue->claimed = true;
		}
	}
	spin_unlock(&vdma->queues_lock);
	return queue;
}

void vdma_queue_release(struct vdma_queue *queue)
{
	spin_lock(&queue->vdma->queues_lock);
	queue->claimed = false;
	spin_unlock(&queue->vdma->queues_lock);
}

static int queue_run(struct vdma_queue *queue, u32 control, u32 pasid, u64 ring, u32 order)
{
	struct device *dev = &queue->vdma->pdev->dev;
	u32 status;

	queue->tail = 0;
	queue->operands = control & VDMA_CONTROL_PASID ? VDMA_FLAG_SOURCE_PASID | VDMA_FLAG_TARGET_PASID : 0;
	queue->first_event = atomic_read(&queue->events);
	bitmap_zero(queue->busy, VDMA_SLOTS);
	queue_write(queue, VDMA_Q_CONTROL, control);
	queue_write(queue, VDMA_Q_PASID, pasid);
	writeq(ring, queue->vdma->bar + VDMA_QUEUE(queue->number) + VDMA_Q_RING);
	queue_write(queue, VDMA_Q_ORDER, order);
	queue_write(queue, VDMA_Q_VECTOR, queue->number % queue->vdma->vectors);
	queue_write(queue, VDMA_Q_COMMAND, VDMA_COMMAND_START);
	status = queue_read(queue, VDMA_Q_STATUS);
	if ((status & VDMA_STATE_MASK) == VDMA_STATE_RUNNING)
		return 0;
	dev_dbg(dev, "queue %u did not start with PASID %#x: status %#x\n", queue->number, pasid, status);
	vdma_queue_stop(queue);
	return status >> VDMA_ERROR_SHIFT == VDMA_ERROR_SETTING ? -EINVAL : -EIO;
}

/* `pasid`: of the addresses that jobs use; IOMMU_PASID_INVALID: none, they are those of the DMA API. */
int vdma_queue_start(struct vdma_queue *queue, u32 pasid)
{
	struct device *dev = &queue->vdma->pdev->dev;
	bool tagged = pasid != IOMMU_PASID_INVALID;

	queue->ring = dma_alloc_coherent(dev, VDMA_SLOTS * sizeof(*queue->ring), &queue->ring_dma, GFP_KERNEL);
	queue->records = dma_alloc_coherent(dev, VDMA_SLOTS * sizeof(*queue->records), &queue->records_dma, GFP_KERNEL);
	if (!queue->ring || !queue->records) {
		vdma_queue_stop(queue);
		return -ENOMEM;
	}
	/* UNTAGGED: ring and records are the kernel's. Processes write neither, their operands are tagged by us. */
	return queue_run(queue, VDMA_CONTROL_UNTAGGED | (tagged ? VDMA_CONTROL_PASID : 0), tagged ? pasid : 0, queue->ring_dma,
			 RING_ORDER);
}

/* A ring that the process writes itself: nothing that it says there is an address without its PASID. -EINVAL: no ring. */
int vdma_queue_start_own(struct vdma_queue *queue, u32 pasid, u64 ring, u32 order)
{
	return queue_run(queue, VDMA_CONTROL_PASID | VDMA_CONTROL_RING_PASID, pasid, ring, order);
}

/* What the device has asked and the kernel has not answered yet: the kernel holds on to the process meanwhile. */
static void queue_answered(struct vdma_queue *queue)
{
	struct vdma *vdma = queue->vdma;
	u32 left;

	if (read_poll_timeout(vdma_read, left, !left, 1000, ANSWER_US, false, vdma, VDMA_QUEUE(queue->number) + VDMA_Q_UNANSWERED))
		dev_err(&vdma->pdev->dev, "queue %u: %u page requests were never answered\n", queue->number, left);
	/* One that the IOMMU has answered in the kernel's place may still be in its hands. */
	iopf_queue_flush_dev(&vdma->pdev->dev);
}

/* After this the device does no DMA for the queue, with its PASID or without, and its PASID may be given back. */
void vdma_queue_stop(struct vdma_queue *queue)
{
	struct vdma *vdma = queue->vdma;
	struct device *dev = &vdma->pdev->dev;
	u32 status;

	queue_write(queue, VDMA_Q_COMMAND, VDMA_COMMAND_ABORT);
	if (read_poll_timeout(vdma_read, status, (status & VDMA_STATE_MASK) == VDMA_STATE_DISABLED, 1000, STOP_US, false, vdma,
			      VDMA_QUEUE(queue->number) + VDMA_Q_STATUS)) {
		dev_err(dev, "queue %u does not stop (status %#x): resetting the device\n", queue->number, status);
		writel(VDMA_RESET, vdma->bar + VDMA_REG_RESET);
		vdma_read(vdma, VDMA_REG_ID); /* the write is posted, a read is not */
	}
	if (queue->operands)
		queue_answered(queue);
	if (queue->records)
		dma_free_coherent(dev, VDMA_SLOTS * sizeof(*queue->records), queue->records, queue->records_dma);
	if (queue->ring)
		dma_free_coherent(dev, VDMA_SLOTS * sizeof(*queue->ring), queue->ring, queue->ring_dma);
	queue->ring = NULL;
	queue->records = NULL;
	atomic_inc(&queue->events);
	wake_up_all(&queue->wait);
}

/* Puts one job into the ring; the device sees it with the next vdma_queue_ring(). */
int vdma_queue_submit(struct vdma_queue *queue, const struct vdma_job *job)
{
	const u16 allowed = VDMA_FLAG_FENCE | VDMA_FLAG_NO_PAGE_REQUESTS;
	struct vdma_descriptor *descriptor = &queue->ring[queue->tail % VDMA_SLOTS];
	unsigned long slot = find_first_zero_bit(queue->busy, VDMA_SLOTS);

	if (job->flags & ~allowed || job->reserved || job->reserved2)
		return -EINVAL;
	if (slot == VDMA_SLOTS)
		return -EAGAIN;
	/* A ring slot is free again once fetched: at most as many descriptors as busy slots were not. */
	*descriptor = (struct vdma_descriptor){
		.opcode = job->opcode,
		.flags = job->flags | VDMA_FLAG_COMPLETION | VDMA_FLAG_INTERRUPT | queue->operands,
		.tag = job->cookie,
		.completion = queue->records_dma + slot * sizeof(*queue->records),
		.target = job->target,
		.source = job->source,
		.length = job->length,
		.value = job->value,
		.value_high = job->value_high,
		.compare_high = job->compare_high,
	};
	memset(&queue->records[slot], 0, sizeof(*queue->records));
	__set_bit(slot, queue->busy);
	queue->tail++;
	return 0;
}

void vdma_queue_ring(struct vdma_queue *queue)
{
	/* writel orders the descriptors before it */
	writel(queue->tail, queue->vdma->bar + VDMA_DOORBELL(queue->number) + VDMA_DB_TAIL);
}

/* One result that nobody has taken; false when no job has ended. */
bool vdma_queue_take(struct vdma_queue *queue, struct vdma_result *result)
{
	unsigned long slot;

	for_each_set_bit(slot, queue->busy, VDMA_SLOTS) {
		struct vdma_completion *record = &queue->records[slot];

		/* the device writes the first 8 bytes last */
		if (smp_load_acquire(&record->status) == VDMA_STATUS_NONE)
			continue;
		*result = (struct vdma_result){
			.cookie = record->tag,
			.status = record->status,
			.reason = record->reason,
			.access = record->access,
			.done = record->done,
			.result = record->result,
			.fault_address = record->fault_address,
		};
		__clear_bit(slot, queue->busy);
		return true;
	}
	return false;
}

/* One vector may serve several queues: each that has it is looked at. */
irqreturn_t vdma_queue_interrupt(int irq, void *data)
{
	struct vdma_queue *first = data;
	struct vdma *vdma = first->vdma;

	for (u32 i = first->number; i < vdma->queue_count; i += vdma->vectors) {
		atomic_inc(&vdma->queues[i].events);
		wake_up_all(&vdma->queues[i].wait);
	}
	return IRQ_HANDLED;
}
