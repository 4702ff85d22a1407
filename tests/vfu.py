"""libvfio-user for tests: the file and the headers that belong to it."""

from __future__ import annotations

import functools
import os
from dataclasses import replace
from pathlib import Path

import pytest

from backend.vm import assets
from backend.vm.errors import CannotRun
from backend.vm.libvfio_user import LibvfioUser
from ctypes_bindings import LIBRARY_VARIABLE, Library, load


@functools.cache
def find() -> LibvfioUser | CannotRun:
    """What $VIOASID_LIBVFIO_USER names, else the host's, else the cached one; headers also from ../include."""
    named = os.environ.get(LIBRARY_VARIABLE)
    try:
        found = LibvfioUser(Path(named), None, "host") if named else assets.libvfio_user()
    except CannotRun as error:
        return error
    beside = found.library.parent.parent / "include"
    if found.include is None and (beside / "libvfio-user.h").exists():
        return replace(found, include=beside)
    return found


@pytest.fixture(scope="session")
def libvfio_user() -> LibvfioUser:
    found = find()
    if isinstance(found, CannotRun):
        pytest.skip(str(found))
    return found


@pytest.fixture(scope="session")
def library(libvfio_user: LibvfioUser) -> Library:
    return load(libvfio_user.library)
