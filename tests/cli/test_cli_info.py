"""`resq info`: what is built and chosen, why CUDA is not, and the bytes of a folder."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_support import Result, save, tiny_llama
from safetensors.torch import load_file

from resq_kernels.commands import info
from resq_kernels.commands.sizes import PARTS, part_of, part_sizes

ROOT = Path(__file__).resolve().parents[2]


def test_info_names_the_variant_that_runs_and_why_cuda_is_not_used(
    tmp_path: Path, resq: Callable[..., Result]
) -> None:
    result = resq("info", "--json", tmp_path / "info.json")
    assert result.code == 0
    figures = json.loads((tmp_path / "info.json").read_text())
    assert set(figures) == {"versions", "machine", "cpu", "cuda"}
    assert figures["cpu"]["chosen"] == torch.ops.resq.cpu_isa()
    assert figures["cpu"]["chosen"] in figures["cpu"]["built"]
    assert figures["versions"]["torch"] == torch.__version__
    assert figures["cuda"]["used"] == (figures["cuda"]["why_not"] is None)
    if torch.version.cuda is None:
        assert "build without CUDA" in figures["cuda"]["why_not"]
        assert "build without CUDA" in result.out


def test_built_variants_are_those_of_the_source() -> None:
    source = (ROOT / "csrc/cpu/isa.cpp").read_text()
    names = set(re.findall(r'return "(\w+)";', source))
    assert names == set(info.built_cpu_variants("x86_64"))
    assert info.built_cpu_variants("aarch64") == ("scalar",)


def test_info_says_whether_launches_are_dependent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info._library, "CUDA_MISSING", "")
    for name, value in {
        "is_available": True,
        "device_count": 1,
        "get_device_capability": (9, 0),
        "get_device_name": "H100",
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.ops.resq, "cuda_family", lambda _: "sm90", raising=False)
    monkeypatch.setattr(torch.ops.resq, "cuda_pdl", lambda _: "off: a reason", raising=False)
    figures = info.cuda()
    assert figures["devices"][0]["dependent_launches"] == "off: a reason"
    expected = "H100 (sm_90, sm90 kernels, dependent launches off: a reason)"
    assert info._cuda_line(figures) == expected


def test_info_of_a_model_counts_every_byte(tmp_path: Path, resq: Callable[..., Result]) -> None:
    folder = save(tiny_llama(), tmp_path / "model")
    result = resq("info", folder, "--json", tmp_path / "info.json")
    assert result.code == 0
    model = json.loads((tmp_path / "info.json").read_text())["model"]
    assert model["architecture"] == "LlamaForCausalLM"
    assert model["quantization"] is None
    tensors = load_file(folder / "model.safetensors")
    assert set(model["bytes"]) == {*PARTS, "total"}
    assert model["bytes"]["total"] == sum(t.nbytes for t in tensors.values())
    assert model["bytes"]["total"] == sum(model["bytes"][part] for part in PARTS)
    # q, o: 256 x 128; k, v: 128 x 128; gate, up, down: 192 x 128; two layers of float32.
    assert model["bytes"]["linears"] == 2 * 4 * (2 * 256 * 128 + 2 * 128 * 128 + 3 * 192 * 128)
    assert model["bytes"]["embedding"] == model["bytes"]["head"] == 4 * 320 * 128


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.layers.0.self_attn.q_proj.weight_lo", "linears"),
        ("model.layers.10.mlp.down_proj.weight_hi", "linears"),
        ("model.layers.0.self_attn.q_proj.weight_scale", "linear_scales"),
        ("model.layers.0.self_attn.q_proj.bias", "other"),
        ("model.layers.3.self_attn.key_rotation", "key_rotations"),
        ("model.embed_tokens.weight", "embedding"),
        ("lm_head.weight", "head"),
        ("model.norm.weight", "other"),
    ],
)
def test_part_of_every_tensor_of_the_format(name: str, part: str) -> None:
    assert part_of(name) == part


def test_sharded_folder_is_counted_and_a_missing_shard_is_named(
    tmp_path: Path, resq: Callable[..., Result]
) -> None:
    whole = save(tiny_llama(), tmp_path / "whole")
    sharded = tmp_path / "sharded"
    tiny_llama().save_pretrained(sharded, max_shard_size="200KB")
    shards = sorted(sharded.glob("*.safetensors"))
    assert len(shards) > 1
    assert part_sizes(sharded) == part_sizes(whole)
    shards[0].unlink()
    result = resq("info", sharded)
    assert result.code == 1
    assert f"{shards[0]}: expected a safetensors file, found nothing" in result.sentence


def test_forced_variant_that_does_not_exist_is_an_error() -> None:
    import os
    import subprocess
    import sys

    environment = {**os.environ, "RESQ_CPU_ISA": "mmx"}
    command = [sys.executable, "-m", "resq_kernels", "info"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == (
        "resq: error: RESQ_CPU_ISA: expected scalar, avx2, avx512vnni or amx, got mmx\n"
    )
