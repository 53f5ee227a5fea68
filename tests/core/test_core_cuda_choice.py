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
# Compute capability, multiprocessors and bits of the memory bus.
H200 = (9, 0, 132, 6144)
A100 = (8, 0, 108, 5120)
CHIPS = {"SM80": A100, "SM90": H200, "PORTABLE": (12, 0, 170, 512)}
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
        problem, chip = (rows, 4096, 3584, 512, False), CHIPS[name]
        tuning = core.mixed_gemm_tuning(*chip)
        return core.mixed_gemm_choice(*problem, getattr(family, name), chip[2], tuning).kernel

    for name in CHIPS:
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
            assert name != kernel.SM90 or core.SPLIT_CLUSTER_N * tile.most_splits <= 8, name
            assert tile.cluster_m * tile.cluster_n <= 8 and tile.row_n <= 8, name


# qkv, o, gate_up and down of Llama-3-8B.
LAYERS = [(6144, 3584, 512), (4096, 3584, 512), (28672, 3584, 512), (4096, 12544, 1792)]


def test_clocks_of_a_tile(core: ModuleType) -> None:
    """Per column of K_lo, by hand: bytes over rates, products over rates."""
    kernel, tuning = core.MixedGemmKernel, core.MixedGemmTuning()

    def clocks(name: object, m: int, splits: int = 1, rows: int = 64, packed: bool = False):
        tile = next(t for t in core.mixed_gemm_tiles(name) if t.m == m)
        parts = core.tile_clocks(rows, 4096, 1024, 0, packed, name, tile, splits, tuning)
        return [part / 1024 for part in parts]

    # small_m: 32 bytes of 64 weights; every activation a byte, or half of one.
    share = 2048 * 0.65
    assert clocks(kernel.SMALL_M, 64) == pytest.approx([32 / 12, 96 / 28, 0, 4096 / share])
    assert clocks(kernel.SMALL_M, 16, packed=True) == pytest.approx(
        [8 / 12, 40 / 28, 0, 1024 / share]  # four tiles along M read the weight once
    )
    # sm80: 128 weights; INT4 at twice the rate where the activations are packed.
    assert clocks(kernel.SM80, 64) == pytest.approx([64 / 12, 128 / 28, 0, 8192 / share])
    assert clocks(kernel.SM80, 64, packed=True) == pytest.approx(
        [64 / 12, 96 / 28, 0, 4096 / share]
    )
    # sm90: a cluster of two by two shares both, one of four along N the activations; so do two
    # blocks of each split.
    assert clocks(kernel.SM90, 64, rows=65) == pytest.approx([32 / 12, 64 / 28, 320 / 128, 2])
    assert clocks(kernel.SM90, 64) == pytest.approx([64 / 12, 80 / 28, 320 / 128, 2])
    assert clocks(kernel.SM90, 64, 4) == pytest.approx([64 / 12, 96 / 28, 320 / 128, 2])
    assert clocks(kernel.SM90, 128, rows=128) == pytest.approx([64 / 12, 96 / 28, 4, 4])
    assert clocks(kernel.SM90, 192, rows=192) == pytest.approx([64 / 12, 160 / 28, 704 / 128, 6])


def test_times_by_hand(core: ModuleType) -> None:
    tuning, family = core.MixedGemmTuning(), core.CudaFamily

    def time(rows: int, weight: tuple[int, int, int], name: str, sms: int) -> tuple[float, str]:
        choice = core.legal_choice(name, rows, *weight, False, family.SM90)
        return core.mixed_gemm_time(rows, *weight, False, choice, sms, tuning)

    # 64 blocks on 132 multiprocessors, one each: reading 4096 columns of 64 weights and 8 rows.
    memory = 64 * (3584 / 2 + 512) / 12
    assert time(1, (4096, 3584, 512), "small_m 8x64 splits=1", 132) == (
        pytest.approx(500 + memory), "waves"
    )  # fmt: skip
    # Three splits: 192 blocks, of 396 that fit; each third of the columns three times as fast.
    sums = 2 * 4 * 4096 * 4 / (132 * 28)
    assert time(1, (4096, 3584, 512), "small_m 8x64 splits=3", 132) == (
        pytest.approx(500 + memory * 192 / 132 / 3 + 2500 + sums), "memory"
    )  # fmt: skip
    # 16 clusters of eight: 32 tiles of 128 weights, a quarter of 98 + 14 K tiles each.
    tuning.memory_bytes = 100
    second_level = (128 * (12544 / 2 + 1792) + 64 / 2 * 14336) / 28 / 4
    finish = 10 * 64 / 4 + 1800 + 64 * 128 * 4 * 3 / 4 / 32
    assert time(64, (4096, 12544, 1792), "sm90 64x128 splits=4", 132) == (
        pytest.approx(1500 + second_level + finish), "L2"
    )  # fmt: skip
    # 4 waves of 66 clusters of two, the tensor cores' 6 clocks a column and the epilogue.
    assert time(2048, (6144, 4096, 0), "sm90 192x128 splits=1", 132) == (
        pytest.approx(1500 + 4 * (6 * 4096 + 1920)), "tensor cores"
    )  # fmt: skip


