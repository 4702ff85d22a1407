"""libvfio-user from Python: its declarations, loading it, and a context that never waits."""

from ctypes_bindings.context import MESSAGE_MAX, Context, Handlers, MappedRegion, Refused, Region, errno_of
from ctypes_bindings.library import LIBRARY_VARIABLE, Library, LibraryError, LibraryMissing, load

__all__ = [
    "LIBRARY_VARIABLE",
    "MESSAGE_MAX",
    "Context",
    "Handlers",
    "Library",
    "LibraryError",
    "LibraryMissing",
    "MappedRegion",
    "Refused",
    "Region",
    "errno_of",
    "load",
]
