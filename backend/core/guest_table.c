/*
 * Tables built as a guest builds its own: in a part of guest memory, entries and root being GPAs.
 *
 * For tests, measurements and whoever has the core without a guest. The memory may be written by others, devices among
 * them, so each step down is judged as a walk would judge it, and no table is used that lies outside of the part.
 */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "engine.h"

#define NOWHERE UINT64_MAX

struct vio_guest_table {
    pthread_mutex_t lock;
    const struct pt_format *format;
    struct pt_config config;
    uint8_t *memory;          /* of GPA 0 */
    uint64_t first, next, end; /* GPAs: of the part, and of what is left of it */
};

/* The entry that an address has, from the root down to where its table ends. */
struct place {
    uint64_t *entry;
    unsigned level;
    struct pt_start start;
};

static unsigned granule(const struct vio_guest_table *t)
{
    return t->config.table.tree.granule;
}

static uint64_t entry_size(const struct vio_guest_table *t, unsigned level)
{
    return 1ull << pt_entry_lg2(granule(t), level);
}

/* Zeroed memory for a table, aligned to its size; NOWHERE without room. What an unmap leaves empty is not used again. */
static uint64_t take_table(struct vio_guest_table *t, uint64_t size)
{
    uint64_t at = (t->next + size - 1) & ~(size - 1);

    if (at < t->next || at > t->end || size > t->end - at)
        return NOWHERE;
    memset(t->memory + at, 0, size);
    t->next = at + size;
    return at;
}

static uint64_t *entry_at(const struct vio_guest_table *t, uint64_t gpa)
{
    return gpa >= t->first && gpa < t->end ? (uint64_t *)(void *)(t->memory + gpa) : NULL;
}

static void store(uint64_t *entry, uint64_t value)
{
    __atomic_store_n(entry, value, __ATOMIC_RELEASE); /* what it leads to is written before it */
}

