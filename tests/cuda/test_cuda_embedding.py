"""embedding on CUDA under the emulator: the bits of the reference in both layouts."""

from __future__ import annotations

import emulation
import pytest
import torch
from emulation import Emulated

from resq_kernels import reference
from resq_kernels.formats import pack_int4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "weight", [(65, 66, 33), (130, 784, 112), (200, 0, 300), (40, 96, 0)], ids=str
)
def test_embedding_has_the_bits_of_the_reference(
    device: Emulated, weight: tuple[int, int, int], dtype: torch.dtype
) -> None:
    n, k_lo, k_hi = weight
    codes_lo = pack_int4(torch.randint(-8, 8, (n, k_lo), dtype=torch.int8))
    codes_hi = torch.randint(-128, 128, (n, k_hi), dtype=torch.int8)
    scale = torch.rand(n, 2)
    packed = device.pack_weight(codes_lo, codes_hi).clone()
    for ids in (torch.arange(n), torch.randint(0, n, (2, 3)).T):
        got = device.embedding(ids, packed, scale, k_lo, k_hi, dtype)
        assert got.dtype == dtype
        assert torch.equal(got, reference.embedding(ids, codes_lo, codes_hi, scale, dtype))


def test_an_id_that_is_none_stops_the_kernel(device: Emulated) -> None:
    codes = torch.zeros(64, 0, dtype=torch.uint8), torch.ones(64, 64, dtype=torch.int8)
    packed = device.pack_weight(*codes).clone()
    for wrong in (-1, 64):
        with emulation.stopped_by_trap():
            device.embedding(torch.tensor([wrong]), packed, torch.ones(64, 2), 0, 64, torch.half)
