"""Registers "resq" with transformers: `AutoModelForCausalLM.from_pretrained` loads our folders."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from transformers.cache_utils import Cache
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

import resq_kernels_autoload
from resq_kernels import architecture, checkpoint
from resq_kernels.config import ResQConfig
from resq_kernels.formats import QuantizedWeight
from resq_kernels.integrations import transformers_parallel
from resq_kernels.weight_reader import reading

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from os import PathLike

    from transformers import PreTrainedConfig, PreTrainedModel

ATTENTION = "resq"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_PACKED = (
    "ResQAttention: expected a causal mask with padding, got {} (position_ids that restart within "
    "a row, as in packed sequences, are not supported)"
)


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
        self._opened: checkpoint.QuantizedFolder | None = None  # whose weights `pack` reads

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuses a device map that offloads; transformers calls it with what it inferred, too.

        Raises:
            ValueError: the map names "disk" or "meta", or devices of several kinds.
        """
        if not isinstance(device_map, dict):
            return
        kinds = {_device_kind(device) for device in device_map.values()}
        if len(kinds) > 1 or kinds & {"disk", "meta"}:
            raise ValueError(
                "ResQ: device_map: expected devices of one kind (weights are packed for the "
                "device that computes with them, and are not offloaded to CPU or disk), got "
                f"{' and '.join(sorted(kinds))}: {device_map}"
            )

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Refuses a compute dtype that the kernels do not have.

        Raises:
            ValueError: not float32, float16 or bfloat16.
        """
        if dtype not in DTYPES:
            raise ValueError(
                f"ResQ: dtype: expected float32, float16 or bfloat16, got {dtype}".replace(
                    "torch.", ""
                )
            )
        return dtype

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Refuses a request for another attention than the model's own.

        Raises:
            ValueError: `attn_implementation` is given and is another.
        """
        if config._attn_implementation not in (None, ATTENTION):
            _check_attention(attention_of(self.stored.config), config._attn_implementation)
        return config

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        checkpoint_files: Sequence[str] | None = None,
        device_map: Any = None,
        **kwargs: Any,
    ) -> PreTrainedModel:
        if checkpoint_files:
            opened = checkpoint.open_folder(
                Path(checkpoint_files[0]).parent,
                checkpoint_files,
                needs_head=hasattr(model, "lm_head"),
            )
            checkpoint.check_values(opened)
            if device_map is None or transformers_parallel.degree_of(model.config) > 1:
                self._opened = opened
        prepare(model, self.stored)
        if self._opened is not None:
            leave_out_weights(model)
        return model

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        from resq_kernels.nn.convert import pack

        if transformers_parallel.degree_of(model.config) > 1:
            parallel = transformers_parallel.share(model)
            if self._opened is not None:
                checkpoint.keep_rows(self._opened, parallel.rank, parallel.degree)
        if self._opened is None:
            pack(model)
            return model
        inside = hasattr(model, model.base_model_prefix)
        prefix, device = "" if inside else architecture.DECODER_PREFIX, model.device
        with reading(self._opened.reader) as read:

            def read_there(linears: Sequence[str], start: int, stop: int) -> QuantizedWeight:
                weight = read([f"{prefix}{name}" for name in linears], start, stop)
                return QuantizedWeight(*(tensor.to(device) for tensor in weight))

            pack(model, read_there)
        self._opened = None
        return model

    def update_parallel_plan(self, model: PreTrainedModel, plan: dict[str, str]) -> None:
        """Keeps transformers from splitting modules that split themselves."""
        if plan is model.tp_plan and transformers_parallel.degree_of(model.config) > 1:
            plan.clear()
            plan.update(transformers_parallel.plan_of(model))

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """What `save_pretrained` writes: the canonical tensors and the guard.

        Raises:
            ValueError: a tensor is on the meta device, so that there is nothing to save; the
                embedding or the head is not the quantized one that the configuration tells of; or
                the model is a rank's of tensor parallel.
        """
        from resq_kernels.nn.embedding import TiedHead
        from resq_kernels.nn.linear import ResQLinear
        from resq_kernels.nn.tensor_parallel import parallel_of

        if (parallel := parallel_of(model)) is not None:
            raise ValueError(
                "save_pretrained: expected all of a model, got a rank of tensor parallel "
                f"{parallel.degree}: copy the folder that it was loaded from, or load that without "
                "tp_plan"
            )

        vocabulary = {
            "embed_tokens": model.get_input_embeddings(),
            "lm_head": model.get_output_embeddings(),
        }
        for name, module in vocabulary.items() if self.stored.config.embedding_bits == 8 else ():
            if module is not None and not isinstance(module, (ResQLinear, TiedHead)):
                raise ValueError(
                    f"save_pretrained: {name}: expected the quantized module, got a "
                    f"{type(module).__name__}, which a quantized folder has no place for"
                )
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_meta:
                raise ValueError(
                    f"save_pretrained: {name}: expected a tensor with values, got one on the meta "
                    "device (not loaded, or offloaded)"
                )
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
        """Whether adapters on the weights can be trained, which stay as they are."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether `torch.compile` takes a forward pass."""
        return True


