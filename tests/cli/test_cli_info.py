"""`resq info`: what is built and chosen, why CUDA is not, and the bytes of a folder."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_support import Result, save, tiny_llama
from safetensors.torch import load_file, save_file

from resq_kernels import _library
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
    monkeypatch.setattr(_library, "CUDA_MISSING", "")
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
        ("model.layers.3.self_attn.key_rotation", "rotations"),
        ("model.embed_tokens.basis.rotation", "rotations"),
        ("model.embed_tokens.basis.gain", "embedding"),
        ("model.embed_tokens.basis.linears.values", "rotations"),
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


def write(folder: Path, config: dict[str, object], **tensors: torch.Tensor) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if tensors:
        save_file(tensors, folder / "model.safetensors")
    return folder


def test_any_folder_of_the_hub_is_described(tmp_path: Path, resq: Callable[..., Result]) -> None:
    def figures(folder: Path) -> dict[str, object]:
        result = resq("info", folder, "--json", tmp_path / "info.json")
        assert result.code == 0, result.err
        return json.loads((tmp_path / "info.json").read_text())["model"]

    half, codes = torch.zeros(6, 4).half(), torch.zeros(5, dtype=torch.float8_e4m3fn)
    custom = {"model_type": "new", "architectures": ["NewModel"], "auto_map": {"AutoModel": "a.B"}}
    got = figures(write(tmp_path / "custom", custom, wte=half, scale=codes))
    assert (got["architecture"], got["quantization"]) == ("NewModel", None)
    assert got["bytes"]["total"] == 6 * 4 * 2 + 5

    others = {"model_type": "llama", "quantization_config": {"quant_method": "fp8", "bits": 8}}
    kinds = [torch.float8_e5m2, torch.float8_e8m0fnu, torch.int16, torch.uint16, torch.uint32]
    kinds += [torch.uint64, torch.complex64, torch.float64, torch.bool, torch.int64]
    tensors = {f"t{i}": torch.zeros(3, dtype=kind) for i, kind in enumerate(kinds)}
    got = figures(write(tmp_path / "others", others, **tensors))
    assert got["architecture"] == "llama" and got["quantization"]["quant_method"] == "fp8"
    assert got["bytes"]["total"] == 3 * sum(kind.itemsize for kind in kinds)

    parts = {"model_type": "llava", "text_config": {"hidden_size": 64, "vocab_size": 100}}
    got = figures(write(tmp_path / "parts", parts))
    assert (got["shape"]["hidden_size"], got["shape"]["vocab_size"]) == (64, 100)
    assert got["weights"] is None and got["bytes"] is None

    pickles = write(tmp_path / "pickles", {"model_type": "llama"})
    torch.save({"a": half}, pickles / "pytorch_model.bin")
    got = figures(pickles)
    assert (got["weights"], got["bytes"]) == ("pytorch_model.bin", None)
    assert re.search(r"weights +pytorch_model.bin \(bytes", resq("info", pickles).out)


def test_bytes_are_those_of_the_file_that_is_loaded(
    tmp_path: Path, resq: Callable[..., Result]
) -> None:
    """Shards and index of a larger model lie beside the single file."""
    folder = save(tiny_llama(), tmp_path / "model")
    before, content = part_sizes(folder), (folder / "model.safetensors").read_bytes()
    tiny_llama(intermediate_size=384).save_pretrained(folder, max_shard_size="200KB")
    (folder / "model.safetensors").write_bytes(content)
    assert part_sizes(folder) == before
    (folder / "model.safetensors").unlink()
    assert part_sizes(folder)["total"] == before["total"] + 2 * 3 * 192 * 128 * 4


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("command", ["quantize", "eval", "generate", "info"])
def test_a_pointer_of_git_lfs_is_said_to_be_one(
    llama: Path,
    text_file: Path,
    tmp_path: Path,
    resq: Callable[..., Result],
    name: str,
    command: str,
) -> None:
    folder = shutil.copytree(llama, tmp_path / "model")
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    options = {
        "quantize": (tmp_path / "out", "--calib", text_file),
        "eval": ("--text", text_file),
        "generate": ("--prompt", "a"),
        "info": (),
    }[command]
    result = resq(command, folder, *options)
    assert result.code == 1 and not (tmp_path / "out").exists()
    assert result.sentence == (
        f"{folder / name}: expected the file, got a git-lfs pointer to it; run `git lfs pull` in "
        f"{folder}"
    )


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
