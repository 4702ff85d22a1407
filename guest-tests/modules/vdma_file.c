// SPDX-License-Identifier: GPL-2.0
/*
 * /dev/vioasid-dmaN: a queue for a process, in its own addresses.
 *
 * A process may die at any point: its address space goes first (the device's jobs then fault, and the IOMMU core answers
 * their page requests with "invalid"), its files after that. So what stops the queue is the file's release.
 */
#include <linux/fs.h>
#include <linux/mm.h>
#include <linux/sched/mm.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#include "vdma.h"

static int vdma_open(struct inode *inode, struct file *filp)
{
	/* misc_open() left the device here, and holds off misc_deregister() meanwhile */
	struct vdma *vdma = container_of(filp->private_data, struct vdma, misc);
	struct vdma_file *file = kzalloc(sizeof(*file), GFP_KERNEL);

	if (!file)
		return -ENOMEM;
	mutex_init(&file->lock);
	mutex_init(&file->doorbell_lock);
	file->mapping = filp->f_mapping;
	kref_get(&vdma->refs);
	file->vdma = vdma;
	mutex_lock(&vdma->files_lock);
	list_add(&file->link, &vdma->files);
	mutex_unlock(&vdma->files_lock);
	filp->private_data = file;
	return nonseekable_open(inode, filp);
}

/* From now on nobody reaches the doorbell page of the file's queue, which may be another's next. */
static void vdma_close_doorbell(struct vdma_file *file)
{
	struct vdma_queue *queue;

	mutex_lock(&file->doorbell_lock);
	queue = file->doorbell;
	file->doorbell = NULL;
	mutex_unlock(&file->doorbell_lock);
	/* what was mapped before is taken away, what faults from here on finds none */
	if (queue)
		unmap_mapping_range(file->mapping, (loff_t)queue->number << PAGE_SHIFT, PAGE_SIZE, 1);
}

/* First the device stops, then the PASID goes: it may be another process's at once. */
void vdma_file_unbind(struct vdma_file *file)
{
	struct vdma_queue *queue = file->queue;

	if (!queue)
		return;
	file->queue = NULL;
	vdma_close_doorbell(file);
	vdma_queue_stop(queue);
	iommu_sva_unbind_device(file->bond);
	mmdrop(file->mm);
	vdma_queue_release(queue);
}

static int vdma_release(struct inode *inode, struct file *filp)
{
	struct vdma_file *file = filp->private_data;

	mutex_lock(&file->lock);
	vdma_file_unbind(file);
	mutex_unlock(&file->lock);
	mutex_lock(&file->vdma->files_lock);
	list_del(&file->link);
	mutex_unlock(&file->vdma->files_lock);
	vdma_put(file->vdma);
	kfree(file);
	return 0;
}

static int vdma_bind(struct vdma_file *file, struct vdma_bind __user *argument)
{
	struct vdma *vdma = file->vdma;
	struct vdma_bind bind;
	struct vdma_queue *queue;
	struct iommu_sva *bond;
	int error;

	if (file->queue)
		return -EBUSY;
	if (copy_from_user(&bind, argument, sizeof(bind)))
		return -EFAULT;
	if (bind.flags & ~VDMA_BIND_OWN_RING)
		return -EINVAL;
	queue = vdma_queue_claim(vdma);
	if (!queue)
		return -ENOSPC;
	bond = iommu_sva_bind_device(&vdma->pdev->dev, current->mm);
	if (IS_ERR(bond)) {
		error = PTR_ERR(bond);
		goto release;
	}
	file->pasid = iommu_sva_get_pasid(bond);
	file->own_ring = bind.flags & VDMA_BIND_OWN_RING;
	if (file->own_ring)
		error = vdma_queue_start_own(queue, file->pasid, bind.ring, bind.order);
	else
		error = vdma_queue_start(queue, file->pasid);
	if (error)
		goto unbind;
	file->bond = bond;
	file->queue = queue;
	file->mm = current->mm;
	mmgrab(file->mm);
	if (file->own_ring) {
		mutex_lock(&file->doorbell_lock);
		file->doorbell = queue;
		mutex_unlock(&file->doorbell_lock);
	}
	bind.pasid = file->pasid;
	bind.queue = queue->number;
	if (!copy_to_user(argument, &bind, sizeof(bind)))
		return 0;
	vdma_file_unbind(file);
	return -EFAULT;

unbind:
	iommu_sva_unbind_device(bond);
release:
	vdma_queue_release(queue);
	return error;
}