def _device_kind(device: Any) -> str:
    """ "cpu", "cuda", ...; an index is that of a GPU. "disk" stays."""
    text = str(device)
    return "cuda" if text.isdigit() else text.partition(":")[0]


def prepare(model: PreTrainedModel, stored: checkpoint.StoredFormat) -> None:
    """Swaps the modules of a model (`nn.convert`) and makes transformers pass their arguments.

    Raises:
        ValueError: another architecture, one whose decoder has another name than in the folder, a
            window of attention, or a `distributed_config` that the modules do not have.
    """
    from resq_kernels.nn.convert import convert
    from resq_kernels.nn.tensor_parallel import check_degree

    # peft may have imported torch, which called this while there was nothing of peft yet.
    resq_kernels_autoload.register()
    prefix = architecture.DECODER_PREFIX
    if f"{model.base_model_prefix}." != prefix:
        raise ValueError(
            f"ResQ: expected a model whose tensors begin with {prefix!r} as the folder's do, got "
            f"{type(model).__name__}, in which they begin with '{model.base_model_prefix}.'"
        )
    shape = architecture.ModelShape.from_config(model.config.to_dict())
    window = getattr(model.config, "sliding_window", None)
    if shape.model_type == "mistral" and window is not None:
        raise ValueError(
            f"ResQ: sliding_window: expected null, as `resq quantize` writes it, got {window}"
        )
    check_degree(shape, stored.config, transformers_parallel.degree_of(model.config))
    # The default device that transformers sets slows down every call of torch (66 to 43 ms here).
    with torch._C.DisableTorchFunction():
        convert(model, stored.config, stored.tied_head, stored.has_basis, stored.has_linear_bases)
    _ignore(model, re.escape(architecture.GUARD.removeprefix(prefix)) + "$")
    register_attention()
    attention = attention_of(stored.config)
    model.config._attn_implementation = attention
    decoder = getattr(model, model.base_model_prefix, model)
    check = partial(_check_call, attention)
    decoder.register_forward_pre_hook(check, with_kwargs=True, prepend=True)
    if stored.config.embedding_bits == 8:
        # peft looks for the embedding of soft prompts by the name of the parameter with a row per
        # token, less ".weight". A plain attribute: no module, parameter or key of a state dict.
        vars(decoder)["embed_tokens_scale"] = decoder.embed_tokens
    model.num_parameters = partial(num_parameters, model)
    model.save_pretrained = partial(save_pretrained, model)


def leave_out_weights(model: PreTrainedModel) -> None:
    """Makes transformers load all but the quantized weights, which `nn.convert.pack` then reads.

    transformers takes 0.1 ms for every tensor, half of it to compile a regular expression, and
    quantized weights are 633 of the 727 tensors of a model with 30 layers.
    """
    from resq_kernels.nn.linear import ResQLinear

    stems = set()
    for name, module in model.named_modules():
        if isinstance(module, ResQLinear):
            stem = re.escape(name.removeprefix(architecture.DECODER_PREFIX))
            stems.add(re.sub(r"\d+", r"\\d+", stem))
            for tensor in QuantizedWeight._fields:
                module.register_parameter(tensor, None)
    names = rf"({'|'.join(sorted(stems))})\.({'|'.join(QuantizedWeight._fields)})"
    _ignore(model, rf"^({re.escape(architecture.DECODER_PREFIX)})?{names}$")


def _ignore(model: PreTrainedModel, pattern: str) -> None:
    """Keeps transformers from reporting names in a file that match, and that it does not load."""
    ignored = set(model._keys_to_ignore_on_load_unexpected or ())
    model._keys_to_ignore_on_load_unexpected = ignored | {pattern}


def attention_of(config: ResQConfig) -> str:
    """The `attn_implementation` of a model: its own over 4-bit pages, torch's over floats."""
    return ATTENTION if config.kv_bits == 4 else "sdpa"


def _check_attention(expected: str, given: str) -> None:
    if given != expected:
        raise ValueError(
            f"ResQ: attn_implementation: expected {expected!r} (or none given), which the "
            f"quantized attention computes with, got {given!r}"
        )


