"""The VM that went away: its own kind of failure, neither a failed check nor a run that could not start."""

from __future__ import annotations


class VmLost(Exception):
    """`part` is what went: "qemu", "guest" or "backend"; the text says how it was noticed."""

    def __init__(self, part: str, message: str) -> None:
        super().__init__(message)
        self.part = part