static int vdma_submit(struct vdma_file *file, struct vdma_submit __user *argument)
{
	struct vdma_submit submit;
	struct vdma_job job;
	int error = 0;

	if (!file->queue)
		return -ENXIO;
	if (file->mm != current->mm)
		return -EPERM;
	if (file->own_ring)
		return -EINVAL;
	if (copy_from_user(&submit, argument, sizeof(submit)))
		return -EFAULT;
	for (submit.submitted = 0; submit.submitted < submit.count; submit.submitted++) {
		if (copy_from_user(&job, u64_to_user_ptr(submit.jobs) + submit.submitted * sizeof(job), sizeof(job)))
			error = -EFAULT;
		else
			error = vdma_queue_submit(file->queue, &job);
		if (error)
			break;
	}
	vdma_queue_ring(file->queue);
	if (error && !submit.submitted)
		return error;
	return put_user(submit.submitted, &argument->submitted);
}

/* Takes what has ended, up to `count`, from *taken on; -EFAULT, or whether jobs are left. */
static int vdma_collect(struct vdma_file *file, const struct vdma_wait *wait, u32 *taken)
{
	struct vdma_result result;

	while (*taken < wait->count && vdma_queue_take(file->queue, &result)) {
		if (copy_to_user(u64_to_user_ptr(wait->results) + *taken * sizeof(result), &result, sizeof(result)))
			return -EFAULT;
		++*taken;
	}
	return !bitmap_empty(file->queue->busy, VDMA_SLOTS);
}

/* Called without file->lock: it sleeps, and another thread may submit, or unbind, meanwhile. */
static int vdma_wait(struct vdma_file *file, struct vdma_wait __user *argument)
{
	unsigned long end = 0, left = MAX_SCHEDULE_TIMEOUT;
	struct vdma_queue *queue;
	struct vdma_wait wait;
	u32 taken = 0;
	long woken;
	int seen, more;

	if (copy_from_user(&wait, argument, sizeof(wait)))
		return -EFAULT;
	wait.least = min(wait.least, wait.count);
	if (wait.timeout_ms)
		end = jiffies + msecs_to_jiffies(wait.timeout_ms) + 1;
	for (;;) {
		if (mutex_lock_killable(&file->lock))
			return -EINTR;
		queue = file->queue;
		if (!queue) {
			mutex_unlock(&file->lock);
			return -ENXIO;
		}
		if (file->own_ring) {
			mutex_unlock(&file->lock);
			return -EINVAL;
		}
		seen = atomic_read(&queue->events); /* before the look: what ends after it counts as an event */
		smp_rmb();
		more = vdma_collect(file, &wait, &taken);
		mutex_unlock(&file->lock);
		if (more < 0)
			return more;
		if (!more || taken >= wait.least)
			break;
		if (wait.timeout_ms) {
			if (time_after_eq(jiffies, end))
				break;
			left = end - jiffies;
		}
		/* A queue outlives its claim: it is part of the device, which the open file holds. */
		woken = wait_event_killable_timeout(queue->wait, atomic_read(&queue->events) != seen, left);
		if (woken < 0)
			return woken;
	}
	return put_user(taken, &argument->taken);
}

static int vdma_info(struct vdma_file *file, struct vdma_info __user *argument)
{
	struct vdma *vdma = file->vdma;
	struct vdma_queue *queue = file->queue;
	struct vdma_info info = {
		.version = vdma_read(vdma, VDMA_REG_VERSION),
		.queues = vdma->queue_count,
		.features = vdma_read(vdma, VDMA_REG_FEATURES),
		.jobs = vdma_read64(vdma, VDMA_REG_JOBS),
		.bytes = vdma_read64(vdma, VDMA_REG_BYTES),
		.faults = vdma_read64(vdma, VDMA_REG_FAULTS),
		.page_groups = vdma_read64(vdma, VDMA_REG_PAGE_GROUPS),
		.page_requests = vdma_read64(vdma, VDMA_REG_PAGE_REQUESTS),
		.page_answers = vdma_read64(vdma, VDMA_REG_PAGE_ANSWERS),
	};

	if (queue) {
		info.queue_status = vdma_read(vdma, VDMA_QUEUE(queue->number) + VDMA_Q_STATUS);
		info.error_address = vdma_read64(vdma, VDMA_QUEUE(queue->number) + VDMA_Q_ERROR_ADDRESS);
		info.interrupts = (u32)(atomic_read(&queue->events) - queue->first_event);
	}
	return copy_to_user(argument, &info, sizeof(info)) ? -EFAULT : 0;
}

