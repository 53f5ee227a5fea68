"""A decoder layer with the residual sum in its second norm: the bits of transformers' own."""

from __future__ import annotations

import pickle

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from resq_kernels import ops
from resq_kernels.architecture import SUPPORTED
from resq_kernels.nn import layer as layers
from resq_kernels.testing.quantized_models import random_quantized


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("model_type", SUPPORTED)
def test_layers_have_the_bits_of_the_layers_they_replace(
    model_type: str, dtype: torch.dtype
) -> None:
    model = random_quantized(model_type).to(dtype)
    hidden = torch.randn(2, 9, 128, dtype=dtype)
    rope = model.model.rotary_emb(hidden, torch.arange(9)[None])
    for layer in model.model.layers:
        (original,) = (base for base, ours in layers.CLASSES.items() if type(layer) is ours)
        assert isinstance(layer, original)  # what transformers records hidden states of
        expected = original.forward(layer, hidden, position_embeddings=rope)
        assert torch.equal(layer(hidden, position_embeddings=rope), expected)


def test_a_pickled_layer_finds_its_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a process that has made no model of its kind."""
    model = random_quantized("qwen3", num_hidden_layers=1)
    data = pickle.dumps(model.model.layers)
    monkeypatch.setattr(layers, "CLASSES", {})
    copied = pickle.loads(data)
    kind = type(copied[0])
    assert kind is layers.ResQQwen3DecoderLayer and list(layers.CLASSES.values()) == [kind]
    with pytest.raises(AttributeError, match="has no attribute 'ResQGemmaDecoderLayer'"):
        _ = layers.ResQGemmaDecoderLayer


class OtherLayer(LlamaDecoderLayer):
    """A layer of somebody else's."""


def test_a_layer_of_another_class_stays() -> None:
    assert layers.quantized_class(OtherLayer) is OtherLayer


def test_a_layer_adds_once_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of its two sums is the norm's: the residual reaches the kernel."""
    given, right = [], ops.rms_norm_quantize
    monkeypatch.setattr(
        ops,
        "rms_norm_quantize",
        lambda *args, **options: given.append(args[1] is not None) or right(*args, **options),
    )
    model = random_quantized("qwen2")
    model.model.layers[0].register_forward_hook(lambda *_: None)  # layers go one by one
    model(torch.randint(3, 250, (1, 5)), use_cache=False)
    assert given == 2 * [False, True]
