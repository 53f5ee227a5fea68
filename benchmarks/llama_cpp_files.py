"""The GGUF files of benchmarks/llama_cpp_race.py: a model's own, or one with random weights, in
each of llama.cpp's 4-bit types, by llama.cpp's own quantizer."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from resq_kernels.architecture import ModelShape
from resq_kernels.bench import models

FTYPES = {"Q4_0": 2, "Q4_1": 3, "Q4_K_M": 15}
"""llama.cpp's LLAMA_FTYPE_MOSTLY_*."""
_POOL = 1 << 22  # random values that all tensors share: 1 billion of their own would take a minute


def quantized(source: Path, work: Path, threads: int) -> dict[str, Path]:
    """The files of all types of FTYPES, made from `source` unless they exist.

    A type of which `source` is already is `source` itself: a second rounding would change nothing.

    Raises:
        ValueError: llama.cpp does not quantize it.
    """
    import llama_cpp

    files = {}
    for name, ftype in FTYPES.items():
        if source.stem.endswith(f".{name}"):
            files[name] = source
            continue
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.nthread, parameters.ftype = threads, ftype
        parameters.allow_requantize = True

        def write(path: Path, parameters: object = parameters) -> None:
            status = llama_cpp.llama_model_quantize(
                str(source).encode(), str(path).encode(), ctypes.byref(parameters)
            )
            if status:
                raise ValueError(f"llama_model_quantize: {source}: expected 0, got {status}")

        files[name] = _made(work / f"{source.stem}.{name}.gguf", write)
    return files


def random_weights(name: str, layers: int | None, work: Path) -> Path:
    """A GGUF file in F16 of the shape of a Llama of `resq_kernels.bench.models`, without a
    vocabulary of words.

    Args:
        name: of the model.
        layers: cuts its depth.
        work: folder of the file; an existing one is used again.

    Raises:
        ValueError: the model is no Llama.
    """
    import gguf

    config = models.configuration(name, layers)
    if config["model_type"] != "llama":
        raise ValueError(f"shape: expected a Llama, got {name}")
    shape = ModelShape.from_config(config)
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    pool = np.random.default_rng(0).standard_normal(_POOL, dtype=np.float32)

    def write(path: Path) -> None:
        writer = gguf.GGUFWriter(path, "llama", use_temp_file=True)
        writer.add_context_length(131072)
        writer.add_embedding_length(shape.hidden)
        writer.add_block_count(shape.layers)
        writer.add_feed_forward_length(shape.intermediate)
        writer.add_head_count(shape.heads)
        writer.add_head_count_kv(shape.kv_heads)
        writer.add_rope_dimension_count(shape.head_dim)
        writer.add_layer_norm_rms_eps(shape.norm_eps)
        writer.add_vocab_size(shape.vocab)
        writer.add_tokenizer_model("no_vocab")
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)

        def add(tensor: str, rows: int, columns: int, scale: float) -> None:
            values = np.resize((pool * scale).astype(np.float16), (rows, columns))
            writer.add_tensor(f"{tensor}.weight", values)

        def add_norm(tensor: str) -> None:
            writer.add_tensor(f"{tensor}.weight", np.ones(shape.hidden, np.float32))

        add("token_embd", shape.vocab, shape.hidden, 1.0)
        for index in range(shape.layers):
            block = f"blk.{index}"
            for part, rows, columns in (
                ("attn_q", q, shape.hidden),
                ("attn_k", kv, shape.hidden),
                ("attn_v", kv, shape.hidden),
                ("attn_output", shape.hidden, q),
                ("ffn_gate", shape.intermediate, shape.hidden),
                ("ffn_up", shape.intermediate, shape.hidden),
                ("ffn_down", shape.hidden, shape.intermediate),
            ):
                add(f"{block}.{part}", rows, columns, columns**-0.5)
            add_norm(f"{block}.attn_norm")
            add_norm(f"{block}.ffn_norm")
        add_norm("output_norm")
        if not shape.tied:
            add("output", shape.vocab, shape.hidden, shape.hidden**-0.5)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    return _made(work / f"{name}-{shape.layers}-layers.gguf", write)


def _made(path: Path, write: Callable[[Path], None]) -> Path:
    """`path`, written under a temporary name first unless it is there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        write(part)
        os.replace(part, path)
    return path
