"""Brute-force page-table walkers and table builders, written from the specifications alone.

Slow and plain on purpose: they are the independent judge of the fast core, share nothing with it and import the
standard library only. `walk` functions are the numbered steps of a specification; builders have encodings of their own
and never call a walker.

Order of checks, one for all formats (each specification leaves parts of it open; see each file's "unspecified:" lines):
    1. input address width                     ADDRESS_WIDTH, level 0, no entry
    2. per table, from the root down:          TABLE_ACCESS, NOT_PRESENT, RESERVED_BITS, BAD_LEVEL, MISALIGNED,
                                               ADDRESS_WIDTH (Arm output size, AMD bits of skipped levels)
    3. at the leaf, once for the whole walk:   ACCESS_FLAG (Arm), PERMISSION, then ACCESS_FLAG and DIRTY (RISC-V)
    4. accessed and dirty bits are set only where the translation succeeds
"""
