"""Swaps the modules of a supported model of transformers for the quantized ones."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from resq_kernels import architecture
from resq_kernels.architecture import ModelShape
from resq_kernels.config import ResQConfig
from resq_kernels.formats import PackedWeight, QuantizedWeight, RowFormat
from resq_kernels.nn.attention import ResQAttention
from resq_kernels.nn.batch import ForwardPass
from resq_kernels.nn.decoder_layers import DecoderLayers
from resq_kernels.nn.embedding import ResQEmbedding, TiedHead
from resq_kernels.nn.fused import FusesLinears
from resq_kernels.nn.generation import generating_class
from resq_kernels.nn.hidden_basis import HiddenBasis, RotatedEmbedding, attach
from resq_kernels.nn.layer import quantized_class
from resq_kernels.nn.linear import ResQLinear
from resq_kernels.nn.linear_basis import LinearBases
from resq_kernels.nn.mlp import ResQMLP
from resq_kernels.nn.norm import FinalRMSNorm, HeadNorm, ResQRMSNorm

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedModel

    # Rows start <= row < stop of the matrix that has the rows of all these linears.
    ReadsRows = Callable[[Sequence[str], int, int], QuantizedWeight]


WORKERS = 4
"""Threads that pack modules, at most. Of weights that transformers has loaded each of them holds a
module's codes, 0.13 GB of gate_proj and up_proj in Llama-3-8B."""


def convert(
    model: PreTrainedModel,
    config: ResQConfig,
    tied_head: bool,
    stores_basis: bool = True,
    stores_linears: bool = True,
) -> None:
    """Replaces modules of a model in place: norms, attention and MLP of every decoder layer, the
    layer's `forward`, the last norm, and embedding and lm_head if they are in 8 bits.

    The new parameters have the names, shapes and dtypes of a checkpoint (docs/formats.md section
    6), on the device and in the dtype of the ones they replace, and no values yet: load them, then
    `pack`.

    Args:
        model: `LlamaForCausalLM`, `Qwen2ForCausalLM` or another head on the same decoder.
        config: how the checkpoint was quantized.
        tied_head: whether the head reads the embedding's matrix; with `embedding_bits` 8 only.
        stores_basis: whether the checkpoint of a rotated model holds the rotation.
        stores_linears: whether it holds the bases of the linears.

    Raises:
        ValueError: another architecture, or columns that do not split as `high_fraction` demands.
    """
    shape = ModelShape.from_config(model.config.to_dict())
    decoder = getattr(model, model.base_model_prefix, model)
    for index, layer in enumerate(decoder.layers):
        _convert_layer(layer, index, shape, config)
    decoder.norm = FinalRMSNorm(decoder.norm.weight, shape.norm_eps)
    decoder.register_forward_pre_hook(_share_metadata, with_kwargs=True)
    model.__class__ = generating_class(type(model))  # keeps all that it holds
    like = decoder.embed_tokens.weight
    basis = None
    if config.has_basis:
        basis = HiddenBasis(shape.hidden, stored=stores_basis, dtype=like.dtype, device=like.device)
        if stores_linears:
            basis.linears = LinearBases(shape, like.device)
    if config.embedding_bits == 8:
        _convert_embedding(model, decoder, config, tied_head, basis)
    elif basis is not None:
        decoder.embed_tokens = RotatedEmbedding(decoder.embed_tokens, basis)
    # A plain attribute, which stays when another embedding is put in the place of this one.
    vars(decoder)["hidden_basis"] = basis
    if basis is not None:
        attach(model, decoder)


