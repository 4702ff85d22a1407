"""vIOMMU front ends: a guest's registers and queues turned into IOASID commands."""
