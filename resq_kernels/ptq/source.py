"""The 16-bit model that is being quantized, read one decoder layer at a time."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import torch

from resq_kernels import architecture
from resq_kernels.architecture import (
    ATTENTION_NORM,
    GATE_UP,
    MLP_NORM,
    QKV,
    ModelShape,
    layer_prefix,
)
from resq_kernels.ptq.decoder import Layer
from resq_kernels.safetensors_io import CheckpointError, CheckpointReader, TensorInfo

ROWS = 8192
"""Rows of two matrices that are compared at once."""
IGNORED = r"rotary_emb\.inv_freq"
"""Buffers in old checkpoints that transformers computes from config.json instead."""


def check_class(config: Mapping[str, Any]) -> None:
    """Refuses what only the installed transformers can tell of a config.json: keys of its class
    that are new to this package, and models that custom code computes.

    Raises:
        ValueError: names the key.
    """
    from transformers import CONFIG_MAPPING

    custom = config.get("auto_map") or {}
    for name in custom if isinstance(custom, Mapping) else [custom]:
        if name != "AutoTokenizer":
            raise ValueError(
                f"config.json: auto_map: expected a model of transformers itself, got {name} in "
                f"custom code; remove the key if the model is a plain {config.get('model_type')}"
            )
    model_type = config.get("model_type")
    if model_type not in architecture.SUPPORTED:
        return
    known = architecture.READ_KEYS | architecture.HARMLESS_KEYS | set(architecture.SHARED_KEYS)
    known |= set(architecture.FIXED_KEYS[model_type]) | architecture.WINDOW_KEYS
    for field in fields(CONFIG_MAPPING[model_type]):
        if field.name in known or field.name not in config or field.default is MISSING:
            continue
        if config[field.name] != field.default:
            raise ValueError(
                f"config.json: {field.name}: expected {field.default!r}, got {config[field.name]!r}"
            )


class SourceModel:
    """A Hugging Face folder of a supported model: the model that transformers makes of it.

    Every tensor of its files is used, except the buffers that transformers leaves out as well.

    Attributes:
        reader: its files; tensors have the names that they have in `LlamaForCausalLM`.
        shape: its sizes. `tied` is what the files say: a head of its own is kept whatever
            `tie_word_embeddings` says, as in transformers.
        dtype: the dtype in which transformers loads it.

    Raises:
        CheckpointError: damaged, incomplete, or quantized already; a tensor or an adapter that has
            no place in the model.
        ValueError: another architecture.
    """

    def __init__(self, folder: Path | str) -> None:
        self.reader = CheckpointReader(folder)
        quantized = self.reader.config.get("quantization_config")
        if quantized is not None:
            method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
            raise CheckpointError(
                f"{self.reader.folder}: expected a 16-bit model, got one that is already "
                f"quantized (quant_method {method!r})"
            )
        if (self.reader.folder / "adapter_config.json").exists():
            raise CheckpointError(
                f"{self.reader.folder}: adapter_config.json: expected a model without adapters; "
                "merge it first (peft: `merge_and_unload`)"
            )
        try:
            check_class(self.reader.config)
            self.shape = ModelShape.from_config(self.reader.config)
        except ValueError as error:
            raise CheckpointError(f"{self.reader.folder}: {error}") from error
        self._name_tensors()
        self._refuse_others()
        self.dtype = self.reader.dtype
        self._find_head()
        for name, shape in self.shape.source_tensors().items():
            self.reader.check(name, shape)

    def _name_tensors(self) -> None:
        """Gives the tensors the names of the causal language model, as transformers does: files of
        the decoder alone lack the prefix "model."."""
        known = self._known()
        tensors: dict[str, TensorInfo] = {}
        for stored, info in self.reader.tensors.items():
            longer = architecture.DECODER_PREFIX + stored
            shorter = stored.removeprefix(architecture.DECODER_PREFIX)
            name = longer if longer in known else shorter if shorter in known else stored
            if name in tensors:
                raise CheckpointError(
                    f"{self.reader.folder}: {name}: expected one tensor, got {tensors[name].name} "
                    f"and {stored}"
                )
            tensors[name] = info
        self.reader.tensors = tensors

    def _find_head(self) -> None:
        """Decides what the head is; of a tied model, one matrix is kept."""
        embedding, head = architecture.EMBEDDING, architecture.HEAD
        tensors = self.reader.tensors
        if not self.shape.tied:
            if head not in tensors:
                raise CheckpointError(
                    f"{self.reader.folder}: {head}: expected a tensor, found nothing "
                    "(tie_word_embeddings in config.json is not true; set it if the head is the "
                    "embedding's matrix)"
                )
            return
        if head not in tensors:
            return
        if embedding not in tensors:
            tensors[embedding] = tensors.pop(head)
            return
        matrix = (self.shape.vocab, self.shape.hidden)
        for name in (embedding, head):
            self.reader.check(name, matrix)
        if self._equal(embedding, head):
            del tensors[head]
            return
        self.shape = replace(self.shape, tied=False)
        warnings.warn(
            f"{self.reader.folder}: config.json says tie_word_embeddings, but {head} differs from "
            f"{embedding}: the model is quantized with the head of the file, which transformers "
            "uses too",
            stacklevel=4,
        )

    def _equal(self, first: str, second: str) -> bool:
        """Whether two matrices are equal in the dtype in which transformers loads them."""
        for start in range(0, self.shape.vocab, ROWS):
            a, b = (
                self.reader.load_rows(name, start, start + ROWS).to(self.dtype)
                for name in (first, second)
            )
            if not torch.equal(a, b):
                return False
        return True

    def _known(self) -> set[str]:
        """The parameters of the causal language model; a tied one has a head too."""
        return {*self.shape.source_tensors(), architecture.HEAD}

    def _refuse_others(self) -> None:
        others = sorted(set(self.reader.tensors) - self._known())
        others = [name for name in others if not re.search(IGNORED, name)]
        if not others:
            return
        name = self.reader.tensors[others[0]].name
        more = f" (and {len(others) - 1} more)" if len(others) > 1 else ""
        layer = re.match(r"model\.layers\.(\d+)\.", others[0])
        hint = ""
        if layer and int(layer[1]) >= self.shape.layers:
            hint = f"; config.json says num_hidden_layers {self.shape.layers}"
        raise CheckpointError(
            f"{self.reader.folder}: {name}{more}: expected only the tensors of a language model of "
            f"type {self.shape.model_type}, got one that has no place there{hint}"
        )

    @property
    def head(self) -> str:
        """Name of the stored tensor that the head multiplies with: the embedding's if tied."""
        return architecture.EMBEDDING if self.shape.tied else architecture.HEAD

    @property
    def item_bytes(self) -> int:
        """Bytes of an element of the embedding."""
        return self.reader.info(architecture.EMBEDDING).dtype.itemsize

    def load(self, name: str) -> torch.Tensor:
        """A tensor as float32.

        Raises:
            ValueError: it holds NaN or an infinity.
        """
        tensor = self.reader.load(name).float()
        self.check_finite(name, tensor)
        return tensor

    def check_finite(self, name: str, values: torch.Tensor) -> None:
        """Refuses values of a tensor that are NaN or infinite.

        Raises:
            ValueError: there are some.
        """
        bad = int((~torch.isfinite(values)).sum())
        if bad:
            raise ValueError(
                f"{self.reader.folder}: {name}: expected finite values, got {bad} that are NaN or "
                "infinite"
            )

    def layer(self, index: int, fold_norms: bool) -> Layer:
        """A decoder layer; with `fold_norms`, `NORMS` are multiplied into the next linears."""
        prefix = layer_prefix(index)
        names = architecture.LINEARS
        weights = {name: self.load(f"{prefix}{name}.weight") for name in names}
        biases = {name: self.load(f"{prefix}{name}.bias") for name in self.shape.biased}
        norms = {name: self.load(f"{prefix}{name}.weight") for name in self.shape.norms}
        if fold_norms:
            for norm, linears in ((ATTENTION_NORM, QKV), (MLP_NORM, GATE_UP)):
                gain = norms.pop(norm).double()
                for name in linears:
                    weights[name] = (weights[name].double() * gain).float()
        return Layer(weights, biases, norms, turned=index not in self.shape.unturned)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Rows of the embedding, float32 [..., hidden]."""
        matrix = self.reader.load(architecture.EMBEDDING)
        self.check_finite(architecture.EMBEDDING, matrix)
        return matrix[tokens].float()
