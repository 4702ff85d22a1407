/* api.h as C includes it: cffi reads that file bare, so its guard and its one include stand here. */
#ifndef VIOASID_VIO_H
#define VIOASID_VIO_H

#include <stdint.h>

#include "api.h"

#endif
