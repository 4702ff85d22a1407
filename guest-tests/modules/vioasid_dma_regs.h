/* SPDX-License-Identifier: GPL-2.0 OR MIT */
/*
 * The vioasid DMA engine as a driver sees it: PCI ids, registers, descriptors, completion records.
 * docs/dma-engine.md says what each does. Everything is little endian; a register is reached by aligned accesses of
 * its own width (a 64-bit one also by its two halves).
 *
 * Only constants (VDMA_...) and the two structures stand here: the device's own tests compare them with what it does.
 */
#ifndef VIOASID_DMA_REGS_H
#define VIOASID_DMA_REGS_H

#include <linux/types.h>

#define VDMA_VENDOR_ID 0x1234
#define VDMA_DEVICE_ID 0x10a6
#define VDMA_CLASS 0x088000 /* system peripheral, other */

#define VDMA_BAR 0	/* registers and doorbells */
#define VDMA_MSIX_BAR 2 /* MSI-X table and pending bits, nothing else */

/* BAR0, the register page: for the kernel alone */
#define VDMA_REG_ID 0x000		/* ro 32: VDMA_ID */
#define VDMA_REG_VERSION 0x004		/* ro 32: VDMA_VERSION */
#define VDMA_REG_QUEUES 0x008		/* ro 32: queues of this device, 1 to 16; as many MSI-X vectors */
#define VDMA_REG_ORDER_MAX 0x00c	/* ro 32: largest ring, log2 of its descriptors */
#define VDMA_REG_DEPTH 0x010		/* ro 32: most jobs of one queue in flight */
#define VDMA_REG_FEATURES 0x014		/* ro 32: VDMA_FEATURE_...: what the guest has enabled, as it is now */
#define VDMA_REG_LENGTH_MAX 0x018	/* ro 64: longest job in bytes */
#define VDMA_REG_OPERATIONS 0x020	/* ro 32: bit n: opcode n is known */
#define VDMA_REG_RESET 0x024		/* wo 32: VDMA_RESET ends everything at once, without records */
#define VDMA_REG_JOBS 0x040		/* ro 64: jobs ended since reset, whatever their status */
#define VDMA_REG_BYTES 0x048		/* ro 64: bytes done by them */
#define VDMA_REG_FAULTS 0x050		/* ro 64: jobs that ended with VDMA_STATUS_FAULT */
#define VDMA_REG_PAGE_GROUPS 0x058	/* ro 64: page request groups asked */
#define VDMA_REG_PAGE_REQUESTS 0x060	/* ro 64: pages in them */
#define VDMA_REG_PAGE_ANSWERS 0x068	/* ro 64: groups answered */

#define VDMA_ID 0x414d4456 /* "VDMA" in memory order */
#define VDMA_VERSION 1
#define VDMA_RESET 1

#define VDMA_FEATURE_PASID 0x1		/* the PASID capability is enabled */
#define VDMA_FEATURE_ATS 0x2		/* ATS is enabled */
#define VDMA_FEATURE_PAGE_REQUESTS 0x4	/* pages can be asked for */

/* One block a queue in the register page */
#define VDMA_QUEUE_BASE 0x800
#define VDMA_QUEUE_STRIDE 0x80
#define VDMA_QUEUES_MAX 16
#define VDMA_QUEUE(q) (VDMA_QUEUE_BASE + (q) * VDMA_QUEUE_STRIDE)

