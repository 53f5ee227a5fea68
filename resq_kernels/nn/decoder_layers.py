"""DecoderLayers: all layers of a pass by one call of `ops.decoder_layers`.

transformers calls the layers of a decoder one by one, and each calls ten operators. On a CPU that
takes longer than a small model's kernels in a step of one token (docs/notes/0046). A decoder over
4-bit pages therefore offers its layers a `DecoderLayers` in every pass: the first layer computes
all of them, the others return what they get. Where anything could tell the difference, such as a
hook, an adapter or collected hidden states, there is none, and the layers compute one by one, to
the same bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from resq_kernels import ops
from resq_kernels.nn import prefill
from resq_kernels.nn.attention import ResQAttention
from resq_kernels.nn.batch import Batch
from resq_kernels.nn.fused import FusedLinear
from resq_kernels.nn.layer import CLASSES
from resq_kernels.nn.linear import ResQLinear
from resq_kernels.nn.mlp import ResQMLP
from resq_kernels.nn.norm import ResQRMSNorm
from resq_kernels.nn.paged import PagedKeysValues
from resq_kernels.nn.straight import needs_gradient

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

    from resq_kernels.nn.batch import ForwardPass

# Modules whose hooks only collect what the caller asked for, which `DecoderLayers.of` looks at.
COLLECTORS = "transformers.utils.output_capturing"
# What one call takes as alike in all layers, or as fixed between two passes.
ATTRIBUTES: dict[type, tuple[str, ...]] = {
    ResQRMSNorm: ("eps", "row_format", "gain_is_one"),
    ResQAttention: ("heads", "kv_heads", "head_dim", "scaling", "kv_bits", "hi_bits")
    + ("layer_idx", "batch_invariant", "turned"),
    ResQMLP: ("hadamard", "hadamard_block"),
    ResQLinear: ("row_format", "dtype", "_packed_for"),
    FusedLinear: ("row_format", "dtype", "_packed_for"),
}

# What a module has where its own `forward` is not all that computes.
REPLACED = ("forward", "_forward_pre_hooks", "_forward_hooks")

# The entry `name` of a dictionary of a module.
Place = tuple[dict[str, Any], str]


class DecoderLayers:
    """The layers of one pass, which the first of them computes.

    Args:
        plan: of the decoder.
        weights: of all layers, as `ops.decoder_layers` takes them.
    """

    def __init__(self, plan: _Plan, weights: list[torch.Tensor | None]) -> None:
        self._plan, self._weights = plan, weights
        self._computed: bool | None = None  # None before the first layer

    @classmethod
    def of(cls, decoder: nn.Module, kwargs: dict[str, Any]) -> DecoderLayers | None:
        """The layers of a decoder that `nn.convert` has converted, or None where they must be
        called one by one.

        Args:
            decoder: with `layers`.
            kwargs: what the decoder is called with.
        """
        if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
            return None
        if torch_module._has_any_global_hook() or _collects(decoder, kwargs):
            return None
        plan = _plan(decoder)
        return None if plan is None or plan.is_watched() else cls(plan, plan.weights())

    def hidden_states(
        self,
        layer: object,
        x: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None,
        mask: torch.Tensor | None,
        cache: Cache | None,
        forward_pass: ForwardPass,
    ) -> torch.Tensor | None:
        """What `layer` returns for x [B, L, hidden]: after the first, x, which is then the output
        of all of them. None where it must compute for itself.

        Args:
            layer: that is being called.
            position_embeddings, mask, cache, forward_pass: as in `ResQAttention.forward`, which
                lists the errors.
        """
        if layer is not self._plan.layers[0]:
            return x if self._computed else None
        out = None
        if position_embeddings is not None:
            out = self._compute(x, *position_embeddings, mask, cache, forward_pass)
        self._computed = out is not None
        return out

    def _compute(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        mask: torch.Tensor | None,
        cache: Cache | None,
        forward_pass: ForwardPass,
    ) -> torch.Tensor | None:
        plan, first = self._plan, self._plan.layers[0]
        attention: ResQAttention = first.self_attn
        if x.dtype != attention.o_proj.dtype or needs_gradient(x):
            return None
        batch, paged = _batch_and_pages(cache, plan.indices)
        shape = (x.shape[0], x.shape[1])
        metadata = forward_pass.metadata(batch, paged[0].length, shape, mask, cos, sin)
        invariant = attention.batch_invariant
        if metadata.rows is not None or prefill.is_faster(x.device.type, metadata.new, invariant):
            return None
        for one in paged:
            one.make_room(metadata, attention.kv_heads, attention.head_dim, x.device)
        pages = paged[0].pages_per_sequence
        if any(one.pages_per_sequence != pages for one in paged):
            return None
        assert metadata.cos is not None and metadata.sin is not None
        states = self.compute(
            x.flatten(0, 1),
            metadata.cos,
            metadata.sin,
            [one.held() for one in paged],
            metadata.slots(pages * paged[0].page_size),
            metadata.block_table(pages),
            metadata.seq_lens,
            metadata.cu_seqlens_q,
        )
        for one in paged:
            one.advance(metadata)
        batch.advance(metadata)
        return states.view(x.shape)

    def prepare_step(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        pages: list[torch.Tensor],
        block_table: torch.Tensor,
    ) -> torch.Tensor:
        """`ops.prepare_decode_step` of these layers as they are now, which lists the errors."""
        # The CPU's operators read key rotations in float32 only: else each step would convert them.
        rotations = {id(layer.self_attn.key_rotation) for layer in self._plan.layers}
        weights = [
            weight.float() if weight is not None and id(weight) in rotations else weight
            for weight in self._weights
        ]
        options = self._plan.options()
        return ops.prepare_decode_step(x, cos, sin, pages, block_table, weights, *options)

    def compute(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        pages: list[torch.Tensor],
        slots: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
    ) -> torch.Tensor:
        """The hidden states after all layers, like x [T, hidden]; arguments as those of
        `ops.decoder_layers`, which lists the errors."""
        out, residual = ops.decoder_layers(
            x,
            cos,
            sin,
            pages,
            slots,
            block_table,
            seq_lens,
            cu_seqlens_q,
            self._weights,
            *self._plan.options(),
        )
        return residual + out


class _Plan:
    """Where the weights of a decoder's layers are, and what must be as it was when they are read.

    To look at all modules takes 1.1 ms for 30 layers, a tenth of a step. A plan looks at the
    dictionaries of their attributes instead, in loops of the interpreter: 0.1 ms.

    Args:
        layers: which are alike (`_kind`).

    Attributes:
        layers: as given.
        indices: of their layers of the cache.
    """

    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers
        self.indices = [layer.self_attn.layer_idx for layer in layers]
        modules = [module for layer in layers for module in layer.modules()]
        self._own, self._modules = [vars(module) for module in modules], modules
        self._watched = _columns([place for module in modules for place in _watched(module)])
        self._replaced = _columns([(own, name) for own in self._own for name in REPLACED])
        self._tensors = _columns([place for layer in layers for place in _weights(layer)])
        self._parameters = [module._parameters for module in modules]
        self._seen = self._now()

    def holds(self) -> bool:
        """Whether the layers have the modules, attributes and names of tensors that they had."""
        return self._now() == self._seen

    def is_watched(self) -> bool:
        """Whether something sees, or replaces, what single modules compute."""
        if not any(map(dict.get, *self._replaced)):
            return False
        for own in self._own:
            if "forward" in own:
                return True
            before, after = own["_forward_pre_hooks"], own["_forward_hooks"]
            if (before or after) and _see([*before.values(), *after.values()]):
                return True
        return False

    def weights(self) -> list[torch.Tensor | None]:
        """Of all layers, in the order of `ops.decoder_layers`."""
        return list(map(dict.get, *self._tensors))

    def options(self) -> tuple[Any, ...]:
        """What all layers have in common, in the order of `ops.decoder_layers`."""
        first = self.layers[0]
        norm, attention, mlp = first.input_layernorm, first.self_attn, first.mlp
        formats = [part.row_format for part in (norm, attention.o_proj, mlp.down_proj)]
        return (
            norm.eps,
            attention.scaling,
            [part.k_hi for part in formats],
            [part.clip for part in formats],
            formats[0].lo_bits,
            formats[0].symmetric,
            attention.hi_bits,
            mlp.hadamard,
            mlp.hadamard_block,
        )

    def _now(self) -> tuple[list[Any], ...]:
        values = list(map(dict.get, *self._watched))
        # A bias that is given later moves from the parameters to the buffers.
        return values, list(map(type, self._modules)), list(map(len, self._parameters))


def _batch_and_pages(
    cache: Cache | None, indices: list[int]
) -> tuple[Batch, list[PagedKeysValues]]:
    """What a cache holds for layers; without one an empty batch, and the same pages for every
    layer, which overwrites what the layer before has read."""
    if cache is None:
        return Batch(), len(indices) * [PagedKeysValues()]
    from resq_kernels.nn.kv_cache import paged_layer

    held = [paged_layer(cache, index) for index in indices]
    return held[0].batch, [layer.paged for layer in held]


# Not an attribute of the decoder, which a copy of it would share.
_PLANS: WeakKeyDictionary[nn.Module, _Plan] = WeakKeyDictionary()


def _plan(decoder: Any) -> _Plan | None:
    """The plan of a decoder as it is now; None if no call computes its layers."""
    layers = list(decoder.layers._modules.values())[: decoder.config.num_hidden_layers]
    plan = _PLANS.get(decoder)
    if plan is not None and plan.layers == layers and plan.holds():
        return plan
    first = _kind(layers[0]) if layers else None
    if first is None or any(_kind(layer) != first for layer in layers):
        _PLANS.pop(decoder, None)  # it holds modules that the decoder may have given up
        return None
    plan = _PLANS[decoder] = _Plan(layers)
    return plan


def _collects(decoder: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the caller asks for what single layers return."""
    options = ("output_hidden_states", "output_attentions")
    given = (kwargs.get(name, getattr(decoder.config, name, False)) for name in options)
    return any(value is not None and value is not False for value in given)


