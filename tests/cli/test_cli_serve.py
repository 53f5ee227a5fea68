"""`resq serve` over HTTP: one server for all, answers compared with transformers' greedy search."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_support import Result

from resq_kernels import DecodeGraph
from resq_kernels.commands import serve
from resq_kernels.testing.quantized_models import random_quantized
from resq_kernels.testing.tiny_models import make_model, make_tokenizer

for package in serve.PACKAGES:
    pytest.importorskip(package, reason=f"the extra `serve` is not installed: no {package}")

NAME = "tiny-resq"
POSITIONS = 512
END = 256
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
HI = {"messages": [{"role": "user", "content": "hi"}]}
COMPLETION, CHAT = "/v1/completions", "/v1/chat/completions"


def whole(text: str) -> str:
    """Text without the beginning of a character at its end, which a stream leaves out."""
    return text.rstrip("\ufffd")


class Server:
    """The process, and requests to it."""

    def __init__(self, process: subprocess.Popen[str], figures: Path, model: Any) -> None:
        self.process, self.figures, self.model = process, figures, model
        self.tokenizer = make_tokenizer()
        self.announced = [process.stdout.readline(), process.stdout.readline()]
        self.port = int(re.search(r"http://127.0.0.1:(\d+)/v1", self.announced[0])[1])

    def request(self, method: str, path: str, body: object = None) -> tuple[int, str, str]:
        """Status, content type and text of an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = body if isinstance(body, str | None) else json.dumps(body)
        connection.request(method, path, data, {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        return response.status, response.headers["content-type"], text

    def post(self, path: str, body: object) -> Any:
        """The JSON of an answer that must be one."""
        status, kind, text = self.request("POST", path, body)
        assert (status, kind) == (200, "application/json"), text
        return json.loads(text)

    def stream(self, path: str, body: dict[str, Any]) -> list[Any]:
        """The events of a streamed answer, which must end with [DONE]."""
        status, kind, text = self.request("POST", path, {**body, "stream": True})
        assert (status, kind) == (200, "text/event-stream; charset=utf-8"), text
        events = text.split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]

    def expected(self, prompt: str, count: int) -> str:
        """What transformers' greedy search says after a text."""
        ids = self.tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            tokens = self.model.generate(
                ids, max_new_tokens=count, do_sample=False, eos_token_id=END, pad_token_id=END
            )
        return self.tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)

    def open(self, until: bytes = b"", **changes: object) -> socket.socket:
        """A client that asks for a long stream, and has read its beginning."""
        client = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        body = json.dumps({"prompt": "left alone", "max_tokens": 400, "stream": True} | changes)
        request = f"POST {COMPLETION} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        client.sendall((request + body).encode())
        got = b""
        while until not in got:
            got += client.recv(4096)
        return client


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("serve")
    # A seed whose answers differ, and go on until they are stopped.
    model = random_quantized("llama", seed=2, max_position_embeddings=POSITIONS)
    model.generation_config.eos_token_id = END
    model.save_pretrained(home / NAME)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(home / NAME)
    figures, log = home / "figures.json", home / "log"
    with open(log, "w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "resq_kernels", "serve", NAME, "--port", "0"]
            + ["--device", "cpu", "--threads", "1", "--json", str(figures)],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=home,
            env={
                **os.environ,
                "PYTHONPATH": str(Path(serve.__file__).resolve().parents[2])
                + os.pathsep
                + os.environ.get("PYTHONPATH", ""),
            },
        )
    try:
        yield Server(process, figures, model)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_health_and_models(server: Server) -> None:
    assert server.request("GET", "/health") == (200, "application/json", '{"status":"ok"}')
    listed = json.loads(server.request("GET", "/v1/models")[2])
    assert listed["object"] == "list"
    assert [(model["id"], model["object"]) for model in listed["data"]] == [(NAME, "model")]


def test_the_announced_command_works(server: Server) -> None:
    assert server.announced[0] == f"serving {NAME} at http://127.0.0.1:{server.port}/v1\n"
    done = subprocess.run(
        ["bash", "-c", server.announced[1]], capture_output=True, text=True, timeout=60
    )
    if done.returncode == 127:
        pytest.skip("this machine has no curl")
    assert json.loads(done.stdout)["choices"][0]["message"]["role"] == "assistant"


def test_a_completion_is_transformers_greedy_search(server: Server) -> None:
    body = {"model": NAME, "prompt": "one two", "max_tokens": 24, "temperature": 0}
    answer = server.post(COMPLETION, body)
    expected = server.expected("one two", 24)
    assert answer["object"] == "text_completion" and answer["model"] == NAME
    assert answer["choices"] == [{"index": 0, "text": expected, "finish_reason": "length"}]
    assert answer["usage"] == {"prompt_tokens": 7, "completion_tokens": 24, "total_tokens": 31}
    events = server.stream(COMPLETION, {**body, "stream_options": {"include_usage": True}})
    assert whole("".join(event["choices"][0]["text"] for event in events)) == whole(expected)
    assert len(events) > 10  # as it comes, not at once
    assert events[-1]["choices"][0]["finish_reason"] == "length"
    assert events[-1]["usage"] == answer["usage"]


