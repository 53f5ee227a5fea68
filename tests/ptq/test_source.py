"""The source model is the one that transformers makes of the folder, or it is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ptq_models import MODELS
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from resq_kernels import architecture
from resq_kernels.config import ResQConfig
from resq_kernels.ptq.pipeline import quantize_folder
from resq_kernels.ptq.source import SourceModel
from resq_kernels.safetensors_io import CheckpointError, weight_files
from resq_kernels.testing.tiny_models import make_model, save_tiny_model

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, HEAD, NORM = architecture.EMBEDDING, architecture.HEAD, architecture.FINAL_NORM
Tensors = dict[str, torch.Tensor]
Change = Callable[[Path], object]


def tensors(change: Callable[[Tensors], object]) -> Change:
    """Rewrites model.safetensors."""

    def edit(folder: Path) -> None:
        content = load_file(folder / WEIGHTS)
        change(content)
        save_file(content, folder / WEIGHTS, metadata={"format": "pt"})

    return edit


def config(**changes: object) -> Change:
    """Rewrites config.json; None removes a key."""

    def edit(folder: Path) -> None:
        path = folder / "config.json"
        content = json.loads(path.read_text()) | changes
        kept = {key: value for key, value in content.items() if value is not None}
        path.write_text(json.dumps(kept))

    return edit


def stale_index(folder: Path) -> None:
    """Shards and index of an older model beside the single file."""
    content = (folder / WEIGHTS).read_bytes()
    make_model("llama", seed=5).save_pretrained(folder, max_shard_size="150KB")
    (folder / WEIGHTS).write_bytes(content)


def a_tensor_in_two_shards(folder: Path) -> None:
    """The first shard holds a norm too that the index assigns to the last one."""
    make_model("llama", seed=5).save_pretrained(folder, max_shard_size="150KB")
    (folder / WEIGHTS).unlink()
    first, *_, last = sorted({path.name for path in folder.glob("model-*.safetensors")})
    for name, factor in ((first, 3.0), (last, 5.0)):
        content = load_file(folder / name) | {NORM: torch.arange(128.0) * factor}
        save_file(content, folder / name, metadata={"format": "pt"})
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][NORM] = first
    (folder / INDEX).write_text(json.dumps(index))


def another_name(folder: Path) -> None:
    stale_index(folder)
    (folder / WEIGHTS).rename(folder / "weights.safetensors")
    config(transformers_weights="weights.safetensors")(folder)


def links(folder: Path) -> None:
    """As the hub's cache keeps files."""
    another_name(folder)
    (folder / "weights.safetensors").rename(folder.with_name("blob"))
    (folder / "weights.safetensors").symlink_to(folder.with_name("blob"))


def another_index(folder: Path) -> None:
    make_model("llama", seed=5).save_pretrained(folder, max_shard_size="150KB")
    (folder / INDEX).rename(folder / "other.safetensors.index.json")
    config(transformers_weights="other.safetensors.index.json")(folder)


def without_prefix(content: Tensors) -> None:
    for name in [name for name in content if name.startswith("model.")]:
        content[name.removeprefix("model.")] = content.pop(name)


def index_with_a_dtype(folder: Path) -> None:
    """Sharded, no dtype in config.json; the index says another than the files."""
    make_model("llama", seed=5).save_pretrained(folder, max_shard_size="150KB")
    (folder / WEIGHTS).unlink()
    index = json.loads((folder / INDEX).read_text())
    index["metadata"]["dtype"] = "bfloat16"
    (folder / INDEX).write_text(json.dumps(index))
    config(dtype=None)(folder)


def each_of(*changes: Change) -> Change:
    def edit(folder: Path) -> None:
        for change in changes:
            change(folder)

    return edit


def own_head(content: Tensors) -> None:
    content[HEAD] = content[EMBEDDING] + 0.1 * torch.randn(320, 128)


