/*
 * The floor of an MMIO round trip: a vfio-user server in C on the same library, which does nothing but answer.
 *
 *   mmio_floor SOCKET      serves one function with a 4 KiB BAR0 until its client leaves
 */
#include <errno.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#include "libvfio-user.h"

static uint8_t registers[4096];

static ssize_t
access_bar(vfu_ctx_t *context, char *buffer, size_t count, loff_t offset, bool is_write)
{
    (void)context;
    if ((size_t)offset > sizeof(registers) || count > sizeof(registers) - (size_t)offset) {
        errno = EINVAL;
        return -1;
    }
    if (is_write) {
        memcpy(registers + offset, buffer, count);
    } else {
        memcpy(buffer, registers + offset, count);
    }
    return (ssize_t)count;
}

int
main(int argc, char **argv)
{
    vfu_ctx_t *context;

    if (argc != 2) {
        fprintf(stderr, "usage: %s SOCKET\n", argv[0]);
        return 2;
    }
    signal(SIGPIPE, SIG_IGN);
    context = vfu_create_ctx(VFU_TRANS_SOCK, argv[1], 0, NULL, VFU_DEV_TYPE_PCI);
    if (context == NULL ||
        vfu_pci_init(context, VFU_PCI_TYPE_EXPRESS, PCI_HEADER_TYPE_NORMAL, 0) < 0 ||
        vfu_setup_region(context, VFU_PCI_DEV_BAR0_REGION_IDX, sizeof(registers), access_bar,
                         VFU_REGION_FLAG_RW | VFU_REGION_FLAG_MEM, NULL, 0, -1, 0) < 0 ||
        vfu_realize_ctx(context) < 0) {
        perror("mmio_floor: setup");
        return 1;
    }
    printf("ready\n");
    fflush(stdout);
    if (vfu_attach_ctx(context) < 0 || (vfu_run_ctx(context) < 0 && errno != ENOTCONN)) {
        perror("mmio_floor: serve");
        return 1;
    }
    vfu_destroy_ctx(context);
    return 0;
}
