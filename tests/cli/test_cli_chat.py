"""`resq chat` and `generate --chat`: every answer is that of transformers' own generate on the
rendered template, whatever of the earlier turns was cached; what ends a turn and a conversation."""

from __future__ import annotations

import io
import json
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_support import Result
from transformers import PreTrainedTokenizerFast

from resq_kernels import ResQConfig, graph_decoding
from resq_kernels.chat_template import end_of_turn
from resq_kernels.commands import chat, streaming
from resq_kernels.commands.conversation import Conversation, _keys_are_final
from resq_kernels.testing.quantized_models import random_quantized
from resq_kernels.testing.tiny_models import make_model, make_tokenizer

END = 257  # <|end|>; <|endoftext|> is 256
POSITIONS = 128
TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] + ':' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
# What some templates do to the reasoning of earlier answers.
FORGETFUL = TEMPLATE.replace(
    "m['content']", "(m['content'] if m['role'] != 'assistant' or loop.last else '...')"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}"
NO_SYSTEM += "{% endif %}" + TEMPLATE
IGNORES_SYSTEM = TEMPLATE.replace("{{ m", "{% if m['role'] != 'system' %}{{ m").replace(
    "}}{% endfor", "}}{% endif %}{% endfor"
)


def chat_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """One token a byte, and `<|end|>`."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    assert tokenizer.convert_tokens_to_ids("<|end|>") == END
    tokenizer.chat_template = template
    return tokenizer


def float_model() -> Any:
    return make_model("llama", max_position_embeddings=POSITIONS)


MODELS: dict[str, Callable[[], Any]] = {
    "float llama": float_model,
    "llama": lambda: random_quantized("llama", max_position_embeddings=POSITIONS),
    "qwen2": lambda: random_quantized("qwen2", max_position_embeddings=POSITIONS),
    "16-bit keys": lambda: random_quantized(
        "llama", ResQConfig(kv_bits=16), max_position_embeddings=POSITIONS
    ),
    "dynamic rope": lambda: make_model(
        "llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    ),
}


def one_shot(model: Any, template: str, messages: list[dict[str, str]], new: int) -> list[int]:
    """New tokens of transformers' greedy search after the whole history, with its own cache."""
    ids = chat_tokenizer(template).apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        tokens = model.generate(
            **ids, max_new_tokens=new, do_sample=False, eos_token_id=[256, END], pad_token_id=256
        )
    return tokens[0, ids["input_ids"].shape[1] :].tolist()


