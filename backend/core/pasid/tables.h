/* The PASID tables there are. To add one: write its header after amd_gcr3.h, include it here and add it to the list. */
#ifndef VIOASID_PASID_TABLES_H
#define VIOASID_PASID_TABLES_H

#include "amd_gcr3.h"
#include "arm_cd.h"
#include "riscv_pdt.h"
#include "vtd_pasid.h"

#define PASID_FORMATS(X) X(amd_gcr3) X(arm_cd) X(riscv_pdt) X(vtd_pasid)

#endif
