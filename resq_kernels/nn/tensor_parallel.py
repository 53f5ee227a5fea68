"""Tensor parallel: every rank holds an equal share of the rows of every quantized matrix.

A row of activations has one scale for all of its columns, and its product with a row of a weight is
an exact sum over all of them. So no product is split along K. A rank computes its share of the
columns of every result, and ranks gather columns where the next operator needs whole rows: the
inputs of o_proj and down_proj, and their outputs. Attention needs none; a rank keeps the pages of
its own heads. All bits are those of one rank (docs/notes/0050-tensor-parallel.md).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed, nn

from resq_kernels.architecture import ModelShape
from resq_kernels.config import ResQConfig
from resq_kernels.formats import MixedTensor
from resq_kernels.nn.attention import ResQAttention
from resq_kernels.nn.embedding import ResQEmbedding, TiedHead
from resq_kernels.nn.linear import ResQLinear
from resq_kernels.nn.mlp import ResQMLP
from resq_kernels.nn.straight import StraightRows, needs_gradient


class TensorParallel:
    """The ranks that share a model, all of which call the same functions in the same order.

    Args:
        group: of `torch.distributed`, with a backend for the device of the model.

    Attributes:
        rank: this process, 0 to degree - 1.
        degree: number of ranks.
    """

    def __init__(self, group: distributed.ProcessGroup) -> None:
        self.group = group
        self.rank = distributed.get_rank(group)
        self.degree = distributed.get_world_size(group)

    def __deepcopy__(self, memo: dict[int, Any]) -> TensorParallel:
        return self  # a copy of a model has the same ranks

    def share(self, rows: int) -> slice:
        """The rows of this rank, of a number of rows that the degree divides."""
        own = rows // self.degree
        return slice(self.rank * own, (self.rank + 1) * own)

    def gather(self, x: torch.Tensor, *widths: int) -> torch.Tensor:
        """The columns of all ranks [..., degree n], in their order, of this rank's x [..., n].

        Args:
            x: of any dtype, with the same shape on every rank.
            widths: if x consists of several matrices of these widths, one after the other, so does
                the result.

        Raises:
            RuntimeError: x needs a gradient.
        """
        if needs_gradient(x):
            raise RuntimeError(
                "tensor parallel: expected a tensor that needs no gradient, got one that requires "
                "it: ranks exchange no gradients; train on a model without tp_plan"
            )
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        found = rows.new_empty(self.degree * len(rows), rows.shape[1])
        # torch 2.13 calls the older name deprecated.
        collect = getattr(distributed, "all_gather_single", None)
        (collect or distributed.all_gather_into_tensor)(found, rows, group=self.group)
        parts = found.view(self.degree, *rows.shape).split(widths or rows.shape[1], dim=-1)
        joined = [part.transpose(0, 1).flatten(1) for part in parts]
        whole = joined[0] if len(joined) == 1 else torch.cat(joined, dim=-1)
        return whole.view(*x.shape[:-1], -1)

    def merge(self, x: torch.Tensor) -> torch.Tensor:
        """The elements of all ranks, each of which is +0.0 on all of them but one.

        Formula: sums of bytes; sums of floats would lose the sign of a -0.0.

        Args:
            x: of any dtype, with the same shape on every rank; it may be overwritten.
        """
        data = x.contiguous().view(torch.uint8)
        distributed.all_reduce(data, group=self.group)
        return data.view(x.dtype)


class SplitLinear(ResQLinear):
    """A rank's rows of a linear, whose output is that of all ranks.

    Attributes:
        parallel: the ranks.
        input_widths: of the matrices, of which the input holds this rank's columns; () if the input
            has all columns.
    """

    parallel: TensorParallel
    input_widths: tuple[int, ...]

    def forward(self, x: torch.Tensor | MixedTensor | StraightRows) -> torch.Tensor:
        """y [..., degree N] of x [..., K], or of x [..., K / degree] with `input_widths`."""
        if self.input_widths and isinstance(x, torch.Tensor):
            x = self.parallel.gather(x, *self.input_widths)
        return self.parallel.gather(super().forward(x))


class SplitMLP(ResQMLP):
    """`ResQMLP` over a rank's rows of gate_proj and up_proj.

    Attributes:
        parallel: the ranks.
    """

    parallel: TensorParallel

    def project(self, x: torch.Tensor | MixedTensor | StraightRows) -> torch.Tensor:
        """gate [..., I] and up [..., I] of all ranks for x [..., K], concatenated."""
        own = super().project(x)
        return self.parallel.gather(own, own.shape[-1] // 2, own.shape[-1] // 2)


class SplitEmbedding(ResQEmbedding):
    """A rank's rows of an embedding, which looks up those of all ranks.

    Attributes:
        parallel: the ranks.
    """

    parallel: TensorParallel

    def stored(self, ids: torch.Tensor) -> torch.Tensor:
        """As in `ResQEmbedding`.

        Raises:
            RuntimeError: no rank has an id. On CUDA and in compiled graphs, which cannot look, the
                operator finds it, too.
        """
        first, rows = self.parallel.rank * self.out_features, self.out_features
        vocabulary = self.parallel.degree * rows
        own = (ids >= first) & (ids < first + rows)
        valid = (ids >= 0) & (ids < vocabulary)
        looks = ids.device.type == "cpu" and not torch.compiler.is_compiling()
        if looks and not valid.all():
            raise RuntimeError(
                f"SplitEmbedding: ids: expected 0 to {vocabulary - 1}, got {ids[~valid][0].item()}"
            )
        found = super().stored(torch.where(own, ids - first, torch.where(valid, 0, ids)))
        return self.parallel.merge(found.masked_fill_(~own[..., None], 0))


class SplitTiedHead(TiedHead):
    """`TiedHead` on a `SplitEmbedding`.

    Attributes:
        parallel: the ranks.
    """

    parallel: TensorParallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [..., vocabulary] of x [..., hidden], in x's dtype."""
        return self.parallel.gather(super().forward(x))


