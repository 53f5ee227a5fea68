"""LoRA of peft over the quantized linears: the float model's adapters, forward and backward."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
)

import resq_kernels
from resq_kernels import ResQConfig, graph_decoding
from resq_kernels.integrations import peft as lora
from resq_kernels.ptq.pipeline import quantize_folder
from resq_kernels.testing.quantized_models import make_older, random_quantized
from resq_kernels.testing.tiny_models import save_tiny_model

IDS = torch.arange(5, 30)[None]
FINE = {"lo_bits": 8, "kv_bits": 16}  # nothing that an adapter changes is rounded to 4 bits


@pytest.fixture
def model() -> Any:
    return random_quantized("llama")


def adapt(model: Any, deviation: float = 0.0, **options: Any) -> Any:
    """peft's model of one; B, which peft begins at 0, gets random numbers."""
    given = {"task_type": "CAUSAL_LM", "target_modules": "all-linear", "r": 4, "lora_alpha": 16}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**{**given, **options})).eval()
    randomize_b(adapted, deviation)
    return adapted


def randomize_b(adapted: Any, deviation: float, adapter: str = "default") -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if f"lora_B.{adapter}" in name:
                parameter.normal_(std=deviation)


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor = IDS, **arguments: Any) -> torch.Tensor:
    return model(ids, **arguments).logits


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def gains_of_one(model: Any) -> Any:
    """As `resq quantize` leaves them; those of `random_quantized` are no float model's."""
    for layer in model.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.data.fill_(1)
    model.model.norm.weight.data.fill_(1)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"method": "rtn"}, {"embedding_bits": 16}], ids=str)
def test_bits_are_the_base_s_while_b_is_zero(options: dict[str, Any], dtype: torch.dtype) -> None:
    model = random_quantized("llama", ResQConfig(**options)).to(dtype)
    before = logits(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = adapt(model)
    out = adapted(input_ids=IDS, labels=IDS)
    assert torch.equal(out.logits, before)
    out.loss.backward()
    trained = {name for name, p in adapted.named_parameters() if p.grad is not None}
    assert len(trained) == 2 * 7 * 2 and all("lora_" in name for name in trained)
    for name, tensor in model.state_dict().items():  # the base is as it was
        if "lora_" not in name:
            assert torch.equal(tensor, state[name.replace(".base_layer", "")])


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "smollm3"])
def test_adapters_are_the_float_model_s(model_type: str) -> None:
    """Gradients too. Activations and weights in 8 bits leave 1 % of error; the tolerance is twice
    what the model without adapters has. An adapter in another basis is off by its whole effect."""
    options = ResQConfig(**FINE, embedding_bits=16 if model_type == "qwen2" else 8)
    quantized = gains_of_one(random_quantized(model_type, options))
    source = resq_kernels.dequantize(quantized)
    plain = logits(source)
    error = relative(logits(quantized), plain)
    adapted, expected = adapt(quantized, 0.05), adapt(source)
    loaded = peft.set_peft_model_state_dict(expected, peft.get_peft_model_state_dict(adapted))
    assert not loaded.unexpected_keys
    effect = relative(logits(expected), plain)
    assert error < 0.03 and effect > 0.2
    assert relative(logits(adapted), logits(expected)) < 2 * error
    assert relative(logits(resq_kernels.dequantize(adapted)), logits(expected)) < 1e-5

    for one in (adapted, expected):
        one(input_ids=IDS, labels=IDS).loss.backward()
    trained = dict(expected.named_parameters())
    for name, parameter in adapted.named_parameters():
        if parameter.grad is not None:
            assert relative(parameter.grad, trained[name].grad) < 0.2, name

    for module in adapted.modules():
        if isinstance(module, lora.AdaptedLinear):
            module.basis = None
    assert relative(logits(adapted), logits(expected)) > 0.5 * effect


