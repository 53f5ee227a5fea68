"""embedding: the value of every code, in every dtype, and what is refused."""

from __future__ import annotations

import pytest
import torch

from resq_kernels import ops, reference

SHAPES = [(1, 2, 0), (33, 56, 8), (320, 0, 128), (100, 6, 3), (64, 96, 0), (257, 0, 5), (40, 0, 0)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def weight(n: int, k_lo: int, k_hi: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Canonical codes and scales."""
    codes_lo = torch.randint(0, 256, (n, k_lo // 2), dtype=torch.uint8)
    codes_hi = torch.randint(-128, 128, (n, k_hi), dtype=torch.int8)
    return codes_lo, codes_hi, torch.rand(n, 2) * torch.tensor([0.1, 0.01])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_embedding_has_the_bits_of_the_reference(
    shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    codes_lo, codes_hi, scale = weight(*shape)
    packed = ops.pack_weight(codes_lo, codes_hi)
    every = torch.arange(shape[0]).flip(0)
    for ids in (every, every[None, :, None], torch.randint(0, shape[0], (3, 7)).T):
        got = ops.embedding(ids, packed, scale, *shape[1:], dtype)
        assert got.dtype == dtype and got.shape == (*ids.shape, sum(shape[1:]))
        assert torch.equal(got, reference.embedding(ids, codes_lo, codes_hi, scale, dtype))


def test_embedding_of_a_real_vocabulary_shows_one_changed_code() -> None:
    shape = (32000, 0, 512)
    codes_lo, codes_hi, scale = weight(*shape)
    ids = torch.randint(0, shape[0], (600,))
    packed = ops.pack_weight(codes_lo, codes_hi)
    before = ops.embedding(ids, packed, scale, *shape[1:], torch.bfloat16)
    codes_hi[ids[17], 300] ^= 64
    after = ops.embedding(
        ids, ops.pack_weight(codes_lo, codes_hi), scale, *shape[1:], torch.bfloat16
    )
    places = (before != after).nonzero().tolist()
    assert places == [[i, 300] for i in (ids == ids[17]).nonzero()[:, 0].tolist()]


def test_embedding_of_no_tokens() -> None:
    codes_lo, codes_hi, scale = weight(33, 56, 8)
    packed = ops.pack_weight(codes_lo, codes_hi)
    none = torch.empty(2, 0, dtype=torch.int64)
    assert ops.embedding(none, packed, scale, 56, 8, torch.half).shape == (2, 0, 64)


def test_embedding_carries_scales_that_are_not_finite() -> None:
    codes_lo, codes_hi, scale = weight(3, 0, 8)
    scale[1, 1] = torch.nan
    packed = ops.pack_weight(codes_lo, codes_hi)
    got = ops.embedding(torch.arange(3), packed, scale, 0, 8, torch.bfloat16)
    assert got.isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": torch.tensor([0, 33])}, "ids: expected 0 to 32, got 33"),
        ({"ids": torch.tensor([-1])}, "ids: expected 0 to 32, got -1"),
        ({"ids": torch.tensor([1], dtype=torch.uint8)}, r"ids: expected int64, got uint8 \[1\]"),
        ({"scale": torch.ones(65, 2)}, r"packed_weight: expected uint8 \[3456\] contiguous, got"),
        ({"scale": torch.ones(33)}, r"weight_scale: expected float32 \[\*, 2\] contiguous, got"),
        ({"k_lo": 55}, "k_lo, k_hi: expected none negative and k_lo even, got 55, 8"),
        ({"k_hi": -8}, "k_lo, k_hi: expected none negative and k_lo even, got 56, -8"),
        ({"dtype": torch.float64}, "dtype: expected float32, float16 or bfloat16, got float64"),
    ],
)
def test_embedding_refuses(change: dict, message: str) -> None:
    codes_lo, codes_hi, scale = weight(33, 56, 8)
    given = {"ids": torch.tensor([3]), "packed": ops.pack_weight(codes_lo, codes_hi)}
    given |= {"scale": scale, "k_lo": 56, "k_hi": 8, "dtype": torch.float32}
    with pytest.raises(RuntimeError, match="embedding: " + message):
        ops.embedding(*(given | change).values())


@pytest.mark.slow
def test_embedding_passes_opcheck_and_compiles() -> None:
    codes_lo, codes_hi, scale = weight(33, 56, 8)
    rest = (ops.pack_weight(codes_lo, codes_hi), scale, 56, 8, torch.bfloat16)
    ids = torch.randint(0, 33, (2, 5))
    torch.library.opcheck(torch.ops.resq.embedding.default, (ids, *rest))
    compiled = torch.compile(lambda ids: ops.embedding(ids, *rest) + 1, fullgraph=True)
    assert torch.equal(compiled(ids), ops.embedding(ids, *rest) + 1)