/* Offsets in a block. CONTROL, PASID, RING, ORDER, VECTOR: writable while the queue is DISABLED, else ignored. */
#define VDMA_Q_CONTROL 0x00	  /* rw 32: VDMA_CONTROL_... */
#define VDMA_Q_PASID 0x04	  /* rw 32: bits 19:0 */
#define VDMA_Q_RING 0x08	  /* rw 64: address of the descriptor ring, a multiple of 4096 */
#define VDMA_Q_ORDER 0x10	  /* rw 32: log2 of the ring's descriptors, 0 to ORDER_MAX */
#define VDMA_Q_VECTOR 0x14	  /* rw 32: MSI-X vector; queue n resets to n */
#define VDMA_Q_COMMAND 0x18	  /* wo 32: VDMA_COMMAND_... */
#define VDMA_Q_STATUS 0x1c	  /* ro 32: state 7:0, error 15:8 */
#define VDMA_Q_TAIL 0x20	  /* ro 32: descriptors submitted since START, modulo 2^32 */
#define VDMA_Q_HEAD 0x24	  /* ro 32: descriptors fetched since START: their slots are free */
#define VDMA_Q_COMPLETED 0x28	  /* ro 32: jobs ended since START */
#define VDMA_Q_WAITING 0x2c	  /* ro 32: jobs that wait for pages now */
#define VDMA_Q_ERROR_ADDRESS 0x30 /* ro 64: address that the error befell, 0 if it has none */
#define VDMA_Q_UNANSWERED 0x38	  /* ro 32: pages asked for, by this START or before it, and not answered yet */

#define VDMA_CONTROL_PASID 0x1	    /* the queue has the PASID in VDMA_Q_PASID */
#define VDMA_CONTROL_RING_PASID 0x2 /* the ring's address is in that PASID */
#define VDMA_CONTROL_UNTAGGED 0x4   /* descriptors may use addresses without PASID: never for a process's own ring */

#define VDMA_COMMAND_START 1 /* DISABLED -> RUNNING, counts from 0; a wrong setting: -> ERROR */
#define VDMA_COMMAND_DRAIN 2 /* RUNNING -> DRAINING: fetch no more; -> DISABLED when the last job has ended */
#define VDMA_COMMAND_ABORT 3 /* any -> DISABLED: jobs end with VDMA_STATUS_ABORTED; no DMA after that */

#define VDMA_STATE_MASK 0xff
#define VDMA_STATE_DISABLED 0
#define VDMA_STATE_RUNNING 1
#define VDMA_STATE_DRAINING 2
#define VDMA_STATE_ERROR 3 /* nothing runs; ABORT leads out */

#define VDMA_ERROR_SHIFT 8
#define VDMA_ERROR_NONE 0
#define VDMA_ERROR_SETTING 1	/* START: PASID, ring, order or vector out of range */
#define VDMA_ERROR_DOORBELL 2	/* a tail more than the ring's size ahead of the head, or behind it */
#define VDMA_ERROR_RING 3	/* a descriptor could not be read */
#define VDMA_ERROR_COMPLETION 4 /* a record could not be written, or its address may not be used */

/* BAR0, doorbells: one page a queue, fit to be mapped into a process */
#define VDMA_DOORBELL_BASE 0x10000
#define VDMA_DOORBELL_STRIDE 0x1000
#define VDMA_DOORBELL(q) (VDMA_DOORBELL_BASE + (q) * VDMA_DOORBELL_STRIDE)
#define VDMA_DB_TAIL 0x0      /* rw 32: descriptors submitted since START, modulo 2^32 */
#define VDMA_DB_HEAD 0x4      /* ro 32: as VDMA_Q_HEAD */
#define VDMA_DB_COMPLETED 0x8 /* ro 32: as VDMA_Q_COMPLETED */
#define VDMA_DB_STATUS 0xc    /* ro 32: as VDMA_Q_STATUS */

#define VDMA_DESCRIPTOR_SIZE 64
#define VDMA_COMPLETION_SIZE 32 /* aligned to as much */

/* opcodes */
#define VDMA_OP_NOP 0
#define VDMA_OP_COPY 1	    /* source -> target */
#define VDMA_OP_FILL 2	    /* value, 8 bytes over and over -> target */
#define VDMA_OP_COMPARE 3   /* source with target */
#define VDMA_OP_CRC32 4	    /* of source; value: 0, or the result so far; as zlib's crc32() */
#define VDMA_OP_FETCH_ADD 5 /* target += value; length 4 or 8 */
#define VDMA_OP_SWAP 6	    /* target <-> value; length 4 or 8 */
#define VDMA_OP_CAS 7	    /* target == compare ? value; length 4, 8 or 16 */

