/* What a C program of the core's tests holds the core to. The first that does not hold ends it, with a line. */
#ifndef CORE_HOLDS_H
#define CORE_HOLDS_H

#include <stdio.h>
#include <unistd.h>

#define HOLDS(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "%s:%d: does not hold: %s\n", __FILE__, __LINE__, #condition);                             \
            _exit(1); /* at once: threads and helpers are still at work */                                             \
        }                                                                                                              \
    } while (0)

#endif
