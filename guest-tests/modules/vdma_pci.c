// SPDX-License-Identifier: GPL-2.0
/*
 * The vioasid DMA engine: found, set up, given to processes as /dev/vioasid-dmaN.
 *
 * PASID, ATS and PRI are not switched on here: the IOMMU driver does that as it attaches the function's default domain.
 */
#include <linux/dma-mapping.h>
#include <linux/idr.h>
#include <linux/interrupt.h>
#include <linux/module.h>
#include <linux/slab.h>

#include "vdma.h"

static DEFINE_IDA(vdma_ids);

static void vdma_free(struct kref *refs)
{
	struct vdma *vdma = container_of(refs, struct vdma, refs);

	ida_free(&vdma_ids, vdma->id);
	pci_dev_put(vdma->pdev);
	kfree(vdma);
}

void vdma_put(struct vdma *vdma)
{
	kref_put(&vdma->refs, vdma_free);
}

static int vdma_map(struct vdma *vdma)
{
	struct pci_dev *pdev = vdma->pdev;
	u32 id, version;

	vdma->bar = pcim_iomap_region(pdev, VDMA_BAR, KBUILD_MODNAME);
	if (IS_ERR(vdma->bar))
		return dev_err_probe(&pdev->dev, PTR_ERR(vdma->bar), "no registers\n");
	id = vdma_read(vdma, VDMA_REG_ID);
	version = vdma_read(vdma, VDMA_REG_VERSION);
	if (id != VDMA_ID || version != VDMA_VERSION)
		return dev_err_probe(&pdev->dev, -ENODEV, "id %#x, version %u: not for this driver\n", id, version);
	vdma->queue_count = vdma_read(vdma, VDMA_REG_QUEUES);
	if (!vdma->queue_count || vdma->queue_count > VDMA_QUEUES_MAX)
		return dev_err_probe(&pdev->dev, -ENODEV, "%u queues: 1 to 16 can be\n", vdma->queue_count);
	if (pci_resource_len(pdev, VDMA_BAR) < VDMA_DOORBELL(vdma->queue_count))
		return dev_err_probe(&pdev->dev, -ENODEV, "the registers end before the doorbells\n");
	writel(VDMA_RESET, vdma->bar + VDMA_REG_RESET);
	return dma_set_mask_and_coherent(&pdev->dev, DMA_BIT_MASK(64));
}

static int vdma_interrupts(struct vdma *vdma)
{
	struct pci_dev *pdev = vdma->pdev;
	int count = pci_alloc_irq_vectors(pdev, 1, vdma->queue_count, PCI_IRQ_MSIX);

	if (count < 0)
		return dev_err_probe(&pdev->dev, count, "no MSI-X vector\n");
	vdma->vectors = count;
	for (int i = 0; i < count; i++) {
		int error = request_irq(pci_irq_vector(pdev, i), vdma_queue_interrupt, 0, vdma->name, &vdma->queues[i]);

		if (!error)
			continue;
		while (i--)
			free_irq(pci_irq_vector(pdev, i), &vdma->queues[i]);
		pci_free_irq_vectors(pdev);
		return error;
	}
	return 0;
}

static void vdma_no_interrupts(struct vdma *vdma)
{
	for (u32 i = 0; i < vdma->vectors; i++)
		free_irq(pci_irq_vector(vdma->pdev, i), &vdma->queues[i]);
	pci_free_irq_vectors(vdma->pdev);
}

static struct vdma *vdma_alloc(struct pci_dev *pdev)
{
	struct vdma *vdma = kzalloc(sizeof(*vdma), GFP_KERNEL);

	if (!vdma)
		return NULL;
	vdma->id = ida_alloc(&vdma_ids, GFP_KERNEL);
	if (vdma->id < 0) {
		kfree(vdma);
		return NULL;
	}
	kref_init(&vdma->refs);
	vdma->pdev = pci_dev_get(pdev);
	snprintf(vdma->name, sizeof(vdma->name), "vioasid-dma%d", vdma->id);
	mutex_init(&vdma->files_lock);
	INIT_LIST_HEAD(&vdma->files);
	spin_lock_init(&vdma->queues_lock);
	for (u32 i = 0; i < VDMA_QUEUES_MAX; i++) {
		vdma->queues[i].vdma = vdma;
		vdma->queues[i].number = i;
		init_waitqueue_head(&vdma->queues[i].wait);
	}
	return vdma;
}

static int vdma_probe(struct pci_dev *pdev, const struct pci_device_id *id)
{
	struct vdma *vdma;
	int error = pcim_enable_device(pdev);

	if (error)
		return error;
	vdma = vdma_alloc(pdev);
	if (!vdma)
		return -ENOMEM;
	error = vdma_map(vdma);
	if (error)
		goto put;
	pci_set_master(pdev);
	error = vdma_interrupts(vdma);
	if (error)
		goto no_master;
	vdma->misc.minor = MISC_DYNAMIC_MINOR;
	vdma->misc.name = vdma->name;
	vdma->misc.fops = &vdma_file_operations;
	vdma->misc.parent = &pdev->dev;
	pci_set_drvdata(pdev, vdma);
	error = misc_register(&vdma->misc);
	if (error)
		goto no_interrupts;
	dev_info(&pdev->dev, "%s: %u queues, features %#x\n", vdma->name, vdma->queue_count, vdma_read(vdma, VDMA_REG_FEATURES));
	return 0;

no_interrupts:
	vdma_no_interrupts(vdma);
no_master:
	pci_clear_master(pdev);
put:
	vdma_put(vdma);
	return error;
}

static void vdma_remove(struct pci_dev *pdev)
{
	struct vdma *vdma = pci_get_drvdata(pdev);
	struct vdma_file *file;

	misc_deregister(&vdma->misc);
	mutex_lock(&vdma->files_lock);
	vdma->gone = true;
	list_for_each_entry(file, &vdma->files, link) {
		mutex_lock(&file->lock);
		vdma_file_unbind(file);
		mutex_unlock(&file->lock);
	}
	mutex_unlock(&vdma->files_lock);
	writel(VDMA_RESET, vdma->bar + VDMA_REG_RESET);
	vdma_no_interrupts(vdma);
	pci_clear_master(pdev);
	vdma_put(vdma);
}

static const struct pci_device_id vdma_devices[] = {
	{ PCI_DEVICE(VDMA_VENDOR_ID, VDMA_DEVICE_ID) },
	{}
};
MODULE_DEVICE_TABLE(pci, vdma_devices);

static struct pci_driver vdma_driver = {
	.name = "vioasid-dma",
	.id_table = vdma_devices,
	.probe = vdma_probe,
	.remove = vdma_remove,
};
module_pci_driver(vdma_driver);

MODULE_DESCRIPTION("vioasid DMA engine: jobs on kernel mappings, and in the addresses of processes");
MODULE_LICENSE("GPL");
