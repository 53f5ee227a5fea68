"""mixed_gemm compared with what a user would run instead (gemm_baselines.py).

Every result is compared with the reference, bit for bit, before it is timed. Weights are cold:
each candidate rotates over copies of them. The bound of a row is the larger of bytes / measured
bandwidth and products / measured rate of the integer instructions.

    resq bench gemm --shapes square,llama-3-8b --batch 1,16,512 --json out.json
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from functools import partial

import torch

from resq_kernels import ops, reference
from resq_kernels.bench import gemm_baselines, models
from resq_kernels.bench.device import BenchDevice, Call, Row, Work, evenly_spaced, nbytes
from resq_kernels.formats import MixedTensor, PackedWeight, QuantizedWeight

MODELS = (models.SQUARE, *models.names())
DEFAULTS = {"shapes": [models.SQUARE], "batch": [1, 4, 16, 64, 512]}
OUT = torch.bfloat16


def random_weight(n: int, k_lo: int, k_hi: int, device: str) -> QuantizedWeight:
    """Random codes and scales."""
    return QuantizedWeight(
        torch.randint(0, 256, (n, k_lo // 2), dtype=torch.uint8, device=device),
        torch.randint(-128, 128, (n, k_hi), dtype=torch.int8, device=device),
        torch.rand(n, 2, device=device) + 0.5,
    )


def differing(
    results: list[torch.Tensor],
    activations: list[MixedTensor],
    weight: QuantizedWeight,
    most: int = 64,
) -> list[int]:
    """Batch sizes whose result differs from the reference in any bit of the rows looked at.

    Evenly spaced rows of each batch, at most `most`, go through one call of the reference, which
    spends most of its time on the weight.
    """
    rows = [evenly_spaced(len(y), most) for y in results]
    sampled = [
        torch.cat([part.cpu()[row] for part, row in zip(parts, rows, strict=True)])
        for parts in zip(*activations, strict=True)
    ]
    q_lo, q_hi, params = sampled
    codes_lo, codes_hi, scale = (part.cpu() for part in weight)
    expected = reference.mixed_gemm(q_lo, q_hi, params, codes_lo, codes_hi, scale, None, OUT)
    wanted = expected.split([len(row) for row in rows])
    return [
        len(y)
        for y, row, right in zip(results, rows, wanted, strict=True)
        if not torch.equal(y.cpu()[row], right)
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """A linear layer with random weights, and activations of every batch size.

    Attributes:
        name: of the layer, as `models.layers` has it.
        weight: the codes.
        packs: cold copies of the packed codes.
        sums: of the codes.
        activations: one for each batch size.
    """

    name: str
    weight: QuantizedWeight
    packs: list[torch.Tensor]
    sums: torch.Tensor
    activations: list[MixedTensor]

    @classmethod
    def random(
        cls, bench: BenchDevice, layer: tuple[str, int, int, int], batches: list[int]
    ) -> Layer:
        """A layer of `models.layers`."""
        name, n, k, k_hi = layer
        weight = random_weight(n, k - k_hi, k_hi, bench.device)
        data, _, sums, _, _ = PackedWeight.pack(weight)
        rows = [torch.randn(m, k, device=bench.device, dtype=OUT) for m in batches]
        return cls(
            name=name,
            weight=weight,
            packs=bench.copies(data),
            sums=sums,
            activations=[ops.mixed_quantize(x, k_hi) for x in rows],
        )

    def moved(self, activation: MixedTensor) -> int:
        """Bytes that a product has to read and write."""
        result = len(activation.params) * self.weight.n * OUT.itemsize
        return nbytes(self.packs[0], self.sums, self.weight.weight_scale, activation) + result

    def kernel_arguments(self, activation: MixedTensor) -> tuple[int, int, int, int, bool, int]:
        """What torch.ops.resq.mixed_gemm_kernel and mixed_gemm_choices take."""
        w, packed = self.weight, activation.q_lo.dtype == torch.uint8
        return len(activation.params), w.n, w.k_lo, w.k_hi, packed, 0

    def product(self, activation: MixedTensor, i: int) -> torch.Tensor:
        """mixed_gemm with the i-th copy of the weight."""
        data = self.packs[i % len(self.packs)]
        return ops.mixed_gemm(*activation, data, self.weight.weight_scale, self.sums, None, OUT)

    def checked_products(self, model: str, rows: int = 64) -> list[torch.Tensor]:
        """The product of every batch size, of which at most `rows` rows are compared.

        Raises:
            RuntimeError: one differs from the reference.
        """
        results = [self.product(activation, 0) for activation in self.activations]
        if wrong := differing(results, self.activations, self.weight, rows):
            size = f"{wrong[0]}x{self.weight.n}x{self.weight.k_lo + self.weight.k_hi}"
            raise RuntimeError(
                f"mixed_gemm: {model} {self.name} {size}: differs from the reference"
            )
        return results


def layer_rows(
    bench: BenchDevice,
    model: str,
    layer: tuple[str, int, int, int],
    batches: list[int],
    missing: dict[str, str],
) -> Iterator[Row]:
    """Checks one layer at all batch sizes, then times it at each."""
    name, n, k, k_hi = layer
    it = Layer.random(bench, layer, batches)
    it.checked_products(model)
    for m, activation in zip(batches, it.activations, strict=True):
        place: Row = {"model": model, "layer": name, "batch": m, "shape": [m, n, k], "k_hi": k_hi}
        if bench.on_gpu:
            arguments = it.kernel_arguments(activation)
            place["kernel"] = str(torch.ops.resq.mixed_gemm_kernel(*arguments))
        candidates: dict[str, Call] = {"ours": partial(it.product, activation)}
        candidates |= gemm_baselines.baselines(bench, m, n, k, missing)
        work = Work(
            op="mixed_gemm",
            place=place,
            moved=it.moved(activation),
            products=m * n * k,
        )
        yield from bench.rows(work, bench.alternate(candidates))


def rows(bench: BenchDevice, args: argparse.Namespace, missing: dict[str, str]) -> Iterator[Row]:
    """Checks and times every model, layer, batch and baseline.

    Args:
        bench: the device; its `failures` receive what is wrong, which is not timed.
        args: the options of `resq bench`: shapes, batch.
        missing: receives name -> reason for each baseline that cannot run.
    """
    for model in args.shapes:
        for layer in models.layers(model):
            yield from bench.attempted(
                partial(layer_rows, bench, model, layer, args.batch, missing)
            )
