"""The model card of a quantized folder: README.md, the first thing that its users read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from resq_kernels.config import ResQConfig

CARD = "README.md"
# What a card says that holds for the quantized model as well.
_KEPT = ("license", "license_name", "license_link", "language")

_TEXT = """\
# {name}, quantized with ResQ

Weights and activations of {name} in 4 bits, with 1/8 of every dimension in 8; {cache}; {embedding}.
Made by [ResQ](https://arxiv.org/abs/2412.14363) with `resq_kernels`. `quantization_report.html`
has the error of every layer.{preset}
{facts}
Needs `resq_kernels` installed in the environment:

    pip install resq_kernels

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```

Nothing needs to import `resq_kernels`, and `trust_remote_code` changes nothing. Where the package
is missing, transformers says that it does not know the quantization type "resq" and stops with a
size mismatch of `model.layers.0.self_attn.q_proj.weight`.

| option | value |
|---|---|
{options}
"""


def source_name(folder: Path) -> str:
    """The source's name: that of its folder, or "owner/name" for a snapshot in the Hub's cache."""
    cached = re.search(r"/models--([^/]+)--([^/]+)/snapshots/[^/]+$", folder.resolve().as_posix())
    return "/".join(cached.groups()) if cached else folder.resolve().name


def write_card(
    folder: Path, source: Path, config: ResQConfig, facts: Sequence[tuple[str, str]] = ()
) -> None:
    """Writes README.md into `folder`, with the licence and languages of the source's card.

    Args:
        folder: the quantized folder.
        source: the folder that it was made from.
        config: how it was quantized.
        facts: rows of `verdict_facts`, for a list.
    """
    name = source_name(source)
    header: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["resq", "4-bit"],
        **{key: value for key, value in _header(source / CARD).items() if key in _KEPT},
    }
    if "/" in name:
        header |= {"base_model": name, "base_model_relation": "quantized"}
    text = _TEXT.format(
        name=name,
        facts="".join(f"\n- {name}: {value}" for name, value in facts) + "\n" * bool(facts),
        cache="KV cache in 4 bits" if config.kv_bits == 4 else "KV cache in 16 bits",
        embedding=f"embedding and head in {config.embedding_bits} bits",
        preset=f" Preset: {config.preset}." if config.preset else "",
        options="\n".join(f"| {key} | {value} |" for key, value in config.to_dict().items()),
    )
    if not config.mixed:
        text = text.replace(", with 1/8 of every dimension in 8", "")
    from huggingface_hub import ModelCardData

    data = ModelCardData(**header).to_yaml()
    (folder / CARD).write_text(f"---\n{data}\n---\n\n{text}", encoding="utf-8")


def _header(card: Path) -> dict[str, Any]:
    """The YAML header of a model card; empty if there is none, or none that can be read."""
    import yaml
    from huggingface_hub import metadata_load

    try:
        return metadata_load(card) or {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}
