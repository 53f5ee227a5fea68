"""The drop-in decoder on the kernels against the fake-quantized float32 path."""

import copy
from typing import Any

import pytest
import torch

from resq_kernels import ResQConfig
from resq_kernels.fake_quant import fake_quantized
from resq_kernels.formats import MixedTensor
from resq_kernels.nn.attention import ResQAttention
from resq_kernels.nn.linear import ResQLinear
from resq_kernels.nn.mlp import ResQMLP
from resq_kernels.nn.norm import ResQRMSNorm
from resq_kernels.testing.quantized_models import head_input, random_quantized
from resq_kernels.testing.tiny_models import LLAMA3_ROPE

# A model's two paths quantize the same floats up to rounding, so almost all codes agree; a value on
# the edge of two codes may go the other way, and all after it see that. So every module is compared
# on the same input, attention before o_proj quantizes: there most rows differ by rounding only, in
# float32 or, inside kv_attention, float16 (2^-11 = 5e-4).
ROUNDING = {"ResQRMSNorm": 1e-6, "ResQMLP": 1e-5, "ResQAttention": 3e-4}
FLIPPED_CODE = 0.1


def relative(a: torch.Tensor, b: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    """|a - b| / |b| over a dimension or over everything."""
    a, b = a.float(), b.float()
    return torch.linalg.vector_norm(a - b, dim=dim) / torch.linalg.vector_norm(b, dim=dim)


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return model(ids, use_cache=False, **kwargs).logits


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(3, 250, shape, generator=torch.Generator().manual_seed(1))


def values(module: Any, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    """What a module computes; for attention, what it passes to o_proj."""
    if not isinstance(module, ResQAttention):
        out = module(*args, **kwargs)
        out = out[0] if type(out) is tuple else out  # the other is the residual sum
        return out.dequantize() if isinstance(out, MixedTensor) else out
    seen = []
    hook = module.o_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    module(*args, **kwargs)
    hook.remove()
    return seen[0]


@torch.no_grad()
def row_errors(model: Any, ids: torch.Tensor, other: Any = None) -> dict[str, torch.Tensor]:
    """Relative error of every row of every module's output: `model` on the kernels against the
    float path of `other` (default: of `model`) on the same input."""
    kinds = (ResQRMSNorm, ResQAttention, ResQMLP)
    calls = []
    hooks = [
        module.register_forward_pre_hook(
            lambda module, args, kwargs, name=name: calls.append((name, args, kwargs)),
            with_kwargs=True,
        )
        for name, module in model.named_modules()
        if isinstance(module, kinds)
    ]
    logits(model, ids)
    for hook in hooks:
        hook.remove()
    errors: dict[str, list[torch.Tensor]] = {}
    for name, args, kwargs in calls:
        got = values(model.get_submodule(name), args, kwargs)
        with fake_quantized((other or model).get_submodule(name)) as module:
            expected = values(module, args, kwargs)
        rows = relative(got, expected, dim=-1).flatten()
        errors.setdefault(type(module).__name__, []).append(rows)
    return {name: torch.cat(rows) for name, rows in errors.items()}


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "smollm3"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"method": "quarot"},
        {"method": "quik"},
        {"method": "rtn"},
        {"lo_bits": 8, "activation_clip": 0.9},
        {"symmetric": True, "high_fraction": 0.25},
        {"kv_bits": 16},
    ],
    ids=str,
)
def test_kernels_agree_with_the_float_path(model_type: str, options: dict[str, Any]) -> None:
    biases = {} if model_type == "llama" else {"attention_bias": True, "mlp_bias": True}
    model = random_quantized(model_type, ResQConfig(**options), **biases)
    ids = tokens(2, 40)
    errors = row_errors(model, ids)
    assert set(errors) == set(ROUNDING)
    for name, rows in errors.items():
        assert rows.median() < ROUNDING[name], name
        assert rows.max() < FLIPPED_CODE, name
    got = logits(model, ids)
    with fake_quantized(model):
        expected = logits(model, ids)
    assert relative(got, expected) < 0.15  # two layers of flipped codes on top of each other


def test_the_comparison_tells_a_slightly_wrong_layer() -> None:
    model = random_quantized("llama")
    other = copy.deepcopy(model)
    for layer in other.model.layers:
        gate_up, qkv = layer.mlp.gate_up_proj, layer.self_attn.qkv_proj
        gate_up.weight_scale.data[gate_up.rows["gate_proj"] + 5] *= 1.1
        qkv.weight_scale.data[qkv.out_features - qkv.rows["v_proj"] + 5] *= 1.1
        layer.input_layernorm.weight.data[-8:] *= 1.01
        layer.post_attention_layernorm.weight.data[-8:] *= 1.01
    for name, rows in row_errors(model, tokens(2, 40), other).items():
        assert rows.median() > 5 * ROUNDING[name], name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype: torch.dtype) -> None:
    model = random_quantized("qwen2", dtype=dtype).to(dtype)
    ids = tokens(2, 24)
    got = logits(model, ids)
    assert got.dtype == dtype
    with fake_quantized(model):
        assert relative(got, logits(model, ids)) < 0.1


def test_head_dim_128_and_grouped_queries() -> None:
    model = random_quantized(
        hidden_size=192, head_dim=128, num_attention_heads=6, num_key_value_heads=2
    )
    ids = tokens(1, 70)
    errors = row_errors(model, ids)["ResQAttention"]
    assert errors.median() < ROUNDING["ResQAttention"] and errors.max() < FLIPPED_CODE


