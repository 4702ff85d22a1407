/* Many translations in one call: a call from Python costs as much as several walks. */
#include "engine.h"

int vio_translate_many(vio_engine *engine, uint32_t rid, uint32_t pasid, const uint64_t *iovas, uint64_t count,
                       uint32_t access, uint64_t *hvas, uint64_t *gpas, uint64_t *sizes, uint8_t *reasons)
{
    int answer = VIO_OK;

    for (uint64_t i = 0; i < count; i++) {
        vio_translation found = {0};
        int status = vio_translate(engine, rid, pasid, iovas[i], access, &found);

        if (status < 0)
            return status;
        hvas[i] = found.hva;
        gpas[i] = found.gpa;
        sizes[i] = found.size;
        reasons[i] = status ? vio_last_fault()->reason : VIO_REASON_NONE;
        answer |= status;
    }
    return answer;
}