def check_degree(shape: ModelShape, config: ResQConfig, degree: int) -> None:
    """Refuses a degree that does not divide what ranks share.

    Args:
        shape: the sizes of the model.
        config: how it was quantized.
        degree: number of ranks.

    Raises:
        ValueError: names the first size that it does not divide. Query heads are a multiple of
            key/value heads.
    """
    sizes = {
        "num_key_value_heads": shape.kv_heads,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
    }
    if config.embedding_bits == 8:
        sizes["vocab_size"] = shape.vocab
    for name, size in sizes.items():
        if size % degree:
            raise ValueError(
                f"ResQ: tensor parallel: expected a degree that divides {name} ({size}), "
                f"got {degree}"
            )


def distribute(model: nn.Module, parallel: TensorParallel) -> None:
    """Leaves a model, in place, this rank's rows of every `ResQLinear`, embedding and head among
    them, and the heads of these rows. Norms, rotations and 16-bit matrices stay whole.

    Args:
        model: that `nn.convert.convert` made and `pack` has not packed yet. Linears without a
            weight get their size alone: what is read into them later are this rank's rows.
        parallel: with a degree that `check_degree` accepts.

    Raises:
        ValueError: a linear is packed.
    """
    modules = list(model.modules())
    for module in modules:
        if isinstance(module, ResQLinear):
            _keep_share(module, parallel)
        elif isinstance(module, ResQAttention):
            module.heads //= parallel.degree
            module.kv_heads //= parallel.degree
            k_lo = module.o_proj.in_features - module.o_proj.high_columns
            widths = (k_lo // parallel.degree, module.o_proj.high_columns // parallel.degree)
            _become(SplitLinear, module.o_proj, parallel, input_widths=widths)
        elif isinstance(module, ResQMLP):
            _become(SplitMLP, module, parallel)
            _become(SplitLinear, module.down_proj, parallel, input_widths=())
        elif isinstance(module, TiedHead):
            _become(SplitTiedHead, module, parallel)
    for module in modules:
        if isinstance(module, ResQEmbedding):
            _become(SplitEmbedding, module, parallel)
    head = getattr(model, "lm_head", None)
    if isinstance(head, ResQLinear):
        _become(SplitLinear, head, parallel, input_widths=())


def parallel_of(model: nn.Module) -> TensorParallel | None:
    """The ranks that share a model or a part of it; None if it is whole."""
    found = (vars(module).get("parallel") for module in model.modules())
    return next((parallel for parallel in found if parallel is not None), None)


def _become(kind: type[nn.Module], module: nn.Module, parallel: TensorParallel, **own: Any) -> None:
    """Makes a module one of another class, which keeps all that it holds."""
    module.__class__ = kind
    vars(module).update(parallel=parallel, **own)


def _keep_share(linear: ResQLinear, parallel: TensorParallel) -> None:
    if linear.is_packed:
        raise ValueError("distribute: expected linears that are not packed yet, got a packed one")
    rows = parallel.share(linear.out_features)
    linear.out_features = rows.stop - rows.start
    for name, tensor in list(linear.named_parameters(recurse=False)):
        # A copy, so that the whole tensor is not kept.
        setattr(linear, name, nn.Parameter(tensor.detach()[rows].clone(), requires_grad=False))
