"""Build the C core; everything else about the project stands in pyproject.toml."""

from setuptools import setup

setup(cffi_modules=["backend/core/build.py:ffibuilder"])