def test_chat_follows_the_template(server: Server) -> None:
    system, parts = "be brief", [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "system", "content": system}, {"role": "user", "content": parts}]
    body = {"messages": messages, "max_completion_tokens": 16, "n": 1, "user": "someone"}
    prompt = f"system: {system}<|endoftext|>user: a b<|endoftext|>assistant: "
    expected = server.expected(prompt, 16)
    answer = server.post(CHAT, body)
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": expected}
    events = server.stream(CHAT, body)
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    deltas = [event["choices"][0]["delta"] for event in events]
    assert deltas[0] == {"role": "assistant"} and deltas[-1] == {}
    assert whole("".join(delta.get("content", "") for delta in deltas)) == whole(expected)


def test_sixteen_clients_get_what_each_gets_alone(server: Server) -> None:
    prompts = [f"client number {index}" for index in range(16)]
    expected = [server.expected(prompt, 20) for prompt in prompts]
    assert len(set(expected)) == 16

    def ask(index: int) -> str:
        body = {"prompt": prompts[index], "max_tokens": 20}
        if index % 2:
            return server.post(COMPLETION, body)["choices"][0]["text"]
        events = server.stream(COMPLETION, body)
        return "".join(event["choices"][0]["text"] for event in events)

    with ThreadPoolExecutor(16) as pool:
        assert list(map(whole, pool.map(ask, range(16)))) == list(map(whole, expected))


def test_a_client_that_goes_hurts_nobody(server: Server) -> None:
    began = time.monotonic()
    server.stream(COMPLETION, {"prompt": "left alone", "max_tokens": 400})
    took = time.monotonic() - began
    server.open(until=b'"text"').close()
    began = time.monotonic()
    answer = server.post(COMPLETION, {"prompt": "next", "max_tokens": 8})
    assert time.monotonic() - began < took / 2  # the other was not generated to its end
    assert answer["choices"][0]["text"] == server.expected("next", 8)


def test_a_temperature_samples_and_is_not_needed(server: Server) -> None:
    body = {"prompt": "seeds", "max_tokens": 16}

    def said(**changes: object) -> str:
        return server.post(COMPLETION, body | changes)["choices"][0]["text"]

    assert len({said(temperature=1.5) for _ in range(3)}) == 3
    for greedy in ({}, {"temperature": 0, "seed": 3}, {"temperature": 1.5, "top_p": 1e-6}):
        assert said(**greedy) == server.expected("seeds", 16)


def test_a_stop_string_ends_the_answer(server: Server) -> None:
    text = server.expected("stop here", 40)
    stop = re.search(r"[a-z]", text)[0]
    body = {"prompt": "stop here", "max_tokens": 40, "stop": ["never said", stop]}
    choice = server.post(COMPLETION, body)["choices"][0]
    # transformers' server leaves it in the text.
    assert choice["text"] == text[: text.index(stop) + len(stop)]
    assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        (COMPLETION, "{", "body: Invalid JSON"),
        (COMPLETION, [1], "body: Input should be an object, got '[1]'"),
        (COMPLETION, {}, "prompt: Field required"),
        (COMPLETION, {"prompt": [1, 2]}, "prompt: Input should be a valid string, got '[1, 2]'"),
        (COMPLETION, {"prompt": "\ud800"}, "body: Invalid JSON"),
        (COMPLETION, {"prompt": ""}, "prompt: expected text, got no token"),
        (COMPLETION, {"prompt": "x" * 600}, "at most 512 tokens of prompt and answer"),
        (COMPLETION, {"prompt": "xx", "max_tokens": 511}, "got 2 + 511"),
        (
            COMPLETION,
            {"prompt": "x", "max_tokens": 0},
            "max_tokens: Input should be greater",
        ),
        (COMPLETION, {"prompt": "x", "temperature": "hot"}, "temperature: Input should be a valid"),
        (COMPLETION, {"prompt": "x", "temperature": 2.5}, "less than or equal to 2, got '2.5'"),
        (COMPLETION, {"prompt": "x", "top_p": 0.5}, "top_p: has no effect without a temperature"),
        (COMPLETION, {"prompt": "x", "temperature": 1, "seed": 3}, "seed: the server cannot seed"),
        (COMPLETION, {"prompt": "x", "n": 2}, "n: Input should be 1, got '2'"),
        (COMPLETION, {"prompt": "x", "logprobs": 0}, "logprobs: Input should be null, got '0'"),
        (COMPLETION, {"prompt": "x", "frequency_penalty": 0.5}, "frequency_penalty: Input should"),
        (COMPLETION, {"prompt": "x", "stop": [""]}, "stop"),
        (COMPLETION, {"prompt": "x", "stream": 1}, "stream: Input should be a valid boolean"),
        (COMPLETION, {"prompt": "x", "suffix": "y"}, "suffix: Extra inputs are not permitted"),
        (COMPLETION, {"prompt": "x", "model": "y"}, f"model: expected '{NAME}', got 'y'"),
        (CHAT, {}, "messages: Field required"),
        (CHAT, {**HI, "logprobs": True}, "logprobs: Input should be False"),
        (CHAT, {**HI, "tools": []}, "tools: Extra inputs are not permitted, got '[]'"),
        (CHAT, {"messages": ["hi"]}, "messages.0: Input should be an object"),
        (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role: Input should"),
        (CHAT, {"messages": [{"role": "user", "content": 1}]}, "messages.0.content"),
    ],
)
def test_wrong_requests_are_refused_in_a_sentence(
    server: Server, path: str, body: object, words: str
) -> None:
    status, _, text = server.request("POST", path, body)
    error = json.loads(text)["error"]
    assert (status, error["code"], error["type"]) == (400, 400, "invalid_request_error")
    assert words in error["message"]


