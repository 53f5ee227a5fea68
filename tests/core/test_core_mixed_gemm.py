"""Which instruction set and plan any machine would run, and mixed_gemm's body over AMX tiles.

The tiles are emulated (emulated_tiles.h): the body is the library's own text, so that its order of
loads and products, its edges and its layouts are tested on machines without AMX.
"""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch

from resq_kernels import ops, reference
from resq_kernels.formats import pack_int4, weight_sums

AVX2 = 0b111
AVX512 = 0b11111_111
TILES = 0b11 << 8
PERMISSION = 1 << 10


def test_best_instruction_set_needs_all_that_the_ones_below_need(core: ModuleType) -> None:
    isa = core.Isa
    for features, best in [
        (0, isa.SCALAR),
        (0b011, isa.SCALAR),  # no f16c
        (AVX2, isa.AVX2),
        (AVX512 & ~(1 << 7), isa.AVX2),  # AVX-512 without VNNI
        (AVX512, isa.AVX512VNNI),
        (AVX512 | TILES, isa.AVX512VNNI),  # a kernel before 5.16, or one that refuses
        (AVX512 | TILES | PERMISSION, isa.AMX),
        (TILES | PERMISSION, isa.SCALAR),
    ]:
        assert core.best_isa(features) == best, bin(features)
        assert core.select_isa("", features) == best


def test_forced_instruction_set_is_refused_with_what_is_missing(core: ModuleType) -> None:
    everything = AVX512 | TILES | PERMISSION
    for name in ("scalar", "avx2", "avx512vnni", "amx"):
        assert core.select_isa(name, everything).name == name.upper()
    prefix = "RESQ_CPU_ISA: amx was asked for, but this machine has {} at best: it lacks {}"
    permission = "the operating system's permission to use tile data"
    for features, best, missing in [
        (AVX512 | TILES, "avx512vnni", permission),
        (AVX512, "avx512vnni", f"amx-tile, amx-int8, {permission}"),
        (AVX512 & ~(1 << 7) | TILES | PERMISSION, "avx2", "avx512vnni"),
    ]:
        with pytest.raises(RuntimeError) as error:
            core.select_isa("amx", features)
        assert str(error.value) == prefix.format(best, missing)
    with pytest.raises(RuntimeError, match="expected scalar, avx2, avx512vnni or amx, got sse9"):
        core.select_isa("sse9", everything)


def test_this_machine_runs_the_best_that_it_has(core: ModuleType) -> None:
    best = core.best_isa(core.detect_features()).name.lower()
    missing = torch.ops.resq.cpu_isa_missing()
    lacking = [core.missing_features(isa, core.detect_features()) for isa in all_isas(core)]
    names = [isa.name.lower() for isa in all_isas(core)]
    lines = [f"{name}: {what}" for name, what in zip(names, lacking, strict=True) if what]
    assert missing == "; ".join(lines)
    assert best in [name for name, what in zip(names, lacking, strict=True) if not what]


def all_isas(core: ModuleType) -> list:
    return [core.Isa.SCALAR, core.Isa.AVX2, core.Isa.AVX512VNNI, core.Isa.AMX]


def test_tiles_run_from_five_rows_on(core: ModuleType) -> None:
    """Decode stays with the vectors, which are at the speed of memory there."""
    on_tiles = [core.mixed_gemm_plan(m, 4096, 3584, 512, core.Isa.AMX).amx for m in range(1, 600)]
    assert on_tiles == [m >= 5 for m in range(1, 600)]
    for isa in all_isas(core)[:3]:
        assert not core.mixed_gemm_plan(512, 4096, 3584, 512, isa).amx


@pytest.mark.parametrize("isa", ["SCALAR", "AVX2", "AVX512VNNI", "AMX"])
def test_plans_cover_every_row_once_within_the_cache(core: ModuleType, isa: str) -> None:
    for rows in [0, 1, 4, 5, 16, 17, 130, 512, 2048, 4095]:
        for k_lo, k_hi in [(0, 0), (0, 24), (2, 0), (1792, 256), (3584, 512), (25872, 3696)]:
            plan = core.mixed_gemm_plan(rows, 4096, k_lo, k_hi, getattr(core.Isa, isa))
            assert plan.blocks == 128
            covered = sum(min(plan.panel_m, rows - i * plan.panel_m) for i in range(plan.panels))
            assert covered == rows
            assert plan.panels == 0 or (plan.panels - 1) * plan.panel_m < rows
            limit = (1280 if plan.amx else 768) * 1024
            one_tile = plan.panel_m <= plan.tile_m
            assert one_tile or plan.panel_m * (k_lo + k_hi) <= limit
            # No AMX tile of a panel but the last of all is padded.
            assert not plan.amx or plan.panel_m % 16 == 0


