"""The choice among the CUDA kernels, pinned without a GPU."""

from __future__ import annotations

import importlib.util
import itertools
import re
from pathlib import Path
from types import ModuleType

import pytest

# Multiprocessors of an A100, an RTX 4090, an H200 and a small card.
SMS = {"SM80": (108, 128, 16), "SM90": (132,), "PORTABLE": (148, 24)}
SHAPES = [
    (1, 2, 0),
    (17, 56, 8),
    (3072, 1792, 256),
    (4096, 0, 512),
    (28672, 3584, 512),
    (4096, 14336, 0),
]
ROWS = (1, 2, 7, 8, 9, 16, 17, 33, 64, 65, 100, 128, 200, 257, 1024, 2048, 16384)


@pytest.mark.parametrize(
    "capability, family",
    [((7, 5), "UNSUPPORTED"), ((8, 0), "SM80"), ((8, 6), "SM80"), ((8, 9), "SM80"),
     ((9, 0), "SM90"), ((10, 0), "PORTABLE"), ((10, 3), "PORTABLE"), ((12, 0), "PORTABLE")],
)  # fmt: skip
def test_family_of_a_compute_capability(
    capability: tuple[int, int], family: str, core: ModuleType
) -> None:
    assert core.cuda_family(*capability) == getattr(core.CudaFamily, family)


def test_layout_and_activation_form_follow_the_family(core: ModuleType) -> None:
    family, layout = core.CudaFamily, core.CudaLayout
    assert core.weight_layout(family.SM90) == layout.WGMMA
    assert core.weight_layout(family.SM80) == core.weight_layout(family.PORTABLE) == layout.MMA
    assert [core.packs_activations(f) for f in (family.SM80, family.SM90, family.PORTABLE)] == [
        True,
        False,
        False,
    ]


def test_small_m_streams_the_weights_and_large_m_uses_the_family_s_kernel(
    core: ModuleType,
) -> None:
    kernel, family = core.MixedGemmKernel, core.CudaFamily

    def choose(rows: int, name: str) -> object:
        return core.mixed_gemm_choice(
            rows, 4096, 3584, 512, False, getattr(family, name), 132
        ).kernel

    for name in ("SM80", "SM90", "PORTABLE"):
        assert choose(1, name) == choose(16, name) == kernel.SMALL_M
    assert choose(2048, "SM80") == kernel.SM80
    assert choose(2048, "SM90") == kernel.SM90
    assert choose(2048, "PORTABLE") == kernel.SMALL_M


