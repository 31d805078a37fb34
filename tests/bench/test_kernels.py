"""How `bench/kernels.py` reads machine code, and what it finds worse than before."""

from dataclasses import replace
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"
CODE = """
        /*0000*/                   STL [R1], R2 ;
        /*0010*/                   LDL R3, [R1] ;
        /*0020*/                   MUFU.EX2 R4, R4 ;
        /*0030*/               @P0 BRA 0x10 ;
        /*0040*/                   LDL R5, [R1+0x4] ;
        /*0050*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0060*/                   STL.64 [R1+0x8], R6 ;
        /*0070*/               @!P1 BRA.U UP0, 0x50 ;
        /*0080*/                   LDL R7, [R1+0x8] ;
        /*0090*/                   BRA 0x0 ;
        /*00a0*/                   BRA 0xa0 ;
"""


@pytest.fixture
def kernels(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import kernels

    return kernels


def test_spills_count_in_the_innermost_loop_over_products(kernels):
    assert kernels.loop_spills(CODE) == 1
    assert kernels.loop_spills(CODE.replace("HMMA", "FFMA")) == 0
    assert kernels.loop_spills(CODE.replace("BRA.U UP0, 0x50", "EXIT")) == 5


def test_what_has_become_worse_is_named(kernels):
    row = kernels.Row(registers=100, spills=0, loop_spills=0, shared=1000, instructions={"mma": 3, "wgmma": 1})

    def said(**changes):
        return list(kernels.complaints("nvcc 13.0", {"k sm_80": replace(row, **changes)}, {"k sm_80": row}))

    assert said() == said(registers=110, shared=900, instructions={"mma": 1, "wgmma": 9, "tcgen05": 1}) == []
    assert said(registers=111) == ["nvcc 13.0: k sm_80 has 111 registers, expected 100"]
    assert said(spills=8) == ["nvcc 13.0: k sm_80 has 8 spills, expected 0"]
    assert said(loop_spills=1) == ["nvcc 13.0: k sm_80 has 1 loop_spills, expected 0"]
    assert said(instructions={"mma": 3}) == ["nvcc 13.0: k sm_80 has lost its wgmma"]
    assert list(kernels.complaints("nvcc 13.0", {"new": row}, {})) == ["nvcc 13.0: new is not in kernels.json"]
