/* Many translations in one call: a call from Python costs as much as several walks. */
#include "engine.h"

int vio_translate_many(vio_engine *engine, uint32_t rid, uint32_t pasid, const uint64_t *iovas, uint64_t count,
                       uint32_t access, const vio_answers *out)
{
    static const vio_fault no_fault;
    int answer = VIO_OK;

    for (uint64_t i = 0; i < count; i++) {
        vio_translation found = {0};
        int status = vio_translate(engine, rid, pasid, iovas[i], access, &found);
        const vio_fault *fault = status ? vio_last_fault() : &no_fault;

        if (status < 0)
            return status;
        out->hvas[i] = found.hva;
        out->gpas[i] = found.gpa;
        out->sizes[i] = found.size;
        out->access[i] = (uint8_t)found.access;
        out->fault_gpas[i] = fault->gpa;
        out->entries[i] = fault->entry;
        out->reasons[i] = fault->reason;
        out->stages[i] = fault->stage;
        out->levels[i] = fault->level;
        out->tables[i] = fault->table;
        answer |= status;
    }
    return answer;
}
