"""transformers' server for one model, behind a check of what it would drop or answer wrongly.

Imported by `resq serve` alone: it needs the packages of the extra `serve`.
"""

from __future__ import annotations

import functools
import inspect
import json
import socket
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import uvicorn
from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager, TimedModel
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import GenerationState, Modality

from resq_kernels.chat_template import end_of_turn
from resq_kernels.commands import conversation, loading, streaming
from resq_kernels.commands.output import CommandError

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import Message, Receive, Scope, Send
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_TOKENS = 1024  # of an answer whose request does not say; transformers' own default
Stop = Annotated[str, Field(min_length=1)]
Zero = Annotated[float, Field(ge=0, le=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _StreamOptions(_Strict):
    include_usage: Literal[True] | None = None  # as the server always does


class _Options(_Strict):
    """Fields of every request. Where only one value is allowed, the server does that anyway."""

    model: str | None = None
    max_tokens: PositiveInt | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stop: Stop | Annotated[list[Stop], Field(min_length=1)] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    seed: int | None = None
    user: str | None = None
    n: Literal[1] | None = None
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None


class _Completion(_Options):
    prompt: str
    logprobs: None = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None


class _Part(_Strict):
    type: Literal["text"]
    text: str


class _Message(_Strict):
    role: Literal["system", "user", "assistant"]
    content: str | list[_Part]


class _Chat(_Options):
    messages: Annotated[list[_Message], Field(min_length=1)]
    logprobs: Literal[False] | None = None
    max_completion_tokens: PositiveInt | None = None


REQUESTS: dict[str, type[_Options]] = {
    "/v1/completions": _Completion,
    "/v1/chat/completions": _Chat,
}
PATHS = {*REQUESTS, "/v1/models", "/health"}
HANDED_ON = {"model", "prompt", "messages", "top_p", "stop", "stream"}  # the rest is `_read`'s


class _Stopped(Exception):
    """The answer is not generated to its end."""


class Application:
    """The ASGI application.

    Args:
        name: what requests call the model.
        model, tokenizer: as loaded; the model's generation_config is changed.
    """

    def __init__(
        self, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self.requests = 0  # that reached the model
        self._stopped = False
        self._name, self._tokenizer = name, tokenizer
        self._limit = loading.window_limit(model.config)
        ends = streaming.end_tokens(model)
        turn = end_of_turn(tokenizer) if tokenizer.chat_template else None
        config = model.generation_config
        config.eos_token_id = ends if turn is None or turn in ends else [*ends, turn]
        # The server changes that for temperature 0, which `_read` asks for if a request does not.
        # top_k=0: the library's default of 50 would cut the distribution unasked.
        config.do_sample, config.top_k = True, 0
        model.generate = functools.partial(self._generate, model.generate)
        manager = ModelManager()
        manager.force_model = name
        key = manager.process_model_name(name)
        manager.loaded_models[key] = TimedModel(model, -1, tokenizer)
        state = GenerationState(continuous_batching=False)
        self._generations = state.get_manager(key)
        self._app = _server(manager, state)

    def stop(self) -> None:
        """Ends the answers in progress at their next token."""
        self._stopped = True

    async def idle(self) -> None:
        """Returns when nothing is generated any more."""
        await self._generations.async_submit(lambda: None)

    def _generate(self, generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`model.generate`, which a stopped server ends before its first token and after each."""
        self._refuse_if_stopped()
        return generate(*args, stopping_criteria=[self._never], **kwargs)

    def _never(self, input_ids: torch.Tensor, scores: object, **unused: object) -> torch.Tensor:
        """A criterion that ends no row. Not a hook of the model, which would be called for every
        token instead of a prepared step."""
        self._refuse_if_stopped()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def _refuse_if_stopped(self) -> None:
        if self._stopped:
            raise _Stopped("the server is being stopped")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuses a request with status 400, or hands it on and marks the end of its stream."""
        kind = REQUESTS.get(scope.get("path", ""))
        if scope["type"] != "http" or scope["method"] != "POST" or kind is None:
            await self._app(scope, receive, send)
            return
        try:
            body = self._read(kind, await Request(scope, receive).body())
        except (CommandError, ValidationError) as error:
            await _error(400, _sentence(error))(scope, receive, send)
            return
        self.requests += 1
        read: list[Message] = [{"type": "http.request", "body": json.dumps(body).encode()}]
        # Without its type, JSON would be taken for a form.
        scope = {**scope, "headers": [(b"content-type", b"application/json")]}
        done = bool(body.get("stream"))

        async def receive_body() -> Message:
            return read.pop() if read else await receive()

        async def send_done(message: Message) -> None:
            nonlocal done
            data = message.get("body", b"")
            done &= message.get("status", 200) == 200 and b'data: {"error"' not in data
            if done and message["type"] == "http.response.body" and not message.get("more_body"):
                message = {**message, "body": data + b"data: [DONE]\n\n"}
            await send(message)

        await self._app(scope, receive_body, send_done)

    def _read(self, kind: type[_Options], data: bytes) -> dict[str, Any]:
        """The request for the server, with the values of what it does not say.

        Raises:
            CommandError, ValidationError: it cannot be answered as it is.
        """
        asked = kind.model_validate_json(data)
        if asked.model not in (None, self._name):
            raise CommandError(f"model: expected {self._name!r}, got {asked.model!r}")
        if asked.top_p not in (None, 1) and asked.temperature is None:
            raise CommandError("top_p: has no effect without a temperature above 0")
        if asked.seed is not None and asked.temperature:
            raise CommandError("seed: the server cannot seed the sampling of a single request")
        body = asked.model_dump(include=HANDED_ON, exclude_none=True)
        if isinstance(asked, _Chat):
            messages = ChatCompletionHandler.get_processor_inputs_from_messages(
                body["messages"], Modality.LLM
            )
            tokens = len(conversation.prompt_ids(self._tokenizer, messages))
        else:
            tokens = len(self._tokenizer(body["prompt"], verbose=False)["input_ids"])
        if tokens == 0:
            raise CommandError("prompt: expected text, got no token")
        wanted = getattr(asked, "max_completion_tokens", None) or asked.max_tokens
        if self._limit is not None and tokens + (wanted or 1) > self._limit:
            raise CommandError(
                f"max_tokens: expected at most {self._limit} tokens of prompt and answer (the "
                f"model's max_position_embeddings), got {tokens} + {wanted or 1}"
            )
        left = MAX_TOKENS if self._limit is None else self._limit - tokens
        body["max_tokens"] = wanted or min(MAX_TOKENS, left)
        body["temperature"] = asked.temperature or 0
        return body


class Server(uvicorn.Server):
    """Ends what is generated before itself.

    The model runs in a daemon thread, and the interpreter aborts if that is inside of a kernel when
    it ends.
    """

    def __init__(self, app: Application) -> None:
        super().__init__(uvicorn.Config(app, log_config=None, access_log=False))
        self._application = app

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Called by uvicorn after SIGINT or SIGTERM."""
        self._application.stop()
        await super().shutdown(sockets)
        await self._application.idle()


def _server(manager: ModelManager, state: GenerationState) -> Any:
    """transformers' server as `transformers serve` makes it, with the routes of `PATHS`."""
    # Which other handlers there are depends on the version; their routes are taken away below.
    handlers = {
        key: None for key in inspect.signature(build_server).parameters if key.endswith("_handler")
    } | {
        "chat_handler": ChatCompletionHandler(manager, state),
        "completion_handler": CompletionHandler(manager, state),
    }
    app = build_server(model_manager=manager, generation_state=state, **handlers)
    # Not /load_model, which loads any model for anybody, nor /reset, which unloads this one.
    app.router.routes[:] = [route for route in app.routes if route.path in PATHS]
    app.add_exception_handler(_Stopped, lambda request, error: _error(503, str(error)))
    app.add_exception_handler(
        Exception, lambda request, error: _error(500, f"{type(error).__name__}: {error}")
    )
    return app


def _error(status: int, sentence: str) -> JSONResponse:
    """An answer in the form of OpenAI's errors."""
    kind = "invalid_request_error" if status == 400 else "server_error"
    return JSONResponse({"error": {"message": sentence, "type": kind, "code": status}}, status)


def _sentence(error: CommandError | ValidationError) -> str:
    """The first thing that is wrong."""
    if isinstance(error, CommandError):
        return str(error)
    first = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"]) or "body"
    value = "" if first["type"] == "missing" else f", got {str(first['input'])[:100]!r}"
    return f"{place}: {first['msg']}{value}"
