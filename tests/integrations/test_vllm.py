"""vLLM serves a quantized folder: the tokens of transformers, refusals, HTTP. `make test-vllm`."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from resq_kernels import ResQConfig
from resq_kernels.checkpoint import CheckpointError
from resq_kernels.testing.quantized_models import make_older, random_quantized
from resq_kernels.testing.tiny_models import LLAMA3_ROPE, make_tokenizer

# Before vLLM is imported. The engine runs in this process, so that errors are those of our model.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
pytest.importorskip("vllm", reason="vLLM is not installed: `make test-vllm` has it")
from vllm import LLM, SamplingParams  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent.parent
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
PROMPTS = [
    torch.randint(3, 250, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (25, 130, 1, 70)
]
NEW = 24
GREEDY = SamplingParams(max_tokens=NEW, temperature=0, ignore_eos=True, logprobs=0)
# Chunks of a prompt that end anywhere in a page, and more requests than run at once.
SMALL: dict[str, Any] = {"max_model_len": 256, "max_num_batched_tokens": 48, "max_num_seqs": 3}


def save(folder: Path, model_type: str, options: dict[str, Any], **sizes: Any) -> Path:
    """A quantized model with random values, and a tokenizer that knows all of its tokens."""
    sizes = {"vocab_size": 257, **sizes}
    model = random_quantized(model_type, ResQConfig(**options), **sizes)
    # Of a float32 folder vLLM makes 16 bits, unless it is asked for a dtype.
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("vllm") / "out/model-resq", "llama", {})


@torch.no_grad()
def by_transformers(folder: Path, dtype: torch.dtype) -> tuple[list[list[int]], list[torch.Tensor]]:
    """Greedy tokens of `PROMPTS`, and the logarithms of their probabilities."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    tokens, logprobs = [], []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=None,
            return_dict_in_generate=True,
            output_logits=True,
        )
        new = out.sequences[0, len(prompt) :]
        steps = torch.cat(out.logits).float().log_softmax(-1)
        tokens.append(new.tolist())
        logprobs.append(steps.gather(1, new[:, None])[:, 0])
    return tokens, logprobs


def by_vllm(llm: Any) -> tuple[list[list[int]], list[torch.Tensor], int]:
    """The same, and how many tokens of the prompts were found in vLLM's prefix cache."""
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    requests = llm.generate(prompts, GREEDY, use_tqdm=False)
    outputs = [request.outputs[0] for request in requests]
    tokens = [list(output.token_ids) for output in outputs]
    logprobs = [
        torch.tensor([step[token].logprob for token, step in zip(new, out.logprobs, strict=True)])
        for new, out in zip(tokens, outputs, strict=True)
    ]
    return tokens, logprobs, sum(request.num_cached_tokens for request in requests)


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], torch.dtype]] = {
    "llama": ("llama", {}, {"rope_parameters": LLAMA3_ROPE}, torch.float32),
    "llama-128": ("llama", {"embedding_bits": 16}, {"head_dim": 128}, torch.bfloat16),
    "qwen2-tied": ("qwen2", {"lo_bits": 8}, {"tie_word_embeddings": True}, torch.bfloat16),
    "llama-quik": ("llama", {"method": "quik"}, {}, torch.bfloat16),
    "qwen2-rtn": ("qwen2", {"method": "rtn"}, {}, torch.float16),
    "qwen3": ("qwen3", {}, {"head_dim": 128, "attention_bias": True}, torch.bfloat16),
    "mistral": ("mistral", {}, {}, torch.bfloat16),
    "smollm3": ("smollm3", {}, {"mlp_bias": True}, torch.float32),
    "format-2": ("llama", {"activation_clip": 1.0, "hadamard_block": 0}, {}, torch.float32),
}


@pytest.mark.parametrize("case", CASES)
def test_bits_are_those_of_transformers(tmp_path: Path, case: str) -> None:
    """Twice: the second time pages of the long prompts are found in vLLM's prefix cache."""
    model_type, options, sizes, dtype = CASES[case]
    save(tmp_path, model_type, options, **sizes)
    if case == "format-2":
        make_older(tmp_path, 2)
    tokens, logprobs = by_transformers(tmp_path, dtype)
    llm = LLM(str(tmp_path), dtype=dtype, **SMALL)
    for known in (0, 128):
        found, found_logprobs, cached = by_vllm(llm)
        assert found == tokens
        assert all(map(torch.equal, found_logprobs, logprobs))
        assert cached == known


