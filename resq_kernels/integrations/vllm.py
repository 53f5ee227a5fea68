"""Registers "resq" with vLLM: `vllm serve FOLDER` and `vllm.LLM(FOLDER)` need no options.

vLLM calls `register` in each of its processes, because the package names it as an entry point of
the group "vllm.general_plugins". It imports neither a model nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import torch
import vllm
from vllm import ModelRegistry
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from resq_kernels import checkpoint
from resq_kernels.architecture import FAMILIES, ModelShape

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

OLDEST = (0, 32)
"""The oldest of vLLM's versions that was tried."""
ARCHITECTURE = "ResQForCausalLM"
"""The name of our model in vLLM's registry; no config.json holds it."""
SOURCES = tuple(f"{family}ForCausalLM" for family in FAMILIES.values())
"""What config.json names, and our model computes."""


def register() -> None:
    """Adds the quantization method and the model to vLLM's tables; more than once changes nothing.

    The model is named by a string, so that only a process that builds it imports it.
    """
    register_quantization_config(checkpoint.QUANT_METHOD)(ResQVllmConfig)
    ModelRegistry.register_model(
        ARCHITECTURE, "resq_kernels.integrations.vllm_model:ResQForCausalLM"
    )


class ResQVllmConfig(QuantizationConfig):
    """`quantization_config` of a folder; makes vLLM build our model instead of its own.

    vLLM's Llama computes norms and SwiGLU in 16 bits and asks a quantization for its linears only.
    Ours quantizes inside of both (`rms_norm_quantize`, `silu_mul_hadamard_quantize`), so the whole
    model is another one.

    Args:
        entry: as stored in config.json (docs/formats.md section 6).

    Raises:
        CheckpointError: a newer format, or a missing or impossible value.
        ValueError: from `maybe_update_config`: an older vLLM, another architecture than `SOURCES`,
            or an option of config.json that changes the model in a way that is not supported.
    """

    def __init__(self, entry: dict[str, Any]) -> None:
        super().__init__()
        checkpoint.parse_quantization_config(entry)
        self.entry = entry

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ResQVllmConfig:
        """How vLLM makes one."""
        return cls(config)

    def get_name(self) -> str:
        """The `quant_method`."""
        return checkpoint.QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Compute dtypes that the kernels have."""
        return [torch.float32, torch.float16, torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        """Ten times the compute capability of the oldest GPU that the CUDA library is built for."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: the configuration is part of config.json."""
        return []

    def maybe_update_config(
        self,
        model_name: str,
        hf_config: PreTrainedConfig | None = None,
        revision: str | None = None,
    ) -> None:
        """Puts our architecture in the place of the float model's.

        vLLM calls it once, before it starts the processes that build the model, and passes the
        changed configuration to them. It looks the class up by that configuration.
        """
        version: tuple[Any, ...] = vllm.__version_tuple__[:2]
        if (0, 0) < version < OLDEST:  # a checkout without tags is 0.0
            oldest = ".".join(map(str, OLDEST))
            raise ValueError(f"ResQ: vLLM: expected {oldest} or newer, got {vllm.__version__}")
        if hf_config is None:
            raise ValueError("ResQ: hf_config: expected the model's configuration, got None")
        architectures = list(hf_config.architectures or ())
        if architectures != [ARCHITECTURE] and not set(architectures) & set(SOURCES):
            raise ValueError(
                f"ResQ: {model_name}: architectures: expected {' or '.join(SOURCES)}, got "
                f"{', '.join(architectures) or 'none'}"
            )
        ModelShape.from_config(hf_config.to_dict())
        hf_config.architectures = [ARCHITECTURE]

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> NoReturn:
        """Refuses: a layer of vLLM's own would hold no weights of ours.

        Raises:
            ValueError: always; the folder was asked for as another model than the one that is
                served, such as a draft of speculative decoding.
        """
        raise ValueError(
            f"ResQ: {prefix}: expected our own model ({ARCHITECTURE}), got a "
            f"{type(layer).__name__} of vLLM's: a quantized folder can only be the model that is "
            "served, not a draft"
        )
