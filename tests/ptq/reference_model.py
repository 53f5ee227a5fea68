"""A quantized folder run through `reference` alone, in float32."""

from __future__ import annotations

from pathlib import Path

import torch

from resq_kernels import architecture, reference
from resq_kernels.architecture import (
    DOWN_PROJ,
    GATE_UP,
    KEY_ROTATION,
    LINEARS,
    O_PROJ,
    QKV,
    ModelShape,
    layer_prefix,
)
from resq_kernels.checkpoint import validate
from resq_kernels.config import ResQConfig
from resq_kernels.formats import RowFormat, unpack_int4
from resq_kernels.ptq.decoder import DecoderLayer, Layer, Rope, rope_tables
from resq_kernels.ptq.fuse import o_column_order
from resq_kernels.safetensors_io import CheckpointReader


class ReferenceLayer(DecoderLayer):
    """A decoder layer whose inputs, keys and values are rounded by `reference`.

    Args:
        shape, layer, rope: as of `DecoderLayer`; the weights are dequantized ones.
        config: how they are rounded.
    """

    def __init__(self, shape: ModelShape, layer: Layer, rope: Rope, config: ResQConfig) -> None:
        super().__init__(shape, layer, rope)
        self.config = config

    def _rounded(self, x: torch.Tensor, name: str) -> torch.Tensor:
        k_hi = self.shape.k_hi(name, self.config)
        rows = RowFormat.of(self.config, x.shape[-1], k_hi)
        return reference.mixed_quantize(x, *rows).dequantize()

    def qkv_input(self, x: torch.Tensor) -> torch.Tensor:
        return self._rounded(super().qkv_input(x), QKV[0])

    def attend(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        queries, keys = self.rotate(queries, keys)
        if self.config.kv_bits == 4:
            hi_bits = 8 if self.config.mixed else 4
            keys = reference.kv_fake_quantize(keys, hi_bits)
            values = reference.kv_fake_quantize(values, hi_bits)
        attended = self.mix(queries, keys, values).flatten(2)
        if self.layer.o_order is not None:
            attended = attended[..., self.layer.o_order]
        return self._rounded(attended, O_PROJ)

    def gate_up_input(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._rounded(super().gate_up_input(hidden), GATE_UP[0])

    def down_input(self, gate_up_input: torch.Tensor) -> torch.Tensor:
        return self._rounded(super().down_input(gate_up_input), DOWN_PROJ)


class ReferenceModel:
    """A quantized model in plain float32 torch, with the kernels' rounding.

    Weights are dequantized; inputs of linears, keys and values are quantized and dequantized.
    The residual stream is float32, so that differences from a bfloat16 run are its rounding.

    Args:
        folder: a quantized folder.
        seqlen: longest sequence.
    """

    def __init__(self, folder: Path | str, seqlen: int) -> None:
        self.config = validate(folder)
        reader = CheckpointReader(folder)
        self.shape = ModelShape.from_config(reader.config)
        rope = rope_tables(reader.config, reader.folder, seqlen)
        self.embedding = _vocabulary(reader, architecture.EMBEDDING_MODULE)
        self.norm = reader.load(architecture.FINAL_NORM).float()
        tied = reader.config["quantization_config"]["tied_head"]
        self.head = self.embedding if tied else _vocabulary(reader, architecture.HEAD_MODULE)
        self.gain = (
            reader.load(architecture.HEAD_GAIN).float()
            if architecture.HEAD_GAIN in reader
            else torch.eye(self.shape.hidden)
        )
        self.layers = [
            ReferenceLayer(self.shape, self._layer(reader, index), rope, self.config)
            for index in range(self.shape.layers)
        ]

    def _layer(self, reader: CheckpointReader, index: int) -> Layer:
        prefix = layer_prefix(index)
        weights, biases = {}, {}
        for name in LINEARS:
            stem = prefix + name
            weights[name] = _weight(reader, stem)
            if f"{stem}.bias" in reader:
                biases[name] = reader.load(f"{stem}.bias").float()
        return Layer(
            weights,
            biases,
            {name: reader.load(f"{prefix}{name}.weight").float() for name in self.shape.norms},
            reader.load(prefix + KEY_ROTATION) if self.config.has_basis else None,
            o_column_order(self.shape, self.config.high_fraction),
            self.config.rotates,
            self.shape.hadamard_block(self.config),
            self.shape.k_hi(DOWN_PROJ, self.config),
            index not in self.shape.unturned,
        )

    @torch.no_grad()
    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """float32 [windows, seqlen, vocab] of token ids int64 [windows, seqlen]."""
        x = self.embedding[tokens]
        for layer in self.layers:
            x = layer.forward(x)
        x = reference.rms_norm(x, self.norm, self.shape.norm_eps) @ self.gain
        if self.config.embedding_bits == 8:
            x = reference.mixed_quantize(x, x.shape[-1]).dequantize()
        return x @ self.head.T


def _weight(reader: CheckpointReader, stem: str) -> torch.Tensor:
    scale, high = reader.load(f"{stem}.weight_scale"), reader.load(f"{stem}.weight_hi")
    low = unpack_int4(reader.load(f"{stem}.weight_lo"))
    return torch.cat([low * scale[:, :1], high * scale[:, 1:]], dim=1)


def _vocabulary(reader: CheckpointReader, module: str) -> torch.Tensor:
    """float32 [vocab, hidden], stored in 16 or in 8 bits."""
    name = f"{module}.weight"
    return reader.load(name).float() if name in reader else _weight(reader, module)
