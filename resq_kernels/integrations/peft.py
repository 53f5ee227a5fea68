"""LoRA of peft over the quantized linears: `peft.get_peft_model(quantized, LoraConfig(...))`.

Importing it puts the classes of this module in the places of peft's own, which they are for models
that are not quantized.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensModel
from peft.utils import PeftType
from torch import nn
from torch.nn import functional as F

from resq_kernels.architecture import LINEARS
from resq_kernels.formats import MixedTensor
from resq_kernels.nn.fused import FusesLinears
from resq_kernels.nn.hidden_basis import RotatedEmbedding
from resq_kernels.nn.linear import ResQLinear
from resq_kernels.nn.linear_basis import LinearBasis, bases_of, turned
from resq_kernels.nn.straight import StraightRows, needs_gradient
from resq_kernels.nn.tensor_parallel import parallel_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from peft import LoraConfig

    from resq_kernels.formats import RowFormat

# Option of `LoraConfig` -> the values that it may have here, if there are others.
ALLOWED: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),
    "layer_replication": (None,),
    "megatron_config": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "use_qalora": (False,),
}


class ResQLoraModel(LoraModel):
    """`LoraModel` whose adapters on quantized linears are `AdaptedLinear`s."""

    def _prepare_model(self, peft_config: LoraConfig, model: nn.Module) -> None:
        """Readies a quantized model: fused linears that are adapted come apart.

        Raises:
            ValueError: an option that these linears do not have, a part of the model that cannot be
                trained, or a rank of tensor parallel.
        """
        found = [m for m in model.named_modules() if "hidden_basis" in vars(m[1])]
        if found:
            ((prefix, decoder),) = found
            prefix = f"{prefix}." if prefix else ""
            _check_options(peft_config)
            _check_saved(peft_config, model, prefix)
            self._check_vocabulary(peft_config, model, prefix, decoder.hidden_basis is not None)
            if (parallel := parallel_of(model)) is not None:
                raise ValueError(
                    "LoRA: expected all of a model, got a rank of tensor parallel "
                    f"{parallel.degree}: load it without tp_plan"
                )
            if str(peft_config.target_modules).lower() == "all-linear":
                peft_config.target_modules = [name.rpartition(".")[2] for name in LINEARS]
            for name, module in list(model.named_modules()):
                if isinstance(module, FusesLinears) and any(
                    self._check_target_module_exists(peft_config, f"{name}.{part}")
                    for part in module.PARTS
                ):
                    module.unfuse()
            modules: dict[str, Any] = dict(decoder.named_modules())
            for name, basis in bases_of(decoder):
                if name in modules and basis is not None:
                    modules[name].basis = basis
            peft_config._register_custom_module({ResQLinear: AdaptedLinear})
        super()._prepare_model(peft_config, model)

    def _check_vocabulary(
        self, config: LoraConfig, model: nn.Module, prefix: str, rotated: bool
    ) -> None:
        """Refuses what peft would adapt in the rotated basis: embeddings and heads in 16 bits."""
        for name in (f"{prefix}embed_tokens", "lm_head"):
            module = dict(model.named_modules()).get(name)
            float_module = rotated and isinstance(module, (nn.Linear, nn.Embedding))
            if float_module and self._check_target_module_exists(config, name):
                raise ValueError(
                    f"LoRA: target_modules: {name}: expected a quantized linear, got a rotated "
                    f"{type(module).__name__} in 16 bits (embedding_bits)"
                )


class ResQTrainableTokensModel(TrainableTokensModel):
    """`TrainableTokensModel`, which reads the weight of an embedding and does not call it."""

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Refuses rotated embeddings.

        Raises:
            ValueError: an embedding in 16 bits is rotated; one in 8 bits refuses by itself.
        """
        if any(isinstance(module, RotatedEmbedding) for module in model.modules()):
            raise ValueError(
                "TrainableTokens: expected the float model's embedding, got a rotated one in 16 "
                "bits (embedding_bits), whose rows are not the float model's: train them there"
            )
        super()._prepare_model(peft_config, model)


