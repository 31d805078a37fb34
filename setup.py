"""Everything is declared in pyproject.toml; the compiled kernels of `csrc/` are built from here."""

from setuptools import setup

setup()
