"""mixed_gemm has the bits of the reference in every shape, dtype, batch, thread count and ISA."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from forced_isa import ISAS, words_under

from resq_kernels import ops, reference
from resq_kernels.formats import pack_int4, unpack_int4, weight_sums

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# (N, K_lo, K_hi): one row, padding everywhere, real splits, a part without columns, and an input so
# wide that 33 rows fill more than one panel.
WEIGHTS = [
    (1, 2, 0),
    (17, 56, 8),
    (64, 224, 32),
    (33, 6, 3),
    (70, 3136, 448),
    (48, 0, 24),
    (40, 96, 0),
    (35, 25872, 3696),
]
BATCHES = [0, 1, 2, 7, 16, 33, 130]


class Case(NamedTuple):
    """Arguments of reference.mixed_gemm; `call` packs the weight and runs the op."""

    q_lo: torch.Tensor
    q_hi: torch.Tensor
    params: torch.Tensor
    codes_lo: torch.Tensor
    codes_hi: torch.Tensor
    weight_scale: torch.Tensor
    bias: torch.Tensor | None
    out_dtype: torch.dtype

    def arguments(self) -> tuple:
        packed = ops.pack_weight(self.codes_lo, self.codes_hi)
        sums = weight_sums(self.codes_lo, self.codes_hi)
        return (*self[:3], packed, self.weight_scale, sums, self.bias, self.out_dtype)

    def call(self) -> torch.Tensor:
        return ops.mixed_gemm(*self.arguments())

    def expected(self) -> torch.Tensor:
        return reference.mixed_gemm(*self)


def make_case(
    batch: int | tuple[int, ...],
    weight: tuple[int, int, int],
    packed: bool = True,
    bias: torch.dtype | None = torch.float32,
    out_dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def codes(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, dtype=torch.int8, generator=generator)

    leading = (batch,) if isinstance(batch, int) else batch
    n, k_lo, k_hi = weight
    q_lo = codes(-8, 8, *leading, k_lo) if packed else codes(-128, 128, *leading, k_lo)
    params = torch.rand(*leading, 4, generator=generator)
    params[..., 1::2] = torch.randint(-255, 256, (*leading, 2), generator=generator).float()
    return Case(
        pack_int4(q_lo) if packed else q_lo,
        codes(-128, 128, *leading, k_hi),
        params,
        pack_int4(codes(-8, 8, n, k_lo)),
        codes(-128, 128, n, k_hi),
        torch.rand(n, 2, generator=generator),
        None if bias is None else torch.randn(n, generator=generator).to(bias),
        out_dtype,
    )


@pytest.mark.parametrize("packed", [True, False], ids=["nibbles", "unpacked"])
@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
def test_mixed_gemm_equals_the_reference(weight: tuple[int, int, int], packed: bool) -> None:
    for index, batch in enumerate(BATCHES):
        dtype = DTYPES[index % 3]
        case = make_case(batch, weight, packed, bias=dtype, out_dtype=dtype, seed=index)
        assert torch.equal(case.call(), case.expected()), (batch, dtype)


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [None, *DTYPES], ids=str)
def test_mixed_gemm_equals_the_reference_in_every_dtype(
    bias: torch.dtype | None, out_dtype: torch.dtype
) -> None:
    case = make_case(5, (50, 56, 8), bias=bias, out_dtype=out_dtype)
    assert torch.equal(case.call(), case.expected())
    assert case.call().dtype == out_dtype


@pytest.mark.parametrize("leading", [(), (3, 5), (2, 1, 4), (2, 0, 4)], ids=str)
def test_mixed_gemm_takes_any_leading_shape(leading: tuple[int, ...]) -> None:
    case = make_case(leading, (17, 56, 8))
    assert case.call().shape == (*leading, 17)
    assert torch.equal(case.call(), case.expected())


def test_mixed_gemm_rounds_16_bit_outputs_at_every_magnitude() -> None:
    # Overflow to infinity, subnormals and ties of float16, from 2^-40 to 2^40.
    case = make_case(64, (64, 8, 0), bias=None)
    case.params[:, 0] = 2.0 ** torch.linspace(-40, 40, 64).round()
    for dtype in DTYPES:
        case = case._replace(out_dtype=dtype)
        assert torch.equal(case.call(), case.expected())


def test_mixed_gemm_without_any_columns_is_the_bias() -> None:
    case = make_case(3, (17, 0, 0))
    assert torch.equal(case.call(), case.bias.expand(3, 17))
    assert torch.equal(case._replace(bias=None).call(), torch.zeros(3, 17))


@pytest.mark.parametrize("weight", [(0, 8, 8), (17, 8, 8)], ids=str)
def test_mixed_gemm_of_empty_sizes(weight: tuple[int, int, int]) -> None:
    assert make_case(0, weight).call().shape == (0, weight[0])


def test_mixed_gemm_row_does_not_depend_on_the_batch() -> None:
    case = make_case(130, (70, 224, 32))
    whole = case.call()
    for begin, end in [(0, 1), (57, 58), (129, 130), (3, 5), (10, 23), (40, 104)]:
        rows = (tensor[begin:end].clone() for tensor in case[:3])
        assert torch.equal(Case(*rows, *case[3:]).call(), whole[begin:end])


def test_mixed_gemm_into_memory_of_huge_pages() -> None:
    """42 MB, which come from the system in pages of 2 MB, as rows of 1.3 MB do not."""
    codes, hi = torch.zeros(40960, 0, dtype=torch.uint8), torch.randint(-9, 9, (40960, 8)).char()
    weight = ops.pack_weight(codes, hi), torch.rand(40960, 2), weight_sums(codes, hi)
    rows = ops.mixed_quantize(torch.randn(512, 8), 8)
    whole = ops.mixed_gemm(*rows, *weight, None, torch.bfloat16)
    for first in (0, 16, 496):
        part = [each[first : first + 16] for each in rows]
        found = ops.mixed_gemm(*part, *weight, None, torch.bfloat16)
        assert torch.equal(found, whole[first : first + 16])


def test_mixed_gemm_does_not_depend_on_the_thread_count() -> None:
    threads = torch.get_num_threads()
    for batch in (1, 16, 130):
        case = make_case(batch, (200, 224, 32))
        try:
            torch.set_num_threads(1)
            single = case.call()
            torch.set_num_threads(2)
            double = case.call()
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(single, double)


EXTREMES = [
    (q, zero, w_lo, w_hi)
    for q in (-128, -8, 7, 127)
    for zero in (-128, 127)
    for w_lo in (-8, 7)
    for w_hi in (-128, 127)
]


def extreme_case(part: int, q: int, zero: int, w_lo: int, w_hi: int) -> Case:
    """Seven rows of one code each, of which the scale of the other part is 0.

    K_hi = 65536 is the documented limit: |d_hi| reaches 65536 * 255 * 128 < 2^31. 29568 is the
    widest model's input.
    """
    m, n, k_lo, k_hi = 7, 2, 29568, 65536
    params = torch.tensor([[0.0, float(zero), 0.0, float(zero)]]).repeat(m, 1)
    params[:, 2 * part] = 1.0
    return Case(
        torch.full((m, k_lo), q, dtype=torch.int8),
        torch.full((m, k_hi), q, dtype=torch.int8),
        params,
        pack_int4(torch.full((n, k_lo), w_lo, dtype=torch.int8)),
        torch.full((n, k_hi), w_hi, dtype=torch.int8),
        torch.ones(n, 2),
        None,
        torch.float32,
    )


@pytest.mark.parametrize(("q", "zero", "w_lo", "w_hi"), EXTREMES)
def test_mixed_gemm_is_exact_with_extreme_codes(q: int, zero: int, w_lo: int, w_hi: int) -> None:
    for part, (w, columns) in enumerate([(w_lo, 29568), (w_hi, 65536)]):
        result = extreme_case(part, q, zero, w_lo, w_hi).call()
        assert torch.equal(result, torch.full((7, 2), float((q - zero) * w * columns)))


def test_mixed_gemm_propagates_nan_scales() -> None:
    case = make_case(4, (17, 56, 8))
    clean = case.call()
    case.params[1, 0] = torch.nan
    case.params[2, 2] = torch.nan
    for dtype in DTYPES:
        y = case._replace(out_dtype=dtype).call()
        assert y[1:3].isnan().all()
        assert torch.equal(y[[0, 3]], clean[[0, 3]].to(dtype))
    case.weight_scale[5, 1] = torch.nan
    assert case.call()[:, 5].isnan().all()


@pytest.mark.parametrize("name", ["q_lo", "q_hi", "codes_lo", "codes_hi"])
def test_mixed_gemm_feels_one_code(name: str) -> None:
    """The comparison above would fail on a kernel that gets a single code wrong by one."""
    case = make_case(33, (64, 224, 32), bias=None)
    wrong = getattr(case, name).clone()
    wrong[13, 7] ^= 1
    expected, got = case.expected(), case._replace(**{name: wrong}).call()
    changed = (got != expected).nonzero()
    assert set(changed[:, 1 if name.startswith("codes") else 0].tolist()) == {13}


def test_mixed_gemm_epilogue_rounds_every_operation() -> None:
    """A fused multiply-add in the epilogue would change bits of this very case."""
    case = make_case(64, (64, 56, 8))
    q_lo, q_hi = unpack_int4(case.q_lo), case.q_hi
    w_lo, w_hi = unpack_int4(case.codes_lo), case.codes_hi
    terms = []
    for part, (q, w) in enumerate([(q_lo, w_lo), (q_hi, w_hi)]):
        zero = case.params[:, 2 * part + 1, None].double()
        d = q.double() @ w.double().T - zero * w.double().sum(1)
        terms.append((d.float() * case.params[:, 2 * part, None], case.weight_scale[:, part]))
    (lo, t_lo), (hi, t_hi) = terms
    fused = (hi.double() * t_hi.double() + (lo * t_lo).double()).float() + case.bias
    assert torch.equal(case.call(), (lo * t_lo + hi * t_hi) + case.bias)
    assert not torch.equal(case.call(), fused)


def digest() -> str:
    """A hash of the results for every weight and batch."""
    sha = hashlib.sha256()
    for index, weight in enumerate(WEIGHTS):
        for batch in BATCHES:
            dtype = DTYPES[(index + batch) % 3]
            case = make_case(batch, weight, packed=batch % 2 == 0, bias=dtype, out_dtype=dtype)
            sha.update(case.call().view(torch.uint8).numpy().tobytes())
    for codes in EXTREMES[::3]:
        for part in range(2):
            sha.update(extreme_case(part, *codes).call().numpy().tobytes())
    return sha.hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
def test_mixed_gemm_has_the_same_bits_on_every_isa(isa: str) -> None:
    # The process's own variant is compared with the reference above; the others with it.
    assert words_under(isa, __file__) == [isa, digest()]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("q_lo", lambda t: t.float(), r"q_lo: expected uint8 or int8 .*got float32 \[3, 28\]"),
        ("q_lo", lambda t: t[0, 0], r"q_lo: expected at least one dimension, got uint8 \[\]"),
        ("q_lo", lambda t: t.char()[:, :27].clone(), r"q_lo: expected an even number of columns"),
        ("q_lo", lambda t: t.T, r"q_lo: .*\(not contiguous\)"),
        ("q_hi", lambda t: t[:2], r"q_hi: expected int8 \[3, \*\] .*got int8 \[2, 8\]"),
        ("q_hi", lambda t: t.byte(), r"q_hi: expected int8 .*got uint8"),
        ("q_hi", lambda t: t[:, ::2], r"q_hi: .*got int8 \[3, 4\] \(not contiguous\)"),
        ("params", lambda t: t[:, :2].clone(), r"params: expected float32 \[3, 4\].*\[3, 2\]"),
        ("params", lambda t: t.double(), r"params: expected float32 .*got float64"),
        ("packed_weight", lambda t: t.char(), r"packed_weight: expected uint8 .*got int8"),
        (
            "packed_weight",
            lambda t: t[:-1],
            r"packed_weight: expected 1152 bytes for 17 rows \(weight_scale\) x \(56 \| 8\) "
            r"columns \(q_lo \| q_hi\), got 1151 bytes",
        ),
        (
            "q_hi",
            lambda t: t.repeat(1, 2),
            r"packed_weight: expected 1408 bytes .*\(56 \| 16\)",
        ),
        ("weight_scale", lambda t: t.half(), r"weight_scale: expected float32 \[\*, 2\]"),
        ("weight_scale", lambda t: t.repeat(3, 1), r"weight_sum: expected int32 \[51, 2\]"),
        ("weight_sum", lambda t: t.long(), r"weight_sum: expected int32 \[17, 2\].*got int64"),
        ("bias", lambda t: t[:5].clone(), r"bias: expected float32 or float16 .*\[17\].*\[5\]"),
        ("bias", lambda t: t.double(), r"bias: expected float32 or float16 or bfloat16"),
        (
            "out_dtype",
            lambda t: torch.int32,
            r"out_dtype: expected float32, float16 or b.*got int32",
        ),
    ],
)
def test_mixed_gemm_refuses(name: str, change: object, message: str) -> None:
    names = [argument.name for argument in torch.ops.resq.mixed_gemm.default._schema.arguments]
    arguments = dict(zip(names, make_case(3, (17, 56, 8)).arguments(), strict=True))
    arguments[name] = change(arguments[name])
    with pytest.raises(RuntimeError, match="mixed_gemm: " + message):
        ops.mixed_gemm(**arguments)


@pytest.mark.parametrize("packed", [True, False], ids=["nibbles", "unpacked"])
def test_mixed_gemm_is_exact_up_to_65536_columns(packed: bool) -> None:
    # The largest sums of codes that a quantizer writes: |q - zero| is at most 255, or 15.
    for weight in [(3, 65536, 0), (3, 0, 65536)]:
        case = make_case(2, weight, packed, bias=None)
        case.q_lo.fill_(0x88 if packed else -128)
        case.codes_lo.fill_(0x88)
        case.q_hi.fill_(-128)
        case.codes_hi.fill_(-128)
        case.params[:, 1::2] = torch.tensor([7.0 if packed else 127.0, 127.0])
        assert torch.equal(case.call(), case.expected())


def test_mixed_gemm_refuses_more_columns_than_its_sums_hold() -> None:
    for name, weight in [("q_lo", (3, 65538, 8)), ("q_hi", (3, 8, 65537))]:
        message = rf"^mixed_gemm: {name}: expected at most 65536 columns .*, got {max(weight)}$"
        for packed in (True, False):
            with pytest.raises(RuntimeError, match=message):
                make_case(2, weight, packed).call()


def test_mixed_gemm_refuses_more_rows_than_32_bits_number(tmp_path: Path) -> None:
    arguments = list(make_case(3, (17, 0, 0)).arguments())
    sparse = torch.from_file(str(tmp_path / "scale"), True, 2**32, dtype=torch.float32)
    with pytest.raises(RuntimeError, match=r"weight_scale: expected fewer than 2\^31 rows, got"):
        ops.mixed_gemm(*arguments[:4], sparse.view(2**31, 2), *arguments[5:])
    arguments[0] = arguments[0].new_empty(2**31, 0)
    arguments[1] = arguments[1].new_empty(2**31, 0)
    with pytest.raises(RuntimeError, match=r"q_lo: expected fewer than 2\^31 rows, got 2147483648"):
        ops.mixed_gemm(*arguments)


@pytest.mark.parametrize("packed", [True, False])
def test_mixed_gemm_passes_opcheck(packed: bool) -> None:
    case = make_case(5, (17, 56, 8), packed, out_dtype=torch.bfloat16)
    torch.library.opcheck(torch.ops.resq.mixed_gemm.default, case.arguments())


def test_mixed_gemm_compiles_to_one_graph_for_every_batch() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(ops.mixed_gemm, fullgraph=True, dynamic=True)
    for batch in (4, 9):
        case = make_case(batch, (17, 56, 8))
        assert torch.equal(compiled(*case.arguments()), case.expected())


if __name__ == "__main__":
    print(torch.ops.resq.cpu_isa(), digest())
