/* Pages that translation requests do not find: a call from Python for each of them costs as much as ten walks. */
#include "engine.h"

#define PAGE 4096u
#define ROOM 64 /* translations of one request, on the stack */

struct missing {
    uint64_t *out;
    uint64_t most, count;
};

/* Enter the pages of [first, last]; false: there is no room for more. */
static bool add_pages(struct missing *missing, uint64_t first, uint64_t last)
{
    for (uint64_t page = first; missing->count < missing->most; page += PAGE) {
        missing->out[missing->count++] = page;
        if (last - page < PAGE)
            break;
    }
    return missing->count < missing->most;
}

/* Is it the page that is to blame, and not where all requests are led? */
static bool of_page(int reason)
{
    return reason != VIO_REASON_NO_ROUTE && reason != VIO_REASON_BLOCKED && reason != VIO_REASON_NOT_BOUND &&
           reason != VIO_REASON_ATS_OFF;
}

int vio_ats_missing(vio_engine *engine, uint32_t rid, uint32_t pasid, uint64_t iova, uint64_t length, uint32_t access,
                    uint64_t *out, uint64_t most, uint64_t *count)
{
    const uint32_t rights = access & (VIO_READ | VIO_WRITE | VIO_EXECUTE);
    struct missing missing = {out, most, 0};
    uint64_t last = iova + (length - 1), at = iova & ~(PAGE - 1ull);
    bool more = most > 0;

    *count = 0;
    if (!length || last < iova)
        return VIO_ERR_VALUE;
    while (more) {
        vio_translated found[ROOM];
        uint64_t left = last - at < UINT64_MAX ? last - at + 1 : UINT64_MAX, known;
        int status = vio_ats(engine, rid, pasid, at, left, access, found, ROOM, &known);

        if (status < 0)
            return status;
        for (uint64_t i = 0; i < known && more; i++) {
            uint64_t end = found[i].iova + (found[i].size - 1);

            if (rights & ~found[i].access) /* there for a part of what is asked */
                more = add_pages(&missing, at, end < last ? end : last);
            more = more && end < last;
            at = end + 1;
        }
        if (more && status) {
            if (!of_page(vio_last_fault()->reason))
                return status;
            more = add_pages(&missing, at, at) && last - at >= PAGE;
            at += PAGE;
        }
    }
    *count = missing.count;
    return VIO_OK;
}