TIED = config(tie_word_embeddings=True)
FOLDERS: dict[str, Change] = {
    "plain": lambda _: None,
    "stale index": stale_index,
    "a tensor in two shards": a_tensor_in_two_shards,
    "another name": another_name,
    "another name, a link": links,
    "another index": another_index,
    "decoder alone": each_of(TIED, tensors(lambda t: t.pop(HEAD)), tensors(without_prefix)),
    "decoder without prefix, and a head": tensors(without_prefix),
    "prefix before the head": tensors(lambda t: t.update({f"model.{HEAD}": t.pop(HEAD)})),
    "tied": each_of(TIED, tensors(lambda t: t.pop(HEAD))),
    "said to be tied, own head": each_of(TIED, tensors(own_head)),
    "tied, stored twice": each_of(TIED, tensors(lambda t: t.update({HEAD: t[EMBEDDING].clone()}))),
    "tied, stored as the head": each_of(TIED, tensors(lambda t: t.pop(EMBEDDING))),
    # Equal in the model's dtype alone.
    "tied once loaded": each_of(
        TIED,
        config(dtype="bfloat16"),
        tensors(lambda t: t.update({HEAD: t[EMBEDDING].bfloat16().float()})),
    ),
    "inv_freq": tensors(
        lambda t: t.update(
            {
                "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(32),
                "model.rotary_emb.inv_freq": torch.ones(32),
            }
        )
    ),
    "no dtype": config(dtype=None),
    "no dtype, half": each_of(
        config(dtype=None), tensors(lambda t: t.update({k: v.half() for k, v in t.items()}))
    ),
    "an older key": config(dtype=None, torch_dtype="bfloat16"),
    "both keys": config(dtype="float16", torch_dtype="bfloat16"),
    "index with a dtype": index_with_a_dtype,
    "mixed, head first": each_of(
        config(dtype=None), tensors(lambda t: t.update({HEAD: t[HEAD].half()}))
    ),
    "mixed, norm last": each_of(
        config(dtype=None), tensors(lambda t: t.update({NORM: t[NORM].bfloat16()}))
    ),
    "swish": config(hidden_act="swish"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "model", **MODELS["llama"])


@pytest.mark.filterwarnings("ignore:.*says tie_word_embeddings")
@pytest.mark.parametrize("case", FOLDERS)
def test_every_tensor_is_that_of_transformers(folder: Path, case: str) -> None:
    FOLDERS[case](folder)
    exact = AutoModelForCausalLM.from_pretrained(folder)
    model = SourceModel(folder)
    assert model.dtype == exact.dtype
    parameters = exact.state_dict() | {model.head: exact.lm_head.weight}
    assert model.shape.tied == (exact.lm_head.weight is exact.model.embed_tokens.weight)
    assert set(model.shape.source_tensors()) <= set(parameters)
    for name in model.shape.source_tensors():
        assert torch.equal(model.load(name).to(exact.dtype), parameters[name]), name
        rows = model.reader.load_rows(name, 2, 5).to(exact.dtype)
        assert torch.equal(rows, parameters[name][2:5])


@pytest.mark.parametrize("case", ["another name", "no dtype, half", "an older key"])
def test_the_result_loads_in_the_dtype_of_the_source(folder: Path, case: str) -> None:
    FOLDERS[case](folder)
    out = folder.with_name("out")
    quantize_folder(
        folder, out, torch.randint(0, 256, (2, 32)), ResQConfig(weights="rtn"), progress=False
    )
    settings = json.loads((out / "config.json").read_text())
    assert "torch_dtype" not in settings and "transformers_weights" not in settings
    dtype = AutoModelForCausalLM.from_pretrained(folder).dtype
    assert AutoModelForCausalLM.from_pretrained(out).dtype == dtype
    assert settings["dtype"] == str(dtype).removeprefix("torch.")


def test_a_head_of_its_own_is_kept_and_said(folder: Path) -> None:
    """As far from the source as with the flag corrected, to the bit; 0.6 away without the head."""
    each_of(TIED, tensors(own_head))(folder)
    ids, out = torch.randint(0, 256, (2, 32)), folder.parent
    options = {"config": ResQConfig(weights="rtn"), "progress": False}
    with pytest.warns(UserWarning, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        report = quantize_folder(folder, out / "kept", ids, **options)
    assert report["bytes_before"] == (folder / WEIGHTS).stat().st_size
    config(tie_word_embeddings=False)(folder)
    quantize_folder(folder, out / "corrected", ids, **options)
    kept, corrected = (out / name / WEIGHTS for name in ("kept", "corrected"))
    assert kept.read_bytes() == corrected.read_bytes()


def extra(name: str) -> Change:
    return tensors(lambda t: t.update({name: torch.ones(3)}))


def other_dtype(name: str, dtype: torch.dtype) -> Change:
    return tensors(lambda t: t.update({name: t[name].to(dtype)}))


Q = "model.layers.1.self_attn.q_proj.weight"
REFUSED: dict[str, tuple[Change, str]] = {
    "classifier": (
        tensors(lambda t: (t.pop(HEAD), t.update({"score.weight": torch.ones(2, 128)}))),
        "score.weight: expected only the tensors of a language model of type llama, got one",
    ),
    "value head": (extra("v_head.summary.weight"), "v_head.summary.weight: expected only"),
    "adapter": (
        extra("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"),
        "lora_A.weight: expected only",
    ),
    "adapter beside": (
        lambda folder: (folder / "adapter_config.json").write_text("{}"),
        "adapter_config.json: expected a model without adapters; merge it first",
    ),
    "bias": (extra("model.layers.0.self_attn.o_proj.bias"), "o_proj.bias: expected only"),
    "head's bias": (extra("lm_head.bias"), "lm_head.bias: expected only"),
    "scale": (extra(f"{Q}_scale_inv"), f"{Q}_scale_inv: expected only"),
    "layers": (
        config(num_hidden_layers=1),
        "model.layers.1.input_layernorm.weight (and 8 more): expected only the tensors of a "
        "language model of type llama, got one that has no place there; config.json says "
        "num_hidden_layers 1",
    ),
    "position ids": (extra("model.position_ids"), "model.position_ids: expected only"),
    "two names": (
        tensors(lambda t: t.update({"norm.weight": torch.ones(128)})),
        "model.norm.weight: expected one tensor, got ",
    ),
    "no head": (
        tensors(lambda t: t.pop(HEAD)),
        "lm_head.weight: expected a tensor, found nothing (tie_word_embeddings in config.json is",
    ),
    "other head": (
        each_of(TIED, tensors(lambda t: t.update({HEAD: torch.ones(321, 128)}))),
        "lm_head.weight: expected bfloat16 or float16 or float32 [320, 128], got float32 [321, 128",
    ),
    **{
        str(dtype): (other_dtype(Q, dtype), f"{Q}: expected bfloat16 or float16 or float32 [256")
        for dtype in (torch.float64, torch.int16, torch.uint16, torch.uint32, torch.uint64)
        + (torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu)
    },
    "custom code": (
        config(auto_map={"AutoModelForCausalLM": "modeling.Model"}),
        "auto_map: expected a model of transformers itself, got AutoModelForCausalLM in custom",
    ),
    "dtype": (config(dtype="float64"), "config.json: dtype: expected one of bfloat16, float16, fl"),
    "weights elsewhere": (
        config(transformers_weights="../model.safetensors"),
        "transformers_weights: expected a safetensors file or index in the folder, got '../model",
    ),
    "variant alone": (
        lambda folder: (folder / WEIGHTS).rename(folder / "model.fp16.safetensors"),
        "expected model.safetensors or model.safetensors.index.json, found neither",
    ),
    "index": (
        lambda folder: (
            (folder / WEIGHTS).rename(folder / "other.safetensors"),
            (folder / INDEX).write_text('{"weight_map": ["other.safetensors"]}'),
        ),
        "weight_map: expected tensor -> file, got ['other.safetensors']",
    ),
    "index of numbers": (
        lambda folder: (
            (folder / WEIGHTS).rename(folder / "other.safetensors"),
            (folder / INDEX).write_text(
                json.dumps({"weight_map": {NORM: "other.safetensors", HEAD: 3}})
            ),
        ),
        f"weight_map: {HEAD}: expected a file, got 3",
    ),
    "empty index": (
        lambda folder: (
            (folder / WEIGHTS).rename(folder / "other.safetensors"),
            (folder / INDEX).write_text('{"weight_map": {}}'),
        ),
        "weight_map: expected tensor -> file, got {}",
    ),
    "pointer": (
        lambda folder: (folder / WEIGHTS).write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
        ),
        "model.safetensors: expected the file, got a git-lfs pointer to it; run `git lfs pull` in",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_place_in_the_model_is_named(folder: Path, case: str) -> None:
    change, words = REFUSED[case]
    change(folder)
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        SourceModel(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def edit_header(path: Path, **changes: object) -> None:
    """Changes what a safetensors file says of the tensor Q."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header[Q] |= changes
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


@pytest.mark.parametrize(
    "change", [{"dtype": ["F32"]}, {"dtype": None}, {"shape": [256.0, 128.0]}, {"shape": "128"}]
)
def test_a_header_of_other_types_is_named(folder: Path, change: dict[str, object]) -> None:
    edit_header(folder / WEIGHTS, **change)
    expected = rf"{WEIGHTS}: expected a safetensors header, got .*{Q}"
    with pytest.raises(CheckpointError, match=expected):
        SourceModel(folder)


def test_a_dtype_that_torch_does_not_have_is_named(folder: Path) -> None:
    """Six-bit floats: the data has three quarters of the bytes of FP8."""
    edit_header(folder / WEIGHTS, dtype="F6_E2M3")
    expected = rf"{Q}: expected bfloat16 or float16 or float32 \[256, 128\], got F6_E2M3 \[256"
    with pytest.raises(CheckpointError, match=expected):
        SourceModel(folder)


def test_pickles_are_for_the_converter(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="expected model.safetensors .*got pytorch_model.bin"):
        SourceModel(folder)


def test_the_order_of_weight_files(folder: Path) -> None:
    """The single file, the index, and of a variant likewise; other files never count."""
    stale_index(folder)
    assert weight_files(folder, {}) == [folder / WEIGHTS]
    (folder / WEIGHTS).rename(folder / "model.fp16.safetensors")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2 and weight_files(folder, {}) == shards
    assert weight_files(folder, {}, "fp16") == [folder / "model.fp16.safetensors"]
    (folder / INDEX).rename(folder / "model.safetensors.index.fp16.json")
    assert weight_files(folder, {}, "fp16") == [folder / "model.fp16.safetensors"]
    (folder / "model.fp16.safetensors").unlink()
    assert weight_files(folder, {}, "fp16") == shards
    with pytest.raises(CheckpointError, match="of variant 'int8', found neither"):
        weight_files(folder, {}, "int8")