def rows_of_codes(generator: np.random.Generator, low: int, *shape: int) -> np.ndarray:
    return generator.integers(low, -low, shape, dtype=np.int8)


def over_tiles(core: ModuleType, q_lo: np.ndarray, packed: bool, runs: int, **rest) -> np.ndarray:
    empty = np.zeros((len(q_lo), 0), dtype=np.uint8)
    nibbles = pack_int4(torch.from_numpy(q_lo)).numpy() if packed else empty
    codes = empty.view(np.int8) if packed else q_lo
    return core.mixed_gemm_over_tiles(codes, nibbles, *rest.values(), runs)


@pytest.mark.parametrize("packed", [True, False], ids=["nibbles", "unpacked"])
@pytest.mark.parametrize(
    ("n", "k_lo", "k_hi"),
    [
        (1, 2, 0),  # one column of a tile, two codes of a step
        (17, 56, 8),  # less than a step of each part
        (33, 6, 3),  # three codes of a word
        (64, 224, 32),
        (48, 0, 72),  # no low part, a step and a group
        (40, 96, 0),
        (35, 64, 64),  # whole steps: the high part is loaded where it lies
        (32, 1030, 514),  # two chunks and six columns; one chunk and two
        (70, 1792, 256),
    ],
)
@pytest.mark.parametrize("rows", [5, 16, 17, 32, 33, 50])
def test_body_over_tiles_has_the_bits_of_the_reference(
    core: ModuleType, rows: int, n: int, k_lo: int, k_hi: int, packed: bool
) -> None:
    generator = np.random.default_rng()
    q_lo = rows_of_codes(generator, -8 if packed else -128, rows, k_lo)
    q_hi = rows_of_codes(generator, -128, rows, k_hi)
    params = generator.random((rows, 4), dtype=np.float32)
    params[:, 1::2] = generator.integers(-255, 256, (rows, 2))
    codes_lo = pack_int4(torch.from_numpy(rows_of_codes(generator, -8, n, k_lo)))
    codes_hi = torch.from_numpy(rows_of_codes(generator, -128, n, k_hi))
    scale = generator.random((n, 2), dtype=np.float32)
    bias = generator.normal(size=n).astype(np.float32)
    actual = over_tiles(
        core,
        q_lo,
        packed,
        runs=2,
        q_hi=q_hi,
        params=params,
        weight=ops.pack_weight(codes_lo, codes_hi).numpy(),
        scale=scale,
        sums=weight_sums(codes_lo, codes_hi).numpy(),
        bias=bias,
    )
    expected = reference.mixed_gemm(
        *(torch.from_numpy(part) for part in (q_lo, q_hi, params)),
        codes_lo,
        codes_hi,
        torch.from_numpy(scale),
        torch.from_numpy(bias),
        torch.float32,
    )
    assert torch.equal(torch.from_numpy(actual), expected)


@pytest.mark.parametrize("q", [-128, 127])
@pytest.mark.parametrize(("w_lo", "w_hi"), [(-8, -128), (7, 127)])
def test_body_over_tiles_is_exact_with_extreme_codes(
    core: ModuleType, q: int, w_lo: int, w_hi: int
) -> None:
    # 29568: the widest input of a model. The two parts are read apart by their scales.
    rows, n, k_lo, k_hi = 5, 2, 25872, 3696
    codes_lo = pack_int4(torch.full((n, k_lo), w_lo, dtype=torch.int8))
    codes_hi = torch.full((n, k_hi), w_hi, dtype=torch.int8)
    for part in range(2):
        params = np.zeros((rows, 4), dtype=np.float32)
        params[:, 2 * part] = 1.0
        params[:, 1::2] = -q
        actual = over_tiles(
            core,
            np.full((rows, k_lo), q, dtype=np.int8),
            packed=False,
            runs=1,
            q_hi=np.full((rows, k_hi), q, dtype=np.int8),
            params=params,
            weight=ops.pack_weight(codes_lo, codes_hi).numpy(),
            scale=np.ones((n, 2), dtype=np.float32),
            sums=weight_sums(codes_lo, codes_hi).numpy(),
            bias=np.zeros(0, dtype=np.float32),
        )
        exact = 2 * q * (w_lo * k_lo if part == 0 else w_hi * k_hi)
        assert (actual == np.float32(exact)).all()
