"""FusedLinear: the bits of the linears one by one, under their names, whatever happens to it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from resq_kernels import ops
from resq_kernels.nn.attention import ResQAttention
from resq_kernels.nn.fused import FusedLinear, FusesLinears
from resq_kernels.nn.linear import ResQLinear
from resq_kernels.testing.quantized_models import random_quantized

K, HIGH = 192, 24


class Projections(FusesLinears):
    FUSED = "abc_proj"
    PARTS = ("a", "b", "c")

    def __init__(self, *parts: torch.nn.Module) -> None:
        super().__init__()
        for name, part in zip(self.PARTS, parts, strict=True):
            setattr(self, name, part)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.project(x)


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


def projections(*rows: int, fuse: bool = True, **options: Any) -> Projections:
    module = Projections(*linears(*rows, **options))
    if fuse:
        module.fuse()
    return module


def apart(x: object, parts: list[ResQLinear]) -> torch.Tensor:
    return torch.cat([part(x) for part in parts], dim=-1)


def equal_states(left: torch.nn.Module, right: torch.nn.Module) -> bool:
    a, b = left.state_dict(), right.state_dict()
    return a.keys() == b.keys() and all(
        a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(128, 64, 64), (64, 64, 192), (64, 37, 5), (100, 64, 1)], ids=str)
@torch.no_grad()
def test_one_product_has_the_bits_of_each(
    products: list[int], rows: tuple[int, ...], bias: bool
) -> None:
    parts = linears(*rows, bias=bias)
    module = Projections(*copy.deepcopy(parts))
    module.fuse()
    for x in (torch.randn(3, 5, K), torch.randn(1, K).half(), torch.randn(0, K)):
        for given in (x, parts[0].quantize_input(x)):
            expected = apart(given, parts)
            products.clear()
            got = module(given)
            assert products == [sum(rows)]
            assert got.dtype == expected.dtype and torch.equal(got, expected)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(128, 64, 64), (100, 37, 5)], ids=str)
def test_the_state_has_the_names_and_values_of_the_parts(rows: tuple[int, ...], bias: bool) -> None:
    separate = projections(*rows, bias=bias, fuse=False)
    fused = copy.deepcopy(separate)
    fused.fuse()
    assert [name for name, _ in fused.named_children()] == ["abc_proj"]
    assert set(separate.state_dict()) == {
        f"{part}.{name}"
        for part in "abc"
        for name in ("weight_lo", "weight_hi", "weight_scale", *(["bias"] if bias else []))
    }
    assert equal_states(separate, fused)
    outer, prefixed = torch.nn.Sequential(fused), torch.nn.Sequential(separate)
    assert equal_states(outer, prefixed)
    state = list(fused.state_dict().values())
    storages = {tensor.untyped_storage().data_ptr() for tensor in state}
    assert len(storages) == len(state), "some savers refuse tensors that share a storage"
    fused.abc_proj.unpack()
    assert equal_states(separate, fused)
    fused.abc_proj.pack()
    fused.unfuse()
    assert [name for name, _ in fused.named_children()] == ["a", "b", "c"]
    assert equal_states(separate, fused)
    x = torch.randn(3, K)
    assert torch.equal(fused(x), separate(x))


@pytest.mark.parametrize("source", [True, False], ids=["of a fused one", "of parts"])
@pytest.mark.parametrize("target", [True, False], ids=["into a fused one", "into parts"])
@pytest.mark.parametrize("assign", [True, False])
def test_states_load_into_each_other(source: bool, target: bool, assign: bool) -> None:
    left, right = projections(128, 64, 37, fuse=source), projections(128, 64, 37, fuse=target)
    x = torch.randn(4, K)
    assert not torch.equal(left(x), right(x))
    torch.nn.Sequential(right).load_state_dict(
        torch.nn.Sequential(left).state_dict(), assign=assign
    )
    assert torch.equal(left(x), right(x)) and equal_states(left, right)


def test_a_part_is_loaded_alone() -> None:
    module, other = projections(64, 64, 64), linears(64)[0]
    x, before = torch.randn(4, K), module.state_dict()
    state = {f"b.{name}": tensor for name, tensor in other.state_dict().items()}
    expected = module(x)
    expected[:, 64:128] = other(x)
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "a.weight_lo"'):
        copy.deepcopy(module).load_state_dict(state)
    result = module.load_state_dict(state, strict=False)
    assert set(result.missing_keys) == set(before) - set(state) and not result.unexpected_keys
    assert torch.equal(module(x), expected)


@pytest.mark.parametrize(
    ("name", "wrong", "words"),
    [
        (
            "b.weight_lo",
            torch.zeros(64, 84, dtype=torch.int8),
            "0.b.weight_lo: expected torch.uint8",
        ),
        (
            "abc_proj.bias",
            torch.zeros(192),
            r'Unexpected key\(s\) in state_dict: "0.abc_proj.bias"',
        ),
        ("c.weight_scale", torch.zeros(64, 2).half(), "got torch.float16"),
        ("a.weight_hi", torch.zeros(64, 15, dtype=torch.int8), "size mismatch for 0.a.weight_hi"),
        ("b.bias", torch.zeros(1), "size mismatch for 0.b.bias"),
        ("b.weight", torch.zeros(64, K), r'Unexpected key\(s\) in state_dict: "0.b.weight"'),
        ("d.bias", torch.zeros(64), r'Unexpected key\(s\) in state_dict: "0.d.bias"'),
    ],
)
def test_a_wrong_state_is_refused_by_the_name_of_the_part(
    name: str, wrong: torch.Tensor, words: str
) -> None:
    outer = torch.nn.Sequential(projections(64, 64, 64))
    state = {**outer.state_dict(), f"0.{name}": wrong}
    with pytest.raises(RuntimeError, match=words):
        outer.load_state_dict(state)


def test_splitting_adds_no_memory_where_blocks_allow_it() -> None:
    fused = projections(128, 64, 64).fused
    for part in fused.split().values():
        for mine, whole in zip(part.packed()[:3], fused.packed()[:3], strict=True):
            assert mine.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    parts = projections(100, 64, 64).fused.split().values()
    assert len({part.packed_weight.untyped_storage().data_ptr() for part in parts}) == 3


def test_fusing_keeps_nothing_of_the_parts() -> None:
    module = projections(128, 64, 64, fuse=False)
    held = sum(t.nbytes for t in (*module.parameters(), *module.buffers()))
    module.fuse()
    assert sum(t.nbytes for t in (*module.parameters(), *module.buffers())) == held
    for tensor in (*module.parameters(), *module.buffers()):
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


def set_data(module: Projections) -> None:
    module.abc_proj.weight_scale.data = module.abc_proj.weight_scale * 2


def scale_in_place(module: Projections) -> None:
    module.abc_proj.weight_scale.data[200:].mul_(2)


def cast(module: Projections) -> None:
    module.half().abc_proj.bias.data.mul_(2)


def repack(module: Projections) -> None:
    module.abc_proj.unpack()
    module.abc_proj.weight_lo.data = module.abc_proj.weight_lo.flip(0)
    module.abc_proj.pack()


def move(module: Projections) -> None:
    module.to("meta").to_empty(device="cpu")
    module.load_state_dict(projections(128, 64, 64).state_dict())


def load(module: Projections) -> None:
    module.load_state_dict(projections(128, 64, 64).state_dict())


@pytest.mark.parametrize("change", [set_data, scale_in_place, cast, repack, move, load])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@torch.no_grad()
def test_changes_are_seen(
    products: list[int],
    change: Callable[[Projections], None],
    copied: Callable[[Projections], Projections],
) -> None:
    original = projections(128, 64, 64)
    module, x = copied(original), torch.randn(4, K)
    before = original(x)
    assert torch.equal(module(x), before)
    change(module)
    twin = copy.deepcopy(module)
    twin.unfuse()
    expected = twin(x)
    assert not torch.equal(expected, before), "the change has no effect"
    products.clear()
    assert torch.equal(module(x), expected)
    assert products == [256]
    assert torch.equal(original(x), before), "a copy shares tensors"


@torch.no_grad()
def test_a_part_is_hooked_when_it_is_apart(products: list[int]) -> None:
    module, x = projections(64, 64, 64), torch.randn(4, K)
    expected = module(x)
    module.unfuse()
    module.b.register_forward_hook(lambda module, args, out: out + 1)
    module.c = torch.nn.Sequential(module.c, torch.nn.ReLU())
    products.clear()
    expected[:, 64:128] += 1
    assert torch.equal(module(x), torch.cat([expected[:, :128], expected[:, 128:].relu()], dim=1))
    assert products == [64, 64, 64]


def test_parts_that_cannot_be_fused_are_refused() -> None:
    a, b = linears(64, 64)
    hooked, replaced, adapter = linears(64, 64, 64)
    hooked.register_forward_pre_hook(lambda module, args: None)
    replaced.forward = lambda x: x
    for other, words in (
        (ResQLinear.from_linear(torch.nn.Linear(K, 64), HIGH + 8), r"row_format: .*got \(32, 4"),
        (ResQLinear.from_linear(torch.nn.Linear(K, 64, bias=False), HIGH), "bias: expected True"),
        (ResQLinear.from_linear(torch.nn.Linear(K, 64).half(), HIGH), "got torch.float16"),
        (ResQLinear.of(b.packed(), b.bias, b.row_format._replace(clip=0.8), b.dtype), "0.8"),
        (hooked, "expected no hooks"),
        (replaced, "got ResQLinear with another forward"),
        (torch.nn.Sequential(adapter), "expected an unmodified ResQLinear, got Sequential"),
    ):
        with pytest.raises(ValueError, match=f"FusedLinear: b: .*{words}"):
            FusedLinear("ab", {"a": a, "b": other})
    b._packed_for = "cuda"
    with pytest.raises(RuntimeError, match="expected the layout of cpu, got that of cuda"):
        FusedLinear("ab", {"a": a, "b": b})


@pytest.mark.parametrize("rows", [(64, 64, 64), (64, 37, 5)], ids=str)
def test_parts_are_fused_before_they_are_packed(rows: tuple[int, ...]) -> None:
    module, x = projections(*rows, fuse=False), torch.randn(3, K)
    expected, state = module(x), module.state_dict()
    for part in module.children():
        part.unpack()
    module.fuse()
    assert not module.abc_proj.is_packed
    assert all(torch.equal(tensor, state[key]) for key, tensor in module.state_dict().items())
    with pytest.raises(RuntimeError, match=r"call pack\(\) after loading"):
        module(x)
    module.abc_proj.pack()
    assert torch.equal(module(x), expected)


def test_a_fused_part_is_no_module() -> None:
    module = projections(64, 64, 64)
    with pytest.raises(AttributeError, match="b: expected a module .*part of abc_proj; call unfu"):
        module.b.register_forward_hook(lambda *_: None)
    with pytest.raises(AttributeError, match="c: expected a module"):
        module.c = torch.nn.Identity()
    module.unfuse()
    module.c = torch.nn.Identity()
    with pytest.raises(AttributeError, match="has no attribute 'd'"):
        module.d  # noqa: B018


def test_a_part_is_unfused_without_being_packed() -> None:
    module, x = projections(64, 37, 5), torch.randn(3, K)
    expected, state = module(x), module.state_dict()
    module.abc_proj.unpack()
    module.unfuse()
    assert module.state_dict().keys() == state.keys() and not module.a.is_packed
    for part in (module.a, module.b, module.c):
        part.pack()
    assert torch.equal(module(x), expected)


def test_names_of_parameters_are_names_of_the_state() -> None:
    """Tools that offload parameters one by one look each of them up in the state."""
    model = random_quantized("qwen2")
    assert dict(model.named_parameters()).keys() <= model.state_dict().keys()


def test_a_shallow_copy_loads() -> None:
    module = projections(64, 64, 64)
    shallow = copy.copy(module)
    del module
    other = projections(64, 64, 64)
    shallow.load_state_dict(other.state_dict())
    x = torch.randn(2, K)
    assert torch.equal(shallow(x), other(x))


def test_parts_on_two_devices_are_refused() -> None:
    module, other = projections(64, 64, 64).to("meta"), linears(64)[0]
    state = {f"b.{name}": tensor for name, tensor in other.state_dict().items()}
    with pytest.raises(RuntimeError, match="abc_proj: expected all parts on one device, got cpu a"):
        module.load_state_dict(state, assign=True, strict=False)
    module.load_state_dict(projections(64, 64, 64).state_dict(), assign=True)
    assert module(torch.randn(2, K)).shape == (2, 192)


def test_an_unpacked_linear_is_refused() -> None:
    module = projections(128, 64, 64)
    module.abc_proj.unpack()
    with pytest.raises(RuntimeError, match=r"FusedLinear: .*call pack\(\) after loading"):
        module(torch.randn(1, K))


@torch.no_grad()
def test_a_model_multiplies_four_times_a_layer(products: list[int]) -> None:
    for kind in ("llama", "qwen2"):
        model = random_quantized(
            kind, hidden_size=256, num_attention_heads=4, num_key_value_heads=2
        )
        ids = torch.randint(3, 250, (2, 9))
        model.model.layers[0].register_forward_hook(lambda *_: None)  # layers go one by one
        products.clear()
        expected = model(ids, use_cache=False).logits
        assert len(products) == 4 * model.config.num_hidden_layers + 1  # and the head's
        twin = copy.deepcopy(model)
        assert torch.equal(twin(ids, use_cache=False).logits, expected)
        twin.model.layers[0].self_attn.qkv_proj.weight_scale.data[300:].mul_(2)  # of k
        assert not torch.equal(twin(ids, use_cache=False).logits, expected)
        assert torch.equal(model(ids, use_cache=False).logits, expected), "a copy shares weights"
        for parameter in model.parameters():
            assert not parameter.is_inference()
        for module in model.modules():
            if isinstance(module, FusesLinears):
                module.unfuse()
        products.clear()
        assert torch.equal(model(ids, use_cache=False).logits, expected)
        assert len(products) == 7 * model.config.num_hidden_layers + 1
        assert isinstance(model.model.layers[0].self_attn, ResQAttention)
        assert model.model.layers[0].self_attn.k_proj.out_features == 128


@torch.no_grad()
def test_fusing_inside_inference_mode_leaves_ordinary_tensors() -> None:
    module = projections(64, 64, 64, fuse=False)
    with torch.inference_mode():
        module.fuse()
        module.unfuse()
        module.fuse()
    module.load_state_dict(projections(64, 64, 64).state_dict())
    assert not any(tensor.is_inference() for tensor in module.parameters())


@torch.no_grad()
def test_compiles_to_one_product() -> None:
    torch._dynamo.reset()
    module = projections(64, 64, 64)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for rows in (2, 5):
        x = torch.randn(rows, K)
        assert torch.equal(compiled(x), module(x))
    module.load_state_dict(projections(64, 64, 64).state_dict())
    assert torch.equal(compiled(x), module(x)), "the graph kept old weights"
