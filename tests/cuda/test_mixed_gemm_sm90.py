"""mixed_gemm on sm_90a (wgmma) has the bits of the reference; every access is checked."""

from __future__ import annotations

import emulation
import pytest
import torch
from gemm_cases import DTYPES, Case, forced

from resq_kernels.formats import pack_int4

# Tokens of a tile -> rows and N: one tile along M, which has another cluster, and several; tiles
# that end inside.
TILES = {
    32: [(20, 600), (128, 1), (80, 250)],
    64: [(64, 520), (200, 77), (256, 250)],
    128: [(93, 300), (200, 512), (256, 260)],
    192: [(257, 300), (384, 450), (300, 500)],
}
# The same with several turns of the clusters of eight multiprocessors.
TURNS = {32: (80, 250), 64: (200, 600), 128: (256, 1100), 192: (384, 800)}
ONE_ROW_OF_TILES = {32: (30, 1100), 64: (64, 1100)}
# (K_lo, K_hi): whole stages of 128 columns, half stages, tails of both, rows that are no multiple
# of 16 bytes, parts without columns, more stages than the ring holds.
COLUMNS = [(256, 128), (448, 64), (200, 72), (130, 65), (0, 224), (192, 0), (1568, 224)]
# Blocks that share K and the tokens of their tiles.
SPLITS = [(tile, splits) for tile in (32, 64, 128) for splits in (2, 3, 4)]


@pytest.fixture
def sm90(sm90: emulation.Emulated) -> emulation.Emulated:
    """A small H100."""
    return emulation.Emulated(sm90.arch, sms=8)