def test_every_parameter_matters() -> None:
    biases = {"attention_bias": True, "mlp_bias": True}
    for model in (random_quantized("qwen3", **biases), random_quantized("llama", **biases)):
        layer = model.model.layers[1]
        parameters = [
            tensor
            for tensor in (*layer.parameters(), *layer.buffers())
            if tensor.is_floating_point() and tensor.shape[-1] > 1
        ]
        # Four scales and biases, or in Qwen3 two and the norms of heads; two gains; the rotation.
        assert len(parameters) == 4 + 4 + 2 + 1
        check_that_each_matters(model, parameters)


def check_that_each_matters(model: Any, parameters: list[torch.Tensor]) -> None:
    ids = tokens(1, 16)
    before = logits(model, ids)
    with torch.no_grad():
        for parameter in parameters:
            kept = parameter.clone()
            parameter.copy_(parameter.flip(-1) * 1.5)
            assert relative(logits(model, ids), before) > 0.01
            parameter.copy_(kept)
    assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kv_bits", [4, 16])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "smollm3"])
def test_a_padded_row_equals_the_row_alone(model_type: str, side: str, kv_bits: int) -> None:
    model = random_quantized(model_type, ResQConfig(kv_bits=kv_bits))
    lengths, width = [19, 32, 7], 32
    ids = tokens(3, width)
    columns = torch.arange(width)
    mask = torch.stack([columns < n if side == "right" else columns >= width - n for n in lengths])
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    got = logits(model, ids, attention_mask=mask.long(), position_ids=positions)
    assert torch.isfinite(got).all()
    for row in range(3):
        alone = logits(model, ids[row : row + 1, mask[row]])
        assert relative(got[row, mask[row]], alone[0]) < 1e-5


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "smollm3"])
def test_a_row_does_not_depend_on_the_batch(model_type: str) -> None:
    model = random_quantized(model_type)
    ids = tokens(4, 33)
    hidden = head_input(model, ids, use_cache=False)
    for row in range(4):
        alone = head_input(model, ids[row : row + 1], use_cache=False)
        assert torch.equal(alone[0], hidden[row])


def test_masks_that_cannot_be_computed_are_refused() -> None:
    model = random_quantized("llama")
    ids = tokens(1, 8)
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    with pytest.raises(ValueError, match="packed sequences, are not supported"):
        logits(model, ids, position_ids=packed)
    dense = torch.zeros(1, 1, 8, 8)
    with pytest.raises(ValueError, match=r"attention_mask: expected \[1, 8\]"):
        logits(model, ids, attention_mask=dense)


def test_casting_a_model_leaves_scales_and_rotations() -> None:
    model = random_quantized("qwen2")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.to(torch.bfloat16)
    for name, tensor in model.state_dict().items():
        exact = name.endswith(("weight_lo", "weight_hi", "weight_scale", "rotation"))
        exact = exact or ".basis.linears." in name
        assert tensor.dtype == (before[name].dtype if exact else torch.bfloat16), name
        assert not exact or torch.equal(tensor, before[name]), name
    assert logits(model, tokens(1, 4)).dtype == torch.bfloat16


def test_copies_are_independent() -> None:
    model = random_quantized("llama")
    ids = tokens(1, 9)
    other = copy.deepcopy(model)
    assert torch.equal(logits(other, ids), logits(model, ids))
    other.model.layers[0].mlp.gate_up_proj.weight_scale.data.mul_(2)
    assert not torch.equal(logits(other, ids), logits(model, ids))


@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [
        (
            "llama",  # Llama-3.2-1B
            {
                "hidden_size": 2048,
                "intermediate_size": 8192,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "head_dim": 64,
                "rms_norm_eps": 1e-5,
                "max_position_embeddings": 131072,
                "rope_parameters": LLAMA3_ROPE,
            },
        ),
        (
            "qwen2",  # Qwen2.5-0.5B
            {
                "hidden_size": 896,
                "intermediate_size": 4864,
                "num_attention_heads": 14,
                "num_key_value_heads": 2,
                "rms_norm_eps": 1e-6,
                "max_position_embeddings": 32768,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
            },
        ),
        (
            "qwen3",  # Qwen3-0.6B
            {
                "hidden_size": 1024,
                "intermediate_size": 3072,
                "num_attention_heads": 16,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "rms_norm_eps": 1e-6,
                "max_position_embeddings": 40960,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
            },
        ),
    ],
)
def test_real_widths(model_type: str, sizes: dict[str, Any]) -> None:
    model = random_quantized(model_type, num_hidden_layers=1, **sizes)
    for name, rows in row_errors(model, tokens(1, 24)).items():
        assert rows.median() < ROUNDING[name] and rows.max() < FLIPPED_CODE, name
    layers = model.model.layers.modules()
    linears = [module for module in layers if isinstance(module, ResQLinear)]
    assert [m.bias is not None for m in linears] == [model_type == "qwen2"] + 3 * [False]
    assert isinstance(model.model.layers[0].self_attn, ResQAttention)


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "smollm3"])
def test_compiles_to_one_graph(model_type: str) -> None:
    torch._dynamo.reset()
    # SmolLM3's is a layer without RoPE.
    model = random_quantized(model_type, num_hidden_layers=1, no_rope_layers=[0])
    ids = tokens(1, 12)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(logits(compiled, ids), logits(model, ids))
