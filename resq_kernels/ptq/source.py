"""The 16-bit model that is being quantized, read one decoder layer at a time."""

from __future__ import annotations

from pathlib import Path

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
from resq_kernels.safetensors_io import CheckpointError, CheckpointReader


class SourceModel:
    """A Hugging Face folder of a Llama or Qwen2 model.

    Attributes:
        reader: its files.
        shape: its sizes.

    Raises:
        CheckpointError: damaged, incomplete, or quantized already.
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
        self.shape = ModelShape.from_config(self.reader.config)
        for name, shape in self.shape.source_tensors().items():
            self.reader.check(name, shape)

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
        """A decoder layer; with `fold_norms`, norm gains are multiplied into the next linears."""
        prefix = layer_prefix(index)
        names = architecture.LINEARS
        weights = {name: self.load(f"{prefix}{name}.weight") for name in names}
        biases = {name: self.load(f"{prefix}{name}.bias") for name in QKV if self.shape.qkv_bias}
        norms = {name: self.load(f"{prefix}{name}.weight") for name in architecture.NORMS}
        if fold_norms:
            for norm, linears in ((ATTENTION_NORM, QKV), (MLP_NORM, GATE_UP)):
                gain = norms[norm].double()
                for name in linears:
                    weights[name] = (weights[name].double() * gain).float()
            norms = {}
        return Layer(weights, biases, norms)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Rows of the embedding, float32 [..., hidden]."""
        matrix = self.reader.load(architecture.EMBEDDING)
        self.check_finite(architecture.EMBEDDING, matrix)
        return matrix[tokens].float()
