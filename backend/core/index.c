/* Hash index; see index.h. Half empty at least, so a look-up of a missing key ends soon. */
#include "index.h"

#include <stdlib.h>

#define FIRST_LOG2 2 /* there may be one for each IOASID */

static int index_alloc(struct index *index, unsigned log2)
{
    struct index_slot *slots = calloc((size_t)1 << log2, sizeof *slots);

    if (!slots)
        return -1;
    index->slots = slots;
    index->mask = ((size_t)1 << log2) - 1;
    index->shift = 64 - log2;
    index->used = 0;
    return 0;
}

int index_init(struct index *index)
{
    return index_alloc(index, FIRST_LOG2);
}

void index_deinit(struct index *index)
{
    free(index->slots);
    index->slots = NULL;
}

static void index_place(struct index *index, uint64_t key, void *value)
{
    size_t i = index_home(index, key);

    while (index->slots[i].value)
        i = (i + 1) & index->mask;
    index->slots[i] = (struct index_slot){key, value};
    index->used++;
}

int index_insert(struct index *index, uint64_t key, void *value)
{
    if ((index->used + 1) * 2 > index->mask + 1) {
        struct index old = *index;

        if (index_alloc(index, 64 - old.shift + 1))
            return -1;
        for (size_t i = 0; i <= old.mask; i++)
            if (old.slots[i].value)
                index_place(index, old.slots[i].key, old.slots[i].value);
        free(old.slots);
    }
    index_place(index, key, value);
    return 0;
}

void index_remove(struct index *index, uint64_t key)
{
    size_t hole = index_home(index, key);

    while (index->slots[hole].key != key || !index->slots[hole].value) {
        if (!index->slots[hole].value)
            return;
        hole = (hole + 1) & index->mask;
    }
    index->used--;
    /* Move back every later entry of the run whose home does not lie behind the hole. */
    for (size_t i = (hole + 1) & index->mask; index->slots[i].value; i = (i + 1) & index->mask) {
        size_t home = index_home(index, index->slots[i].key);

        if (((i - home) & index->mask) >= ((i - hole) & index->mask)) {
            index->slots[hole] = index->slots[i];
            hole = i;
        }
    }
    index->slots[hole].value = NULL;
}
