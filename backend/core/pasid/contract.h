/*
 * What a PASID table must tell the core: the contract, without bodies.
 *
 * A PASID table of the guest's leads from a PASID to the stage-1 table of one address space. Each kind is one header of
 * this folder, its parts in this order: title with the specification's section, bits, prepare, find, the constant table
 * of them; tables.h lists them. They are read seldom (what was found is kept, see ../pasid.c), so their functions
 * are called by pointer.
 *
 * Levels, as faults tell them: 1 holds the entries that describe address spaces, 0 means that none was read. Every word
 * is read once, by one 64-bit load; the words of one entry are read in order.
 */
#ifndef VIOASID_PASID_CONTRACT_H
#define VIOASID_PASID_CONTRACT_H

#include <stdbool.h>
#include <stdint.h>

#include "../formats/contract.h"

/* Reading a table: what it goes through, and where it stands. */
struct pasid_reader {
    int (*load)(struct pasid_reader *reader, uint64_t at, unsigned level, uint64_t *word); /* 0, or the reader's reason */
    unsigned level;   /* out, also at a fault: of the last entry read */
    uint64_t at;      /* ditto: its address */
    uint64_t entry;   /* ditto: its first word, 0 if it could not be read */
    bool unreadable;  /* out: the reason is the reader's, not the table's */
};

/* What a PASID leads to. */
struct pasid_entry {
    const char *format;  /* name of the stage-1 format; NULL: no stage 1, addresses are stage 2's */
    vio_table table;     /* as the entry tells it; its options are joined by those of vio_pasid_table, and checked */
    bool privileged;     /* requests with privilege are let in */
};

struct pasid_format {
    const char *name;
    const char *const *leads_to; /* stage-1 formats that it can name; ends with NULL */
    /*
     * Over a parent that is guest-managed too: the parent translates the table's own addresses, not only those that it
     * leads to. Else they are the host-managed space's.
     */
    bool nested;
    /* Check the options, and fill in what they leave at 0; false: not legal. */
    bool (*prepare)(vio_pasid_table *table);
    /* Find the entry of a PASID (20 bits): 0, or the reason why there is none. */
    int (*find)(const vio_pasid_table *table, uint32_t pasid, struct pasid_reader *reader, struct pasid_entry *out);
};

/* Read word `index` of the entry at `at`; the first one is the entry that a fault tells. */
static inline int pasid_load(struct pasid_reader *reader, uint64_t at, unsigned index, unsigned level, uint64_t *word)
{
    int reason;

    reader->level = level;
    reader->at = at;
    if (!index)
        reader->entry = 0;
    reason = reader->load(reader, at + 8 * index, level, word);
    reader->unreadable = reason != 0;
    if (!reason && !index)
        reader->entry = *word;
    return reason;
}

#endif
