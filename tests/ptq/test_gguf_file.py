"""GGUF files against what was written into them and against transformers; what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from resq_kernels.ptq.float_folder import Source, convert
from resq_kernels.ptq.gguf_file import GgufFile
from resq_kernels.ptq.gguf_tokenizer import RULES
from resq_kernels.safetensors_io import CheckpointError
from resq_kernels.testing.tiny_gguf import TEMPLATE, stored_weights, write_gguf
from resq_kernels.testing.tiny_models import LLAMA3_ROPE, make_model

gguf = pytest.importorskip("gguf")

FILE = "model.gguf"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
@pytest.mark.parametrize(
    ("model_type", "tied"),
    [("llama", False), ("llama", True), ("qwen2", False), ("qwen3", False)],
)
def test_weights_are_those_that_were_stored(
    tmp_path: Path, model_type: str, tied: bool, kind: str
) -> None:
    model = make_model(model_type, tie_word_embeddings=tied, rms_norm_eps=1e-6)
    file = GgufFile(write_gguf(tmp_path / FILE, model, kind))
    expected = stored_weights(model, kind)
    if tied:
        del expected["lm_head.weight"]
    dtype = DTYPES.get(kind, torch.bfloat16)
    found = dict(file.tensors())
    assert file.dtype == dtype and set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name].to(dtype)) for name in found)
    config, was = file.transformers_config(), model.config
    for name, value in was.to_dict().items():
        if name not in ("dtype", "transformers_version", "architectures"):
            assert getattr(config, name) == value, name
    assert file.generation == {"eos_token_id": 256, "pad_token_id": 256}
    assert file.header() == {"license": "apache-2.0"}


def test_matrices_of_several_float_types_lose_nothing(tmp_path: Path) -> None:
    model = make_model()
    path = write_gguf(tmp_path / FILE, model, "F16")
    reader = gguf.GGUFReader(path)
    file = GgufFile(path)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert set(kinds.values()) == {"F16", "F32"}  # vectors are F32, and do not count
    assert file.dtype == torch.float16
    file._tensors["blk.0.attn_q.weight"] = file._tensors["blk.0.attn_q.weight"]._replace(
        tensor_type=gguf.GGMLQuantizationType.BF16
    )
    assert file._dtype() == torch.float32


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_a_converted_folder_is_what_transformers_reads(tmp_path: Path, model_type: str) -> None:
    # Of a Qwen3 transformers takes 128 whatever the file says.
    sizes = {"head_dim": 128} if model_type == "qwen3" else {}
    write_gguf(tmp_path / FILE, make_model(model_type, **sizes), "Q8_0")
    convert(Source(tmp_path / FILE), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=FILE, dtype=torch.bfloat16)
    expected = theirs.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert model.generation_config.eos_token_id == 256
    ids = torch.randint(0, 256, (1, 16))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, theirs(ids).logits)
    mine, other = AutoTokenizer.from_pretrained(tmp_path / "out"), GgufFile(tmp_path / FILE)
    text = " abc 12 1200\n\n  x\t\u00e4\u6771<|endoftext|>it's"
    assert mine(text)["input_ids"] == other.tokenizer()(text)["input_ids"]
    assert mine.decode(mine(text)["input_ids"]) == text and mine.chat_template == TEMPLATE
    assert "license: apache-2.0" in (tmp_path / "out" / "README.md").read_text()


def llama3_divisors(factor: float) -> torch.Tensor:
    """As llama.cpp's converter writes them: of heads of 64."""
    frequencies = 1.0 / (500000.0 ** (torch.arange(0, 64, 2).float() / 64))
    low, high, old = 1.0, 4.0, 8192
    divisors = []
    for frequency in frequencies.tolist():
        length = 2 * torch.pi / frequency
        if length < old / high:
            divisors.append(1.0)
        elif length > old / low:
            divisors.append(factor)
        else:
            smooth = (old / length - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(divisors)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_frequencies_of_llama_3_are_found_again(tmp_path: Path, factor: float) -> None:
    rope = LLAMA3_ROPE | {"factor": factor}
    model = make_model(rope_parameters=rope, max_position_embeddings=131072)
    divisors = {"rope_freqs.weight": llama3_divisors(factor)}
    file = GgufFile(write_gguf(tmp_path / FILE, model, tensors=divisors))
    assert file.config["rope_parameters"] == rope
    theirs = AutoConfig.from_pretrained(tmp_path, gguf_file=FILE)
    assert theirs.rope_parameters["rope_type"] == "default"  # why it is not read by transformers
    divisors["rope_freqs.weight"][20] *= 1.001
    with pytest.raises(CheckpointError, match="rope_freqs.weight: expected the factors of Llama"):
        GgufFile(write_gguf(tmp_path / FILE, model, tensors=divisors))


def test_linear_scaling(tmp_path: Path) -> None:
    facts = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    file = GgufFile(write_gguf(tmp_path / FILE, make_model(), facts=facts))
    assert file.config["rope_parameters"] == {
        "rope_type": "linear",
        "rope_theta": 10000.0,
        "factor": 4.0,
    }


@pytest.mark.parametrize("pre", RULES)
def test_words_are_split_by_the_rule_of_the_file(tmp_path: Path, pre: str) -> None:
    """ "12" is a word of the vocabulary; of Llama-3 whatever the merges say."""
    model = make_model()
    path = write_gguf(tmp_path / FILE, model, pre=pre)
    tokens = [*gguf.GGUFReader(path).fields["tokenizer.ggml.tokens"].contents()]
    tokens[257:261] = ["12", "000", "<think>", "ab"]
    kinds = [1] * 256 + [3, 1, 1, 4, 1] + [5] * (len(tokens) - 261)
    facts = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": ["1 2"],
        "tokenizer.ggml.bos_token_id": 256,
        "tokenizer.ggml.eot_token_id": 258,
    }
    file = GgufFile(write_gguf(path, model, pre=pre, facts=facts))
    assert file.generation["eos_token_id"] == [256, 258]
    tokenizer = file.tokenizer()
    first = {"gpt-2": ["12", "0", "0", "0"], "smollm": ["1", "2", "0", "0", "0"]}
    first["qwen2"] = first["smollm"]
    expected = [*first.get(pre, ["12", "0", "0", "0"]), "<think>", *"ab"]
    if pre.startswith("llama"):  # three digits at a time, and "ab" though nothing merges it
        expected = ["<|endoftext|>", "12", "0", "0", "0", "<think>", "ab"]
    ids = tokenizer("12000<think>ab")["input_ids"]
    assert [tokens[index] for index in ids] == expected
    composed = tokenizer("\u00e9")["input_ids"] == tokenizer("e\u0301")["input_ids"]
    assert composed == (pre == "qwen2")