def test_clusters_of_an_h200(core: ModuleType) -> None:
    """132 multiprocessors in six parts of 16 and two of 18; a cluster is in one part."""
    clusters = {blocks: core.clusters_at_once(blocks, 132) for blocks in (2, 4, 6, 8)}
    assert clusters == {2: 66, 4: 32, 6: 18, 8: 16}
    assert core.clusters_at_once(8, 8) == 1 and core.clusters_at_once(4, 8) == 2
    assert core.clusters_at_once(8, 4) == 1  # the launch says that none fits


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("name", "chip"), [("SM80", A100), ("SM90", H200)])
def test_the_choice_takes_the_least_time(
    name: str, chip: tuple[int, ...], packed: bool, core: ModuleType
) -> None:
    """Of all legal ones but other tiles of small_m than the one, and splits of few K tiles."""
    family, tuning, sms = getattr(core.CudaFamily, name), core.mixed_gemm_tuning(*chip), chip[2]
    for shape, rows in itertools.product([*SHAPES, *LAYERS], ROWS):
        problem = (rows, *shape, packed)
        chosen = core.mixed_gemm_choice(*problem, family, sms, tuning)
        least, _ = core.mixed_gemm_time(*problem, chosen, sms, tuning)
        for choice in core.legal_choices(*problem, family):
            k_tiles = -(-shape[1] // 64) + 2 * -(-shape[2] // 64)  # of small_m
            if choice.kernel == core.MixedGemmKernel.SM80:
                k_tiles = -(-shape[1] // (128 if packed else 64)) + -(-shape[2] // 64)
            holds = next((m for m in (8, 16, 32) if m >= rows), 64)
            if choice.kernel == core.MixedGemmKernel.SMALL_M and choice.tile.m != holds:
                continue
            if choice.kernel != core.MixedGemmKernel.SM90 and choice.splits > max(k_tiles // 8, 1):
                continue
            assert core.mixed_gemm_time(*problem, choice, sms, tuning)[0] >= least, (
                problem,
                choice,
            )


def test_decode_fills_the_multiprocessors(core: ModuleType) -> None:
    """A 4096 x 4096 layer has 64 row blocks: splits of K occupy the rest of 132."""
    choice = core.mixed_gemm_choice(1, 4096, 3584, 512, False, core.CudaFamily.SM90, 132)
    blocks = 4096 // choice.tile.n * choice.splits
    assert blocks >= 128


def choices(core: ModuleType, rows: int, chip: tuple[int, ...], packed: bool) -> list[str]:
    """Of the layers of Llama-3-8B, with the constants of the chip."""
    family = core.CudaFamily.SM80 if chip[0] == 8 else core.CudaFamily.SM90
    tuning, found = core.mixed_gemm_tuning(*chip), []
    for weight in LAYERS:
        choice = core.mixed_gemm_choice(rows, *weight, packed, family, chip[2], tuning)
        # Rows of whole 16 bytes are read where they are.
        partials = choice.splits > 1 and choice.kernel != core.MixedGemmKernel.SM90
        bytes_of_sums = (choice.splits + 1) * rows * weight[0] * 4 if partials else 0
        assert choice.workspace_bytes == bytes_of_sums
        found.append(str(choice).replace("x64 splits=", "/").replace("x128 splits=", "/"))
    return found


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (1, "small_m 8/1, small_m 8/3, sm90 32/1, small_m 8/3"),
        (16, "small_m 16/1, small_m 16/2, small_m 16/1, small_m 16/3"),
        (32, "sm90 32/2, sm90 32/4, sm90 32/1, sm90 32/4"),
        (64, "sm90 32/1, sm90 64/4, sm90 64/1, sm90 64/4"),
        (128, "sm90 64/1, sm90 32/1, sm90 128/1, sm90 128/4"),
        (256, "sm90 128/1, sm90 64/1, sm90 128/1, sm90 64/1"),
        (2048, "sm90 192/1, sm90 128/1, sm90 128/1, sm90 128/1"),
    ],
)
def test_choices_of_llama_3_8b_on_an_h200(rows: int, expected: str, core: ModuleType) -> None:
    """qkv, o, gate_up and down, tile/splits: the model's, until a GPU measures them."""
    assert ", ".join(choices(core, rows, H200, False)) == expected


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (1, "small_m 8/1, small_m 8/2, small_m 8/1, small_m 8/2"),
        (16, "small_m 16/1, small_m 16/2, small_m 16/3, small_m 16/2"),
        (64, "small_m 64/1, small_m 64/1, small_m 64/1, small_m 64/5"),
        (128, "sm80 64/1, sm80 64/1, sm80 64/1, sm80 64/2"),
        (2048, "sm80 128/1, sm80 128/1, sm80 128/1, sm80 128/1"),
    ],
)
def test_choices_of_llama_3_8b_on_an_a100(rows: int, expected: str, core: ModuleType) -> None:
    assert ", ".join(choices(core, rows, A100, True)) == expected


