"""Chat templates as tokens: what stands before, between and behind the messages."""

from __future__ import annotations

from typing import Any

import pytest

from resq_kernels.chat_template import Between, Template, TemplateError, read_template
from resq_kernels.testing.tiny_models import make_tokenizer

MARKS = ["<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|header|>", "<s>", "</s>"]
IM_START, IM_END, EOT, HEADER, BOS, EOS = range(257, 263)
TEXT_END = 256  # the tokenizer's own

CHATML = """\
{%- if messages[0]['role'] != 'system' -%}<|im_start|>system
Be kind.<|im_end|>
{% endif -%}
{%- for m in messages -%}<|im_start|>{{ m['role'] }}
{{ m['content'] }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}"""
LLAMA_3 = """\
{{- '<s><|header|>system\n' }}
{%- if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}
{{- date_string }}
{{- '<|eot_id|>' }}
{%- for m in messages %}
{{- '<|header|>' + m['role'] + '\n' + m['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|header|>assistant\n' }}{% endif %}"""
LLAMA_2 = """\
{%- for m in messages %}
{%- if m['role'] == 'user' %}{{- '<s>[INST] ' + m['content'] + ' [/INST]' }}
{%- else %}{{- ' ' + m['content'] + ' </s>' }}{% endif %}
{%- endfor %}"""


def tokenizer(template: str | None) -> Any:
    found = make_tokenizer()
    found.add_special_tokens({"additional_special_tokens": MARKS})
    found.chat_template = template
    return found


def test_chatml() -> None:
    t = tokenizer(CHATML)
    found = read_template(t)
    assert t.decode(found.start) == ("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n")
    question, answer = found.between
    assert question.ends == answer.ends == (TEXT_END, IM_END)
    assert t.decode(question.following) == "\n<|im_start|>assistant\n"
    assert t.decode(answer.following) == "\n<|im_start|>user\n"


def test_a_template_with_a_date_gives_the_same_tokens_tomorrow() -> None:
    t = tokenizer(LLAMA_3)
    found = read_template(t)
    assert t.decode(found.start) == ("<s><|header|>system\n26 Jul 2024<|eot_id|><|header|>user\n")
    assert found.between == (
        Between((TEXT_END, EOT), (HEADER, *t("assistant\n").input_ids)),
        Between((TEXT_END, EOT), (HEADER, *t("user\n").input_ids)),
    )


def test_a_question_that_ends_by_no_token_of_its_own() -> None:
    """The model writes "[/INST]" and its answer itself."""
    t = tokenizer(LLAMA_2)
    begin = (BOS, *t("[INST] ").input_ids)
    assert read_template(t) == Template(begin, (Between((TEXT_END, EOS), begin),))


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, "the tokenizer has no chat template$"),
        ("{{ raise_exception('only one message') }}", "refuses the messages: only one message$"),
        ("{% for m in messages %}{{ m['role'] }}{% endfor %}", "does not write every message once"),
        (CHATML.replace("m['content']", "m['content'] + m['content']"), "every message once"),
        ("{% for m in messages %}{{ m['content'] + '<|im_end|>' }}{% endfor %}", "has nothing bef"),
        ("{% for m in messages %}{{ 'x' + m['content'] }}{% endfor %}", "no special token behind"),
    ],
)
def test_templates_in_which_none_is_written(template: str | None, words: str) -> None:
    with pytest.raises(TemplateError, match=words):
        read_template(tokenizer(template))