static int vdma_test(struct vdma_file *file, struct vdma_selftest __user *argument)
{
	struct vdma_selftest test = {};
	int error;

	if (get_user(test.index, &argument->index))
		return -EFAULT;
	error = vdma_selftest(file->vdma, &test);
	if (error)
		return error;
	return copy_to_user(argument, &test, sizeof(test)) ? -EFAULT : 0;
}

static long vdma_ioctl(struct file *filp, unsigned int command, unsigned long address)
{
	struct vdma_file *file = filp->private_data;
	void __user *argument = (void __user *)address;
	int status;

	if (command == VDMA_IOC_WAIT)
		return vdma_wait(file, argument);
	if (mutex_lock_killable(&file->lock))
		return -EINTR;
	if (file->vdma->gone) {
		status = -ENODEV;
	} else {
		switch (command) {
		case VDMA_IOC_BIND:
			status = vdma_bind(file, argument);
			break;
		case VDMA_IOC_UNBIND:
			status = file->queue ? 0 : -ENXIO;
			vdma_file_unbind(file);
			break;
		case VDMA_IOC_SUBMIT:
			status = vdma_submit(file, argument);
			break;
		case VDMA_IOC_INFO:
			status = vdma_info(file, argument);
			break;
		case VDMA_IOC_SELFTEST:
			status = vdma_test(file, argument);
			break;
		default:
			status = -ENOTTY;
		}
	}
	mutex_unlock(&file->lock);
	return status;
}

static vm_fault_t vdma_doorbell_fault(struct vm_fault *fault)
{
	struct vdma_file *file = fault->vma->vm_private_data;
	vm_fault_t result = VM_FAULT_SIGBUS;

	mutex_lock(&file->doorbell_lock);
	/* a mapping is of the queue that the file had then */
	if (file->doorbell && file->doorbell->number == fault->vma->vm_pgoff) {
		phys_addr_t bar = pci_resource_start(file->vdma->pdev, VDMA_BAR);

		result = vmf_insert_pfn(fault->vma, fault->vma->vm_start, PHYS_PFN(bar + VDMA_DOORBELL(file->doorbell->number)));
	}
	mutex_unlock(&file->doorbell_lock);
	return result;
}

static const struct vm_operations_struct vdma_doorbell_operations = {
	.fault = vdma_doorbell_fault,
};

/* The doorbell page of the file's queue, for the process that bound it: no child gets it. */
static int vdma_mmap(struct file *filp, struct vm_area_struct *vma)
{
	struct vdma_file *file = filp->private_data;
	int status = 0;

	if (vma->vm_pgoff || vma->vm_end - vma->vm_start != PAGE_SIZE || !(vma->vm_flags & VM_SHARED))
		return -EINVAL;
	mutex_lock(&file->doorbell_lock);
	if (!file->doorbell)
		status = -ENXIO;
	else if (vma->vm_mm != file->mm)
		status = -EPERM;
	else
		vma->vm_pgoff = file->doorbell->number;
	mutex_unlock(&file->doorbell_lock);
	if (status)
		return status;
	vma->vm_page_prot = pgprot_noncached(vma->vm_page_prot);
	vm_flags_set(vma, VM_IO | VM_PFNMAP | VM_DONTCOPY | VM_DONTEXPAND | VM_DONTDUMP);
	vma->vm_private_data = file;
	vma->vm_ops = &vdma_doorbell_operations;
	return 0;
}

const struct file_operations vdma_file_operations = {
	.owner = THIS_MODULE,
	.open = vdma_open,
	.mmap = vdma_mmap,
	.release = vdma_release,
	.unlocked_ioctl = vdma_ioctl,
};
