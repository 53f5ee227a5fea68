"""What the 4-bit cache alone costs a model: everything else stays as it is.

Keys and values go through the pages of the cache, by the operators that run a quantized model; all
linears keep the source's weights, rotated where a method rotates. Models with large biases on a few
channels of their keys (Qwen2.5) are ruined by plain 4-bit keys, also behind a random rotation.

    python benchmarks/kv_rounding.py path/to/model --calib calibration.txt --text heldout.txt
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from resq_kernels import texts
from resq_kernels.architecture import QKV
from resq_kernels.commands.loading import load_tokenizer
from resq_kernels.commands.output import table
from resq_kernels.config import ResQConfig
from resq_kernels.evaluate import cut_windows
from resq_kernels.intervals import mean_interval
from resq_kernels.ptq.basis import Basis, find_basis
from resq_kernels.ptq.calibrate import calibrate, windows
from resq_kernels.ptq.decoder import DecoderLayer, Rope, product_dtype, rope_tables
from resq_kernels.ptq.fuse import fuse_layer
from resq_kernels.ptq.rotate import rotate
from resq_kernels.ptq.rounded import RoundedLayer
from resq_kernels.ptq.source import SourceModel
from resq_kernels.ptq.verdict import measure_states
from resq_kernels.ptq.vocabulary import FloatHead
from resq_kernels.ptq.workspace import Workspace

SCHEMES = {
    "16 bits, rotated": ResQConfig(kv_bits=16),
    "INT4": ResQConfig(method="rtn"),
    "INT4, rotated": ResQConfig(method="quarot"),
    "ResQ: 7/8 INT4, 1/8 INT8": ResQConfig(),
}


class Model:
    """The source, computed layer by layer with one or another cache.

    Args:
        folder: of the source.
        seqlen: tokens of a window.
    """

    def __init__(self, folder: Path, seqlen: int) -> None:
        self.source = SourceModel(folder)
        self.rope: Rope = rope_tables(self.source.reader.config, folder, seqlen)
        self.products = product_dtype(self.source.dtype, "cpu")
        self.head = FloatHead(self.source, self.products, "cpu")

    def basis(self, calibration: torch.Tensor) -> Basis:
        """That of method "resq"."""
        with tempfile.TemporaryDirectory() as folder:
            work = Workspace(Path(folder))
            return find_basis(self.source, calibrate(self.source, calibration, self.rope, work))

    def exact(self, ids: torch.Tensor) -> torch.Tensor:
        """What the head reads, [windows, seqlen, hidden], without a cache."""
        states = self.source.embed(ids)
        for index in range(self.source.shape.layers):
            layer = self.source.layer(index, fold_norms=True).to("cpu", self.products)
            decoder = DecoderLayer(self.source.shape, layer, self.rope)
            states = torch.cat([decoder.forward(window) for window in states.split(1)])
        return self.head.norm(states)

    def cached(self, ids: torch.Tensor, config: ResQConfig, basis: Basis) -> torch.Tensor:
        """The same through the cache of `config`."""
        shape, rotation, states = self.source.shape, None, self.source.embed(ids)
        if config.rotates:
            rotation = rotate(basis if config.method == "resq" else None, shape, config)
            states = (states.double() @ rotation.hidden).float()
        for index in range(shape.layers):
            layer = fuse_layer(self.source, index, rotation, config)
            rounded = RoundedLayer(shape, layer.to("cpu", self.products), self.rope, config)
            states = torch.cat([_forward(rounded, window) for window in states.split(1)])
        return self.head.norm(states, None if rotation is None else rotation.hidden.T.float())


def _forward(rounded: RoundedLayer, x: torch.Tensor) -> torch.Tensor:
    """The layer of the float model, keys and values as the cache returns them."""
    layer = rounded.float
    normed = layer.qkv_input(x)
    heads = (layer.split_heads(layer.linear(normed, name)) for name in QKV)
    attended = layer.mix(*rounded.rounded_heads(*heads)).flatten(2)
    if layer.layer.o_order is not None:
        attended = attended[..., layer.layer.o_order]
    hidden = layer.after_attention(x, attended)
    return layer.output(hidden, layer.down_input(layer.gate_up_input(hidden)))


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    """Measures every scheme and prints a table.

    Args:
        argv: command-line arguments; those of the process when None.
    """
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("model", type=Path, help="folder of a 16-bit Llama or Qwen2.5 model")
    parser.add_argument("--calib", type=Path, required=True, help="text of the bases")
    parser.add_argument("--text", type=Path, required=True, help="text to measure on")
    parser.add_argument("--samples", type=int, default=8, help="calibration windows (default: 8)")
    parser.add_argument("--seqlen", type=int, default=1024, help="tokens of a window (1024)")
    parser.add_argument("--max-windows", type=int, default=4, help="windows to measure on (4)")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args(argv)

    tokenizer = load_tokenizer(str(args.model))
    text = texts.tokenize(tokenizer, texts.read_text(args.text))
    ids = cut_windows(text, args.seqlen, args.max_windows)
    calibration = windows(tokenizer, texts.read_text(args.calib), args.samples, args.seqlen)
    model = Model(args.model, args.seqlen)
    basis, exact = model.basis(calibration.calibration), model.exact(ids)
    rows = []
    for name, config in SCHEMES.items():
        cached, logits = model.cached(ids, config, basis), model.head.logits
        expected, found = measure_states(ids, exact, cached, logits, logits)
        kl = mean_interval(found.divergences)
        rows.append(
            {
                "scheme": name,
                "perplexity": found.perplexity,
                "kl": kl.mean,
                "kl_interval": kl.half,
                "top1_agreement": found.top1,
            }
        )
        print(f"{name}: KL {kl.mean:.4f}", flush=True)
    figures = {
        "model": args.model.resolve().name,
        "windows": len(ids),
        "seqlen": args.seqlen,
        "reference_perplexity": expected.perplexity,
        "rows": rows,
    }
    cells = [["none", f"{expected.perplexity:.3f}", "", ""]]
    for row in rows:
        spread = "" if row["kl_interval"] is None else f" +- {row['kl_interval']:.4f}"
        kl_text, top1 = f"{row['kl']:.4f}{spread}", f"{row['top1_agreement']:.1%}"
        cells.append([str(row["scheme"]), f"{row['perplexity']:.3f}", kl_text, top1])
    print(table(cells, ("cache", "perplexity", "KL, nats", "top-1")))
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