@pytest.mark.parametrize("method", ["resq", "quik"])
def test_an_adapter_of_the_float_model_over_its_folder(tmp_path: Path, method: str) -> None:
    """From a real run of the quantizer, through files in both directions."""
    source = save_tiny_model(tmp_path / "source")
    tokens = torch.randint(0, 256, (2, 32))
    config = ResQConfig(method=method, weights="rtn", lo_bits=8, kv_bits=16)
    quantize_folder(source, tmp_path / "out", tokens, config, progress=False)
    load = AutoModelForCausalLM.from_pretrained
    trained, quantized = adapt(load(source), 0.05), load(tmp_path / "out")
    error = relative(logits(quantized), logits(load(source)))
    assert relative(logits(resq_kernels.dequantize(quantized)), logits(load(source))) < 1.2 * error
    trained.save_pretrained(tmp_path / "adapter")
    adapted = peft.PeftModel.from_pretrained(quantized, tmp_path / "adapter")
    found = relative(logits(adapted), logits(trained))
    assert found < 2 * error
    for module in adapted.modules():
        if isinstance(module, lora.AdaptedLinear):
            module.basis = None
    assert relative(logits(adapted), logits(trained)) > 2 * found

    adapted.save_pretrained(tmp_path / "again")
    again = peft.PeftModel.from_pretrained(load(source), tmp_path / "again")
    assert torch.equal(logits(again), logits(trained))
    assert torch.equal(logits(again.merge_and_unload()), logits(trained.merge_and_unload()))


def test_a_training_and_its_adapter(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "model")
    adapted = adapt(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), lora_dropout=0.05)
    data = [{"input_ids": IDS[0], "labels": IDS[0]}] * 4
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        use_cpu=True,
        max_steps=6,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        gradient_checkpointing=True,
        logging_steps=1,
        report_to=[],
    )
    trainer = Trainer(model=adapted, args=arguments, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.6 * losses[0]
    adapted.eval().save_pretrained(tmp_path / "adapter")
    expected = logits(adapted)
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(logits(fresh), logits(model))
    fresh.load_adapter(tmp_path / "adapter")  # transformers' way
    # A C and R B of adapters that are not trained are kept: the same products.
    assert torch.equal(logits(fresh), expected) and torch.equal(logits(fresh), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(model: Any, reentrant: bool) -> None:
    adapted = adapt(model, 0.1)
    adapted(input_ids=IDS, labels=IDS).loss.backward()
    expected = {n: p.grad for n, p in adapted.named_parameters() if p.grad is not None}
    adapted.zero_grad()
    adapted.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    adapted.train()(input_ids=IDS, labels=IDS).loss.backward()
    found = {n: p.grad for n, p in adapted.named_parameters() if p.grad is not None}
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_what_a_backward_pass_keeps(model: Any) -> None:
    """Activations alone: weights are not kept as floats. docs/notes/0057 has the numbers."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if not isinstance(tensor, torch.nn.Parameter):
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    adapted, sizes = adapt(model), []
    for length in (64, 128):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            adapted(input_ids=torch.randint(0, 256, (1, length)))
        sizes.append(sum(kept.values()))
    per_token = (sizes[1] - sizes[0]) / 64
    hidden, queries, keys, wide = 128, 4 * 64, 2 * 64, 192
    # Two layers, float32: r numbers here and there, cos and sin besides.
    assert per_token < 1.1 * 2 * 4 * (4 * hidden + 3 * queries + 2 * keys + 4 * wide)
    adapters = sum(4 * p.numel() for name, p in adapted.named_parameters() if "lora_" in name)
    key_rotations = 2 * 2 * 4 * 64 * 64
    assert sizes[0] - 64 * per_token <= adapters + key_rotations


def test_decoding(model: Any) -> None:
    """Every way to decode gives the same tokens; without adapters they are the base's."""
    ids, mask = IDS.repeat(3, 1), torch.ones(3, 25, dtype=torch.int64)
    mask[0, :5] = mask[2, :2] = 0
    given = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    base = model.generate(ids, **given)
    adapted = adapt(model, 0.1)
    tokens = adapted.generate(ids, **given)
    assert not torch.equal(tokens, base)
    assert torch.equal(adapted.generate(ids, custom_generate=graph_decoding, **given), tokens)
    assert torch.equal(adapted.generate(ids, use_cache=False, **given), tokens)
    with adapted.disable_adapter():
        assert torch.equal(adapted.generate(ids, **given), base)
        assert torch.equal(adapted.generate(ids, custom_generate=graph_decoding, **given), base)
    assert torch.equal(adapted.unload().generate(ids, **given), base)


def test_several_adapters(model: Any) -> None:
    base = logits(model)
    adapted = adapt(model, 0.1)
    two = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["o_proj", "q_proj"], r=2)
    adapted.add_adapter("two", two)
    randomize_b(adapted, 0.1, "two")
    first = logits(adapted)
    adapted.set_adapter("two")
    second = logits(adapted)
    names = ["two", "default", "__base__"]
    mixed = logits(adapted, IDS.repeat(3, 1), adapter_names=names)
    assert all(map(torch.equal, mixed, (second[0], first[0], base[0])))
    adapted.delete_adapter("two")
    adapted.set_adapter("default")
    assert torch.equal(logits(adapted), first)
    assert torch.equal(logits(copy.deepcopy(adapted)), first)


def test_what_is_kept_follows_the_adapter(model: Any) -> None:
    """Also where somebody writes into `.data`, as peft's `hotswap_adapter` does."""
    adapted = adapt(model, 0.1)
    first = logits(adapted)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(0.5)
    second = logits(adapted)
    assert not torch.equal(first, second)
    for module in adapted.modules():
        if isinstance(module, lora.AdaptedLinear):
            module._kept.clear()
    assert torch.equal(logits(adapted), second)


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"lora_bias": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"o_proj": 3}},
        {"init_lora_weights": "orthogonal"},
        {"layers_to_transform": [1], "target_modules": ["q_proj", "down_proj"]},
        {"exclude_modules": ["q_proj"]},
        {"target_modules": None},
        {"target_modules": r".*layers\.0\.(self_attn|mlp)\.(v|up)_proj"},
        {"target_modules": ["q_proj", "lm_head"]},
    ],
    ids=str,
)
def test_options_have_the_effect_that_they_have_on_the_float_model(options: Any) -> None:
    fine = ResQConfig(**FINE)
    quantized = gains_of_one(random_quantized("llama", fine, attention_bias=True, mlp_bias=True))
    source = resq_kernels.dequantize(quantized)
    plain = logits(source)
    error = relative(logits(quantized), plain)
    adapted, expected = adapt(quantized, 0.1, **options), adapt(source, **options)
    saved = peft.get_peft_model_state_dict(adapted)
    if options.get("lora_bias"):
        saved = {n: torch.randn_like(t) if n.endswith("bias") else t for n, t in saved.items()}
        peft.set_peft_model_state_dict(adapted, saved)
    assert not peft.set_peft_model_state_dict(expected, saved).unexpected_keys
    names = set(peft.get_peft_model_state_dict(expected))
    assert {name for name in names if "lora_" in name} == set(saved)
    assert relative(logits(adapted), logits(expected)) < 2 * error
    assert relative(logits(expected), plain) > 3 * error
    assert relative(logits(resq_kernels.dequantize(adapted)), logits(expected)) < 1e-5


