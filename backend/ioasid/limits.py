"""Bounds on all that a caller of the uAPI can make grow, each with its reason."""

MAX_CONTEXTS = 1024
"""Contexts of an engine: each stands for an open of /dev/ioasid, and 1,024 is the usual limit of open files of a
process."""

MAX_IOASIDS = 1 << 17
"""IOASIDs of a context: AMD-Vi's DomainID is 16 bits wide, so a guest has at most 65,536 domains; as many again for
their parents and for what is allocated before what it replaces is freed."""

MAX_CHILDREN = 1 << 16
"""Children of an IOASID: one for each DomainID of a guest, which is 16 bits wide in AMD-Vi and in VT-d."""

MAX_MAPPINGS = 65_535
"""Mappings of an IOASID: the default of VFIO type1's dma_entry_limit, which bounds the kernel's memory for the same
thing."""

MAX_DEVICES = 1 << 16
"""Devices of an engine: a RID is 16 bits wide."""

MAX_ATTACHMENTS = (1 << 16) + 2
"""Attachments of a device: its RID to a parent and to a child of it, and 16 bits of PASID (AMD-Vi's PASmax of 15)."""

MAX_PASID = (1 << 20) - 1
"""PCI Express gives a PASID 20 bits."""

MAX_RID = (1 << 16) - 1
"""PCI gives a bus number 8 bits, a device number 5 and a function number 3."""

MAX_GROUP = (1 << 9) - 1
"""PCI Express gives a page request group index 9 bits."""

MAX_PAGE_REQUESTS = 4096
"""Page requests of a context that wait for an answer: the queue of VT-d in its usual size (order 7 of 32-byte entries).
What comes on top is answered by failure at once, so that a device cannot make the queue grow."""

MAX_DEVICE_PAGE_REQUESTS = 512
"""Of them, those of one device: as many as it has group indices. So no device takes the room of the others, of seven
at least."""

MAX_FAULTS = 1024
"""Unrecoverable faults of a context that nobody read yet: as many as the core's own ring keeps."""

MAX_ENTRIES = 4096
"""Entries of one INVALIDATE_CACHE: a page of 16-byte descriptors holds 256 of them, a guest's queue a few pages."""

MAX_PREFETCH = 1 << 20
"""Bytes of one PREFETCH, whose pages are walked one after the other: as many as AMD-Vi's command counts, in 4 KiB."""

MAX_NAMES = 16
"""Names in a list: more than any format has options."""

MAX_REGISTERED = 65_535
"""Ranges of registered memory of a context: as many as mappings that can use them."""

MAX_DIRTY_PAGES = 1 << 22
"""Bits of one GET_DIRTY_BITMAP: 512 KiB, which stands for 16 GiB of 4 KiB pages; a caller may ask again."""

MAX_KVM_PASIDS = 1 << 20
"""PASIDs that a CPU translates: ENQCMD takes 20 bits."""

USER_END = 1 << 47
"""Linux gives a process on x86-64 no address beyond, unless it asks for one."""

MAX_MERGED = 1 << 20
"""Pieces of a context's software-nested tables: sixteen tables full of mappings. What nests multiplies: a child that
maps one address of its parent's a thousand times takes a thousand pieces, and its child may do so with each of them."""

MAX_DEPTH = 8
"""Host-managed IOASIDs above one another: guests of guests of guests have four, and each one costs every change its
share."""

MAX_PROCESSES = MAX_CONTEXTS + 256
"""IOASIDs of kind sva of an engine: one of each context, and a few of those that have more. Two descriptors each: what
the system gives fewer of is refused by it."""
