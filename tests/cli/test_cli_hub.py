"""`resq quantize NAME`: what is downloaded of a repository of the hub (a folder here)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from cli_support import save, tiny_llama
from huggingface_hub.utils import filter_repo_objects

from resq_kernels.commands import quantize
from resq_kernels.ptq.float_folder import Source
from resq_kernels.ptq.save import companions
from resq_kernels.ptq.source import SourceModel

COMMIT = "0123456789abcdef"
COPIED = ("Licence.md", "license", "NOTICE.txt", "tokenizer.model", "vocab.json", "merges.txt")
COPIED += ("additional_chat_templates/tool.jinja", "chat_template.jinja", "special_tokens_map.json")
COPIED += ("Use_Policy.md", "added_tokens.json", "preprocessor_config.json")
LARGE = ("pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "original/consolidated.00.pth")
LARGE += ("original/tokenizer.model", "consolidated.safetensors", "onnx/model.onnx", "model.gguf")
LARGE += ("model.fp16.safetensors", "tf_model.h5", "README.md", "tokenizer.bin", "modeling_x.py")
LARGE += ("training/optimizer.safetensors", "vocab.safetensors", "runs/events.json")


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files of a hub's model, and a `snapshot_download` that copies them from there."""
    folder, cache = tmp_path / "repository", tmp_path / "cache" / COMMIT
    save(tiny_llama(), folder)
    for name in (*COPIED, *LARGE):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")

    def snapshot_download(name: str, revision: str | None = None, **patterns: list[str]) -> str:
        assert name == "some/model" and revision in (None, COMMIT)
        names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
        for found in filter_repo_objects(names, **patterns):
            (cache / found).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / found, cache / found)
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return folder


def single(folder: Path) -> set[str]:
    (folder / "model.safetensors.index.json").write_text("{}")  # older, and not read
    (folder / "model-00001-of-00002.safetensors").write_text("older")
    return {"model.safetensors"}


def shards(folder: Path) -> set[str]:
    tiny_llama().save_pretrained(folder, max_shard_size="200KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    (folder / "model-00001-of-00009.safetensors").write_text("older")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return {"model.safetensors.index.json", *index["weight_map"].values()}


def named(folder: Path) -> set[str]:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"transformers_weights": "w[1].safetensors"})
    )
    shutil.copyfile(folder / "model.safetensors", folder / "w[1].safetensors")
    return {"w[1].safetensors"}


def named_index(folder: Path) -> set[str]:
    names = shards(folder) - {"model.safetensors.index.json"}
    (folder / "model.safetensors.index.json").rename(folder / "w.safetensors.index.json")
    config = json.loads((folder / "config.json").read_text())
    entry = {"transformers_weights": "w.safetensors.index.json"}
    (folder / "config.json").write_text(json.dumps(config | entry))
    return {"w.safetensors.index.json", *names}


def pickles(folder: Path) -> set[str]:
    (folder / "model.safetensors").unlink()
    return {"pytorch_model.bin"}


def pickle_shards(folder: Path) -> set[str]:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").unlink()
    names = {"a": "pytorch_model-00001-of-00002.bin"}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    return {"pytorch_model.bin.index.json", *names.values()}


@pytest.mark.parametrize("kind", [single, shards, named, named_index, pickles, pickle_shards])
def test_what_is_read_and_copied_is_downloaded_and_nothing_else(repository: Path, kind) -> None:
    weights = kind(repository)
    copied = {path.relative_to(repository).as_posix() for path in companions(repository)}
    assert copied >= set(COPIED) and not copied & set(LARGE)
    cache = quantize._folder("some/model")
    found = {p.relative_to(cache).as_posix() for p in cache.rglob("*") if p.is_file()}
    assert found == {"config.json", *copied, *weights}
    if kind in (pickles, pickle_shards):
        assert Source(cache).kind == "pickles"
    else:
        assert SourceModel(cache).shape.layers == 2


def test_adapters_are_downloaded_to_be_refused(repository: Path) -> None:
    (repository / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="expected a model without adapters"):
        SourceModel(quantize._folder("some/model"))
