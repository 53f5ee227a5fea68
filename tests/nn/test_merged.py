"""MergedLinears: the bits of the linears one by one, whatever happens to them in between."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch

from resq_kernels import ops
from resq_kernels.nn.linear import ResQLinear
from resq_kernels.nn.merged import MergedLinears
from resq_kernels.testing.quantized_models import random_quantized

K, HIGH = 192, 24


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The rows of every weight that is multiplied."""
    seen: list[int] = []
    gemm = ops.mixed_gemm

    def count(*args: object) -> torch.Tensor:
        result = gemm(*args)
        seen.append(result.shape[-1])
        return result

    monkeypatch.setattr(ops, "mixed_gemm", count)
    yield seen


def linears(*rows: int, bias: bool = True, dtype: torch.dtype = torch.float32) -> list[ResQLinear]:
    return [
        ResQLinear.from_linear(torch.nn.Linear(K, n, bias=bias, dtype=dtype), HIGH) for n in rows
    ]


def apart(x: object, parts: list[ResQLinear]) -> torch.Tensor:
    return torch.cat([part(x) for part in parts], dim=-1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(128, 64, 64), (64, 192), (64, 37), (320,)], ids=str)
@torch.no_grad()
def test_one_product_has_the_bits_of_each(
    products: list[int], rows: tuple[int, ...], bias: bool
) -> None:
    parts, merged = linears(*rows, bias=bias), MergedLinears()
    before = [copy.deepcopy(part.state_dict()) for part in parts]
    for x in (torch.randn(3, 5, K), torch.randn(1, K).half(), torch.randn(0, K)):
        for given in (x, parts[0].quantize_input(x)):
            expected = apart(given, parts)
            products.clear()
            got = merged(given, *parts)
            assert products == [sum(rows)]
            assert got.dtype == expected.dtype and torch.equal(got, expected)
    for part, state in zip(parts, before, strict=True):
        for name, tensor in part.state_dict().items():
            assert torch.equal(tensor, state[name]), name


def test_merging_adds_no_memory() -> None:
    parts = linears(128, 64, 64)
    MergedLinears().merge(*parts)
    for i in range(4):
        storages = {part.weight_tensors()[i].untyped_storage().data_ptr() for part in parts}
        assert len(storages) == 1
        held = sum(part.weight_tensors()[i].nbytes for part in parts)
        assert parts[0].weight_tensors()[i].untyped_storage().nbytes() == held


def load_other_weights(parts: list[ResQLinear]) -> None:
    parts[1].load_state_dict(linears(64)[0].state_dict())


def set_data(parts: list[ResQLinear]) -> None:
    parts[0].weight_scale.data = parts[0].weight_scale * 2


def scale_in_place(parts: list[ResQLinear]) -> None:
    parts[2].weight_scale.data.mul_(2)


def cast(parts: list[ResQLinear]) -> None:
    for part in parts:
        part.half()
        part.bias.data = part.bias * 2


def cast_bias_in_place(parts: list[ResQLinear]) -> None:
    for part in parts:
        part.half()
        part.bias.data.mul_(2)


def repack(parts: list[ResQLinear]) -> None:
    parts[0].unpack()
    parts[0].weight_lo.data = parts[0].weight_lo.flip(0)
    parts[0].pack()


def move(parts: list[ResQLinear]) -> None:
    for part in parts:
        part.to("meta").to_empty(device="cpu")
        part.load_state_dict(linears(part.out_features)[0].state_dict())


@pytest.mark.parametrize(
    "change",
    [load_other_weights, set_data, scale_in_place, cast, cast_bias_in_place, repack, move],
)
@torch.no_grad()
def test_changes_are_seen(products: list[int], change: Callable[[list[ResQLinear]], None]) -> None:
    parts, merged = linears(128, 64, 64), MergedLinears()
    x = torch.randn(4, K)
    before = merged(x, *parts)
    change(parts)
    expected = apart(x, parts)
    assert not torch.equal(expected, before), "the change has no effect"
    products.clear()
    assert torch.equal(merged(x, *parts), expected)
    assert products == [256], "merged again"


def hook(parts: list[ResQLinear]) -> None:
    parts[1].register_forward_hook(lambda module, args, out: out + 1)


def replace_forward(parts: list[ResQLinear]) -> None:
    forward = parts[0].forward
    parts[0].forward = lambda x: forward(x) * 2


def replace(parts: list[ResQLinear]) -> None:
    parts[1] = torch.nn.Sequential(parts[1], torch.nn.ReLU())


def clip(parts: list[ResQLinear]) -> None:
    parts[1].clip = 0.8


def odd_rows(parts: list[ResQLinear]) -> None:
    parts[0] = linears(100)[0]


@pytest.mark.parametrize("first", [True, False], ids=["before", "after merging"])
@pytest.mark.parametrize("change", [hook, replace_forward, replace, clip, odd_rows])
@torch.no_grad()
def test_what_cannot_be_merged_is_called(
    products: list[int], change: Callable[[list[ResQLinear]], None], first: bool
) -> None:
    parts, merged = linears(128, 64, 64), MergedLinears()
    x = torch.randn(4, K)
    if not first:
        merged(x, *parts)
    change(parts)
    products.clear()
    got = merged(x, *parts)
    assert len(products) == 3
    assert torch.equal(got, apart(x, parts))


def test_an_unpacked_linear_is_refused() -> None:
    parts, merged = linears(128, 64), MergedLinears()
    merged(torch.randn(1, K), *parts)
    parts[1].unpack()
    with pytest.raises(RuntimeError, match=r"call pack\(\) after loading"):
        merged(torch.randn(1, K), *parts)


@torch.no_grad()
def test_a_model_multiplies_four_times_a_layer(products: list[int]) -> None:
    for kind in ("llama", "qwen2"):
        model = random_quantized(
            kind, hidden_size=256, num_attention_heads=4, num_key_value_heads=2
        )
        ids = torch.randint(3, 250, (2, 9))
        products.clear()
        expected = model(ids, use_cache=False).logits
        assert len(products) == 4 * model.config.num_hidden_layers + 1  # and the head's
        twin = copy.deepcopy(model)
        assert torch.equal(twin(ids, use_cache=False).logits, expected)
        twin.model.layers[0].self_attn.k_proj.weight_scale.data.mul_(2)
        assert not torch.equal(twin(ids, use_cache=False).logits, expected)
        assert torch.equal(model(ids, use_cache=False).logits, expected), "a copy shares weights"
        for parameter in model.parameters():
            assert not parameter.is_inference()


@torch.no_grad()
def test_merging_inside_inference_mode_leaves_ordinary_tensors() -> None:
    parts, merged = linears(64, 64), MergedLinears()
    with torch.inference_mode():
        merged(torch.randn(1, K), *parts)
    parts[0].load_state_dict(linears(64)[0].state_dict())
    x = torch.randn(1, K)
    assert torch.equal(merged(x, *parts), apart(x, parts))


@torch.no_grad()
def test_compiles_to_one_product(products: list[int]) -> None:
    torch._dynamo.reset()
    parts, merged = linears(64, 64), MergedLinears()
    merged.merge(*parts)
    compiled = torch.compile(lambda x: merged(x, *parts), fullgraph=True, backend="aot_eager")
    for rows in (2, 5):
        x = torch.randn(rows, K)
        assert torch.equal(compiled(x), apart(x, parts))
    parts[1].half()
    assert torch.equal(compiled(x), apart(x, parts)), "the graph kept old weights"
