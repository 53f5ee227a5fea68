"""The build refuses serialized wgmma and spilled registers."""

from __future__ import annotations

import emulation

REPORT = """\
ptxas info    : Compiling entry function '_Zgood' for 'sm_80'
ptxas info    : Function properties for _Zgood
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 380 bytes cmem[0]
ptxas info    : Compiling entry function '_Zbad' for 'sm_90a'
ptxas info    : Function properties for _Zbad
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
"""
SERIALIZED = (
    "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are "
    "serialized due to the presence of Extern calls in the function '_Zbad'"
)


problems = emulation.load_file("tools/compile_cuda.py").problems


def test_spills_and_serialized_wgmma_stop_the_build() -> None:
    assert problems(REPORT) == ["_Zbad for sm_90a: expected no spilled registers, got 20 bytes"]
    assert problems(SERIALIZED) == [SERIALIZED]


def test_a_clean_report_passes() -> None:
    assert (
        problems(REPORT[: REPORT.index("ptxas info    : Compiling entry function '_Zbad'")]) == []
    )
