"""The virtual machine: its parts, QEMU, firmware tables, initramfs and report."""