def test_a_classifier_on_top_is_trained_and_saved(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "model")
    load = AutoModelForSequenceClassification.from_pretrained
    torch.manual_seed(0)
    classifier = load(tmp_path / "model", num_labels=3)
    adapted = adapt(classifier, 0.1, task_type="SEQ_CLS")
    adapted(input_ids=IDS, labels=torch.tensor([1])).loss.backward()
    assert any("score" in n and p.grad is not None for n, p in adapted.named_parameters())
    adapted.save_pretrained(tmp_path / "adapter")
    fresh = peft.PeftModel.from_pretrained(
        load(tmp_path / "model", num_labels=3), tmp_path / "adapter"
    )
    assert torch.equal(logits(fresh), logits(adapted))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "use_dora: expected plain LoRA on quantized linears, got True"),
    "alora": ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens: expected plain LoRA"),
    "bias": ({"bias": "all"}, "bias: expected 'none', got 'all'"),
    "its own bias": ({"bias": "lora_only"}, "bias: expected 'none', got 'lora_only'"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights: expected True or False or"),
    "qalora": ({"use_qalora": True}, "use_qalora: expected False, got True"),
    "transposed": ({"fan_in_fan_out": True}, "fan_in_fan_out: expected False, got True"),
    "layers": ({"layer_replication": [(0, 2), (0, 2)]}, "layer_replication: expected None"),
    "parameters": ({"target_parameters": ["o_proj.weight_scale"]}, "target_parameters: expected"),
    "tokens": ({"trainable_token_indices": [3]}, "trainable_token_indices: expected None"),
    "head": ({"modules_to_save": ["lm_head"]}, "modules_to_save: expected modules behind"),
    "norm": ({"modules_to_save": ["norm"]}, "modules_to_save: .*got model.norm, which is"),
    "embedding": ({"target_modules": ["embed_tokens"]}, "embed_tokens: expected a linear of the"),
    "fused": ({"target_modules": ["qkv_proj"]}, "qkv_proj: expected a linear of .*FusedLinear"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused(model: Any, kind: str) -> None:
    options, words = REFUSED[kind]
    with pytest.raises(ValueError, match=f"LoRA: .*{words}"):
        adapt(model, **options)


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_rotated_matrices_in_16_bits_are_refused(name: str) -> None:
    """peft would adapt them as they are; without a rotation they are the float model's."""
    model = random_quantized("llama", ResQConfig(embedding_bits=16))
    with pytest.raises(ValueError, match=f"target_modules: .*{name}: expected a quantized linear"):
        adapt(model, target_modules=["q_proj", name])
    adapt(
        random_quantized("llama", ResQConfig(method="rtn", embedding_bits=16)),
        target_modules=[name],
    )


def test_merging_into_4_bits_is_refused(model: Any) -> None:
    adapted = adapt(model, 0.1)
    expected = logits(adapted)
    for merge in (adapted.merge_and_unload, adapted.merge_adapter):
        with pytest.raises(ValueError, match="LoRA: merge: expected float weights.*dequantize"):
            merge()
    adapted.unmerge_adapter()
    assert torch.equal(logits(adapted), expected)


def test_a_rank_is_refused(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    parallel = type("Parallel", (), {"degree": 2})()
    monkeypatch.setattr(lora, "parallel_of", lambda model: parallel)
    with pytest.raises(ValueError, match="LoRA: expected all of a model, got a rank of tensor"):
        adapt(model)


def test_a_folder_without_bases_is_refused(model: Any, tmp_path: Path) -> None:
    model = random_quantized("llama", ResQConfig(hadamard_block=0))
    expected = logits(model)
    model.save_pretrained(tmp_path)
    make_older(tmp_path, 4)
    older = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(older), expected)
    with pytest.raises(ValueError, match="a checkpoint of a format before 6.*quantize the model"):
        adapt(older)
    with pytest.raises(ValueError, match="a checkpoint of a format before 6.*quantize the model"):
        resq_kernels.dequantize(older)


def test_what_cannot_be_dequantized(model: Any) -> None:
    with pytest.raises(ValueError, match="dequantize: expected a quantized causal language model"):
        resq_kernels.dequantize(model.model)
    with pytest.raises(ValueError, match="dequantize: expected a quantized causal language model"):
        resq_kernels.dequantize(resq_kernels.dequantize(model))
    with pytest.raises(ValueError, match="lora_bias: expected linears with a bias"):
        resq_kernels.dequantize(adapt(model, lora_bias=True))


def test_a_dequantized_model_is_an_ordinary_one(tmp_path: Path) -> None:
    """Tied heads too; it is saved and loaded without anything of ours."""
    for tied in (True, False):
        quantized = random_quantized("qwen2", ResQConfig(**FINE), tie_word_embeddings=tied)
        head = gains_of_one(quantized).lm_head
        if tied:  # G of a float model
            basis = quantized.model.hidden_basis
            turn = basis.rotation.float()
            head.gain.data = turn.T @ (basis.gain[:, None] * turn)
        source = resq_kernels.dequantize(quantized)
        assert relative(logits(quantized), logits(source)) < 0.03
        source.save_pretrained(tmp_path / f"{tied}")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / f"{tied}")
        assert torch.equal(logits(again), logits(source))
        assert not any("resq" in type(module).__module__ for module in again.modules())


@pytest.mark.slow
@pytest.mark.parametrize("first", ["peft", "torch", "transformers", "resq_kernels"])
def test_whatever_is_imported_first(model: Any, tmp_path: Path, first: str) -> None:
    """peft imports torch, which calls our entry point before there is anything of peft."""
    model.save_pretrained(tmp_path)
    script = (
        f"import {first}\nimport transformers, peft\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained('.')\n"
        "adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=['q_proj']))\n"
        "print(type(adapted.base_model).__name__)"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.stdout.split() == ["ResQLoraModel"], run.stderr
