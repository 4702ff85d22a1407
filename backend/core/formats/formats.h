/*
 * The formats there are. To add one: write its header after amd_v1.h, include it here, and add its lines to the lists:
 * FORMATS gives it a number and a name, HOST_FORMATS a walker for tables of ours alone, PAIRS one for each stage-1
 * format over a stage-2 format.
 */
#ifndef VIOASID_FORMATS_FORMATS_H
#define VIOASID_FORMATS_FORMATS_H

#include "amd_v1.h"

#define FORMATS(X) X(amd_v1)
#define HOST_FORMATS(X) X(amd_v1)
#define PAIRS(X) X(amd_v1, amd_v1)

enum pt_format_id {
#define X(name) PT_##name,
    FORMATS(X)
#undef X
    PT_FORMATS
};

extern const struct pt_format *const pt_formats[PT_FORMATS];

#endif