def ends_after(model: Any, messages: list[dict[str, str]], count: int, end: int) -> None:
    """Makes the model emit `end` where it would emit its token number `count`."""
    token = one_shot(model, TEMPLATE, messages, count + 1)[count]
    with torch.no_grad():
        rows = model.lm_head.weight
        rows[[token, end]] = rows[[end, token]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float model whose answer to "hi" ends with `<|end|>` after 5 tokens. Its generation
    settings name another end token."""
    path = tmp_path_factory.mktemp("chat") / "model"
    model = float_model()
    ends_after(model, [{"role": "user", "content": "hi"}], 5, END)
    assert model.generation_config.eos_token_id == 256
    model.save_pretrained(path)
    chat_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    return lambda text: monkeypatch.setattr("sys.stdin", io.StringIO(text))


@pytest.mark.parametrize("template", [TEMPLATE, FORGETFUL], ids=["stable", "forgetful"])
@pytest.mark.parametrize("name", MODELS)
def test_turns_equal_one_shot_generation_over_the_whole_history(name: str, template: str) -> None:
    model, tokenizer = MODELS[name](), chat_tokenizer(template)
    talk = Conversation(model, tokenizer, "s")
    messages, before = [{"role": "system", "content": "s"}], 0
    for number, text in enumerate(("hello", "and you", "x")):
        messages.append({"role": "user", "content": text})
        expected = one_shot(model, template, messages, 8)
        turn = talk.reply(text, 8)
        assert turn.generation.ids == expected, number
        messages.append({"role": "assistant", "content": turn.assistant})
        assert turn.assistant == tokenizer.decode(turn.generation.shown, skip_special_tokens=True)
        if number == 0 or name == "dynamic rope":
            assert turn.cached_tokens == 0
        elif template == TEMPLATE:
            # All of the last prompt at least; random bytes of answers may be other tokens again.
            assert before <= turn.cached_tokens <= before + 8
        else:
            assert 0 < turn.cached_tokens < turn.generation.prompt_tokens
        before = turn.generation.prompt_tokens
    talk.reset()
    first = talk.reply("hello", 8)
    assert (first.cached_tokens, first.generation.ids) == (
        0,
        one_shot(model, template, messages[:2], 8),
    )


def test_prepared_steps_give_the_same_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding as on a GPU, over a cache that earlier turns filled and that is cropped."""
    tokenizer = chat_tokenizer(FORGETFUL)
    expected, found = (Conversation(MODELS["llama"](), tokenizer) for _ in range(2))
    turns = [expected.reply(text, 8) for text in ("hello", "and you", "x")]
    monkeypatch.setattr(
        streaming,
        "_decoding",
        lambda _, streamer: {"custom_generate": partial(graph_decoding, streamer=streamer)},
    )
    for turn in turns:
        again = found.reply(turn.user, 8, stop=lambda: False)
        assert (again.generation.ids, again.cached_tokens) == (
            turn.generation.ids,
            turn.cached_tokens,
        )


@pytest.mark.parametrize("end", [256, END])
def test_an_answer_stops_at_the_end_tokens_of_settings_and_template(end: int) -> None:
    model = float_model()
    ends_after(model, [{"role": "user", "content": "hi"}], 5, end)
    out = io.StringIO()
    turn = Conversation(model, chat_tokenizer()).reply("hi", 20, out=out)
    assert (len(turn.generation.ids), turn.generation.ids[-1], turn.end) == (6, end, "end token")
    assert out.getvalue() == turn.assistant + "\n"
    assert Conversation(model, chat_tokenizer()).reply("hi", 5).end == "limit"


def test_end_token_that_is_not_special_is_not_shown() -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<|end|>"])
    tokenizer.chat_template = TEMPLATE
    assert end_of_turn(tokenizer) == END
    model, out = float_model(), io.StringIO()
    ends_after(model, [{"role": "user", "content": "hi"}], 5, END)
    turn = Conversation(model, tokenizer).reply("hi", 20, out=out)
    assert turn.end == "end token" and "<|end|>" not in turn.assistant
    assert out.getvalue() == turn.assistant + "\n"


@pytest.mark.parametrize(
    ("template", "end"),
    [
        ("{% for m in messages %}{{ m['content'] + '\n<|end|>\n' }}{% endfor %}", END),
        ("{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}", None),
        ("{% for m in messages %}{{ m['role'] }}{% endfor %}", None),
    ],
)
def test_end_of_turn_is_the_special_token_behind_an_answer(template: str, end: int | None) -> None:
    assert end_of_turn(chat_tokenizer(template)) == end


def test_lines_of_a_pipe_are_turns(
    folder: Path, tmp_path: Path, resq: Callable[..., Result], stdin: Callable[[str], None]
) -> None:
    target = tmp_path / "chat.json"
    stdin("hi\n\nyou\n/reset\nhi\n/exit\nnot read\n")
    result = resq("chat", folder, "--max-new-tokens", 6, "--json", target)
    assert result.code == 0, result.err
    figures = json.loads(target.read_text())
    assert set(figures) == {"model", "adapter", "turns"}
    turns = figures["turns"]
    assert [turn["user"] for turn in turns] == ["hi", "you", "hi"]
    assert set(turns[0]) == {
        "user", "assistant", "end", "cached_tokens", "prompt_tokens", "new_tokens",
        "prefill_seconds", "decode_seconds", "tokens_per_second",
    }  # fmt: skip
    assert turns[0]["end"] == "end token" and turns[0]["assistant"] == turns[2]["assistant"]
    assert [turn["cached_tokens"] > 0 for turn in turns] == [False, True, False]
    assert result.out == "".join(turn["assistant"] + "\n" for turn in turns)
    assert "resq: 3 turns, " in result.err
    cut = [turn for turn in turns if turn["end"] == "limit"]
    assert result.err.count("the answer was cut after 6 tokens") == len(cut)


def test_generate_answers_a_message(folder: Path, tmp_path: Path, resq: Callable) -> None:
    target = tmp_path / "out.json"
    options = ("--chat", "--prompt", "hi", "--max-new-tokens", 9)
    result = resq("generate", folder, *options, "--json", target)
    assert result.code == 0, result.err
    figures = json.loads(target.read_text())
    assert figures["new_tokens"] == 6 and result.out == figures["text"] + "\n"
    result = resq("generate", folder, *options, "--system", "s", "--json", target)
    model = float_model()
    ends_after(model, [{"role": "user", "content": "hi"}], 5, END)
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]
    expected = [t for t in one_shot(model, TEMPLATE, messages, 9) if t < 256]
    assert json.loads(target.read_text())["text"] == chat_tokenizer().decode(expected)
    result = resq("generate", folder, "--prompt", "hi", "--system", "s")
    assert (result.code, result.sentence) == (2, "--system: needs --chat")


def test_sampling_follows_the_seed(
    folder: Path, resq: Callable[..., Result], stdin: Callable[[str], None]
) -> None:
    def answers(seed: int) -> str:
        stdin("hi\nhi\n")
        options = ("--temperature", 2, "--seed", seed, "--max-new-tokens", 8)
        return resq("chat", folder, *options).out

    assert answers(1) == answers(1) != answers(2)