def _check_call(
    attention: str, decoder: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Refuses what a caller of the decoder asks for and would not get."""
    _check_attention(attention, decoder.config._attn_implementation)
    if kwargs.get("output_attentions"):
        raise ValueError(
            "ResQ: output_attentions: expected False, got True: the weights of the attention are "
            "never in memory as a whole"
        )
    from resq_kernels.nn.hidden_basis import POSITIONAL

    given = {**dict(zip(POSITIONAL, args, strict=False)), **kwargs}
    for name, sizes in (("input_ids", "[B, L]"), ("inputs_embeds", "[B, L, hidden size]")):
        x = given.get(name)
        if isinstance(x, torch.Tensor) and (x.dim() != sizes.count(",") + 1 or x.numel() == 0):
            raise ValueError(f"ResQ: {name}: expected {sizes}, not empty, got {list(x.shape)}")
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        if given.get(name) is not None:
            raise ValueError(f"ResQ: {name}: expected None, packed sequences are not supported")
    positions = given.get("position_ids")
    if attention == ATTENTION and positions is not None and given.get("attention_mask") is None:
        # transformers looks at them only if there is no cache (`padding_mask`). A step of one
        # column has none to read, which a CUDA graph could not.
        readable = positions.shape[-1] > 1 and not torch.compiler.is_compiling()
        if readable and (positions.diff() < 0).any():
            raise ValueError(_PACKED.format("position_ids"))
    for name in ("cache", "past_key_values"):
        cache = given.get(name)
        if cache is not None and not isinstance(cache, Cache):
            raise ValueError(
                f"ResQ: {name}: expected a Cache of transformers (ResQCache, an empty "
                f"DynamicCache) or None, got {type(cache).__name__}"
            )


def num_parameters(
    model: PreTrainedModel, only_trainable: bool = False, exclude_embeddings: bool = False
) -> int:
    """Number of weights, as many as the float model has: for `model.num_parameters`, which would
    count parameters, and packed codes are none.

    Scales and rotations are not counted.

    Args:
        model: a quantized model.
        only_trainable: count only what requires a gradient: nothing, unless a caller made it.
        exclude_embeddings: leave out the embedding of the tokens.
    """
    from torch import nn

    from resq_kernels.nn.attention import ResQAttention
    from resq_kernels.nn.embedding import ResQEmbedding, TiedHead
    from resq_kernels.nn.hidden_basis import HiddenBasis
    from resq_kernels.nn.linear import ResQLinear
    from resq_kernels.nn.linear_basis import LinearBases
    from resq_kernels.nn.tensor_parallel import parallel_of

    parallel = parallel_of(model)
    degree = 1 if parallel is None else parallel.degree  # every rank has as many rows
    count = 0
    for module in model.modules():
        if exclude_embeddings and isinstance(module, (ResQEmbedding, nn.Embedding)):
            continue
        own = list(module.parameters(recurse=False))
        if only_trainable:
            count += sum(parameter.numel() for parameter in own if parameter.requires_grad)
        elif isinstance(module, ResQLinear):
            bias = 0 if module.bias is None else module.out_features
            count += degree * (module.out_features * module.in_features + bias)
        elif not isinstance(module, (ResQAttention, TiedHead, HiddenBasis, LinearBases)):
            count += sum(parameter.numel() for parameter in own)
    return count


def save_pretrained(
    model: PreTrainedModel,
    save_directory: str | PathLike[str],
    is_main_process: bool = True,
    state_dict: dict[str, torch.Tensor] | None = None,
    *args: Any,
    **kwargs: Any,
) -> None:
    """`PreTrainedModel.save_pretrained`, which saves a quantized model's own tensors whatever
    `state_dict` holds.

    Args:
        model: a quantized model.
        save_directory, is_main_process: as there, like all other arguments.
        state_dict: the model's own tensors, as training loops pass them, or None.

    Raises:
        ValueError: `state_dict` holds other tensors; or as in `get_state_dict_and_metadata`.
    """
    if state_dict is not None:
        own = model.state_dict()
        for name in sorted({*own, *state_dict}):
            a, b = own.get(name), state_dict.get(name)
            if a is None or b is None or a.dtype != b.dtype or not torch.equal(a, b.to(a.device)):
                raise ValueError(
                    "save_pretrained: state_dict: expected None or the model's own tensors, got "
                    f"{'no' if b is None else 'another'} {name}: load_state_dict() puts tensors in"
                )
    type(model).save_pretrained(model, save_directory, is_main_process, None, *args, **kwargs)


def register_attention() -> None:
    """Registers the attention "resq", whose mask is the padding mask, [B, columns] or None."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, padding_mask)


def padding_mask(
    *,
    kv_length: int,
    batch_size: int | None = None,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """The padding mask of `ResQAttention`: true where a token is; None if none was given.

    Args:
        kv_length: columns, those in the cache included.
        batch_size: B.
        mask_function: how transformers would compose the mask of a dense attention.
        attention_mask: bool [B, columns] as the caller of the model gave it.

    Raises:
        ValueError: something besides causality and padding is asked for (packed sequences), or the
            mask has another shape.
    """
    from transformers.masking_utils import causal_mask_function

    # A graph cannot read values: transformers then always composes a mask of packed sequences.
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return attention_mask
    if mask_function not in (None, causal_mask_function):
        raise ValueError(_PACKED.format("another mask function"))
    if attention_mask is None:
        return None
    rows = len(attention_mask) if batch_size is None else batch_size
    if attention_mask.shape != (rows, kv_length):
        raise ValueError(
            f"ResQAttention: attention_mask: expected [{rows}, {kv_length}], the padding of every "
            f"column that is cached or new, got {list(attention_mask.shape)}"
        )
    return attention_mask


def _attention(*args: Any, **kwargs: Any) -> NoReturn:
    raise RuntimeError(
        'attn_implementation "resq": expected a quantized model, got one with float attention'
    )
