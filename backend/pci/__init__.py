"""PCI functions: config space, registers, interrupts, and the vfio-user server that carries them."""