@pytest.mark.parametrize("path", ["/reset", "/load_model", "/v1/responses", "/v1/embeddings"])
def test_there_is_no_other_path(server: Server, path: str) -> None:
    assert server.request("POST", path, {"model": NAME})[0] == 404


def test_a_signal_ends_the_server_within_an_answer(server: Server) -> None:
    """The last test of the server."""
    clients = [server.open(until=b'"text"'), server.open(stream=False)]
    clients += [server.open(until=b"HTTP/1.1 200 OK") for _ in range(3)]
    server.process.send_signal(signal.SIGTERM)
    texts = [b"".join(iter(lambda c=client: c.recv(65536), b"")) for client in clients]
    assert all(b"the server is being stopped" in text for text in texts)
    assert b"HTTP/1.1 503" in texts[1] and not any(b"[DONE]" in text for text in texts)
    assert server.process.wait(timeout=20) == 0
    figures = json.loads(server.figures.read_text())
    assert figures["model"] == NAME and figures["requests"] > 16
    log = (server.figures.parent / "log").read_text()
    assert "Traceback" not in log


def answer(app: Any, stream: bool) -> list[Any]:
    """What an application in this process sends to a client that asks for a completion."""
    asked = [json.dumps({"prompt": "x", "stream": stream, "max_tokens": 9}).encode()]
    sent: list[Any] = []

    async def receive() -> Any:
        if not asked:
            await asyncio.Event().wait()  # the client stays
        return {"type": "http.request", "body": asked.pop()}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": COMPLETION, "query_string": b""}
    # What is not in a stream is raised again, and uvicorn logs it.
    with contextlib.nullcontext() if stream else contextlib.suppress(RuntimeError):
        asyncio.run(app(scope | {"headers": []}, receive, send))
    return sent


@pytest.mark.parametrize("stream", [False, True])
def test_answers_come_by_prepared_steps(stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from resq_kernels.commands.serve_app import Application

    steps: list[int] = []
    step = DecodeGraph.step
    monkeypatch.setattr(DecodeGraph, "step", lambda *given: steps.append(1) or step(*given))
    model = random_quantized("llama")
    model.generation_config.eos_token_id = None
    sent = answer(Application("tiny", model, make_tokenizer()), stream)
    assert sent[0]["status"] == 200 and len(steps) == 8


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_is_said(stream: bool) -> None:
    from resq_kernels.commands.serve_app import Application

    model = make_model("llama")
    app = Application("tiny", model, make_tokenizer())
    model.forward = lambda **unused: (_ for _ in ()).throw(RuntimeError("no memory"))
    sent = answer(app, stream)
    assert sent[0]["status"] == (200 if stream else 500)
    text = b"".join(message["body"] for message in sent[1:]).decode()
    error = json.loads(text.removeprefix("data: "))["error"]  # and nothing else: no [DONE]
    assert error == "no memory" if stream else error["message"] == "RuntimeError: no memory"


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_port_in_use_is_said_before_the_model_loads(
    llama: Path, resq: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    monkeypatch.setattr("resq_kernels.commands.streaming.load", None)
    try:
        taken = serve._listen(host, 0)
    except serve.CommandError:
        pytest.skip(f"this machine has no {host}")
    with taken:
        port = taken.getsockname()[1]
        result = resq("serve", llama, "--device", "cpu", "--host", host, "--port", port)
    assert result.code == 1
    sentence = f"--host {host} --port {port}: cannot listen: Address already in use"
    assert result.sentence.startswith(sentence)


@pytest.mark.parametrize("port", ["65536", "-1", "http"])
def test_a_port_that_is_none_is_wrong_usage(resq: Callable[..., Result], port: str) -> None:
    result = resq("serve", "model", f"--port={port}")
    assert result.code == 2 and f"expected a port in [0, 65535], got '{port}'" in result.sentence


def test_a_missing_extra_is_said(
    resq: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = resq("serve", "model")
    assert result.code == 1 and result.sentence.startswith("serve: needs accelerate, fastapi, ")
    assert result.sentence.endswith("; run `pip install 'resq_kernels[serve]'`")
