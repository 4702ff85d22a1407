"""The vioasid backend: core, IOASID engine, PCI functions, vIOMMU front ends, endpoints, VM runner and command line."""