@pytest.mark.parametrize("case", ["llama", "qwen2-tied", "llama-128"])
def test_bits_of_two_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """Tensor parallel: each has a key/value head, with pages of its own."""
    model_type, options, sizes, dtype = CASES[case]
    save(tmp_path, model_type, options, **sizes, vocab_size=258, num_key_value_heads=2)
    tokens, logprobs = by_transformers(tmp_path, dtype)
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # of `heads`, below
    llm = LLM(str(tmp_path), dtype=dtype, tensor_parallel_size=2, **SMALL)
    found, found_logprobs, _ = by_vllm(llm)
    assert found == tokens
    assert all(map(torch.equal, found_logprobs, logprobs))

    def heads(worker: Any) -> list[int]:
        return [cache.shape[1] for cache in worker.model_runner.kv_caches]

    assert llm.collective_rpc(heads) == [[1, 1]] * 2


def test_bits_after_a_preemption(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """6 pages of 32 tokens: vLLM takes those of a request away and computes its tokens again."""
    from vllm.v1.core.sched.scheduler import Scheduler

    preempted = []
    preempt = Scheduler._preempt_request

    def counted(self: Any, request: Any, *arguments: Any, **named: Any) -> None:
        preempted.append(request.request_id)
        preempt(self, request, *arguments, **named)

    monkeypatch.setattr(Scheduler, "_preempt_request", counted)
    tokens, logprobs = by_transformers(folder, torch.bfloat16)
    few: dict[str, Any] = {
        **SMALL,
        "max_model_len": 160,
        "block_size": 32,
        "num_gpu_blocks_override": 7,
    }
    found, found_logprobs, _ = by_vllm(LLM(str(folder), **few))
    assert found == tokens
    assert all(map(torch.equal, found_logprobs, logprobs))
    assert preempted


@pytest.mark.parametrize("processes", [1, 2])
def test_a_float_cache_is_vllms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    """Whose attention sums in another order, so that bits differ; in float32 tokens do not."""
    save(tmp_path, "llama", {"kv_bits": 16}, vocab_size=258)
    tokens, logprobs = by_transformers(tmp_path, torch.float32)
    if processes == 2:
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    llm = LLM(str(tmp_path), dtype="float32", tensor_parallel_size=processes, **SMALL)
    found, found_logprobs, _ = by_vllm(llm)
    assert found == tokens
    for a, b in zip(found_logprobs, logprobs, strict=True):
        torch.testing.assert_close(a, b, atol=0.02, rtol=0)


def test_memory_is_planned_with_the_bytes_of_4_bit_pages(folder: Path) -> None:
    """1 GiB for 2 layers of 2 heads, K and V of 64 dims in 88 bytes, 128 tokens a page."""
    llm = LLM(str(folder), **SMALL)
    [shapes] = llm.collective_rpc(lambda worker: [x.shape for x in worker.model_runner.kv_caches])
    assert shapes == [((1 << 30) // (2 * 2 * 88 * 128), 2, 128, 88)] * 2


def test_prompt_embeddings_are_those_of_the_float_model(folder: Path) -> None:
    """The copy has forgotten the ids, so that transformers' model rotates it, too."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        embeds = model.get_input_embeddings()(torch.tensor(PROMPTS[1])).clone()
        expected = model(inputs_embeds=embeds[None]).logits[0, -1].log_softmax(-1)
    llm = LLM(str(folder), dtype="float32", enable_prompt_embeds=True, **SMALL)
    one = SamplingParams(max_tokens=1, temperature=0, logprobs=0)
    out = llm.generate([{"prompt_embeds": embeds}], one, use_tqdm=False)[0].outputs[0]
    [token] = out.token_ids
    assert token == expected.argmax()
    torch.testing.assert_close(torch.tensor(out.logprobs[0][token].logprob), expected[token])


REFUSALS = [
    ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype: expected 'auto' .* kv_bits=4 .*, got 'fp8'"),
    ({"runner": "pooling"}, "runner: expected 'generate' .*, got 'pooling'"),
    ({"load_format": "dummy"}, "load_format: expected one that reads weights, got 'dummy'"),
    ({"block_size": 16}, r"No common block size for 16 \(RESQ_PAGES: "),
    ({"enable_lora": True}, "ResQForCausalLM does not support LoRA"),
]


@pytest.mark.parametrize(("option", "words"), REFUSALS, ids=lambda value: str(value))
def test_what_vllm_cannot_do_with_it_is_refused(
    folder: Path, option: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        LLM(str(folder), **SMALL, **option)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"tensor_parallel_size": 2}, r"expected a degree that divides vocab_size \(257\), got 2"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size: expected 1 .*, got 2"),
    ],
    ids=lambda value: str(value),
)
def test_how_it_cannot_be_split_is_refused(
    folder: Path, option: dict[str, Any], words: str
) -> None:
    """By the model, where a machine has a place for two processes."""
    from vllm.engine.arg_utils import EngineArgs

    from resq_kernels.integrations.vllm_model import ResQForCausalLM

    config = EngineArgs(str(folder), **option).create_engine_config()
    with pytest.raises(ValueError, match=words):
        ResQForCausalLM(vllm_config=config)


def test_an_older_vllm_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.__version_tuple__", (0, 31, 2))
    with pytest.raises(ValueError, match=r"vLLM: expected 0\.32 or newer, got "):
        LLM(str(folder), **SMALL)


def test_a_damaged_folder_is_refused(tmp_path: Path) -> None:
    save(tmp_path, "llama", {})
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.self_attn.key_rotation"][0, 0, 0] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="key_rotation.*: expected the hash sha256:"):
        LLM(str(tmp_path), **SMALL)


def test_angles_that_depend_on_the_longest_request_are_refused(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    save(tmp_path, "llama", {}, rope_parameters=rope)
    with pytest.raises(ValueError, match="rope_type: expected .*, got 'dynamic'"):
        LLM(str(tmp_path), **SMALL)


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    save(tmp_path, "llama", {})
    path = tmp_path / "config.json"
    content = json.loads(path.read_text()) | {"architectures": ["GemmaForCausalLM"]}
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="expected LlamaForCausalLM or .*, got Gemma"):
        LLM(str(tmp_path), **SMALL)


def snippets() -> list[str]:
    """The Python of the section about vLLM in docs/integrations.md: offline, and a client."""
    section = (ROOT / "docs/integrations.md").read_text().partition("\n## vLLM\n")[2]
    return re.findall(r"```python\n(.*?)```", section.partition("\n## ")[0], re.S)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[str]:
    """The address of a server for out/model-resq, started as docs/integrations.md says, but for
    the port. (`vllm serve` is the same, but the program `vllm` of this CPU wheel does not start.)
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command = [*program, "--model", "out/model-resq", "--host", "127.0.0.1", "--port", str(port)]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with subprocess.Popen(command, cwd=folder.parent.parent, env=environment) as process:
        try:
            address = f"http://127.0.0.1:{port}"
            wait_until_healthy(f"{address}/health", process)
            yield address
        finally:
            process.terminate()
            process.wait(60)


def wait_until_healthy(url: str, process: subprocess.Popen[bytes], seconds: int = 300) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:
            if answer.status == 200:
                return
        time.sleep(1)
    pytest.fail(f"{url}: expected 200 within {seconds} s, the server's status is {process.poll()}")


def test_openai_client(server: str, folder: Path) -> None:
    """Completion, chat and a streamed chat give the tokens of transformers."""
    from openai import OpenAI

    client = OpenAI(base_url=f"{server}/v1", api_key="none")
    [listed] = client.models.list().data
    options: dict[str, Any] = {
        "model": listed.id,
        "max_tokens": NEW,
        "temperature": 0,
        "extra_body": {"ignore_eos": True, "return_token_ids": True},
    }
    messages: Any = [{"role": "user", "content": "hi"}]
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE

    def expected(text: str) -> list[int]:
        ids = tokenizer(text, return_tensors="pt").input_ids
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=None,
        )
        tokens: list[int] = out[0, ids.shape[1] :].tolist()
        return tokens

    [choice] = client.completions.create(prompt="To be or", **options).choices
    assert choice.token_ids == expected("To be or")
    asked = expected("user: hi<|endoftext|>assistant: ")
    [choice] = client.chat.completions.create(messages=messages, **options).choices
    assert choice.token_ids == asked
    stream = client.chat.completions.create(messages=messages, stream=True, **options)
    chunks = [chunk.choices[0] for chunk in stream if chunk.choices]
    assert sum((getattr(chunk, "token_ids", None) or [] for chunk in chunks), []) == asked
    assert len(chunks) > 5 and chunks[-1].finish_reason == "length"


def test_the_client_in_the_docs_runs(server: str, capfd: pytest.CaptureFixture[str]) -> None:
    _, client = snippets()
    assert "http://127.0.0.1:8000/v1" in client
    exec(client.replace("http://127.0.0.1:8000", server), {})
    assert capfd.readouterr().out


def test_the_program_in_the_docs_runs(folder: Path, tmp_path: Path) -> None:
    """In a process of its own: the engine starts others, which import the file."""
    program, _ = snippets()
    (tmp_path / "program.py").write_text(program)
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    command = [sys.executable, tmp_path / "program.py"]
    subprocess.run(command, cwd=folder.parent.parent, env=environment, check=True, timeout=300)
