"""One folder with 4-bit or 8-bit activations, chosen when it is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from resq_kernels import ResQConfig, from_pretrained
from resq_kernels.checkpoint import with_lo_bits
from resq_kernels.fake_quant import fake_quantized
from resq_kernels.testing.quantized_models import random_quantized
from resq_kernels.testing.tiny_models import save_tiny_model

IDS = torch.arange(5, 69).view(2, 32)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lo-bits") / "model"
    random_quantized(request.param, ResQConfig(activation_clip=0.7)).save_pretrained(path)
    return path


def edited(folder: Path, out: Path, **values: object) -> Path:
    """The folder with other values in its quantization_config."""
    shutil.copytree(folder, out)
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] |= values
    (out / "config.json").write_text(json.dumps(config))
    return out


def test_it_is_the_folder_that_says_so(folder: Path, tmp_path: Path) -> None:
    """Whichever way 8 bits are asked for, and saved they stay."""
    own, wide = logits(from_pretrained(folder)), from_pretrained(folder, lo_bits=8)
    expected = logits(wide)
    assert not torch.equal(own, expected)
    assert torch.equal(own, logits(from_pretrained(folder, lo_bits=4)))
    # The clip was chosen for 4 bits. With it 8-bit rows would lose their ends.
    file = edited(folder, tmp_path / "file", lo_bits=8, activation_clip=None)
    clipped = edited(folder, tmp_path / "clipped", lo_bits=8)
    assert torch.equal(expected, logits(AutoModelForCausalLM.from_pretrained(file)))
    assert not torch.equal(expected, logits(from_pretrained(clipped)))
    assert torch.equal(
        logits(from_pretrained(clipped)), logits(from_pretrained(clipped, lo_bits=8))
    )
    config = AutoConfig.from_pretrained(folder)
    config.quantization_config = with_lo_bits(config.quantization_config, 8)
    loaded = AutoModelForCausalLM.from_pretrained(folder, config=config)
    assert torch.equal(expected, logits(loaded))
    wide.save_pretrained(tmp_path / "saved")
    assert torch.equal(expected, logits(from_pretrained(tmp_path / "saved")))


def test_every_row_has_eight_bits(folder: Path) -> None:
    model = from_pretrained(folder, lo_bits=8)
    hidden = model.config.hidden_size
    formats = [m.row_format for m in model.modules() if hasattr(m, "row_format")]
    formats = [f for f in formats if f.k_hi < hidden]  # embedding and head have no low part
    assert len(formats) > 10 and {(f.lo_bits, f.clip) for f in formats} == {(8, 1.0)}


def test_it_is_what_the_reference_computes(folder: Path) -> None:
    """And nearer to the model with exact activations than 4 bits are, by far more than a half."""
    model = from_pretrained(folder, lo_bits=8, dtype=torch.float32)
    found = logits(model)
    with fake_quantized(model):
        reference = logits(model)
    four = logits(from_pretrained(folder, dtype=torch.float32))
    assert (found - reference).norm() < 0.1 * (four - reference).norm()


def test_other_arguments_stay_what_they_are(folder: Path) -> None:
    model = from_pretrained(folder, lo_bits=8, dtype=torch.bfloat16, use_cache=False)
    assert model.dtype == torch.bfloat16 and model.config.use_cache is False
    assert model(IDS).past_key_values is None
    # What says where the folder is, the configuration's loader keeps to itself.
    inside = from_pretrained(folder.parent, subfolder=folder.name, lo_bits=8, device_map="cpu")
    assert torch.equal(logits(inside), logits(from_pretrained(folder, lo_bits=8)))
    with pytest.raises(ValueError, match="attn_implementation: expected 'resq'"):
        from_pretrained(folder, lo_bits=8, attn_implementation="eager")


def test_what_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lo_bits: expected one of 4, 8, got 6"):
        from_pretrained(folder, lo_bits=6)
    with pytest.raises(TypeError, match="lo_bits: expected an integer, got '8'"):
        from_pretrained(folder, lo_bits="8")
    with pytest.raises(ValueError, match="lo_bits: expected None together with config, got 8"):
        from_pretrained(folder, lo_bits=8, config=AutoConfig.from_pretrained(folder))
    source = save_tiny_model(tmp_path / "float")
    with pytest.raises(ValueError, match="expected a model quantized with ResQ"):
        from_pretrained(source, lo_bits=8)


def test_options() -> None:
    clipped = ResQConfig(activation_clip=0.7)
    assert clipped.with_lo_bits(4) == clipped
    assert clipped.with_lo_bits(8) == ResQConfig(lo_bits=8, activation_clip=1.0)
    assert ResQConfig().with_lo_bits(8) == ResQConfig(lo_bits=8)
    assert ResQConfig(lo_bits=8).with_lo_bits(4) == ResQConfig()
    chosen = ResQConfig(lo_bits=8, activation_clip=0.9)
    assert chosen.with_lo_bits(8) == chosen
