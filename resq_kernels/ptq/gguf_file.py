"""A GGUF file of a Llama, Qwen2 or Qwen3 model: configuration, weights, generation settings.

transformers 5.24 reads such files too, but drops without a word what it has no name for: the
frequencies of RoPE that Llama-3.1 and newer files hold as a tensor, `rope.scaling`, biases. It also
goes through the words of the tokenizer once for the configuration, once for the tokenizer and once
for the weights (32 s for SmolLM2-135M). Here the file is read once, by the package gguf, each
tensor is used, and what is not known is refused by name.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from resq_kernels import architecture
from resq_kernels.architecture import ModelShape
from resq_kernels.ptq.source import check_class
from resq_kernels.safetensors_io import CheckpointError, check_content, dtype_name

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

# `general.architecture` of the files that are read; llama.cpp calls a Mistral a "llama" too.
_KINDS = ("llama", "qwen2", "qwen3")
# Names in the file -> names in transformers, without ".weight" and ".bias".
_TENSORS = {
    "token_embd": architecture.EMBEDDING_MODULE,
    "output_norm": "model.norm",
    "output": architecture.HEAD_MODULE,
}
_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k": "self_attn.k_proj",
    "attn_k_norm": "self_attn.k_norm",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"
_SIZES = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
_HEAD_DIMS = ("attention.key_length", "attention.value_length", "rope.dimension_count")
_SCALING = ("rope.scaling.type", "rope.scaling.factor", "rope.scaling.finetuned")
_EPSILON = "attention.layer_norm_rms_epsilon"
_READ = {*_SIZES, *_HEAD_DIMS, *_SCALING, _EPSILON, "attention.head_count_kv", "rope.freq_base"}
# Keys that the quantizer needs no value of, but must have this one.
_FIXED = {"expert_count": 0, "expert_used_count": 0}


def is_gguf(model: Path | str) -> bool:
    """Whether a model is a GGUF file, or nothing that exists under the name of one."""
    return str(model).lower().endswith(".gguf") and not Path(model).is_dir()


class GgufFile:
    """An open file; its tensors are mapped and read one at a time.

    Args:
        path: the file.

    Attributes:
        facts: key -> value of everything in its header.
        config: the content of the config.json that describes the model.
        generation: the content of generation_config.json.
        dtype: of all weights as `tensors` gives them. Formula: if a matrix is stored in blocks,
            bfloat16; else the dtype that holds the matrices' (float32 if they are of several). On
            SmolLM2's Q4_1 blocks bfloat16 is 0.0014 off in the relative norm, and float16, which
            lacks bfloat16's range, 0.0002: 4-bit weights are 0.05 to 0.1 off.

    Raises:
        ImportError: the package gguf is missing.
        CheckpointError: damaged, another architecture, or a key or tensor that is not known.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        reader = _open(self.path)
        self.facts: dict[str, Any] = {
            name: field.contents() for name, field in reader.fields.items()
        }
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.config = self._config()
        self.shape = self._shape()
        self._names = self._name_tensors()
        self.dtype = self._dtype()
        self.config["dtype"] = dtype_name(self.dtype)
        self.generation = self._generation()

    def transformers_config(self) -> PretrainedConfig:
        """`config` as an object of transformers."""
        from transformers import AutoConfig

        return AutoConfig.for_model(**self.config)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that the file describes.

        Raises:
            CheckpointError: of a kind, or with a rule, that is not known here.
        """
        from resq_kernels.ptq.gguf_tokenizer import read_tokenizer

        return read_tokenizer(self.path, self.facts)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights under the names of transformers, in the order of the file.

        Raises:
            CheckpointError: a type of blocks that the package gguf does not know.
        """
        from gguf import dequantize

        for stored, name in self._names.items():
            tensor = self._tensors[stored]
            try:
                values = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
            except NotImplementedError as error:
                raise self._error(f"{stored}: {error}") from error
            # The file has the rows of a pair of RoPE side by side, transformers' Llama all first
            # ones and then all second ones.
            if self.shape.model_type == "llama" and name.endswith(_PAIRED):
                halves = values.view(-1, self.shape.head_dim // 2, 2, values.shape[1])
                values = halves.transpose(1, 2).reshape(values.shape)
            yield name, values.to(self.dtype)

    def header(self) -> dict[str, Any]:
        """Licence and languages as a model card names them."""
        keys = {"license": "license", "license.name": "license_name", "languages": "language"}
        keys["license.link"] = "license_link"
        found = {name: self.facts.get(f"general.{key}") for key, name in keys.items()}
        return {name: value for name, value in found.items() if value}

    def _config(self) -> dict[str, Any]:
        kind = self._fact("general.architecture")
        if kind not in _KINDS:
            expected = ", ".join(_KINDS)
            raise self._error(f"general.architecture: expected one of {expected}, got {kind!r}")
        if self.facts.get("split.count", 0) > 1:
            raise self._error(
                f"split.count: expected a whole model, got one of {self.facts['split.count']} "
                "files; join them first (llama-gguf-split --merge)"
            )
        found = {
            name.removeprefix(f"{kind}."): value
            for name, value in self.facts.items()
            if name.startswith(f"{kind}.")
        }
        vocabulary = found.pop("vocab_size", None)
        for key in sorted(found.keys() - _READ):
            if key not in _FIXED:
                raise self._error(f"{kind}.{key}: not known here, got {found[key]!r}")
            if found[key] != _FIXED[key]:
                raise self._error(f"{kind}.{key}: expected {_FIXED[key]}, got {found[key]!r}")
        sizes = {name: self._fact(f"{kind}.{key}") for key, name in _SIZES.items()}
        heads = sizes["num_attention_heads"]
        if not isinstance(heads, int) or heads < 1:
            raise self._error(f"{kind}.attention.head_count: expected a number, got {heads!r}")
        width = sizes["hidden_size"] // heads
        if kind != "qwen2":
            width = found.get("attention.key_length", width)
            sizes["head_dim"] = width
        for key in _HEAD_DIMS:
            if found.get(key, width) != width:
                raise self._error(f"{kind}.{key}: expected {width}, got {found[key]}")
        embedding = self._tensors.get("token_embd.weight")
        if embedding is None:
            raise self._error("token_embd.weight: expected a tensor, found nothing")
        if vocabulary not in (None, rows := int(embedding.shape[1])):
            raise self._error(f"{kind}.vocab_size: expected {rows}, got {vocabulary}")
        return {
            "architectures": [f"{architecture.FAMILIES[kind]}ForCausalLM"],
            "model_type": kind,
            **sizes,
            "num_key_value_heads": found.get("attention.head_count_kv", heads),
            "rms_norm_eps": _decimal(self._fact(f"{kind}.{_EPSILON}")),
            "rope_parameters": self._rope(kind, found, width),
            "vocab_size": rows,
            "tie_word_embeddings": "output.weight" not in self._tensors,
            # null where the file has none: the classes' own defaults are those of Llama-2.
            **self._token_ids(),
        }

    def _rope(self, kind: str, found: dict[str, Any], width: int) -> dict[str, Any]:
        theta = _decimal(found.get("rope.freq_base", 10000.0))
        scaling = found.get("rope.scaling.type", "none")
        factors = self._tensors.get(_ROPE_FACTORS)
        if scaling == "linear" and factors is None:
            factor = _decimal(self._fact(f"{kind}.rope.scaling.factor"))
            return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
        if scaling != "none":
            raise self._error(f"{kind}.rope.scaling.type: expected none or linear, got {scaling!r}")
        if factors is None:
            return {"rope_type": "default", "rope_theta": theta}
        # The file does not name the rule of these divisors of the frequencies. That of Llama-3.1
        # and newer has one unknown, its largest value.
        rope = {
            "rope_type": "llama3",
            "rope_theta": theta,
            "factor": _decimal(float(np.max(factors.data))),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        expected = _llama3_factors(rope, width)
        got = torch.tensor(factors.data)
        if got.shape != expected.shape or not torch.allclose(got, expected, rtol=1e-4):
            raise self._error(f"{_ROPE_FACTORS}: expected the factors of Llama-3.1, got others")
        return rope

    def _shape(self) -> ModelShape:
        try:
            check_class(self.config)
            return ModelShape.from_config(self.config)
        except ValueError as error:
            text = str(error).removeprefix("config.json: ")
            raise self._error(f"as a model of transformers: {text}") from error

    def _name_tensors(self) -> dict[str, str]:
        """Name in the file -> name in transformers, of all weights; none is left over."""
        shapes = self.shape.source_tensors()
        if not self.shape.tied:
            shapes[architecture.HEAD] = (self.shape.vocab, self.shape.hidden)
        names = {}
        for stored, tensor in self._tensors.items():
            if stored == _ROPE_FACTORS:
                continue
            name = _transformers_name(stored)
            if name not in shapes:
                raise self._error(f"{stored}: not known here")
            got = tuple(int(size) for size in reversed(tensor.shape))
            if got != shapes[name]:
                raise self._error(f"{stored}: expected {list(shapes[name])}, got {list(got)}")
            names[stored] = name
        missing = sorted(set(shapes) - set(names.values()))
        if missing:
            raise self._error(f"expected a tensor for {missing[0]}, found nothing")
        return names

    def _dtype(self) -> torch.dtype:
        floats = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
        matrices = (self._tensors[name] for name in self._names)
        kinds = {tensor.tensor_type.name for tensor in matrices if len(tensor.shape) > 1}
        if not kinds <= set(floats):
            return torch.bfloat16
        return functools.reduce(torch.promote_types, (floats[kind] for kind in kinds))

    def _token_ids(self) -> dict[str, int | None]:
        names = {"bos": "bos", "eos": "eos", "padding": "pad"}
        return {f"{ours}_token_id": self._token_id(theirs) for theirs, ours in names.items()}

    def _generation(self) -> dict[str, Any]:
        """The ids of special tokens; those that end a turn or a message end the text too."""
        ids = {name: index for name, index in self._token_ids().items() if index is not None}
        ends = [self._token_id(name) for name in ("eos", "eot", "eom")]
        ends = list(dict.fromkeys(index for index in ends if index is not None))
        return ids | ({"eos_token_id": ends} if len(ends) > 1 else {})

    def _token_id(self, name: str) -> int | None:
        index: int | None = self.facts.get(f"tokenizer.ggml.{name}_token_id")
        return index

    def _fact(self, key: str) -> Any:
        if key not in self.facts:
            raise self._error(f"{key}: expected a value, found nothing")
        return self.facts[key]

    def _error(self, text: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {text}")


_PAIRED = ("self_attn.q_proj.weight", "self_attn.k_proj.weight")


def _open(path: Path) -> Any:
    """The reader of the package gguf.

    Raises:
        ImportError: the package is missing.
        CheckpointError: the file is missing or damaged.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ImportError(
            f"{path}: reading it needs the package gguf: `pip install 'resq_kernels[gguf]'`"
        ) from error
    if not path.is_file():
        raise CheckpointError(f"{path}: expected a GGUF file, found none")
    check_content(path)

    class Reader(GGUFReader):
        """Slices a plain view of the mapped file: slices of a map are objects of a slower class, of
        which it makes one for every token and merge (SmolLM2's 98,000: 3.3 to 1.1 s)."""

        @property
        def data(self) -> Any:
            return self._plain

        @data.setter
        def data(self, mapped: Any) -> None:
            self._plain = mapped.view(np.ndarray)

    try:
        return Reader(path)
    except Exception as error:  # numpy's and Python's own, of many classes
        raise CheckpointError(
            f"{path}: expected a GGUF file, got one that is truncated or damaged ({error})"
        ) from error


def _transformers_name(stored: str) -> str:
    part, _, end = stored.rpartition(".")
    if part in _TENSORS:
        return f"{_TENSORS[part]}.{end}"
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)", part)
    if block is None or block[2] not in _LAYER_TENSORS:
        return ""
    return f"{architecture.layer_prefix(int(block[1]))}{_LAYER_TENSORS[block[2]]}.{end}"


def _decimal(value: float) -> float:
    """The shortest decimal number that a float32 of the file stands for: 1e-05, not 9.9999e-06."""
    return float(str(np.float32(value)))


def _llama3_factors(rope: dict[str, Any], width: int) -> torch.Tensor:
    """What "llama3" divides RoPE's frequencies by, float32 [width / 2]."""
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = AutoConfig.for_model("llama", head_dim=width, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = rope["rope_theta"] ** -(torch.arange(0, width, 2).float() / width)
    return plain / scaled
