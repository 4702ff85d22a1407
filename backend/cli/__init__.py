"""The vioasid command."""
