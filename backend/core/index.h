/* Hash index from a 64-bit key to a pointer: open addressing, linear probing, deletion by backward shift. */
#ifndef VIOASID_INDEX_H
#define VIOASID_INDEX_H

#include <stddef.h>
#include <stdint.h>

struct index_slot {
    uint64_t key;
    void *value; /* NULL: free */
};

struct index {
    struct index_slot *slots;
    size_t mask; /* slots - 1, a power of two less one */
    size_t used;
    unsigned shift; /* 64 - log2(slots) */
};

int index_init(struct index *index); /* 0, or -1 without memory */
void index_deinit(struct index *index);
int index_insert(struct index *index, uint64_t key, void *value); /* key must be new; 0, or -1 without memory */
void index_remove(struct index *index, uint64_t key);

static inline size_t index_home(const struct index *index, uint64_t key)
{
    return (size_t)(key * 0x9e3779b97f4a7c15ull >> index->shift);
}

static inline void *index_find(const struct index *index, uint64_t key)
{
    for (size_t i = index_home(index, key);; i = (i + 1) & index->mask) {
        const struct index_slot *slot = &index->slots[i];

        if (!slot->value || slot->key == key)
            return slot->value;
    }
}

#endif
