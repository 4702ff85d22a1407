/*
 * The formats there are. To add one: write its header after amd_v1.h, include it here, and add its line to each list:
 * it then has a number and a name, a walker of its own for tables of ours, and one over each format as its stage 2.
 */
#ifndef VIOASID_FORMATS_FORMATS_H
#define VIOASID_FORMATS_FORMATS_H

#include "amd_v1.h"
#include "arm_lpae.h"
#include "ept.h"
#include "riscv.h"
#include "vtd_second_stage.h"
#include "x86.h"

#define FORMATS(X)                                                                                                     \
    X(amd_v1)                                                                                                          \
    X(x86)                                                                                                             \
    X(vtd_second_stage)                                                                                                \
    X(ept)                                                                                                             \
    X(arm_s1)                                                                                                          \
    X(arm_s2)                                                                                                          \
    X(riscv)                                                                                                           \
    X(riscv_x4)

/* What a walker is compiled for: each format with each of its granules, log2 of its smallest page. */
#define WALKS(X)                                                                                                       \
    X(amd_v1, 12)                                                                                                      \
    X(x86, 12)                                                                                                         \
    X(vtd_second_stage, 12)                                                                                            \
    X(ept, 12)                                                                                                         \
    X(arm_s1, 12)                                                                                                      \
    X(arm_s1, 14)                                                                                                      \
    X(arm_s1, 16)                                                                                                      \
    X(arm_s2, 12)                                                                                                      \
    X(arm_s2, 14)                                                                                                      \
    X(arm_s2, 16)                                                                                                      \
    X(riscv, 12)                                                                                                       \
    X(riscv_x4, 12)

/* The same once more, each with another macro's arguments: for what is made of pairs. */
#define WALKS_OVER(X, stage2, granule2)                                                                                \
    X(amd_v1, 12, stage2, granule2)                                                                                    \
    X(x86, 12, stage2, granule2)                                                                                       \
    X(vtd_second_stage, 12, stage2, granule2)                                                                          \
    X(ept, 12, stage2, granule2)                                                                                       \
    X(arm_s1, 12, stage2, granule2)                                                                                    \
    X(arm_s1, 14, stage2, granule2)                                                                                    \
    X(arm_s1, 16, stage2, granule2)                                                                                    \
    X(arm_s2, 12, stage2, granule2)                                                                                    \
    X(arm_s2, 14, stage2, granule2)                                                                                    \
    X(arm_s2, 16, stage2, granule2)                                                                                    \
    X(riscv, 12, stage2, granule2)                                                                                     \
    X(riscv_x4, 12, stage2, granule2)

enum pt_format_id {
#define X(name) PT_##name,
    FORMATS(X)
#undef X
    PT_FORMATS
};

extern const struct pt_format *const pt_formats[PT_FORMATS];

#endif