/* flags of a descriptor; every other bit must be 0 */
#define VDMA_FLAG_COMPLETION 0x0001	  /* write a record at `completion` */
#define VDMA_FLAG_INTERRUPT 0x0002	  /* raise the queue's vector at the end */
#define VDMA_FLAG_FENCE 0x0004		  /* begin when all earlier jobs of the queue have ended */
#define VDMA_FLAG_NO_PAGE_REQUESTS 0x0008 /* do not wait for pages: end with a fault */
#define VDMA_FLAG_SOURCE_PASID 0x0010	  /* `source` is in the queue's PASID */
#define VDMA_FLAG_TARGET_PASID 0x0020	  /* `target` is */
#define VDMA_FLAG_COMPLETION_PASID 0x0040 /* `completion` is */

struct vdma_descriptor {
	__u8 opcode;
	__u8 reserved; /* 0 */
	__u16 flags;
	__u32 tag; /* returned in the record */
	__u64 completion;
	__u64 target;
	union {
		__u64 source;
		__u64 compare; /* CAS */
	};
	__u64 length; /* bytes; 0 is allowed where no width is asked */
	__u64 value;
	__u64 value_high;   /* CAS of 16 bytes */
	__u64 compare_high; /* CAS of 16 bytes */
};

/* Its first 8 bytes are written last, by one release store: poll `status`, which software has set to 0 before. */
struct vdma_completion {
	__u8 status; /* VDMA_STATUS_... */
	__u8 reason; /* VDMA_REASON_..., 0 where the status says all */
	__u16 access; /* VDMA_STATUS_FAULT: VDMA_ACCESS_... of the request at fault */
	__u32 tag;
	__u64 done;   /* bytes, from the start on; COMPARE: equal ones */
	__u64 result; /* CRC32 of the `done` bytes; value before, of atomics */
	union {
		__u64 result_high;   /* CAS of 16 bytes */
		__u64 fault_address; /* VDMA_STATUS_FAULT: first byte that was not reached */
	};
};

#define VDMA_STATUS_NONE 0 /* not ended */
#define VDMA_STATUS_SUCCESS 1
#define VDMA_STATUS_DIFFERENT 2 /* COMPARE: byte `done` differs */
#define VDMA_STATUS_INVALID 3	/* the descriptor; nothing was touched */
#define VDMA_STATUS_FAULT 4	/* memory was not reached */
#define VDMA_STATUS_ABORTED 5	/* by VDMA_COMMAND_ABORT, or with a queue in ERROR */

#define VDMA_ACCESS_READ 0x1
#define VDMA_ACCESS_WRITE 0x2
#define VDMA_ACCESS_PASID 0x4 /* the address is in the queue's PASID */

/* reasons of VDMA_STATUS_INVALID */
#define VDMA_REASON_OPCODE 1
#define VDMA_REASON_FLAGS 2	/* a reserved bit, or one without VDMA_CONTROL_PASID */
#define VDMA_REASON_UNTAGGED 3	/* an address without PASID, and no VDMA_CONTROL_UNTAGGED */
#define VDMA_REASON_LENGTH 4	/* beyond LENGTH_MAX; no width of this atomic */
#define VDMA_REASON_ALIGNMENT 5 /* of an atomic's target */
#define VDMA_REASON_WRAP 6	/* the range ends beyond 2^64 */
#define VDMA_REASON_OVERLAP 7	/* COPY: target begins within source, in one address space */

/* reasons of VDMA_STATUS_FAULT */
#define VDMA_REASON_NOT_PRESENT 16  /* no translation, and pages cannot be asked for */
#define VDMA_REASON_PERMISSION 17   /* not for this access, and pages cannot be asked for */
#define VDMA_REASON_PRI_INVALID 18  /* the page request was answered: invalid */
#define VDMA_REASON_PRI_FAILURE 19  /* the page request was answered: failure; or it was not sent for lack of room */
#define VDMA_REASON_UNRESOLVED 20   /* answered: success, again and again, and still nothing there */
#define VDMA_REASON_BUS_MASTER 21   /* bus mastering is off */
#define VDMA_REASON_PASID_OFF 22    /* the PASID capability is off, or the PASID too wide for it */
#define VDMA_REASON_TRANSLATION 23  /* anything else: no route, a malformed table, memory that is gone */

#endif
