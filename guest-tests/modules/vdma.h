/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The driver's own parts: vdma_pci.c finds the device, vdma_queue.c runs its queues, vdma_file.c gives them to processes,
 * vdma_selftest.c tests kernel mappings.
 *
 * Locks, the outer first: vdma.files_lock, vdma_file.lock, the process's mmap_lock, vdma_file.doorbell_lock,
 * vdma.queues_lock. A queue belongs to whoever has claimed it, and is used under that one's lock.
 */
#ifndef VDMA_H
#define VDMA_H

#include <linux/bitmap.h>
#include <linux/io.h>
#include <linux/iommu.h>
#include <linux/kref.h>
#include <linux/list.h>
#include <linux/miscdevice.h>
#include <linux/mutex.h>
#include <linux/pci.h>
#include <linux/spinlock.h>
#include <linux/wait.h>

#include "vioasid_dma.h"
#include "vioasid_dma_regs.h"

struct vdma_queue {
	struct vdma *vdma;
	u32 number;
	bool claimed; /* under queues_lock */
	struct vdma_descriptor *ring; /* VDMA_SLOTS of them */
	struct vdma_completion *records; /* one a slot */
	dma_addr_t ring_dma, records_dma; /* unused with a process's own ring, which is in its own memory */
	u32 tail;
	u16 operands; /* VDMA_FLAG_..._PASID that jobs get */
	DECLARE_BITMAP(busy, VDMA_SLOTS); /* submitted, result not taken */
	wait_queue_head_t wait;
	atomic_t events; /* interrupts, and whatever else a waiter must look at; never reset, a waiter compares */
	int first_event;
};

struct vdma {
	struct kref refs; /* of the bound device, and one an open file */
	struct pci_dev *pdev;
	void __iomem *bar;
	struct miscdevice misc;
	char name[16];
	int id;
	struct mutex files_lock;
	struct list_head files;
	bool gone; /* set under files_lock before each file's lock was taken once: no register may be touched */
	spinlock_t queues_lock;
	u32 queue_count, vectors;
	struct vdma_queue queues[VDMA_QUEUES_MAX];
};

struct vdma_file {
	struct vdma *vdma;
	struct list_head link;
	struct mutex lock;
	struct vdma_queue *queue; /* NULL while not bound */
	struct iommu_sva *bond;
	struct mm_struct *mm; /* whose: compared only */
	u32 pasid;
	bool own_ring;
	struct address_space *mapping; /* in which doorbell pages are mapped */
	struct mutex doorbell_lock; /* within mmap_lock and within `lock`; takes neither */
	struct vdma_queue *doorbell; /* whose page may be mapped; NULL: none */
};

void vdma_put(struct vdma *vdma);

static inline u32 vdma_read(struct vdma *vdma, u32 offset)
{
	return readl(vdma->bar + offset);
}

static inline u64 vdma_read64(struct vdma *vdma, u32 offset)
{
	return readq(vdma->bar + offset);
}

/* vdma_queue.c. Claim gives NULL when all are in use; start and submit 0 or -errno. */
struct vdma_queue *vdma_queue_claim(struct vdma *vdma);
void vdma_queue_release(struct vdma_queue *queue);
int vdma_queue_start(struct vdma_queue *queue, u32 pasid);
int vdma_queue_start_own(struct vdma_queue *queue, u32 pasid, u64 ring, u32 order);
void vdma_queue_stop(struct vdma_queue *queue);
int vdma_queue_submit(struct vdma_queue *queue, const struct vdma_job *job);
void vdma_queue_ring(struct vdma_queue *queue);
bool vdma_queue_take(struct vdma_queue *queue, struct vdma_result *result);
irqreturn_t vdma_queue_interrupt(int irq, void *data);

/* vdma_file.c */
extern const struct file_operations vdma_file_operations;
void vdma_file_unbind(struct vdma_file *file);

/* vdma_selftest.c */
int vdma_selftest(struct vdma *vdma, struct vdma_selftest *test);

#endif
