"""Predicts how many of a decode step's weights wait in L2 when a product starts; never measured.

One layer, one sequence, up to 1024 tokens of context, on an H200. The blocks of a product start
when the kernel before it triggers, and ask for their weights in L2 until that kernel is done:

    window   = what runs from the trigger of the kernel before to its end
    brought  = min(asked, MEMORY * (window - START))
    time     = max((bytes - brought) / MEMORY, bytes / L2)

`asked` is bounded by the share of L2 (csrc/ops/mixed_gemm/weight_prefetch.h). Gaps between kernels
are the same in every row and left out; so is what a prefetch behind the wait gains or costs. The
small kernels' times are those of benchmarks/predicted/decode.json.

    python benchmarks/weights_in_l2.py                 print the table
    python benchmarks/weights_in_l2.py --json PATH     and write its rows
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

PREDICTED = Path(__file__).resolve().parent / "predicted"

MEMORY = 4.3  # TB/s that an H200 reaches, of 4.8; MB a microsecond are the same number
L2 = {"28 B": 6.5, "37 B": 8.6}  # the same, from L2: bytes a clock and multiprocessor, assumed
START = 0.7  # us from a trigger to the first bytes: launch, addresses, latency; assumed
REDUCTION = 1.5  # us of the second launch of split K; assumed
ATTENTION = 6.5  # us; assumed
FENCE = 0.4  # us of a cluster's fence and barriers, which decode.json leaves out; assumed
SLOTS, L2_BYTES, L2_SHARE = 3 * 132, 50 << 20, 0.5  # small_m's blocks at once; of an H200
CLUSTERS, CLUSTER_N = 32, 4  # sm90: at once, and tiles of 128 weights in each
STEP_BYTES = 2048
OLD_STEPS = 16  # that a block prefetched before: 32 KB


class Product(NamedTuple):
    """A product of a layer: its weight, and the choice of mixed_gemm_choice.h for one row."""

    name: str
    n: int
    k_lo: int
    k_hi: int
    splits: int
    kernel: str = "small_m"

    @property
    def reductions(self) -> int:
        """Second launches."""
        return int(self.kernel == "small_m" and self.splits > 1)

    @property
    def readers(self) -> int:
        """Blocks of 64 weights that blocks ask for which start at once."""
        if self.kernel == "small_m":
            return min(-(-self.n // 64) * self.splits, SLOTS)
        return min(-(-self.n // (128 * CLUSTER_N)), CLUSTERS) * CLUSTER_N * 2

    @property
    def steps(self) -> int:
        """Of K, of all splits."""
        return -(-self.k_lo // 64) + 2 * -(-self.k_hi // 64)

    @property
    def megabytes(self) -> float:
        return -(-self.n // 64) * self.steps * STEP_BYTES / 1e6

    def asked(self, most_steps: int | None) -> float:
        """MB that the blocks ask for that start at once; None: up to the share of L2."""
        waiting = self.readers
        if most_steps is None:
            most_steps = int(L2_BYTES * L2_SHARE) // waiting // STEP_BYTES
        ends = [self.steps * split // self.splits for split in range(self.splits + 1)]
        counts = [min(end - first, most_steps) for first, end in zip(ends, ends[1:], strict=False)]
        return waiting * sum(counts) / self.splits * STEP_BYTES / 1e6


LAYERS = {
    "llama-3-8b": (
        Product("qkv", 6144, 3584, 512, 1),
        Product("o", 4096, 3584, 512, 3),
        Product("gate_up", 28672, 3584, 512, 1, "sm90"),
        Product("down", 4096, 12544, 1792, 3),
    ),
    "llama-3.2-1b": (
        Product("qkv", 3072, 1792, 256, 1),
        Product("o", 2048, 1792, 256, 4),
        Product("gate_up", 16384, 1792, 256, 1),
        Product("down", 2048, 7168, 1024, 6),
    ),
}
# Of one row: shapes of decode.json.
BLOCKS, WITHOUT = "bfloat16, blocks of 256", "without its fence and barriers"
SMALL = {
    "llama-3-8b": {
        "norm": "1 x 4096 bfloat16, residual, no weight",
        "quantize": "1 x 4096 bfloat16",
        "silu": f"1 x 14336 {BLOCKS}, a cluster of 8, {WITHOUT}",
    },
    "llama-3.2-1b": {
        "norm": "1 x 2048 bfloat16, residual, no weight",
        "quantize": "1 x 2048 bfloat16",
        "silu": f"1 x 8192 {BLOCKS}, a cluster of 4, {WITHOUT}",
    },
}
KERNELS = {
    "norm": "rms_norm_quantize",
    "quantize": "mixed_quantize",
    "silu": "silu_mul_blocks_quantize",
}


def small_times(model: str) -> dict[str, float]:
    """Microseconds of the kernels between the products."""
    rows = json.loads((PREDICTED / "decode.json").read_text())
    us = {(row["kernel"], row["shape"]): row["us"] for row in rows}
    times = {name: us[KERNELS[name], shape] for name, shape in SMALL[model].items()}
    times["silu"] += FENCE
    times["append"] = next(row["us"] for row in rows if row["kernel"] == "kv_append")
    return times | {"attention": ATTENTION}


def windows(model: str, early_trigger: bool) -> dict[str, float]:
    """Microseconds that the blocks of each product wait.

    With `early_trigger` the quantizers trigger before they wait, and the product starts with the
    kernel before them. That counts where this is no product, which needs the bandwidth itself, and
    where it triggers: torch's sum before the first norm does not.
    """
    small = small_times(model)
    window = {"qkv": small["norm"], "o": small["quantize"]}
    window |= {"gate_up": small["norm"], "down": small["silu"]}
    if early_trigger:
        reductions = {product.name: product.reductions for product in LAYERS[model]}
        window["o"] += ATTENTION
        window["gate_up"] += REDUCTION * reductions["o"]
        window["down"] += REDUCTION * reductions["gate_up"]
    return window


WAYS = {"none": 0, "32 KB a block": OLD_STEPS, "slice": None, "slice, early trigger": None}


def predict(model: str, way: str, l2: float) -> dict[str, object]:
    """A row: MB that wait in L2, and microseconds of the products and of the layer."""
    window = windows(model, "early" in way)
    waiting, us = {}, {}
    for product in LAYERS[model]:
        time = max(window[product.name] - START, 0.0)
        brought = min(product.asked(WAYS[way]), MEMORY * time)
        waiting[product.name] = round(brought, 1)
        size = product.megabytes
        us[product.name] = round(max((size - brought) / MEMORY, size / l2), 2)
    small = small_times(model)
    small_us = sum(small.values()) + small["norm"]  # two norms a layer
    small_us += REDUCTION * sum(product.reductions for product in LAYERS[model])
    return {
        "waiting_mb": waiting,
        "product_us": us,
        "small_us": round(small_us, 2),
        "layer_us": round(sum(us.values()) + small_us, 1),
    }


def rows() -> list[dict[str, object]]:
    """Every model, L2 bandwidth and way."""
    return [
        {"model": model, "chip": "H200", "l2_bytes_a_clock": clock, "prefetch": way}
        | predict(model, way, l2)
        for model in LAYERS
        for clock, l2 in L2.items()
        for way in WAYS
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the rows there")
    options = parser.parse_args(arguments)
    found = rows()
    for row in found:
        head = f"{row['model']:13} {row['l2_bytes_a_clock']}  {row['prefetch']:21}"
        waiting = " ".join(f"{name} {mb:4.1f}" for name, mb in row["waiting_mb"].items())
        us = " ".join(f"{name} {time:5.2f}" for name, time in row["product_us"].items())
        print(f"{head} MB waiting: {waiting}   us: {us}   layer {row['layer_us']:.1f}")
    if options.json:
        text = ",\n  ".join(json.dumps(row) for row in found)
        options.json.write_text(f"[\n  {text}\n]\n")


if __name__ == "__main__":
    main()