@pytest.mark.parametrize(
    ("template", "options", "sentence"),
    [
        (None, (), "expected a tokenizer with a chat template, got one without; a base model"),
        (NO_SYSTEM, ("--system", "s"), "the chat template refuses the messages: no system role"),
        (IGNORES_SYSTEM, ("--system", "s"), "--system: the chat template of "),
        ("{% if %}", (), "the chat template refuses the messages: "),
    ],
)
def test_templates_that_do_not_fit_are_refused_before_the_model_is_loaded(
    tmp_path: Path,
    resq: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
    template: str | None,
    options: tuple[str, ...],
    sentence: str,
) -> None:
    float_model().config.save_pretrained(tmp_path)
    chat_tokenizer(template).save_pretrained(tmp_path)
    monkeypatch.setattr(streaming, "load", None)
    for command in (("chat",), ("generate", "--chat", "--prompt", "x")):
        result = resq(*command, tmp_path, *options)
        assert result.code == 1
        assert sentence in result.sentence
        assert template is not None or "`resq generate" in result.sentence


def test_a_conversation_beyond_the_positions_is_refused_and_stays(
    folder: Path,
    resq: Callable[..., Result],
    stdin: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wide = "y" * (POSITIONS - 20)
    stdin(f"hi\n{wide}\n")
    result = resq("chat", folder, "--max-new-tokens", 6)
    assert result.code == 2
    assert f"message: expected fewer than {POSITIONS} tokens (the model's" in result.sentence
    assert "start a new conversation (/reset)" in result.sentence

    lines = iter(["hi", wide, "you", "/reset", wide])

    def typed(prompt: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    result = resq("chat", folder, "--max-new-tokens", 50)
    assert result.code == 0, result.err
    assert result.err.count("message: expected fewer than") == 1
    assert "only 15 positions are left after the prompt" in result.err
    assert "resq: 3 turns" in result.err  # hi, you, and the wide one after /reset
    expected = [t for t in second_answer(folder) if t < 256]
    assert chat_tokenizer().decode(expected) in result.out


def second_answer(folder: Path) -> list[int]:
    """The answer to "you" after "hi" and its answer."""
    model = float_model()
    ends_after(model, [{"role": "user", "content": "hi"}], 5, END)
    messages = [{"role": "user", "content": "hi"}]
    first = one_shot(model, TEMPLATE, messages, 50)
    answer = chat_tokenizer().decode(first[:-1])
    messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "you"}]
    return one_shot(model, TEMPLATE, messages, 50)


@pytest.mark.usefixtures("sigint")
@pytest.mark.parametrize("times", [1, 2])
def test_sigint_ends_an_answer_and_a_second_one_the_program(
    folder: Path,
    tmp_path: Path,
    resq: Callable[..., Result],
    stdin: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    times: int,
) -> None:
    replied = Conversation.reply

    def reply(self: Conversation, text: str, *rest: Any, stop: Callable[[], bool], **more: Any):
        def interrupted() -> bool:
            if text == "hi":
                for _ in range(times):
                    signal.raise_signal(signal.SIGINT)
            return stop()

        return replied(self, text, *rest, stop=interrupted, **more)

    monkeypatch.setattr(chat.Conversation, "reply", reply)
    stdin("hi\nyou\n")
    target, before = tmp_path / "chat.json", signal.getsignal(signal.SIGINT)
    result = resq("chat", folder, "--max-new-tokens", 6, "--json", target)
    assert signal.getsignal(signal.SIGINT) is before
    if times == 2:
        assert (result.code, result.err) == (130, "\nresq: interrupted\n")
        assert not target.exists()
        return
    assert result.code == 0, result.err
    first, second = json.loads(target.read_text())["turns"]
    assert (first["new_tokens"], first["end"]) == (1, "stopped")
    assert "the answer was cut after 1 tokens" in result.err
    model = float_model()
    ends_after(model, [{"role": "user", "content": "hi"}], 5, END)
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": first["assistant"]},
        {"role": "user", "content": "you"},
    ]
    expected = [token for token in one_shot(model, TEMPLATE, messages, 6) if token < 256]
    assert second["assistant"] == chat_tokenizer().decode(expected)


def test_input_that_is_not_text_is_refused(
    folder: Path, resq: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\xff"), encoding="utf-8"))
    result = resq("chat", folder)
    assert result.code == 2
    assert result.sentence.startswith("stdin: expected text, got bytes that are not (")
    assert resq("chat", folder, "--system", "\udcff").sentence.startswith("--system: expected text")


@pytest.mark.parametrize("template", [TEMPLATE, None])
def test_a_continuation_without_a_word_points_to_chat(
    tmp_path: Path, resq: Callable[..., Result], template: str | None
) -> None:
    model = float_model()
    ids = make_tokenizer()("hi", return_tensors="pt")["input_ids"]
    token = model(input_ids=ids).logits[0, -1].argmax()
    with torch.no_grad():
        model.lm_head.weight[256] = 2 * model.lm_head.weight[token]
    model.save_pretrained(tmp_path)
    chat_tokenizer(template).save_pretrained(tmp_path)
    result = resq("generate", tmp_path, "--prompt", "hi")
    assert (result.code, result.out) == (0, "hi\n")
    assert ("wants --chat" in result.err) == (template is not None)


def test_a_window_of_mistral_keeps_no_keys() -> None:
    """Its cache forgets what is behind the window, so that it cannot be cropped."""
    assert _keys_are_final(make_model("mistral")) and _keys_are_final(make_model("qwen3"))
    assert not _keys_are_final(make_model("mistral", sliding_window=64))
