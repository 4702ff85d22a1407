/*
 * What the fuzzing harnesses share: numbers taken from an input, guest memory, and formats chosen by a number.
 *
 * Each harness is one function over the bytes of an input (LLVMFuzzerTestOneInput). An input never fails: numbers beyond
 * its end are zero. What must hold is said by HOLDS, the rest by the sanitizers.
 */
#ifndef VIOASID_FUZZ_HARNESS_H
#define VIOASID_FUZZ_HARNESS_H

#include <sanitizer/asan_interface.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>

#include "engine.h"

#define PAGE 4096u

#define HOLDS(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "%s:%d: does not hold: %s\n", __FILE__, __LINE__, #condition);                             \
            abort();                                                                                                   \
        }                                                                                                              \
    } while (0)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

struct input {
    const uint8_t *at, *end;
};

static inline bool more(const struct input *in)
{
    return in->at < in->end;
}

static inline uint64_t take(struct input *in, unsigned bytes)
{
    uint64_t value = 0;

    for (unsigned i = 0; i < bytes && more(in); i++)
        value |= (uint64_t)*in->at++ << 8 * i;
    return value;
}

/* A number of a table's kind: small, at one of the levels, sign-extended, or any. */
static inline uint64_t take_address(struct input *in)
{
    uint64_t kind = take(in, 1), low = kind & 31;

    switch (kind >> 5) {
    case 0:
    case 1:
        return low << 12;
    case 2:
    case 3:
        return take(in, 1) << (12 + low) | take(in, 1) << 12;
    case 4:
        return low << 12 | take(in, 2);
    case 5:
        return ~0ull << (32 + low) | take(in, 2) << 12;
    default:
        return take(in, 8);
    }
}

/* Memory without huge pages and with nothing behind it: inputs are many, and each touches little. */
static inline uint8_t *reserve(size_t size, size_t align, int protection)
{
    uintptr_t at;
    void *area;

    prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0);
    area = mmap(NULL, size + 2 * align, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    HOLDS(area != MAP_FAILED);
    at = ((uintptr_t)area + 2 * align - 1) & ~(uintptr_t)(align - 1); /* something without access on both sides */
    HOLDS(!mprotect((void *)at, size, protection));
    return (uint8_t *)at;
}

/* Formats, whatever they are: a number of the input names one. */
static inline int any_format(uint64_t number)
{
    return (int)(number % PT_FORMATS);
}

static inline int host_format(uint64_t number)
{
    int format = any_format(number);

    while (!walk_host(format))
        format = (format + 1) % PT_FORMATS;
    return format;
}

static inline unsigned levels_of(int format, uint64_t number)
{
    const struct pt_format *f = pt_formats[format];

    return f->min_levels + (unsigned)(number % (f->max_levels - f->min_levels + 1));
}

/* Bits that the core may change in an entry of the guest's. */
static inline uint64_t used_mask(int format, unsigned flags)
{
    const struct pt_format *f = pt_formats[format];

    return f->used_bits(flags, true, true) | f->used_bits(flags, false, true);
}

static inline unsigned table_flags(uint64_t number)
{
    static const unsigned flags[] = {0, 0, VIO_TABLE_ACCESSED, VIO_TABLE_ACCESSED | VIO_TABLE_DIRTY};

    return flags[number & 3];
}

enum { ENTRY_RAW, ENTRY_LEAF, ENTRY_TABLE, ENTRY_FLIP };

/*
 * An entry as one op of an input gives it: any bits, a leaf or a table as the format has them, but for one bit perhaps,
 * or bits to flip; for a table in one of `pages` pages of 4 KiB from GPA `base` on. `at`: its offset in them, not cut.
 */
static inline uint64_t take_entry(struct input *in, int format, uint64_t base, unsigned pages, unsigned kind,
                                  uint64_t *at)
{
    const struct pt_format *f = pt_formats[format];
    uint64_t place, target, oa, entry;
    unsigned level, bits;

    *at = take(in, 1) % pages * PAGE;
    place = take(in, 1);
    target = take(in, 1);
    bits = (unsigned)take(in, 1);
    level = 1 + place % PT_MAX_LEVELS;
    *at += place & 128 ? take(in, 2) * 8 : f->entry_offset(take_address(in), level);
    oa = base + target % pages * PAGE;
    if (target & 128)
        oa &= ~0ull << (f->entry_lg2(level) & 63);
    switch (kind) {
    case ENTRY_RAW: entry = take(in, 8); break;
    case ENTRY_LEAF: entry = f->make_leaf(oa, level, bits & RW_BOTH); break;
    case ENTRY_TABLE: entry = f->make_table(oa, level > 1 ? level - 1 : 1); break;
    default: return 1ull << (bits & 63);
    }
    return bits & 128 ? entry ^ 1ull << (bits & 63) : entry;
}

#endif
