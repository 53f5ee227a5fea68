"""Registers "resq" with transformers: `AutoModelForCausalLM.from_pretrained` loads our folders."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from resq_kernels import architecture, checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedModel

ATTENTION = "resq"


@register_quantization_config(checkpoint.QUANT_METHOD)
class ResQQuantizationConfig(QuantizationConfigMixin):
    """`quantization_config` of a config.json, kept as it is stored (docs/formats.md section 6)."""

    def __init__(self, **entry: Any) -> None:
        self.quant_method = checkpoint.QUANT_METHOD
        self.__dict__.update(entry)


@register_quantizer(checkpoint.QUANT_METHOD)
class ResQQuantizer(HfQuantizer):
    """Builds the quantized modules before transformers loads the tensors, and packs them after.

    Raises:
        ValueError: the model is a float model: it must be quantized with calibration data first.
        CheckpointError: the folder is damaged, incomplete or of a newer format.
    """

    requires_calibration = True

    def __init__(self, quantization_config: QuantizationConfigMixin, **kwargs: Any) -> None:
        if not kwargs.get("pre_quantized", True):
            raise ValueError(
                "ResQ: expected a folder that `resq quantize` made, got a model that is not "
                "quantized: run `resq quantize MODEL OUT` (or resq_kernels.quantize) and load OUT"
            )
        super().__init__(quantization_config, **kwargs)
        entry = quantization_config.to_dict()
        self.stored = checkpoint.parse_quantization_config(entry)

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        if checkpoint_files:
            checkpoint.validate(
                Path(checkpoint_files[0]).parent,
                checkpoint_files,
                needs_head=hasattr(model, "lm_head"),
            )
        prepare(model, self.stored)
        return model

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        from resq_kernels.nn.convert import pack

        pack(model)
        return model

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """What `save_pretrained` writes: the canonical tensors and the guard."""
        state: dict[str, torch.Tensor] = model.state_dict()
        if self.stored.has_guard:
            inside = hasattr(model, model.base_model_prefix)
            prefix = "" if inside else architecture.DECODER_PREFIX
            state[architecture.GUARD.removeprefix(prefix)] = torch.empty(0, dtype=torch.uint8)
        return state, {}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Whether `save_pretrained` works: it writes the canonical tensors."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether the weights can be trained."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Whether `torch.compile` takes a forward pass."""
        return True


def prepare(model: PreTrainedModel, stored: checkpoint.StoredFormat) -> None:
    """Swaps the modules of a model (`nn.convert`) and makes transformers pass their arguments.

    Raises:
        ValueError: another architecture, one whose decoder has another name than in the folder, or
            a model split over devices by tensor parallelism.
    """
    from resq_kernels.nn.convert import convert

    prefix = architecture.DECODER_PREFIX
    if f"{model.base_model_prefix}." != prefix:
        raise ValueError(
            f"ResQ: expected a model whose tensors begin with {prefix!r} as the folder's do, got "
            f"{type(model).__name__}, in which they begin with '{model.base_model_prefix}.'"
        )

    if getattr(model.config, "distributed_config", None) is not None:
        raise ValueError(
            "ResQ: distributed_config: expected None, tensor parallelism is not supported in "
            f"transformers; got {model.config.distributed_config}"
        )
    convert(model, stored.config, stored.tied_head, stored.has_basis)
    guard = re.escape(architecture.GUARD.removeprefix(prefix)) + "$"
    ignored = set(model._keys_to_ignore_on_load_unexpected or ())
    model._keys_to_ignore_on_load_unexpected = ignored | {guard}
    register_attention()
    model.config._attn_implementation = ATTENTION if stored.config.kv_bits == 4 else "sdpa"


def register_attention() -> None:
    """Registers the attention "resq", whose mask is the padding mask, [B, columns] or None."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, padding_mask)


def padding_mask(
    *,
    kv_length: int,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """The padding mask of `ResQAttention`: true where a token is; None if all are tokens.

    Args:
        kv_length: columns, those in the cache included.
        mask_function: how transformers would compose the mask of a dense attention.
        attention_mask: bool [B, columns] as the caller of the model gave it.

    Raises:
        ValueError: something besides causality and padding is asked for (packed sequences).
    """
    from transformers.masking_utils import causal_mask_function

    # A compiled graph cannot read values: transformers then always composes a mask of packed
    # sequences, and a mask without padding cannot be dropped.
    if torch.compiler.is_compiling():
        return attention_mask
    if mask_function not in (None, causal_mask_function):
        raise ValueError(
            "ResQAttention: expected a causal mask with padding, got another mask function "
            "(position_ids that restart within a row, as in packed sequences, are not supported)"
        )
    if attention_mask is None:
        return None
    attention_mask = attention_mask[:, -kv_length:]
    return None if attention_mask.all() else attention_mask


def _attention(*args: Any, **kwargs: Any) -> NoReturn:
    raise RuntimeError(
        'attn_implementation "resq": expected a quantized model, got one with float attention'
    )