def test_only_a_tile_that_is_compiled_is_launched(core: ModuleType) -> None:
    for tile in core.mixed_gemm_tiles(core.MixedGemmKernel.SM90):
        assert core.dispatched_m(tile.m) == tile.m
    with pytest.raises(RuntimeError, match="tile: expected an M that is compiled, got 48"):
        core.dispatched_m(48)


def workspace(core: ModuleType, name: str, rows: int, k_lo: int, k_hi: int, packed: bool) -> int:
    family = core.CudaFamily.SM80 if name.startswith("sm80") else core.CudaFamily.SM90
    return core.legal_choice(name, rows, 64, k_lo, k_hi, packed, family).workspace_bytes


def test_sm80_workspace_holds_the_rows_that_it_copies(core: ModuleType) -> None:
    """Rows that are no multiple of 16 bytes (8 codes for small M), padded to a step."""
    sm80, small_m = "sm80 64x128 splits=1", "small_m 64x64 splits=1"
    assert workspace(core, sm80, 100, 784, 112, True) == 100 * 832 // 2
    assert workspace(core, sm80, 100, 784, 112, False) == 0
    assert workspace(core, small_m, 64, 784, 112, True) == 0
    assert workspace(core, sm80, 100, 784, 8, False) == 100 * 64
    # The second region is aligned to 256.
    assert workspace(core, small_m, 3, 12, 7, True) == 256 + 3 * 64


@pytest.mark.parametrize("splits", [1, 2])
def test_sm90_workspace_holds_the_rows_that_it_rewrites(splits: int, core: ModuleType) -> None:
    """Nibbles, and rows that are no multiple of 16 bytes, become padded int8 rows."""
    name = f"sm90 64x128 splits={splits}"
    assert workspace(core, name, 100, 64, 32, True) == 100 * 64
    assert workspace(core, name, 100, 66, 32, False) == 100 * 80
    assert workspace(core, name, 100, 64, 33, False) == 100 * 48
    # The second region is aligned to 256.
    assert workspace(core, name, 100, 66, 33, True) == 8192 + 100 * 48
    assert workspace(core, "sm90 64x128 splits=1", 100, 0, 32, True) == 0
    assert workspace(core, "sm90 64x128 splits=1", 100, 0, 0, False) == 0


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
    [("llama-3-8b", [14.2, 9.4, 26.2, 26.0]), ("llama-3.2-1b", [3.5, 2.4, 18.9, 9.4])],
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
        tuning = core.mixed_gemm_tuning(*H200)
        choice = core.mixed_gemm_choice(1, *weight, False, core.CudaFamily.SM90, 132, tuning)
        small_m = product.kernel == "small_m"
        assert (choice.kernel == core.MixedGemmKernel.SMALL_M) == small_m, product
        assert (choice.tile.m, choice.splits) == (8 if small_m else 32, product.splits), product
        blocks, slots = product.n // 64 * choice.splits, 132 * choice.tile.min_blocks
        if not small_m:  # a block has two of 64 weights
            blocks = slots = min(product.n // 512, core.clusters_at_once(4, 132)) * 4 * 2
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
        tuning = core.mixed_gemm_tuning(*CHIPS[family])
        for field, value in changes.items():
            setattr(tuning, field, value)
        of = getattr(core.CudaFamily, family)
        return str(core.mixed_gemm_choice(rows, 4096, 3584, 512, True, of, 132, tuning))

    assert choose(64) == "sm90 64x128 splits=4"
    assert choose(64, start=20000) == "small_m 64x64 splits=2"
    assert choose(64, sm90_exchange=20000) == "sm90 32x128 splits=1"
    assert choose(1) == "small_m 8x64 splits=3"
    assert choose(1, second_launch=20000) == "sm90 32x128 splits=4"
    assert choose(512) == "sm90 128x128 splits=1"
    assert choose(65) == "sm90 32x128 splits=1"
    assert choose(65, l2_bytes=4) == "sm90 128x128 splits=4"  # reads the least
    assert choose(2048, "SM80").startswith("sm80 128x128")
    assert choose(2048, "SM80", l2_bytes=100).startswith("sm80 64x128")
    assert choose(2048, "PORTABLE").startswith("small_m 64x64")