class AdaptedLinear(nn.Module, LoraLayer):
    """y = Q(x) + s (R B) (A C) x: a quantized linear with adapters of the float model's basis.

    Formula: x is in the basis of the quantized weight R W C (`nn.linear_basis`), of which
    s R (B A) C is the update that W + s B A gets in the float model. So `lora_A` and `lora_B`, and
    what peft saves, are the float model's: an adapter that was trained on one serves the other.
    Where no gradient is asked for, A C and R B are kept until A or B changes.

    x are the rounded rows where those are what the linear reads (q, k, v, gate, up, down), and the
    rows before rounding for o. Dropout is applied to x as it is, in the rotated basis. With B = 0
    the bits are those of the linear alone.

    Args:
        base_layer: the linear; its `basis` is None or absent where it is the float model's.
        adapter_name, config, r, lora_alpha: as peft gives them.
        target_name: of the linear, for messages.

    Raises:
        ValueError: another module than a linear of the float model.
    """

    def __init__(
        self,
        base_layer: ResQLinear,
        adapter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: int = 1,
        target_name: str = "",
        **kwargs: Any,
    ) -> None:
        if type(base_layer) is not ResQLinear:
            raise ValueError(
                f"LoRA: {target_name}: expected a linear of the float model (q_proj, k_proj, "
                f"v_proj, o_proj, gate_proj, up_proj, down_proj), got {type(base_layer).__name__}"
            )
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self.basis: LinearBasis | None = vars(base_layer).get("basis")
        if self.basis is not None:
            self.basis.check()
        self._kept: dict[str, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

    @property
    def row_format(self) -> RowFormat:
        """That of the linear."""
        base: Any = self.get_base_layer()
        row_format: RowFormat = base.row_format
        return row_format

    def forward(
        self,
        x: torch.Tensor | MixedTensor | StraightRows,
        adapter_names: Sequence[str] | None = None,
    ) -> torch.Tensor:
        """y [..., N] of x [..., K].

        Args:
            x: as `ResQLinear.forward` takes it.
            adapter_names: of every sequence of the batch, instead of the active adapters;
                "__base__": none.
        """
        y: torch.Tensor = self.base_layer(x)
        if self.disable_adapters:
            return y
        if isinstance(x, MixedTensor):
            rows = x.dequantize()
        else:
            rows = x.values if isinstance(x, StraightRows) else x
        if adapter_names is None:
            for name in self.active_adapters:
                if name in self.lora_A:
                    y = (y + self._update(rows, name)).to(y.dtype)
            return y
        for name in self.lora_A.keys() & set(adapter_names):
            own = [index for index, given in enumerate(adapter_names) if given == name]
            y[own] += self._update(rows[own], name).to(y.dtype)
        return y

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """s B A [N, K], in the float model's basis."""
        first, second, *_ = self._factors(adapter)
        delta: torch.Tensor = second @ first * self.scaling[adapter]
        return delta

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        """Refuses: 4-bit weights would have to be rounded anew.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "LoRA: merge: expected float weights, got 4-bit ones, which would have to be rounded "
            "anew without calibration. resq_kernels.dequantize(model) gives a float model with the "
            "adapters merged; better, load the adapter on the float model, merge it there and run "
            "`resq quantize` on the result"
        )

    def unmerge(self) -> None:
        """Nothing is ever merged."""

    def delete_adapter(self, adapter_name: str) -> None:
        """Forgets an adapter."""
        super().delete_adapter(adapter_name)
        self._kept.pop(adapter_name, None)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        assert isinstance(module, ResQLinear)
        return module.in_features, module.out_features

    def _update(self, rows: torch.Tensor, adapter: str) -> torch.Tensor:
        """s (R B) (A C) x for x [..., K], in the adapter's dtype."""
        a, b, *bias = self._turned(adapter)
        rows = self.lora_dropout[adapter](rows.to(a.dtype))
        update: torch.Tensor = F.linear(F.linear(rows, a), b, *bias) * self.scaling[adapter]
        return update

    def _factors(self, adapter: str) -> list[torch.Tensor]:
        """A, B and, with `lora_bias`, b, in the float model's basis."""
        first, second = self.lora_A[adapter], self.lora_B[adapter]
        assert isinstance(first, nn.Linear) and isinstance(second, nn.Linear)
        return [first.weight, second.weight, *([] if second.bias is None else [second.bias])]

    def _turned(self, adapter: str) -> list[torch.Tensor]:
        """A C, R B and, with `lora_bias`, R b."""
        factors = self._factors(adapter)
        if self.basis is None:
            return factors
        if torch.compiler.is_compiling() or needs_gradient(*factors):
            return list(self._turn(factors))
        # By value: some code writes into `weight.data`, which leaves no trace. A graph's capture
        # cannot look; a graph is of the adapter as it was then.
        kept = self._kept.get(adapter)
        if kept is None or not (_is_captured(factors[0]) or all(map(_same, kept[0], factors))):
            with torch.inference_mode(False), torch.no_grad():
                copies = [factor.detach().clone() for factor in factors]
                kept = self._kept[adapter] = (copies, list(self._turn(copies)))
        return kept[1]

    def _turn(self, factors: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        assert self.basis is not None
        first, *others = factors
        yield turned(self.basis.columns, first.float()).to(first.dtype)
        for factor in others:
            yield turned(self.basis.rows, factor.float()).to(factor.dtype)


def _check_options(config: LoraConfig) -> None:
    """Refuses options that peft's own linear has and `AdaptedLinear` has not."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.metadata.get("is_lora_variant") and value:
            raise ValueError(
                f"LoRA: {field.name}: expected plain LoRA on quantized linears, got {value!r}"
            )
        if field.name in ALLOWED and value not in ALLOWED[field.name]:
            expected = " or ".join(map(repr, ALLOWED[field.name]))
            raise ValueError(f"LoRA: {field.name}: expected {expected}, got {value!r}")


def _check_saved(config: LoraConfig, model: nn.Module, prefix: str) -> None:
    """Refuses copies of modules that are rotated or quantized, and would be trained as they are."""
    for name, module in model.named_modules():
        inside = name.startswith(prefix) or isinstance(module, ResQLinear) or name == "lm_head"
        if inside and any(f".{name}".endswith(f".{one}") for one in config.modules_to_save or ()):
            raise ValueError(
                f"LoRA: modules_to_save: expected modules behind the quantized decoder, such as a "
                f"classifier, got {name}, which is quantized or rotated"
            )


def _is_captured(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    alike = (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
    return alike and torch.equal(a, b)


PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = ResQLoraModel
PEFT_TYPE_TO_TUNER_MAPPING[PeftType.TRAINABLE_TOKENS] = ResQTrainableTokensModel
