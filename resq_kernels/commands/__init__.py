"""The subcommands of `resq`: one module each with SUMMARY, DESCRIPTION, add_arguments and run."""

from __future__ import annotations

from types import ModuleType

from resq_kernels.commands import bench, chat, compare, evaluate, generate, info, quantize, serve
from resq_kernels.commands.output import CommandError, UsageError

COMMANDS: dict[str, ModuleType] = {
    "quantize": quantize,
    "eval": evaluate,
    "compare": compare,
    "generate": generate,
    "chat": chat,
    "serve": serve,
    "bench": bench,
    "info": info,
}

__all__ = ["COMMANDS", "CommandError", "UsageError"]
