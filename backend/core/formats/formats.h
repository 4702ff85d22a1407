/*
 * The formats there are. To add one: write its header after amd_v1.h, include it here, and add its line to both lists:
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

/* The same once more, each with another macro's argument: for what is made of pairs. */
#define FORMATS_OVER(X, stage2)                                                                                        \
    X(amd_v1, stage2)                                                                                                  \
    X(x86, stage2)                                                                                                     \
    X(vtd_second_stage, stage2)                                                                                        \
    X(ept, stage2)                                                                                                     \
    X(arm_s1, stage2)                                                                                                  \
    X(arm_s2, stage2)                                                                                                  \
    X(riscv, stage2)                                                                                                   \
    X(riscv_x4, stage2)

enum pt_format_id {
#define X(name) PT_##name,
    FORMATS(X)
#undef X
    PT_FORMATS
};

extern const struct pt_format *const pt_formats[PT_FORMATS];

#endif
