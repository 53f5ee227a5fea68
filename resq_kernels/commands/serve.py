"""`resq serve`: a model behind transformers' HTTP server."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import shlex
import socket

from resq_kernels.commands import loading, output, streaming
from resq_kernels.commands.output import CommandError

SUMMARY = "serve a model over HTTP, as OpenAI's clients expect it"
DESCRIPTION = """\
Runs transformers' server for one model: /v1/completions and /v1/chat/completions, whole or
streamed, /v1/models and /health. Requests are answered one after the other; what the server would
drop is refused. Nobody is asked for a key: leave --host as it is unless everybody who reaches the
port may use the model. Ctrl-C ends the server.

examples:
  resq serve out/smollm2-resq
  resq serve out/smollm2-resq --host 0.0.0.0 --port 8080 --device cuda
"""

PACKAGES = ("accelerate", "fastapi", "openai", "pydantic", "uvicorn")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `resq serve`."""
    loading.add_model_arguments(parser)
    loading.add_adapter_argument(parser)
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen at (default: this machine's own)"
    )
    parser.add_argument(
        "--port",
        type=_port,
        default=8000,
        metavar="N",
        help="port to listen at (default: 8000; 0 takes a free one)",
    )


def run(args: argparse.Namespace) -> None:
    """Serves until SIGINT or SIGTERM; writes --json last.

    Raises:
        CommandError: the model cannot be used, a package is missing, or the port is taken.
    """
    output.check_target(args.json, reads=[args.model, args.adapter])
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise CommandError(
            f"serve: needs {', '.join(missing)}; run `pip install 'resq_kernels[serve]'`"
        )
    device = loading.choose_device(args.device)
    loading.load_config(args.model, args.lo_bits)
    tokenizer = loading.load_tokenizer(args.model)
    with _listen(args.host, args.port) as listener:
        model = streaming.load(args, device)

        from resq_kernels.commands.serve_app import Application, Server

        app = Application(args.model, model, tokenizer)
        print(_announcement(args.model, bool(tokenizer.chat_template), listener), flush=True)
        # The signal that ended the server is raised again once it has ended.
        with contextlib.suppress(KeyboardInterrupt):
            Server(app).run(sockets=[listener])
    output.write_json(
        args.json, {"model": args.model, "adapter": args.adapter, "requests": app.requests}
    )


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens, before the time that loading a model takes.

    Raises:
        CommandError: there is no such address, or the port is taken or not allowed.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        text = error.strerror or str(error)
        raise CommandError(f"--host {host} --port {port}: cannot listen: {text}") from error


def _announcement(model: str, chat: bool, listener: socket.socket) -> str:
    """The address, and a command line that asks for an answer."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    body: dict[str, object] = {"model": model, "max_tokens": 32}
    if chat:
        path = "/v1/chat/completions"
        body["messages"] = [{"role": "user", "content": "What is the capital of France?"}]
    else:
        path, body["prompt"] = "/v1/completions", "The capital of France is"
    data = shlex.quote(json.dumps(body))
    return (
        f"serving {model} at {url}/v1\n"
        f"curl {url}{path} -H 'Content-Type: application/json' -d {data}"
    )


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"expected a port in [0, 65535], got {text!r}")
    return int(text)