@pytest.mark.parametrize("name", SMS)
def test_every_choice_can_be_launched(name: str, core: ModuleType) -> None:
    for (n, k_lo, k_hi), rows, packed, sms in itertools.product(
        SHAPES, ROWS, (True, False), SMS[name]
    ):
        family = getattr(core.CudaFamily, name)
        choice = core.mixed_gemm_choice(rows, n, k_lo, k_hi, packed, family, sms)
        case = (n, k_lo, k_hi, rows, packed, sms)
        tile = (choice.tile.m, choice.tile.n)
        assert tile in [(t.m, t.n) for t in core.mixed_gemm_tiles(choice.kernel)], case
        assert str(choice).endswith(f" {tile[0]}x{tile[1]} splits={choice.splits}"), case
        steps = -(-k_lo // 64) + -(-k_hi // 32)
        assert 1 <= choice.splits <= max(steps, 1), case
        assert choice.workspace_bytes >= 0, case
        # int32 sums of each part and split; blocks of sm90 have them in shared memory.
        if choice.splits > 1 and choice.kernel != core.MixedGemmKernel.SM90:
            assert choice.workspace_bytes >= choice.splits * 4 * rows * n, case


def test_tiles_fit_the_packed_weight_and_the_multiprocessor(core: ModuleType) -> None:
    kernel = core.MixedGemmKernel
    for name in (kernel.SMALL_M, kernel.SM80, kernel.SM90):
        tiles = core.mixed_gemm_tiles(name)
        assert [t.m for t in tiles] == sorted({t.m for t in tiles}), name
        for tile in tiles:
            assert tile.m % 8 == 0 and tile.m <= 256, name
            assert tile.n % 64 == 0 and tile.min_blocks >= 1, name
            assert name == kernel.SM90 or tile.cluster_m == tile.cluster_n == 1, name
            # A cluster that every device of sm_90 can launch has at most eight blocks.
            assert name != kernel.SM90 or tile.cluster_n * tile.most_splits <= 8, name


def test_cost_of_sm90_tiles(core: ModuleType) -> None:
    """Clocks per column of K; only 192 rows of activations are bound by tensor cores."""
    tiles = core.mixed_gemm_tiles(core.MixedGemmKernel.SM90)
    whole = {tile.m: core.sm90_clocks(tile, 1, core.MixedGemmTuning()) for tile in tiles}
    assert {m: load for m, (load, _, _) in whole.items()} == pytest.approx(
        {32: 224 / 128, 64: 2.5, 128: 128 / 28, 192: 160 / 28}
    )
    assert {m: multiply for m, (_, multiply, _) in whole.items()} == {32: 1, 64: 2, 128: 4, 192: 6}
    assert {m: finish for m, (_, _, finish) in whole.items()} == {m: 10 * m for m in whole}
    # Blocks that share K have no neighbour along M to share weights with, and send their sums.
    load, multiply, finish = core.sm90_clocks(tiles[1], 4, core.MixedGemmTuning())
    assert (load, multiply) == (pytest.approx(96 / 28), 2)
    assert finish == 10 * 64 / 4 + 1800 + 64 * 128 * 4 * 3 / 4 / 32


def test_clusters_of_an_h200(core: ModuleType) -> None:
    """132 multiprocessors in six parts of 16 and two of 18; a cluster is in one part."""
    clusters = {blocks: core.sm90_clusters(blocks, 132) for blocks in (2, 4, 6, 8)}
    assert clusters == {2: 66, 4: 32, 6: 18, 8: 16}
    assert core.sm90_clusters(8, 8) == 1 and core.sm90_clusters(4, 8) == 2
    assert core.sm90_clusters(8, 4) == 1  # the launch says that none fits


def test_decode_fills_the_multiprocessors(core: ModuleType) -> None:
    """A 4096 x 4096 layer has 64 row blocks: splits of K occupy the rest of 132."""
    choice = core.mixed_gemm_choice(1, 4096, 3584, 512, False, core.CudaFamily.SM90, 132)
    blocks = 4096 // choice.tile.n * choice.splits
    assert blocks >= 128


@pytest.mark.parametrize(
    ("rows", "tiles"),
    [
        (17, ((32, 1), (32, 4), (32, 4), (32, 4))),
        (64, ((32, 1), (64, 4), (32, 1), (64, 4))),
        (128, ((64, 1), (32, 1), (128, 1), (128, 4))),
        (256, ((128, 1), (64, 1), (64, 1), (128, 2))),
        (2048, ((192, 1), (128, 1), (192, 1), (128, 1))),
    ],
)
def test_tiles_of_llama_3_8b_on_an_h200(
    rows: int, tiles: tuple[tuple[int, int], ...], core: ModuleType
) -> None:
    """qkv, o, gate_up and down: the model of sm90_clocks, until a GPU measures it."""
    tuning = core.mixed_gemm_tuning(9, 0, 132, 6144)
    layers = [(6144, 3584, 512), (4096, 3584, 512), (28672, 3584, 512), (4096, 12544, 1792)]
    for (n, k_lo, k_hi), tile in zip(layers, tiles, strict=True):
        choice = core.mixed_gemm_choice(
            rows, n, k_lo, k_hi, False, core.CudaFamily.SM90, 132, tuning
        )
        assert choice.kernel == core.MixedGemmKernel.SM90
        assert (choice.tile.m, choice.splits) == tile
        assert choice.workspace_bytes == 0  # int8 rows of whole 16 bytes are read where they are


@pytest.mark.parametrize(
    ("rows", "kernel", "tiles"),
    [
        (1, "SMALL_M", ((8, 1), (8, 2), (8, 1), (8, 2))),
        (16, "SMALL_M", ((16, 1), (16, 2), (16, 1), (16, 2))),
        (64, "SMALL_M", ((64, 1), (64, 1), (64, 1), (64, 3))),
        (128, "SM80", ((64, 1), (64, 1), (128, 1), (64, 2))),
        (2048, "SM80", ((128, 1), (128, 1), (128, 1), (128, 1))),
    ],
)
def test_tiles_and_splits_of_llama_3_8b_on_an_a100(
    rows: int, kernel: str, tiles: tuple[tuple[int, int], ...], core: ModuleType
) -> None:
    """qkv, o, gate_up and down: the model of best_splits, until a GPU measures it."""
    layers = [(6144, 3584, 512), (4096, 3584, 512), (28672, 3584, 512), (4096, 14336, 0)]
    for (n, k_lo, k_hi), tile in zip(layers, tiles, strict=True):
        choice = core.mixed_gemm_choice(rows, n, k_lo, k_hi, True, core.CudaFamily.SM80, 108)
        assert choice.kernel == getattr(core.MixedGemmKernel, kernel)
        assert (choice.tile.m, choice.splits) == tile
        partials = (choice.splits + 1) * rows * n * 4 if choice.splits > 1 else 0
        assert choice.workspace_bytes == partials


def test_only_a_tile_that_is_compiled_is_launched(core: ModuleType) -> None:
    for tile in core.mixed_gemm_tiles(core.MixedGemmKernel.SM90):
        assert core.dispatched_m(tile.m) == tile.m
    with pytest.raises(RuntimeError, match="tile: expected an M that is compiled, got 48"):
        core.dispatched_m(48)


def test_sm80_workspace_holds_the_rows_that_it_copies(core: ModuleType) -> None:
    """Rows that are no multiple of 16 bytes (8 codes for small M), padded to a step."""

    def workspace(rows: int, k_lo: int, k_hi: int, packed: bool) -> int:
        family = core.CudaFamily.SM80
        return core.mixed_gemm_choice(rows, 64, k_lo, k_hi, packed, family, 1).workspace_bytes

    assert workspace(100, 784, 112, True) == 100 * 832 // 2
    assert workspace(100, 784, 112, False) == workspace(64, 784, 112, True) == 0
    assert workspace(100, 784, 8, False) == 100 * 64
    assert workspace(3, 12, 7, True) == 256 + 3 * 64  # the second region is aligned to 256


def test_sm90_workspace_holds_the_rows_that_it_rewrites(core: ModuleType) -> None:
    """Nibbles, and rows that are no multiple of 16 bytes, become padded int8 rows."""

    def workspace(k_lo: int, k_hi: int, packed: bool) -> int:
        family = core.CudaFamily.SM90
        return core.mixed_gemm_choice(100, 64, k_lo, k_hi, packed, family, 132).workspace_bytes

    assert workspace(64, 32, True) == 100 * 64
    assert workspace(66, 32, False) == 100 * 80
    assert workspace(64, 33, False) == 100 * 48
    assert workspace(66, 33, True) == 8192 + 100 * 48  # the second region is aligned to 256
    assert workspace(0, 32, True) == workspace(0, 0, False) == 0


def test_a_percentage_is_an_integer_or_what_holds_without_one(core: ModuleType) -> None:
    for otherwise in (core.DRIVERS_CARVEOUT, core.PREFETCH_PERCENT):
        for text, percent in (("", otherwise), ("0", 0), ("50", 50), ("100", 100)):
            assert core.select_percent("NAME", text, otherwise) == percent
    for text in ("-1", "101", "max", "50%", " 50", "5.0", "+5", "99999999999999999999"):
        sentence = f"^NAME: expected an integer from 0 to 100, got {re.escape(text)}$"
        with pytest.raises(RuntimeError, match=sentence):
            core.select_percent("NAME", text, -1)


STEP_BYTES, L2_BYTES = 2048, 50 << 20  # 64 rows of a weight, 64 or 32 of K; an H200


@pytest.mark.parametrize(
    ("k_lo", "k_hi"), [(3584, 512), (14336, 0), (0, 2048), (784, 112), (66, 33), (1, 0), (0, 0)]
)
def test_the_blocks_of_small_m_ask_for_every_byte_once(
    k_lo: int, k_hi: int, core: ModuleType
) -> None:
    steps = -(-k_lo // 64) + 2 * -(-k_hi // 64)  # both parts are padded to 64 columns
    for splits in range(1, max(2, min(16, steps) + 1)):
        whole = core.prefetched_spans(k_lo, k_hi, splits, steps)
        assert [first for first, _ in whole] == [
            STEP_BYTES * (steps * split // splits) for split in range(splits)
        ]
        ends = [first + count for first, count in whole]
        assert ends == [*(first for first, _ in whole[1:]), STEP_BYTES * steps]
        for most in (0, 1, 5, 40):  # of a block's steps the first ones, which it reads first
            assert core.prefetched_spans(k_lo, k_hi, splits, most) == [
                (first, min(count, STEP_BYTES * most)) for first, count in whole
            ]


@pytest.mark.parametrize("percent", [0, 1, 25, 50, 100])
@pytest.mark.parametrize("slots", [132, 264, 396])
def test_blocks_that_wait_together_ask_for_a_share_of_l2(
    slots: int, percent: int, core: ModuleType
) -> None:
    for blocks in (1, 16, 96, 132, 256, 396, 397, 1344, 100_000):
        steps = core.prefetched_steps(blocks, slots, L2_BYTES, percent)
        waiting = min(blocks, slots)
        assert 0 <= steps * STEP_BYTES * waiting <= L2_BYTES * percent / 100
        # No less than that share, but for what one instruction takes.
        share = (steps + 1) * STEP_BYTES * waiting > L2_BYTES * percent / 100
        assert share or steps * STEP_BYTES == (1 << 20) - STEP_BYTES


@pytest.mark.parametrize(
    ("model", "expected"),
    [("llama-3-8b", [14.2, 9.4, 19.5, 26.0]), ("llama-3.2-1b", [3.5, 2.4, 18.9, 9.4])],
)
def test_what_may_wait_in_l2_for_a_step_on_an_h200(
    model: str, expected: list[float], core: ModuleType
) -> None:
    """qkv, o, gate_up, down: MB that the blocks ask for that start at once, as predicted."""
    path = Path(__file__).resolve().parents[2] / "benchmarks/weights_in_l2.py"
    spec = importlib.util.spec_from_file_location("weights_in_l2", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    asked = []
    for product in script.LAYERS[model]:
        weight = (product.n, product.k_lo, product.k_hi)
        choice = core.mixed_gemm_choice(1, *weight, False, core.CudaFamily.SM90, 132)
        assert (choice.tile.m, choice.splits) == (8, product.splits), product
        blocks, slots = product.n // 64 * choice.splits, 132 * choice.tile.min_blocks
        steps = core.prefetched_steps(blocks, slots, L2_BYTES, core.PREFETCH_PERCENT)
        spans = core.prefetched_spans(product.k_lo, product.k_hi, choice.splits, steps)
        per_block = sum(count for _, count in spans) / choice.splits
        asked.append(min(blocks, slots) * per_block / 1e6)
        assert product.asked(None) == pytest.approx(asked[-1])
    assert [round(megabytes, 1) for megabytes in asked] == expected


def test_what_is_asked_once_is_kept_but_for_failures(core: ModuleType) -> None:
    asked = []

    def compute(key: int) -> int:
        asked.append(key)
        if len(asked) == 1:
            raise ValueError
        return 10 * key + len(asked)

    assert core.asked_once(compute) == [-1, 2, 13, 2]
    assert asked == [0, 0, 1]


def test_legal_choices_hold_the_one_that_is_taken(core: ModuleType) -> None:
    for name, sms in SMS.items():
        family = getattr(core.CudaFamily, name)
        for shape, rows, packed in itertools.product(SHAPES, ROWS, (True, False)):
            legal = {
                str(choice): choice for choice in core.legal_choices(rows, *shape, packed, family)
            }
            choice = core.mixed_gemm_choice(rows, *shape, packed, family, sms[0])
            same = legal[str(choice)]
            assert same.workspace_bytes == choice.workspace_bytes, (rows, shape, packed)


@pytest.mark.parametrize(
    ("name", "numbers"),
    [("SM80", {"small_m": 64, "sm80": 32}), ("SM90", {"small_m": 64, "sm90": 13}),
     ("PORTABLE", {"small_m": 64})],
)  # fmt: skip
def test_legal_choices_are_every_tile_and_split(
    name: str, numbers: dict[str, int], core: ModuleType
) -> None:
    """4 tiles x 16 splits of small_m, 2 x 16 of sm80; 3 x 4 and one tile of sm90."""
    family = getattr(core.CudaFamily, name)
    names = [str(choice) for choice in core.legal_choices(1, 4096, 3584, 512, True, family)]
    assert len(names) == len(set(names)) == sum(numbers.values())
    for kernel, number in numbers.items():
        assert sum(text.startswith(f"{kernel} ") for text in names) == number


def test_a_choice_is_found_by_its_name_alone(core: ModuleType) -> None:
    family = core.CudaFamily
    shape = (40, 64, 128, 64, True)  # four steps of small_m, two K tiles of sm80

    def find(name: str, of: object = family.SM90) -> str | None:
        choice = core.legal_choice(name, *shape, of)
        return choice and str(choice)

    for name in ("small_m 8x64 splits=1", "small_m 64x64 splits=4", "sm90 192x128 splits=1",
                 "sm90 64x128 splits=2"):  # fmt: skip
        assert find(name) == name
    wrong = ("", "sm90", "sm90 48x128 splits=1", "sm90 64x128 splits=3", "small_m 8x64 splits=5")
    for name in (*wrong, "small_m 8x64 splits=0", "small_m 8x64 splits=02", "sm80 64x128 splits=1"):
        assert find(name) is None, name
    assert find("sm80 64x128 splits=1", family.SM80) and not find("sm80 64x128 splits=1")
    assert not find("sm90 64x128 splits=1", family.PORTABLE)
    assert core.describe_legal(*shape, family.SM90) == (
        "small_m 8x64 splits=1..4, small_m 16x64 splits=1..4, small_m 32x64 splits=1..4, "
        "small_m 64x64 splits=1..4, sm90 32x128 splits=1..2, sm90 64x128 splits=1..2, "
        "sm90 128x128 splits=1..2, sm90 192x128 splits=1"
    )


def test_chips_are_told_apart(core: ModuleType) -> None:
    """H100 and H200 have 132 multiprocessors each; the H200's memory bus is wider."""
    chips = {"h100": (9, 0, 132, 5120), "h200": (9, 0, 132, 6144), "a100": (8, 0, 108, 5120)}
    chips["rtx4090"] = (8, 9, 128, 384)
    for name, facts in chips.items():
        assert core.mixed_gemm_chip(*facts) == name
    assert core.mixed_gemm_chip(9, 0, 114, 5120) == core.mixed_gemm_chip(12, 0, 170, 512) == ""


def test_tuning_moves_the_choice(core: ModuleType) -> None:
    def choose(rows: int, family: str = "SM90", **changes: float) -> str:
        tuning = core.MixedGemmTuning()
        for field, value in changes.items():
            setattr(tuning, field, value)
        of = getattr(core.CudaFamily, family)
        return str(core.mixed_gemm_choice(rows, 4096, 3584, 512, True, of, 132, tuning))

    assert choose(64) == "small_m 64x64 splits=2"
    assert choose(64, small_m_up_to=32).startswith("sm90 ")
    assert choose(64, small_m_largest_tile=32).startswith("small_m 32x64 ")
    assert choose(1) == "small_m 8x64 splits=3"
    assert choose(1, small_m_second_launch=1000) == "small_m 8x64 splits=1"
    assert choose(512) == "sm90 128x128 splits=1"
    assert choose(512, sm90_l2_bytes=4) == "sm90 64x128 splits=1"
    assert choose(2048, "SM80").startswith("sm80 128x128")
    assert choose(2048, "SM80", sm80_large_tiles=9).startswith("sm80 64x128")
