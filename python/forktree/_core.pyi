"""The compiled core, `csrc/bindings.cpp`."""

from typing import TypedDict

class Build(TypedDict):
    compiler: str
    flags: str
    isas: str
    openmp: bool

build: Build

def isas() -> list[tuple[str, str]]: ...
def isa() -> str: ...
def use_isa(name: str) -> None: ...