def call(case: Case, device: emulation.Emulated, tile: int = 64, splits: int = 1) -> torch.Tensor:
    """Runs the op on the sm90 kernel with this tile, and this split of K as far as K has tiles."""
    k_tiles = sum(-(-k // 128) for k in (case.codes_lo.shape[1] * 2, case.codes_hi.shape[1]))
    with forced(device, "mixed_gemm", f"sm90 {tile}x128 splits={min(splits, max(k_tiles, 1))}"):
        return case.run(device)


def make_case(
    rows: int,
    n: int,
    k_lo: int,
    k_hi: int,
    form: str = "unpacked",
    bias: torch.dtype | None = None,
    out_dtype: torch.dtype = torch.float16,
) -> Case:
    """Random codes of the whole range; `form` is nibbles, unpacked or bytes (8-bit codes)."""

    def codes(low: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, -low, shape, dtype=torch.int8)

    q_lo = codes(-128 if form == "bytes" else -8, rows, k_lo)
    if form == "bytes":
        q_lo = torch.where(torch.rand(q_lo.shape) < 0.1, torch.tensor(-128, dtype=torch.int8), q_lo)
    params = torch.rand(rows, 4)
    params[:, 1::2] = torch.randint(-128, 128, (rows, 2)).float()
    return Case(
        pack_int4(q_lo) if form == "nibbles" else q_lo,
        codes(-128, rows, k_hi),
        params,
        pack_int4(codes(-8, n, k_lo)),
        codes(-128, n, k_hi),
        torch.rand(n, 2) - 0.3,
        None if bias is None else torch.randn(n).to(bias),
        out_dtype,
    )


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal with the sign of zero; NaN equals NaN."""
    view = torch.int32 if a.dtype == torch.float32 else torch.int16
    bits = a.contiguous().view(view) == b.contiguous().view(view)
    return a.dtype == b.dtype and bool((bits | (a.isnan() & b.isnan())).all())


@pytest.mark.parametrize("columns", COLUMNS, ids=str)
@pytest.mark.parametrize("tile", TILES)
def test_equals_the_reference(
    tile: int, columns: tuple[int, int], sm90: emulation.Emulated
) -> None:
    for index, (rows, n) in enumerate(TILES[tile]):
        form = ["unpacked", "nibbles", "bytes"][(index + COLUMNS.index(columns)) % 3]
        case = make_case(rows, n, *columns, form, DTYPES[index - 1], DTYPES[index])
        assert same_bits(call(case, sm90, tile), case.expected()), (rows, n, form)


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [None, *DTYPES], ids=str)
@pytest.mark.parametrize("n", [72, 75])
def test_equals_the_reference_in_every_dtype(
    n: int, bias: torch.dtype | None, out_dtype: torch.dtype, sm90: emulation.Emulated
) -> None:
    case = make_case(65, n, 224, 32, "nibbles", bias, out_dtype)
    assert same_bits(call(case, sm90), case.expected())


def test_without_any_columns_is_the_bias(sm90: emulation.Emulated) -> None:
    case = make_case(65, 72, 0, 0, bias=torch.float32, out_dtype=torch.float32)
    case.bias[3] = -0.0
    assert same_bits(call(case, sm90), case.expected())
    assert same_bits(call(case._replace(bias=None), sm90), torch.zeros(65, 72))


def test_a_part_without_columns_keeps_the_sign_of_zero(sm90: emulation.Emulated) -> None:
    for k_lo, k_hi in [(64, 0), (0, 64)]:
        case = make_case(65, 64, k_lo, k_hi, out_dtype=torch.float32)
        case.params[:, 1::2] = 0
        case.params[::2, 0::2] = 0
        case.params[:, 2 if k_hi == 0 else 0] = torch.nan  # of the absent part: not looked at
        expected = case.expected()
        assert (expected.signbit() & (expected == 0)).any()
        assert same_bits(call(case, sm90), expected)


def test_nan_scales_reach_their_rows_and_columns_only(sm90: emulation.Emulated) -> None:
    case = make_case(130, 140, 224, 32)
    case.params[7, 0], case.params[129, 2], case.weight_scale[139, 1] = (torch.nan,) * 3
    actual = call(case, sm90)
    assert same_bits(actual, case.expected())
    assert actual[[7, 129]].isnan().all() and actual[:, 139].isnan().all()
    assert int(actual.isnan().sum()) == 2 * 140 + 128


@pytest.mark.parametrize("columns", [(65536, 0), (0, 65536)], ids=str)
def test_extreme_codes_are_exact(columns: tuple[int, int], sm90: emulation.Emulated) -> None:
    """The largest K: 16 x the low sum reaches 2^30 in the accumulator, d_hi almost 2^31."""
    case = make_case(65, 2, *columns, "bytes", out_dtype=torch.float32)
    case.q_lo.fill_(-128), case.q_hi.fill_(-128)
    case.params[:, 1::2] = 127
    case.codes_lo.fill_(0x88), case.codes_hi.fill_(-128)
    case.codes_lo[1], case.codes_hi[1] = 0x77, 127
    assert same_bits(call(case, sm90), case.expected())


def test_a_row_does_not_depend_on_the_batch_or_the_tile(sm90: emulation.Emulated) -> None:
    case = make_case(384, 300, 448, 64, "nibbles")
    whole = call(case, sm90, 192)
    for begin, end, tile, splits in [(0, 65, 64, 1), (70, 270, 128, 2), (319, 384, 32, 3)]:
        part = call(case.rows(begin, end), sm90, tile, splits)
        assert same_bits(part, whole[begin:end])
    assert same_bits(case.rows(383, 384).run(sm90), whole[383:])  # another kernel


@pytest.mark.parametrize("columns", [*COLUMNS[2:], (100, 20)], ids=str)
@pytest.mark.parametrize(("tile", "splits"), SPLITS)
def test_blocks_that_share_k_give_the_bits_of_the_reference(
    tile: int, splits: int, columns: tuple[int, int], sm90: emulation.Emulated
) -> None:
    """Splits with columns of one part, of both; a tile, and several for each cluster."""
    at = COLUMNS.index(columns) if columns in COLUMNS else 0
    for index, (rows, n) in enumerate([(17, 130), (tile, 1), (tile + 9, 520)]):
        form = ["unpacked", "nibbles", "bytes"][(index + at) % 3]
        case = make_case(rows, n, *columns, form, DTYPES[index - 1], DTYPES[(index + at) % 3])
        assert same_bits(call(case, sm90, tile, splits), case.expected()), (rows, n, form)


@pytest.mark.parametrize("columns", [(65536, 0), (0, 65536)], ids=str)
def test_extreme_codes_are_exact_across_splits(
    columns: tuple[int, int], sm90: emulation.Emulated
) -> None:
    case = make_case(3, 2, *columns, "bytes", out_dtype=torch.float32)
    case.q_lo.fill_(-128), case.q_hi.fill_(-128)
    case.params[:, 1::2] = 127
    case.codes_lo.fill_(0x88), case.codes_hi.fill_(-128)
    case.codes_lo[1], case.codes_hi[1] = 0x77, 127
    assert same_bits(call(case, sm90, 32, 4), case.expected())


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize(
    ("tile", "splits", "sizes"),
    [(tile, 1, sizes) for turns in (TURNS, ONE_ROW_OF_TILES) for tile, sizes in turns.items()]
    + [(tile, splits, TURNS[tile]) for tile, splits in SPLITS],
)
def test_the_order_of_warps_does_not_matter(
    tile: int, splits: int, sizes: tuple[int, int], seed: int, sm90: emulation.Emulated
) -> None:
    case = make_case(*sizes, 960, 192)
    shuffled = emulation.Emulated(
        sm90.arch, sms=8, seed=seed, async_="early" if seed == 3 else "late"
    )
    assert same_bits(call(case, shuffled, tile, splits), case.expected())


@pytest.mark.parametrize("splits", [1, 2])
def test_one_cluster_may_take_all_tiles(splits: int, sm90: emulation.Emulated) -> None:
    case = make_case(200, 600, 448, 64)
    device = emulation.Emulated(sm90.arch, sms=4)
    assert same_bits(call(case, device, 64, splits), case.expected())


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("name", ["q_lo", "q_hi", "codes_lo", "codes_hi"])
def test_feels_one_code(name: str, splits: int, sm90: emulation.Emulated) -> None:
    """The comparisons above would fail on a kernel that gets a single code wrong by one."""
    case = make_case(130, 140, 448, 64, bias=None, out_dtype=torch.float32)
    wrong = getattr(case, name).clone()
    wrong[129, 23] ^= 1
    changed = (call(case._replace(**{name: wrong}), sm90, 64, splits) != case.expected()).nonzero()
    assert set(changed[:, 1 if name.startswith("codes") else 0].tolist()) == {129}
