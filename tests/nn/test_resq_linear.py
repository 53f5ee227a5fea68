"""ResQLinear against the reference: values, loading, saving, moving."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

from resq_kernels import ops, reference
from resq_kernels.formats import weight_sums
from resq_kernels.nn.linear import ResQLinear
from resq_kernels.weights import quantize_weight


def random_layer(
    k: int = 96, n: int = 50, high: int = 16, bias: bool = True, **options: object
) -> ResQLinear:
    """A packed layer with random codes, scales and bias."""
    layer = ResQLinear(k, n, bias, high_columns=high, **options)
    layer.weight_lo.random_(0, 256)
    layer.weight_hi.random_(-128, 128)
    layer.weight_scale.uniform_(0.01, 0.1)
    if bias:
        layer.bias.normal_()
    layer.pack()
    return layer


def expected(layer: ResQLinear, x: torch.Tensor) -> torch.Tensor:
    """The layer's output by the reference."""
    mixed = reference.mixed_quantize(x, *layer.row_format)
    return reference.mixed_gemm(*mixed, *layer.codes(), layer.bias, x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(7, 96), (2, 3, 96), (0, 96), (96,)])
def test_forward_is_bit_equal_to_the_reference(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer = random_layer()
    x = torch.randn(shape).to(dtype)
    y = layer(x)
    assert y.dtype == dtype and y.shape == (*shape[:-1], 50)
    assert torch.equal(y, expected(layer, x))


@pytest.mark.parametrize(("k", "high"), [(96, 0), (50, 50), (130, 6)])
@pytest.mark.parametrize("options", [{}, {"lo_bits": 8}, {"symmetric": True, "clip": 0.9}], ids=str)
def test_splits_and_options(k: int, high: int, options: dict[str, object]) -> None:
    torch.manual_seed(k)
    layer = random_layer(k, 33, high, bias=False, **options)
    x = torch.randn(5, k)
    assert torch.equal(layer(x), expected(layer, x))
    assert torch.equal(layer(layer.quantize_input(x)), layer(x))


def test_a_mixed_tensor_is_returned_in_the_compute_dtype() -> None:
    layer = random_layer(dtype=torch.bfloat16)
    mixed = ops.mixed_quantize(torch.randn(3, 96), 16)
    assert layer(mixed).dtype == torch.bfloat16
    assert layer.to(torch.float16)(mixed).dtype == torch.float16
    assert layer.dtype == layer.bias.dtype == torch.float16


def test_dequantize_is_what_the_kernel_computes_with() -> None:
    torch.manual_seed(1)
    layer = random_layer()
    x = torch.randn(20, 96)
    weight = layer.dequantize()
    assert weight.dtype == torch.float32 and weight.shape == (50, 96)
    exact = layer.quantize_input(x).dequantize().double() @ weight.double().T + layer.bias.double()
    # Float32 rounding of the epilogue only; one code of the weight off would be 0.3 and more.
    torch.testing.assert_close(layer(x).double(), exact, rtol=1e-5, atol=1e-4)


def test_from_linear() -> None:
    torch.manual_seed(2)
    linear = nn.Linear(1024, 64, dtype=torch.bfloat16)
    layer = ResQLinear.from_linear(linear)
    assert layer.high_columns == 512 and layer.bias.dtype == torch.bfloat16
    codes_lo, codes_hi, scale = quantize_weight(linear.weight, 512)
    assert torch.equal(layer.codes()[0], codes_lo) and torch.equal(layer.codes()[1], codes_hi)
    assert torch.equal(layer.weight_scale, scale)
    x = torch.randn(16, 1024, dtype=torch.bfloat16)
    error = (layer(x) - linear(x)).float().norm() / linear(x).float().norm()
    assert 0.01 < error < 0.15  # 4 bits cost something, and not everything
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    with pytest.raises(ValueError, match="even number of the 1024 columns"):
        ResQLinear.from_linear(linear, high_columns=511)


def test_packing_releases_the_codes_and_the_state_still_holds_them() -> None:
    layer = random_layer()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    assert set(before) == {"weight_lo", "weight_hi", "weight_scale", "bias"}
    assert layer.weight_lo is None and layer.weight_hi is None
    assert torch.equal(layer.weight_sum, weight_sums(before["weight_lo"], before["weight_hi"]))
    layer.unpack()
    assert not layer.is_packed and layer.packed_weight is None
    for name, tensor in layer.state_dict().items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])
    with pytest.raises(RuntimeError, match=r"call pack\(\) after loading"):
        layer(torch.randn(2, 96))


@pytest.mark.parametrize("packed", [True, False])
def test_load_state_dict_packs(packed: bool) -> None:
    torch.manual_seed(3)
    source, layer = random_layer(), random_layer()
    if not packed:
        layer.unpack()
    x = torch.randn(4, 96)
    assert not torch.equal(layer(x), source(x)) if packed else True
    layer.load_state_dict(source.state_dict())
    assert torch.equal(layer(x), source(x))


def test_load_state_dict_with_assign_on_meta() -> None:
    source = random_layer()
    layer = ResQLinear(96, 50, True, high_columns=16, device="meta")
    layer.load_state_dict(source.state_dict(), assign=True)
    x = torch.randn(4, 96)
    assert torch.equal(layer(x), source(x))


@pytest.mark.parametrize(
    ("name", "wrong", "words"),
    [
        ("weight_lo", torch.zeros(50, 40, dtype=torch.int8), "weight_lo: expected torch.uint8"),
        ("weight_scale", torch.zeros(50, 2, dtype=torch.float16), "got torch.float16"),
        ("weight_hi", torch.zeros(50, 15, dtype=torch.int8), "size mismatch for weight_hi"),
    ],
)
def test_load_state_dict_refuses(name: str, wrong: torch.Tensor, words: str) -> None:
    state = {**random_layer().state_dict(), name: wrong}
    with pytest.raises(RuntimeError, match=words):
        random_layer().load_state_dict(state)


@pytest.mark.parametrize(
    "cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.bfloat16()]
)
def test_casting_leaves_the_scales(cast: Callable[[nn.Module], nn.Module]) -> None:
    layer = random_layer()
    scale = layer.weight_scale.clone()
    codes = layer.codes()
    cast(nn.Sequential(layer))
    assert layer.weight_scale.dtype == torch.float32 and torch.equal(layer.weight_scale, scale)
    assert layer.bias.dtype == layer.dtype != torch.float32
    assert all(torch.equal(a, b) for a, b in zip(layer.codes(), codes, strict=True))


def test_moving_to_another_device_type_unpacks() -> None:
    layer = random_layer().to("meta")
    assert not layer.is_packed and layer.weight_lo.is_meta and layer.weight_scale.is_meta


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_compute_the_same(copied: Callable[[ResQLinear], ResQLinear]) -> None:
    layer = random_layer()
    other = copied(layer)
    x = torch.randn(3, 96)
    assert torch.equal(other(x), layer(x))
    assert other.packed_weight.data_ptr() != layer.packed_weight.data_ptr()


def test_a_packed_layer_is_about_half_a_byte_per_weight() -> None:
    layer = random_layer(2048, 2048, 256, bias=False)
    held = sum(t.numel() * t.element_size() for t in (*layer.parameters(), *layer.buffers()))
    assert held < 1.02 * 2048 * (1792 // 2 + 256)


def test_bad_split() -> None:
    with pytest.raises(ValueError, match="even number of the 96 columns for INT4, got 97"):
        ResQLinear(96, 8, high_columns=97)