def _see(hooks: list[Any]) -> bool:
    return any(getattr(hook, "__module__", None) != COLLECTORS for hook in hooks)


def _columns(places: list[Place]) -> tuple[list[dict[str, Any]], list[str]]:
    """Dictionaries and names of places, for `map`."""
    return [place[0] for place in places], [place[1] for place in places]


def _watched(module: Any) -> list[Place]:
    """Children, and attributes that a pass depends on."""
    children = [(module._modules, name) for name in module._modules]
    return children + [(vars(module), name) for name in ATTRIBUTES.get(type(module), ())]


def _kind(layer: Any) -> tuple[Any, ...] | None:
    """What all layers of a call have in common; None for a layer that it does not compute."""
    if type(layer) not in CLASSES.values():
        return None
    first, attention, second, mlp = (
        layer._modules.get(name)
        for name in ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
    )
    types = [type(module) for module in (first, attention, second, mlp)]
    if types != [ResQRMSNorm, ResQAttention, ResQRMSNorm, ResQMLP] or attention.kv_bits != 4:
        return None
    linears = _linears(layer)
    if [type(linear) for linear in linears] != [FusedLinear, ResQLinear, FusedLinear, ResQLinear]:
        return None
    if any(linear._buffers["packed_weight"] is None for linear in linears):
        return None
    if attention._modules.get("q_norm") is not None or not attention.turned:
        return None  # the operator has no norm of heads, and turns all layers
    tensors = [place[0].get(place[1]) for place in _weights(layer)]
    devices = {tensor.device for tensor in tensors if tensor is not None}
    if len(devices) != 1 or next(iter(devices)).type != linears[0]._packed_for:
        return None
    formats = (first.row_format, linears[1].row_format, linears[3].row_format)
    same = (
        {part[1:4] for part in formats} == {(formats[0].lo_bits, None, formats[0].symmetric)}
        and (first.eps, first.row_format) == (second.eps, second.row_format)
        and len({(linear.dtype, linear._packed_for) for linear in linears}) == 1
    )
    if not same:
        return None
    heads = (attention.heads, attention.kv_heads, attention.head_dim, attention.scaling)
    transform = (mlp.hadamard, mlp.hadamard_block)
    modes = (attention.hi_bits, attention.batch_invariant, transform, *devices)
    return (first.eps, formats, linears[0].dtype, heads, modes)


def _linears(layer: Any) -> list[Any]:
    places = [(layer.self_attn, "qkv_proj"), (layer.self_attn, "o_proj")]
    places += [(layer.mlp, "gate_up_proj"), (layer.mlp, "down_proj")]
    return [owner._modules.get(name) for owner, name in places]


def _weights(layer: Any) -> list[Place]:
    """Of a layer that has a `_kind`, in the order of `ops.decoder_layers`."""
    qkv, output, gate_up, down = map(_linear_weights, _linears(layer))
    rotation = (layer.self_attn._parameters, "key_rotation")
    first, second = _gain(layer.input_layernorm), _gain(layer.post_attention_layernorm)
    return [first, *qkv, rotation, *output, second, *gate_up, *down]


def _linear_weights(linear: Any) -> list[Place]:
    names = ("packed_weight", "weight_scale", "weight_sum", "bias")
    return [
        (linear._buffers if name in linear._buffers else linear._parameters, name) for name in names
    ]


def _gain(norm: Any) -> Place:
    return ({} if norm.gain_is_one else norm._parameters, "weight")
