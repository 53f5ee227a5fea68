"""The tokenizer of a GGUF file.

A byte-level vocabulary is built here, since transformers 5.24 splits the words of SmolLM as GPT-2
does, forgets that Llama-3 takes a whole word where the vocabulary has it and puts BOS in front, and
does not normalize for Qwen2. A SentencePiece vocabulary is built by transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resq_kernels.safetensors_io import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KEY = "tokenizer.ggml."
ORDINARY, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # of tokenizer.ggml.token_type
SPACE = "\u2581"  # of SentencePiece

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


@dataclass(frozen=True)
class Rule:
    """How a byte-level tokenizer reads a text.

    Attributes:
        split: the words, as an expression; None: those of GPT-2.
        digits: whether every digit is a word, before anything else.
        nfc: whether the text is normalized first.
        whole_words: whether a word of the vocabulary is one token, whatever the merges make of it.
        bos: whether BOS comes first, where the file does not say.
    """

    split: str | None = None
    digits: bool = False
    nfc: bool = False
    whole_words: bool = False
    bos: bool = False


_LLAMA3_RULE = Rule(_LLAMA3, whole_words=True, bos=True)
RULES = {
    "gpt-2": Rule(),
    "smollm": Rule(digits=True),
    "llama-bpe": _LLAMA3_RULE,
    "llama3": _LLAMA3_RULE,
    "llama-v3": _LLAMA3_RULE,
    "qwen2": Rule(_QWEN2, nfc=True),
}
"""tokenizer.ggml.pre -> the rule."""


def read_tokenizer(path: Path, facts: dict[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer, with the file's special tokens and chat template.

    Args:
        path: the file.
        facts: its header.

    Raises:
        CheckpointError: another kind of vocabulary or rule; the message names the key.
    """
    kind, pre = facts.get(f"{KEY}model"), facts.get(f"{KEY}pre")
    model = facts.get("general.architecture")
    if model in ("qwen2", "qwen3") and (kind, pre) != ("gpt2", "qwen2"):
        # Whatever tokenizer.json says, AutoTokenizer splits words as Qwen2 does.
        raise _error(path, "pre", f"'qwen2' with a {model} model", pre)
    if kind == "gpt2":
        return _byte_level(path, facts)
    if kind == "llama":
        return _sentence_pieces(path, facts)
    raise _error(path, "model", "'gpt2' (byte-level BPE) or 'llama' (SentencePiece)", kind)


def _byte_level(path: Path, facts: dict[str, Any]) -> PreTrainedTokenizerBase:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
    from tokenizers import pre_tokenizers as pre

    rule = RULES.get(facts.get(f"{KEY}pre", ""))
    if rule is None:
        raise _error(path, "pre", f"one of {', '.join(RULES)}", facts.get(f"{KEY}pre"))
    for key in ("add_space_prefix", "add_eos_token"):
        if facts.get(f"{KEY}{key}"):
            raise _error(path, key, "false", True)
    words, kinds = facts[f"{KEY}tokens"], facts.get(f"{KEY}token_type", [])
    vocabulary = {word: index for index, word in enumerate(words)}
    known = {ORDINARY, CONTROL, USER_DEFINED, UNUSED}
    if len(kinds) != len(words) or not set(kinds) <= known:
        others = sorted(set(kinds) - known)
        raise _error(path, "token_type", f"{sorted(known)} for {len(words)} tokens", others)
    if len(vocabulary) != len(words):
        raise _error(path, "tokens", "different tokens", f"{len(words) - len(vocabulary)} twice")
    merges = [tuple(merge.split(" ")) for merge in facts[f"{KEY}merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, ignore_merges=rule.whole_words)
    )
    if rule.nfc:
        tokenizer.normalizer = normalizers.NFC()
    steps: list[Any] = [pre.Digits(individual_digits=True)] if rule.digits else []
    if rule.split is None:
        steps.append(pre.ByteLevel(add_prefix_space=False))
    else:
        steps += [
            pre.Split(Regex(rule.split), behavior="isolated"),
            pre.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    tokenizer.pre_tokenizer = pre.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    for word, kind in zip(words, kinds, strict=True):
        if kind == CONTROL:
            tokenizer.add_special_tokens([AddedToken(word, normalized=False, special=True)])
        elif kind == USER_DEFINED:
            tokenizer.add_tokens([AddedToken(word, normalized=False, special=False)])
    return _wrap(tokenizer, facts, facts.get(f"{KEY}add_bos_token", rule.bos))


def _sentence_pieces(path: Path, facts: dict[str, Any]) -> PreTrainedTokenizerBase:
    from tokenizers import normalizers
    from transformers import AutoTokenizer

    for key, only in (("add_space_prefix", True), ("add_eos_token", False)):
        if facts.get(f"{KEY}{key}", only) != only:
            raise _error(path, key, str(only).lower(), not only)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:
        raise CheckpointError(f"{path}: the tokenizer does not load: {error}") from error
    words, kinds = facts[f"{KEY}tokens"], facts.get(f"{KEY}token_type", [])
    for index, (word, kind) in enumerate(zip(words, kinds, strict=True)):
        if kind in (CONTROL, USER_DEFINED) and tokenizer.convert_tokens_to_ids(word) != index:
            raise _error(path, "tokens", f"{word!r} to be token {index}", "another in transformers")
    backend = tokenizer.backend_tokenizer
    # As in Llama-2's tokenizer.json: SentencePiece puts a space in front of a space too.
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    )
    backend.pre_tokenizer = None
    return _wrap(backend, facts, facts.get(f"{KEY}add_bos_token", True))


def _wrap(tokenizer: Any, facts: dict[str, Any], bos_first: bool) -> PreTrainedTokenizerBase:
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    special = _special(facts)
    bos = special.get("bos_token")
    if bos_first and bos is not None:
        tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos} $B",
            special_tokens=[(bos, tokenizer.token_to_id(bos))],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=_chat_template(facts),
        clean_up_tokenization_spaces=False,
        **special,
    )


def _special(facts: dict[str, Any]) -> dict[str, str]:
    """Name -> text of the special tokens that the file names."""
    keys = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    found = {f"{name}_token": facts.get(f"{KEY}{key}_token_id") for name, key in keys.items()}
    return {name: facts[f"{KEY}tokens"][i] for name, i in found.items() if i is not None}


def _chat_template(facts: dict[str, Any]) -> str | dict[str, str] | None:
    """The template, or all by name where the file has several."""
    first = "tokenizer.chat_template"
    named = {
        key.removeprefix(f"{first}."): text
        for key, text in facts.items()
        if key.startswith(f"{first}.")
    }
    default: str | None = facts.get(first)
    return {"default": default, **named} if named and default else default


def _error(path: Path, key: str, expected: str, got: object) -> CheckpointError:
    return CheckpointError(
        f"{path}: {KEY}{key}: expected {expected}, got {got!r}; take the tokenizer from the "
        "original model's folder (`resq quantize --tokenizer`)"
    )
