/* SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note OR MIT */
/*
 * /dev/vioasid-dmaN: jobs of the vioasid DMA engine in the caller's own addresses.
 *
 *	fd = open("/dev/vioasid-dma0", O_RDWR | O_CLOEXEC);
 *	ioctl(fd, VDMA_IOC_BIND, &bind);	the process gets a queue and a PASID
 *	ioctl(fd, VDMA_IOC_SUBMIT, &submit);	jobs with plain pointers, many in flight
 *	ioctl(fd, VDMA_IOC_WAIT, &wait);	results in the order in which jobs end
 *	close(fd);				stops the queue's DMA, then gives the PASID back
 *
 * Without a system call a job: bound with VDMA_BIND_OWN_RING the process writes descriptors (vioasid_dma_regs.h) to a ring
 * in its own memory, maps the queue's doorbell page (mmap, offset 0, one page) and polls its own completion records. Each
 * address in a descriptor must be marked as the PASID's. SUBMIT and WAIT are EINVAL then, and the page is gone with UNBIND.
 *
 * An open file has one queue at a time, and only the process that bound it may submit: its child (EPERM) opens its own.
 * Opcodes, statuses, reasons and access bits are those of vioasid_dma_regs.h.
 */
#ifndef VIOASID_DMA_H
#define VIOASID_DMA_H

#include <linux/ioctl.h>
#include <linux/types.h>

#define VDMA_SLOTS 256 /* jobs of a file that were submitted and whose results were not taken */

#define VDMA_BIND_OWN_RING 0x1

struct vdma_bind {
	__u32 flags; /* VDMA_BIND_... */
	__u32 order; /* own ring: log2 of its descriptors */
	__u64 ring; /* own ring: its address, a multiple of 4096 */
	__u32 pasid; /* out */
	__u32 queue; /* out */
};

/* Flags of a job: VDMA_FLAG_FENCE and VDMA_FLAG_NO_PAGE_REQUESTS; anything else is EINVAL. */
struct vdma_job {
	__u8 opcode;
	__u8 reserved; /* 0 */
	__u16 flags;
	__u32 cookie; /* returned with the result */
	__u64 target;
	__u64 source; /* `compare` of a CAS */
	__u64 length;
	__u64 value;
	__u64 value_high;
	__u64 compare_high;
	__u64 reserved2; /* 0 */
};

struct vdma_result {
	__u32 cookie;
	__u8 status;
	__u8 reason;
	__u16 access;
	__u64 done;
	__u64 result;
	__u64 fault_address; /* of a fault; else the upper half of a 16-byte result */
};

struct vdma_submit {
	__u64 jobs; /* of struct vdma_job */
	__u32 count;
	__u32 submitted; /* out; less than count when the slots or the readable jobs end; none at all: EAGAIN, EFAULT, EINVAL */
};

struct vdma_wait {
	__u64 results; /* of struct vdma_result */
	__u32 count;   /* most to take */
	__u32 least;   /* wait for as many, unless fewer are outstanding */
	__u32 timeout_ms; /* 0: none. A time-out is no error: `taken` is less than `least` */
	__u32 taken;   /* out */
};

struct vdma_info {
	__u32 version;
	__u32 queues;
	__u32 features; /* VDMA_FEATURE_... */
	__u32 queue_status; /* VDMA_Q_STATUS of the file's queue, 0 without one */
	__u64 error_address;
	__u64 jobs, bytes, faults, page_groups, page_requests, page_answers; /* of the whole device */
	__u64 interrupts; /* taken for the file's queue since its BIND */
};

/* One of the driver's own tests, on kernel mappings. ENOENT: `index` is beyond the last. */
struct vdma_selftest {
	__u32 index;
	__u32 outcome; /* out: 0 passed, 1 failed, 3 could not be made, 4 skipped */
	char name[32];
	char text[192]; /* what was seen */
};

#define VDMA_IOC_BIND _IOWR('V', 0x80, struct vdma_bind)
#define VDMA_IOC_UNBIND _IO('V', 0x81)
#define VDMA_IOC_SUBMIT _IOWR('V', 0x82, struct vdma_submit)
#define VDMA_IOC_WAIT _IOWR('V', 0x83, struct vdma_wait)
#define VDMA_IOC_INFO _IOR('V', 0x84, struct vdma_info)
#define VDMA_IOC_SELFTEST _IOWR('V', 0x85, struct vdma_selftest)

#endif
