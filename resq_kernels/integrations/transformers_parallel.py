"""Tensor parallel in transformers: what is asked for, and that our modules do it themselves.

transformers would split parameters as `DTensor`s along the columns of o_proj and down_proj. Its
plan is therefore replaced by one that splits nothing, and `nn.tensor_parallel` splits the modules
once transformers has made the ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from resq_kernels.nn.tensor_parallel import TensorParallel

STYLE = "resq"
# Sizes of a `DistributedConfig` that stand for another kind of parallelism.
_OTHERS = ("dp_replicate_size", "fsdp_size", "pp_size", "ep_size")


def degree_of(config: PreTrainedConfig) -> int:
    """Ranks that share the model: `distributed_config`, which `from_pretrained` makes of its
    `tp_plan`, too.

    Raises:
        ValueError: another kind of parallelism, a plan, or a version of transformers without
            `HfQuantizer.update_parallel_plan`.
    """
    from transformers import __version__
    from transformers.quantizers.base import HfQuantizer

    given: Any = getattr(config, "distributed_config", None)
    if given is None:
        return 1
    if not hasattr(HfQuantizer, "update_parallel_plan"):
        raise ValueError(
            "ResQ: distributed_config: expected None before transformers 5.23, got "
            f"{given} in {__version__}"
        )
    for name in _OTHERS:
        if (size := getattr(given, name, None)) not in (None, 1):
            raise ValueError(
                f"ResQ: distributed_config: {name}: expected 1 (tensor parallel is the only kind), "
                f"got {size}"
            )
    if given.enable_sequence_parallel:
        raise ValueError(
            "ResQ: distributed_config: enable_sequence_parallel: expected False, got True"
        )
    if given.tp_plan not in (None, "auto"):
        raise ValueError(
            'ResQ: tp_plan: expected "auto" (the quantized modules split themselves), '
            f"got {given.tp_plan!r}"
        )
    return int(given.tp_size)


def plan_of(model: PreTrainedModel) -> dict[str, str]:
    """A plan that names every module with parameters and splits none of them."""
    from transformers.distributed.parallel_utils import (
        ALL_PARALLEL_STYLES,
        replace_layer_number_by_wildcard,
    )
    from transformers.distributed.tensor_parallel import TensorParallelLayer

    class Untouched(TensorParallelLayer):
        """Leaves parameters and `forward` as they are."""

        def install_forward(self, module: Any, mesh: Any) -> Any:
            return module

    ALL_PARALLEL_STYLES.register(STYLE, Untouched())
    names = (name.rpartition(".")[0] for name, _ in model.named_parameters())
    return dict.fromkeys(map(replace_layer_number_by_wildcard, names), STYLE)


def share(model: PreTrainedModel) -> TensorParallel:
    """Splits a model whose tensors are loaded, but for the weights of its linears, over the ranks
    that transformers made for it.

    Raises:
        ValueError: as `distribute`.
    """
    from resq_kernels.nn.tensor_parallel import TensorParallel, distribute

    mesh: Any = model._device_mesh
    parallel = TensorParallel(mesh["tp"].get_group())
    distribute(model, parallel)
    # From its own plan transformers reads how many heads a static cache has on a rank.
    model.init_parallel_plans()
    return parallel