def _share_metadata(
    decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Gives all layers of a pass one `ForwardPass`; the decoder passes it on to its layers."""
    forward_pass = kwargs.get("forward_pass") or ForwardPass()
    forward_pass.layers = DecoderLayers.of(decoder, kwargs)
    return args, {**kwargs, "forward_pass": forward_pass}


def pack(model: nn.Module, read: ReadsRows | None = None) -> None:
    """Fuses the linears that read the same rows and packs every `ResQLinear` for the kernel of its
    device; no parameter is left trainable.

    Goes module by module, so that memory freed by one is reused by the next: packing everything
    before fusing left a process with twice the memory (Llama-3.2-1B: 1.73 GB, not 0.8). On a CPU
    loaded parameters lie in a memory-mapped file, which stays mapped as a whole while one of them
    is left in it; they are therefore copied first.

    Args:
        model: a model that `convert` made, with its tensors loaded.
        read: `read(linears, start, stop)` reads rows of the linears that have no weight yet, or of
            a rank's rows of them (`nn.tensor_parallel.distribute`), to their device; several
            threads call it, and are done with the result when they call it again. None if all
            linears have theirs.

    Raises:
        RuntimeError: a tensor is on meta: not loaded, or offloaded.
    """
    on_cpu = True
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise RuntimeError(
                f"pack: {name}: expected a loaded tensor, got one on the meta device: load the "
                "checkpoint first, without offloading"
            )
        on_cpu = on_cpu and parameter.device.type == "cpu"
        if parameter.is_floating_point() and parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()
    tasks: list[Callable[[], None]] = []
    parts: set[str] = set()
    for name, module in model.named_modules():  # a module comes before its parts
        if isinstance(module, FusesLinears) and module.fused is None:
            parts |= {f"{name}.{part}" for part in module.PARTS}
            tasks.append(partial(_pack_fused, module, name, read))
        elif isinstance(module, ResQLinear) and name not in parts:
            tasks.append(partial(_pack_linear, module, name, read))
        elif isinstance(module, ResQRMSNorm):
            module.pack()
    _run(tasks, min(WORKERS, torch.get_num_threads()) if on_cpu else 1)
    model.requires_grad_(False)
    _return_freed_memory()


def _pack_fused(module: FusesLinears, name: str, read: ReadsRows | None) -> None:
    parts = [getattr(module, part) for part in module.PARTS]
    module.fuse(_packed(parts, [f"{name}.{part}" for part in module.PARTS], read))
    assert module.fused is not None
    module.fused.pack()


def _pack_linear(linear: ResQLinear, name: str, read: ReadsRows | None) -> None:
    if (weight := _packed([linear], [name], read)) is not None:
        linear.hold(weight, linear.bias)
    linear.pack()


def _packed(
    linears: Sequence[ResQLinear], names: Sequence[str], read: ReadsRows | None
) -> PackedWeight | None:
    """The weight of all rows of the linears from a file, or None if they have theirs."""
    if read is None or any(linear.weight_lo is not None or linear.is_packed for linear in linears):
        return None
    rows = sum(linear.out_features for linear in linears)
    return PackedWeight.read(partial(read, names), rows, linears[0].in_features)


def _run(tasks: Sequence[Callable[[], None]], workers: int) -> None:
    """Runs every task on one of some threads, in which operators do not share work with others.

    Operators that do wait for all of torch's threads every time. Where another process uses a core,
    each of thousands of waits costs the other cores milliseconds: packing 135M weights on two busy
    cores took 0.6 to 14 seconds, and takes 0.15 this way.
    """
    if workers == 1:
        for task in tasks:
            task()
        return
    with ThreadPoolExecutor(workers, initializer=_compute_alone) as pool:
        for future in [pool.submit(task) for task in tasks]:
            future.result()


def _compute_alone() -> None:
    """Makes torch's operators use the calling thread alone.

    By OpenMP's own function, since `torch.set_num_threads` also sets what threads that start later
    get. A torch without OpenMP has threads that do not wait for one another.
    """
    limit = getattr(ctypes.CDLL(torch._C.__file__), "omp_set_num_threads", None)
    if limit is not None:
        torch.get_num_threads()  # torch sets the number of a thread that it first meets
        limit(1)


def _return_freed_memory() -> None:
    """Makes glibc return the memory that packing freed between live tensors: 0.2 GB on top of the
    0.8 of Llama-3.2-1B."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _convert_layer(layer: Any, index: int, shape: ModelShape, config: ResQConfig) -> None:
    like = layer.self_attn.q_proj.weight
    place: dict[str, Any] = {"dtype": like.dtype, "device": like.device}

    def linear(name: str) -> ResQLinear:
        rows, columns = shape.linear(name)
        row_format = RowFormat.of(config, columns, shape.k_hi(name, config))
        return ResQLinear(
            columns,
            rows,
            name in shape.biased,
            high_columns=row_format.k_hi,
            lo_bits=row_format.lo_bits,
            symmetric=row_format.symmetric,
            clip=row_format.clip,
            **place,
        )

    def norm(first_reader: str) -> ResQRMSNorm:
        k_hi = shape.k_hi(first_reader, config)
        row_format = RowFormat.of(config, shape.hidden, k_hi)
        return ResQRMSNorm(shape.hidden, shape.norm_eps, row_format, **place)

    def head_norm() -> HeadNorm | None:
        return HeadNorm(shape.head_dim, shape.norm_eps, **place) if shape.head_norms else None

    layer.__class__ = quantized_class(type(layer))  # keeps all that it holds
    layer.input_layernorm = norm(architecture.QKV[0])
    layer.post_attention_layernorm = norm(architecture.GATE_UP[0])
    layer.self_attn = ResQAttention(
        *(linear(name) for name in (*architecture.QKV, architecture.O_PROJ)),
        head_dim=shape.head_dim,
        layer_idx=index,
        kv_bits=config.kv_bits,
        hi_bits=8 if config.mixed else 4,
        rotated=config.has_basis,
        q_norm=head_norm(),
        k_norm=head_norm(),
        turned=index not in shape.unturned,
        device=like.device,
    )
    layer.mlp = ResQMLP(
        *(linear(name) for name in (*architecture.GATE_UP, architecture.DOWN_PROJ)),
        hadamard=config.rotates,
        hadamard_block=shape.hadamard_block(config),
    )


def _convert_embedding(
    model: PreTrainedModel,
    decoder: Any,
    config: ResQConfig,
    tied_head: bool,
    basis: HiddenBasis | None,
) -> None:
    like = decoder.embed_tokens.weight
    vocabulary, hidden = like.shape
    decoder.embed_tokens = ResQEmbedding(
        vocabulary, hidden, basis, dtype=like.dtype, device=like.device
    )
    # transformers takes the model's dtype from the first floating parameter: not from a scale.
    decoder._modules = {"norm": decoder.norm, **decoder._modules}
    if not hasattr(model, "lm_head"):
        return
    model.lm_head = (
        TiedHead(decoder.embed_tokens, config.has_basis)
        if tied_head
        else ResQLinear(
            hidden, vocabulary, high_columns=hidden, dtype=like.dtype, device=like.device
        )
    )