/* Where a walk may set bits meanwhile: false if the entry was not *old, which then is what it is. */
static bool replace(uint64_t *entry, uint64_t *old, uint64_t value)
{
    return __atomic_compare_exchange_n(entry, old, value, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
}

/*
 * Step down to `level`, or to the leaf or the empty entry above it that ends the way; with `make`, past empty entries.
 * VIO_OK, VIO_ERR_LIMIT without room for a table, VIO_ERR_VALUE if what is there is no table of ours.
 */
static int descend(struct vio_guest_table *t, uint64_t iova, unsigned level, bool make, struct place *out)
{
    uint64_t at;

    if (t->format->start(&t->config, iova, &out->start))
        return VIO_ERR_VALUE;
    out->level = out->start.levels;
    at = out->start.table + pt_root_offset(granule(t), out->start.index, out->level);
    for (;;) {
        struct pt_entry decoded;
        uint64_t entry;

        out->entry = entry_at(t, at);
        if (!out->entry)
            return VIO_ERR_VALUE;
        entry = __atomic_load_n(out->entry, __ATOMIC_ACQUIRE);
        if (out->level <= level || (!entry && !make))
            return VIO_OK;
        if (!entry) {
            uint64_t table = take_table(t, 1ull << granule(t));

            if (table == NOWHERE)
                return VIO_ERR_LIMIT;
            entry = t->format->make_table(&t->config, table, out->level);
            store(out->entry, entry);
        }
        if (t->format->decode(&t->config, &out->start, entry, out->level, false, &decoded))
            return VIO_ERR_VALUE;
        if (!decoded.next)
            return VIO_OK;
        out->level = decoded.next;
        at = decoded.oa + pt_offset(granule(t), out->start.index, out->level);
    }
}

int vio_guest_table_create(int format, const vio_table *table, void *memory, uint64_t first, uint64_t size,
                           vio_guest_table **out)
{
    struct pt_config config = {.table = *table};
    struct vio_guest_table *t;
    uint64_t root = 4096;

    if (format < 0 || format >= PT_FORMATS)
        return VIO_ERR_KIND;
    if (((uintptr_t)memory | first | size) & 4095 || !size || first + size < first)
        return VIO_ERR_VALUE;
    config.table.tree.root = 0;
    if (!table_config_ok(format, &config, false) || !config.table.tree.levels)
        return VIO_ERR_VALUE;
    t = calloc(1, sizeof *t);
    if (!t)
        return VIO_ERR_MEMORY;
    *t = (struct vio_guest_table){
        .format = pt_formats[format],
        .config = config,
        .memory = memory,
        .first = first,
        .next = first,
        .end = first + size,
    };
    while (root < pt_root_bytes(&config.table.tree))
        root *= 2;
    root = take_table(t, root > 1ull << granule(t) ? root : 1ull << granule(t));
    t->config.table = *table;
    t->config.table.tree.root = root;
    if (root == NOWHERE || !table_config_ok(format, &t->config, false)) {
        free(t);
        return root == NOWHERE ? VIO_ERR_LIMIT : VIO_ERR_VALUE;
    }
    pthread_mutex_init(&t->lock, NULL);
    *out = t;
    return VIO_OK;
}

void vio_guest_table_destroy(vio_guest_table *t)
{
    pthread_mutex_destroy(&t->lock);
    free(t);
}

void vio_guest_table_get(vio_guest_table *t, vio_table *out)
{
    *out = t->config.table;
}

/* Are all of a range's addresses this table's, and in whole pages? */
static bool legal(const struct vio_guest_table *t, uint64_t iova, uint64_t gpa, uint64_t size)
{
    uint64_t last = iova + (size - 1), page = (1ull << granule(t)) - 1;
    unsigned bits = t->config.table.output_bits;
    struct pt_start start;

    return size && !((iova | gpa | size) & page) && last >= iova && gpa + (size - 1) >= gpa &&
           !(bits && bits < 64 && (gpa + (size - 1)) >> bits) && !t->format->start(&t->config, iova, &start) &&
           !t->format->start(&t->config, last, &start);
}

static bool access_ok(const struct vio_guest_table *t, uint32_t access)
{
    return access & PT_RWX && !(access & ~(uint32_t)PT_RWX) && (access & VIO_READ || t->format->write_only);
}

/* The largest leaf that the alignment of both sides and the size allow. */
static unsigned leaf_level(const struct vio_guest_table *t, uint64_t iova, uint64_t gpa, uint64_t size)
{
    unsigned level = 1;

    for (unsigned up = 2; up <= t->config.table.tree.levels && pt_entry_lg2(granule(t), up) < 64; up++)
        if (t->format->leaf_sizes(&t->config, up) & entry_size(t, up) && !((iova | gpa) & (entry_size(t, up) - 1)) &&
            size >= entry_size(t, up))
            level = up;
    return level;
}

/* All of the range mapped (wanted), or none of it: VIO_OK, or what is wrong. */
static int check_range(struct vio_guest_table *t, uint64_t iova, uint64_t size, bool wanted)
{
    while (size) {
        struct place place;
        int status = descend(t, iova, 1, false, &place);
        uint64_t rest;

        if (status)
            return status;
        if ((*place.entry != 0) != wanted)
            return wanted ? VIO_ERR_NOT_MAPPED : VIO_ERR_OVERLAP;
        rest = entry_size(t, place.level) - (iova & (entry_size(t, place.level) - 1));
        if (rest >= size)
            return VIO_OK;
        iova += rest;
        size -= rest;
    }
    return VIO_OK;
}

/* Make the range's leaves, none of which is larger than its part of it, empty. */
static int clear(struct vio_guest_table *t, uint64_t iova, uint64_t size)
{
    while (size) {
        struct place place;
        int status = descend(t, iova, 1, false, &place);

        if (status)
            return status;
        store(place.entry, 0);
        iova += entry_size(t, place.level);
        size -= entry_size(t, place.level);
    }
    return VIO_OK;
}

/* Fill a range that is free; *done: bytes filled. */
static int fill(struct vio_guest_table *t, uint64_t iova, uint64_t gpa, uint64_t size, unsigned perm, uint64_t *done)
{
    for (*done = 0; *done < size;) {
        uint64_t from = iova + *done, to = gpa + *done;
        unsigned level = leaf_level(t, from, to, size - *done);
        struct place place;
        int status = descend(t, from, level, true, &place);

        while (!status && *place.entry && level > 1) /* a table that is empty stands where the leaf could */
            status = descend(t, from, --level, true, &place);
        if (!status && (*place.entry || place.level != level)) /* it was none of ours */
            status = VIO_ERR_VALUE;
        if (status)
            return status;
        store(place.entry, t->format->make_leaf(&t->config, to, level, pt_entry_lg2(granule(t), level), perm));
        *done += entry_size(t, level);
    }
    return VIO_OK;
}

int vio_guest_table_map(vio_guest_table *t, uint64_t iova, uint64_t gpa, uint64_t size, uint32_t access)
{
    uint64_t done;
    int status;

    if (!legal(t, iova, gpa, size) || !access_ok(t, access))
        return VIO_ERR_VALUE;
    pthread_mutex_lock(&t->lock);
    status = check_range(t, iova, size, false);
    if (!status) {
        status = fill(t, iova, gpa, size, access, &done);
        if (status)
            clear(t, iova, done);
    }
    pthread_mutex_unlock(&t->lock);
    return status;
}

static bool is_dirty(const struct vio_guest_table *t, uint64_t leaf)
{
    const struct pt_dirty *dirty = &t->format->dirty;

    return !(~leaf & (dirty->tracked | dirty->set)) && !(leaf & dirty->clear);
}

/* The leaf made dirty or clean, if it has such a state. */
static uint64_t with_dirty(const struct vio_guest_table *t, uint64_t leaf, bool is)
{
    const struct pt_dirty *dirty = &t->format->dirty;

    if (~leaf & dirty->tracked)
        return leaf;
    return is ? (leaf | dirty->set) & ~dirty->clear : (leaf & ~dirty->set) | dirty->clear;
}

/* Let a leaf boundary lie at `iova`: a larger leaf there becomes a table of smaller ones, level by level. */
static int split(struct vio_guest_table *t, uint64_t iova)
{
    struct place place;
    int status;

    while (!(status = descend(t, iova, 1, false, &place)) && *place.entry && place.level > 1 &&
           iova & (entry_size(t, place.level) - 1)) {
        /* as a walk reads it: a clean leaf may permit writes by other bits than a dirty one */
        unsigned perm = t->format->permissions(&t->config, &place.start, ~0ull, *place.entry, false) & PT_RWX;
        uint64_t table = take_table(t, 1ull << granule(t)), part = entry_size(t, place.level - 1);
        uint64_t old = *place.entry;
        struct pt_entry leaf;

        if (table == NOWHERE)
            return VIO_ERR_LIMIT;
        if (t->format->decode(&t->config, &place.start, old, place.level, false, &leaf))
            return VIO_ERR_VALUE;
        do { /* a walk may make the leaf dirty meanwhile, and all its parts are then */
            for (uint64_t i = 0; i < 1ull << (granule(t) - 3); i++) {
                uint64_t small = t->format->make_leaf(&t->config, leaf.oa + i * part, place.level - 1,
                                                      pt_entry_lg2(granule(t), place.level - 1), perm);

                store(entry_at(t, table + i * 8), with_dirty(t, small, is_dirty(t, old)));
            }
        } while (!replace(place.entry, &old, t->format->make_table(&t->config, table, place.level)));
    }
    return status;
}

/* Let no leaf reach over an end of the range. */
static int carve(struct vio_guest_table *t, uint64_t iova, uint64_t size)
{
    struct pt_start start;
    int status = split(t, iova);

    if (!status && !t->format->start(&t->config, iova + size, &start)) /* else it is the end of the table */
        status = split(t, iova + size);
    return status;
}

int vio_guest_table_unmap(vio_guest_table *t, uint64_t iova, uint64_t size)
{
    int status;

    if (!legal(t, iova, 0, size))
        return VIO_ERR_VALUE;
    pthread_mutex_lock(&t->lock);
    status = check_range(t, iova, size, true);
    if (!status)
        status = carve(t, iova, size);
    if (!status)
        status = clear(t, iova, size);
    pthread_mutex_unlock(&t->lock);
    return status;
}

/* Give every leaf of the range, none of which reaches over its ends, another permission; dirty ones stay so. */
static int permit(struct vio_guest_table *t, uint64_t iova, uint64_t size, unsigned perm)
{
    while (size) {
        struct place place;
        struct pt_entry leaf;
        int status = descend(t, iova, 1, false, &place);
        uint64_t old, new;

        if (status)
            return status;
        old = __atomic_load_n(place.entry, __ATOMIC_ACQUIRE);
        if (t->format->decode(&t->config, &place.start, old, place.level, false, &leaf))
            return VIO_ERR_VALUE;
        do {
            new = t->format->make_leaf(&t->config, leaf.oa, place.level, leaf.size_lg2, perm);
            new = with_dirty(t, new, is_dirty(t, old));
        } while (!replace(place.entry, &old, new));
        iova += entry_size(t, place.level);
        size -= entry_size(t, place.level);
    }
    return VIO_OK;
}

int vio_guest_table_protect(vio_guest_table *t, uint64_t iova, uint64_t size, uint32_t access)
{
    int status;

    if (!legal(t, iova, 0, size) || !access_ok(t, access))
        return VIO_ERR_VALUE;
    pthread_mutex_lock(&t->lock);
    status = check_range(t, iova, size, true);
    if (!status)
        status = carve(t, iova, size);
    if (!status)
        status = permit(t, iova, size, access);
    pthread_mutex_unlock(&t->lock);
    return status;
}

static void set_bits(uint8_t *bitmap, uint64_t first, uint64_t last)
{
    for (; first <= last && first % 8; first++)
        bitmap[first / 8] |= (uint8_t)(1u << first % 8);
    for (; first + 7 <= last; first += 8)
        bitmap[first / 8] = 0xff;
    for (; first <= last; first++)
        bitmap[first / 8] |= (uint8_t)(1u << first % 8);
}

int vio_guest_table_read_dirty(vio_guest_table *t, uint64_t iova, uint64_t size, uint32_t page_lg2, int clean,
                               uint8_t *bitmap)
{
    bool set_by_walks = !(t->format->flags & VIO_TABLE_DIRTY) || t->config.table.flags & VIO_TABLE_DIRTY;
    uint64_t done = 0;
    int status;

    if (!legal(t, iova, 0, size) || page_lg2 < 12 || page_lg2 > 63 || (iova | size) & ((1ull << page_lg2) - 1))
        return VIO_ERR_VALUE;
    if (!set_by_walks)
        return VIO_ERR_UNTRACKED;
    pthread_mutex_lock(&t->lock);
    status = clean ? carve(t, iova, size) : VIO_OK;
    while (!status && done < size) {
        struct place place;
        uint64_t old, rest;

        status = descend(t, iova + done, 1, false, &place);
        if (status)
            break;
        old = __atomic_load_n(place.entry, __ATOMIC_ACQUIRE);
        rest = entry_size(t, place.level) - ((iova + done) & (entry_size(t, place.level) - 1));
        rest = rest < size - done ? rest : size - done;
        if (old && is_dirty(t, old))
            set_bits(bitmap, done >> page_lg2, (done + rest - 1) >> page_lg2);
        while (clean && old && is_dirty(t, old) && !replace(place.entry, &old, with_dirty(t, old, false)))
            continue;
        done += rest;
    }
    pthread_mutex_unlock(&t->lock);
    return status;
}