def test_expressions_are_those_of_transformers() -> None:
    theirs = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    for pre, rule in RULES.items():
        assert rule.split == theirs.GGUF_PRE_TOKENIZER_SPLITS.get(pre)


def test_sentence_pieces(tmp_path: Path) -> None:
    """A space comes first, also in front of one; bytes where there is no piece."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces = ["\u2581", "a", "b", "\u2581a", "ab", "\u2581ab", "\u2581\u2581"]
    tokens = words + pieces
    tokens += [f"[PAD{index}]" for index in range(len(tokens), 320)]
    order = [*range(len(words)), 303, 301, 302, 3, 2, 1, 4]
    facts: dict[str, Any] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [float(-rank) for rank in order] + [-999.0] * (320 - len(order)),
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * 7 + [5] * (320 - len(order)),
        "tokenizer.ggml.merges": None,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    path = write_gguf(tmp_path / FILE, make_model(), facts=facts)
    tokenizer = GgufFile(path).tokenizer()
    for text, expected in (
        ("ab", ["<s>", "\u2581ab"]),
        (" ab", ["<s>", "\u2581", "\u2581ab"]),
        ("a\u00e9", ["<s>", "\u2581a", "<0xC3>", "<0xA9>"]),
    ):
        assert tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"]) == expected


@pytest.mark.parametrize(
    ("facts", "sentence"),
    [
        (
            {"general.architecture": "gemma2"},
            "general.architecture: expected one of llama, qwen2, qw",
        ),
        ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type: expected none or linear"),
        ({"llama.rope.dimension_count": 16}, "llama.rope.dimension_count: expected 64, got 16"),
        ({"llama.attention.sliding_window": 9}, "llama.attention.sliding_window: not known here"),
        ({"llama.expert_count": 8}, "llama.expert_count: expected 0, got 8"),
        ({"llama.vocab_size": 319}, "llama.vocab_size: expected 320, got 319"),
        ({"llama.block_count": 3}, "expected a tensor for model.layers.2.*, found nothing"),
        ({"llama.feed_forward_length": 128}, "blk.0.ffn_.*: expected .*128.*, got .*192"),
        ({"split.count": 2}, "split.count: expected a whole model, got one of 2 files; join them"),
        ({"llama.embedding_length": 0}, "as a model of transformers: hidden_size: expected"),
    ],
)
def test_what_is_not_known_is_refused(tmp_path: Path, facts: dict[str, Any], sentence: str) -> None:
    path = write_gguf(tmp_path / FILE, make_model(), facts=facts)
    with pytest.raises(CheckpointError, match=f"{FILE}: {sentence}"):
        GgufFile(path)


def test_a_tensor_that_has_no_place_is_refused(tmp_path: Path) -> None:
    """transformers leaves it out."""
    bias = {"blk.0.attn_q.bias": torch.ones(256)}
    path = write_gguf(tmp_path / FILE, make_model(), tensors=bias)
    with pytest.raises(CheckpointError, match=r"blk.0.attn_q.bias: not known here"):
        GgufFile(path)


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("model", "bert", r"expected 'gpt2' .* got 'bert'; take the tokenizer from the original"),
        ("pre", "default", "expected one of gpt-2, .*, got 'default'; take"),
        ("add_eos_token", True, "expected false, got True"),
        ("token_type", [2] + [1] * 319, r"expected \[1, 3, 4, 5\] for 320 tokens, got \[2\]"),
        ("tokens", ["a"] * 320, "expected different tokens"),
    ],
)
def test_tokenizers_that_are_not_known_are_refused(
    tmp_path: Path, key: str, value: Any, sentence: str
) -> None:
    path = write_gguf(tmp_path / FILE, make_model(), facts={f"tokenizer.ggml.{key}": value})
    with pytest.raises(CheckpointError, match=f"tokenizer.ggml.{key}: {sentence}"):
        GgufFile(path).tokenizer()


def test_qwen2_takes_its_own_words(tmp_path: Path) -> None:
    """AutoTokenizer would take them for the folder in OUT, whatever the file says."""
    path = write_gguf(tmp_path / FILE, make_model("qwen2"), pre="gpt-2")
    with pytest.raises(CheckpointError, match="pre: expected 'qwen2' with a qwen2 model, got 'gpt"):
        GgufFile(path).tokenizer()


def test_damaged_files_are_named(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / FILE, make_model(), "Q8_0").read_bytes()
    for size in (0, 3, 10, 5000, len(whole) // 2, len(whole) - 100):
        (tmp_path / FILE).write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=f"{FILE}: expected a GGUF file, got one that is"):
            GgufFile(tmp_path / FILE)
    with pytest.raises(CheckpointError, match="expected a GGUF file, found none"):
        GgufFile(tmp_path / "none.gguf")
