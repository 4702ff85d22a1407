"""The IOASID uAPI: contexts, I/O address spaces, devices and their attachments."""
