"""Finding and loading libvfio-user."""

from __future__ import annotations

import ctypes
import ctypes.util
import os
from pathlib import Path
from typing import Any

from ctypes_bindings.declarations import FUNCTIONS

LIBRARY_NAME = "libvfio-user.so.0"
LIBRARY_VARIABLE = "VIOASID_LIBVFIO_USER"


class LibraryMissing(Exception):
    """libvfio-user could not be loaded; the message says what was tried and what to do."""


class LibraryError(OSError):
    """A call of libvfio-user failed; errno and strerror are the library's, `function` is the call."""

    def __init__(self, function: str, number: int) -> None:
        super().__init__(number, os.strerror(number))
        self.function = function

    def __str__(self) -> str:
        return f"{self.function}: {self.strerror} (errno {self.errno})"


class Library:
    """The loaded library, every function declared.

    PyDLL holds the interpreter's lock during a call. That is wanted: no call made here ever waits (context.py sees
    to it), and the library once closes a descriptor twice, which must not hit one that another thread just opened.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        handle = ctypes.PyDLL(name, use_errno=True)
        self._functions: dict[str, Any] = {}
        for function, result, arguments in FUNCTIONS:
            declared = getattr(handle, function)
            declared.restype = result
            declared.argtypes = arguments
            self._functions[function] = declared
        libc = ctypes.PyDLL(None)
        self._errno = libc["__errno_location"]  # by item: an attribute would be mangled inside a class
        self._errno.restype = ctypes.POINTER(ctypes.c_int)
        self._errno.argtypes = ()

    def call(self, function: str, *arguments: Any) -> Any:
        """Call and return the result; LibraryError if it is negative or a NULL context."""
        declared = self._functions[function]
        ctypes.set_errno(0)
        result = declared(*arguments)
        failed = result is None if declared.restype is ctypes.c_void_p else result is not None and result < 0
        if failed:
            raise LibraryError(function, ctypes.get_errno())
        return result

    def set_errno(self, number: int) -> None:
        """Set C's own errno, for a callback to fail with. ctypes.set_errno changes a private copy that C never sees."""
        self._errno().contents.value = number


def load(path: Path | None = None) -> Library:
    """Load libvfio-user: from `path`, else from $VIOASID_LIBVFIO_USER, else the system's own.

    Raises LibraryMissing if there is none, or if what was found is not libvfio-user.
    """
    variable = os.environ.get(LIBRARY_VARIABLE)
    if path is not None:
        candidate, origin = str(path), "asked for"
    elif variable:
        candidate, origin = variable, f"named by ${LIBRARY_VARIABLE}"
    else:
        candidate, origin = ctypes.util.find_library("vfio-user") or LIBRARY_NAME, "of the system"
    try:
        return Library(candidate)
    except OSError as error:
        raise LibraryMissing(
            f"cannot load {candidate} ({origin}): {error}; install libvfio-user or set ${LIBRARY_VARIABLE} to its file"
        ) from error
    except AttributeError as error:
        raise LibraryMissing(f"{candidate} ({origin}) is no libvfio-user that fits: {error}") from error
