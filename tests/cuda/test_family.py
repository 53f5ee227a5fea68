"""Which family of kernels a device runs."""

from __future__ import annotations

import emulation


def test_family_follows_the_compute_capability(
    sm80: emulation.Emulated, sm90: emulation.Emulated
) -> None:
    assert sm80.cuda_family(sm80.index) == "sm80"
    assert sm90.cuda_family(sm90.index) == "sm90"
