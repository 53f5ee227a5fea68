"""Both sides of benchmarks/llama_cpp_race.py, each in a process of its own, behind one interface.

A process holds one model. It answers calls one at a time, so that nothing else computes meanwhile,
and its memory is that of one engine. Only its own engine's packages are imported in it.
"""

from __future__ import annotations

import ctypes
import dataclasses
import multiprocessing
import re
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

NEW_TOKENS = 32
"""Tokens of a timed decode."""
UBATCH = 512
"""Tokens that llama.cpp computes at once, its default and that of its own benchmark."""
FLASH = {False: 0, True: 1}  # llama.cpp's LLAMA_FLASH_ATTN_TYPE_DISABLED and _ENABLED


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cache:
    """How llama.cpp keeps keys and values: the type of their numbers, and its attention."""

    kind: str = "f16"
    flash: bool = False

    def __str__(self) -> str:
        return f"KV {self.kind}{', flash' if self.flash else ''}"


CACHES = (
    Cache(),
    Cache(flash=True),
    Cache(kind="q8_0", flash=True),
    Cache(kind="q4_0", flash=True),
)
"""llama.cpp takes quantized values with flash attention only."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Test:
    """One kind of work.

    Attributes:
        prompt: tokens of a prompt that is read at once, or 0: decoding is timed.
        context: tokens that are in the cache before the first decoded one.
        batch: sequences that are decoded together.
    """

    prompt: int = 0
    context: int = 0
    batch: int = 1

    @property
    def tokens(self) -> int:
        """Tokens that a timed call computes."""
        return self.prompt or self.batch * NEW_TOKENS

    @property
    def positions(self) -> int:
        """Tokens of a sequence in the cache at the end."""
        return self.prompt or self.context + NEW_TOKENS


class Transformers:
    """A model of transformers.

    Args:
        threads: of torch.
    """

    _model: Any

    def __init__(self, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self._torch = torch

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """float32 [tokens, vocabulary] of one window, int64 [tokens]."""
        ids = self._torch.from_numpy(tokens)[None]
        logits: np.ndarray = self._model(ids).logits[0].float().numpy()
        return logits


class Float(Transformers):
    """The 16-bit model in float32, the reference of every divergence.

    Args:
        folder: where it lies.
        threads: of torch.
    """

    def __init__(self, folder: str, threads: int) -> None:
        from transformers import AutoModelForCausalLM

        super().__init__(threads)
        dtype = self._torch.float32
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


class Ours(Transformers):
    """A ResQ folder, or a model of a known shape with random codes.

    Args:
        source: the folder, or a name of `resq_kernels.bench.models` and a number of layers or None.
        lo_bits: of the activations.
        threads: of torch.
    """

    _kept: Any
    _graph: Any

    def __init__(self, source: str | tuple[str, int | None], lo_bits: int, threads: int) -> None:
        import transformers.models.llama.modeling_llama  # noqa: F401 (imports are not the load)
        import transformers.models.qwen2.modeling_qwen2  # noqa: F401

        import resq_kernels
        from resq_kernels.bench import model as bench_model
        from resq_kernels.bench import models
        from resq_kernels.nn.kv_cache import cache_name

        transformers.utils.logging.disable_progress_bar()
        super().__init__(threads)
        self._why_wrong = bench_model.why_wrong
        self._before, began = _resident(), time.perf_counter()
        if isinstance(source, str):
            self._model = resq_kernels.from_pretrained(source, lo_bits=lo_bits).eval()
        else:
            options = models.OPTIONS.with_lo_bits(lo_bits)
            self._model = bench_model.build(*source, "cpu", options=options)
        self._argument = cache_name(self._model)
        self._model(self._torch.zeros(1, 1, dtype=self._torch.int64))
        self.load_seconds = time.perf_counter() - began

    def load(self) -> dict[str, float]:
        """Seconds from the call to the first token, bytes of the process and what it added."""
        return _load(self.load_seconds, self._before)

    def prepare(self, test: Test, tokens: np.ndarray, cache: Cache | None = None) -> None:
        """Fills a cache with the context of a test; `tokens` int64 [batch, positions]."""
        from transformers import DynamicCache

        from resq_kernels import DecodeGraph

        self._test = test
        self._ids = self._torch.from_numpy(tokens)
        self._kept = DynamicCache(config=self._model.config)
        if not test.prompt:
            # Steps are prepared for a cache that holds tokens: without a context it holds one.
            self._read(self._ids[:, : test.context or 1])
            self._graph = DecodeGraph(self._model, self._kept, NEW_TOKENS)

    def _read(self, ids: Any) -> Any:
        given = {self._argument: self._kept, "use_cache": True}
        return self._model(ids, logits_to_keep=1, **given).logits

    def run(self) -> float:
        """Seconds of one call of the test, after which the cache is as before."""
        test, steps = self._test, self._ids[:, self._test.context :]
        began = time.perf_counter()
        if test.prompt:
            logits = self._read(steps)
        else:
            for i in range(NEW_TOKENS):
                logits = self._graph.step(steps[:, i])
        seconds = time.perf_counter() - began
        assert self._torch.isfinite(logits).all(), "logits are not finite"
        self._kept.crop(-steps.shape[1])
        return seconds

    def finish(self) -> None:
        """Frees what `prepare` made."""
        self._kept = self._graph = None

    def why_wrong(self) -> str | None:
        """Of random weights: how the kernels differ from the reference path, or None."""
        return self._why_wrong(self._model)


class LlamaCpp:
    """A GGUF file in llama.cpp, by the package llama-cpp-python.

    Its C functions are called one to one, as llama.cpp's own benchmark does.

    Args:
        path: the file.
        threads: for prompts and for decoding.
    """

    def __init__(self, path: str, threads: int) -> None:
        import llama_cpp

        self._lib = llama_cpp
        self._threads = threads
        self._silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._silent, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self._before, began = _resident(), time.perf_counter()
        parameters = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), parameters)
        if not self._model:
            raise ValueError(f"llama.cpp does not load {path}")
        vocab = llama_cpp.llama_model_get_vocab(self._model)
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(vocab)
        self._context: Any = None
        self.prepare(Test(prompt=1), np.zeros((1, 1), np.int64))
        self.run()
        self.load_seconds = time.perf_counter() - began

    def load(self) -> dict[str, float]:
        """As `Ours.load`."""
        return _load(self.load_seconds, self._before)

    def prepare(self, test: Test, tokens: np.ndarray, cache: Cache | None = None) -> None:
        """As `Ours.prepare`, in a new context."""
        self.finish()
        cache = cache or Cache()
        lib, batch = self._lib, len(tokens)
        parameters = lib.llama_context_default_params()
        parameters.n_ctx = batch * -(-test.positions // 256) * 256
        parameters.n_batch = max(UBATCH, tokens.size)
        parameters.n_ubatch = UBATCH
        parameters.n_seq_max = batch
        parameters.n_threads = parameters.n_threads_batch = self._threads
        parameters.flash_attn_type = FLASH[cache.flash]
        kinds = {"f16": lib.GGML_TYPE_F16, "q8_0": lib.GGML_TYPE_Q8_0, "q4_0": lib.GGML_TYPE_Q4_0}
        parameters.type_k = parameters.type_v = kinds[cache.kind]
        self._context = lib.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise ValueError(f"llama.cpp makes no context with {cache}")
        self._batch = lib.llama_batch_init(max(UBATCH, tokens.size), 0, batch)
        self._test, self._ids = test, tokens
        if test.context:
            self._fill(tokens[:, : test.context], 0)
            self._decode()

    def _fill(self, tokens: np.ndarray, position: int, *, every: bool = False) -> None:
        batch = self._batch
        batch.n_tokens = tokens.size
        sequences, count = tokens.shape
        for s in range(sequences):
            for i in range(count):
                at = s * count + i
                batch.token[at] = int(tokens[s, i])
                batch.pos[at] = position + i
                batch.n_seq_id[at] = 1
                batch.seq_id[at][0] = s
                batch.logits[at] = every or i == count - 1

    def _decode(self) -> None:
        if status := self._lib.llama_decode(self._context, self._batch):
            raise ValueError(f"llama_decode: expected 0, got {status}")
        self._lib.llama_synchronize(self._context)

    def _logits(self, rows: int) -> np.ndarray:
        pointer = self._lib.llama_get_logits(self._context)
        return np.ctypeslib.as_array(pointer, shape=(rows, self._vocabulary))

    def run(self) -> float:
        """As `Ours.run`."""
        test, steps = self._test, self._ids[:, self._test.context :]
        self._fill(steps if test.prompt else steps[:, :1], test.context)
        began = time.perf_counter()
        self._decode()
        for i in range(1, 0 if test.prompt else NEW_TOKENS):
            self._fill(steps[:, i : i + 1], test.context + i)
            self._decode()
        seconds = time.perf_counter() - began
        assert np.isfinite(self._logits(len(steps))).all(), "logits are not finite"
        memory = self._lib.llama_get_memory(self._context)
        for s in range(len(steps)):
            self._lib.llama_memory_seq_rm(memory, s, test.context, -1)
        return seconds

    def finish(self) -> None:
        """As `Ours.finish`."""
        if self._context:
            self._lib.llama_batch_free(self._batch)
            self._lib.llama_free(self._context)
            self._context = None

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """As `Transformers.logits`, with the default cache."""
        self.prepare(Test(prompt=len(tokens)), tokens[None])
        self._fill(tokens[None], 0, every=True)
        self._decode()
        return self._logits(len(tokens)).copy()


class Remote:
    """An engine in a process of its own.

    Args:
        engine: its class; the other arguments are the engine's.

    Raises:
        RuntimeError: the engine raised; the message holds its traceback.
    """

    def __init__(self, engine: Callable[..., Any], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, engine, arguments))
        self._process.start()
        other.close()
        self._answer()

    def __call__(self, name: str, *arguments: Any) -> Any:
        """What the engine's method `name` returns."""
        self._pipe.send((name, arguments))
        return self._answer()

    def _answer(self) -> Any:
        try:
            value, error = self._pipe.recv()
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            raise RuntimeError(f"the engine's process ended with {code}") from None
        if error:
            raise RuntimeError(error)
        return value

    def close(self) -> None:
        """Ends the process."""
        self._pipe.close()
        self._process.join()


def _serve(pipe: Any, engine: Callable[..., Any], arguments: Sequence[Any]) -> None:
    try:
        held = engine(*arguments)
        pipe.send((None, None))
        while True:
            name, given = pipe.recv()
            pipe.send((getattr(held, name)(*given), None))
    except EOFError:
        return
    except Exception:
        pipe.send((None, traceback.format_exc()))


def _load(seconds: float, before: int) -> dict[str, float]:
    return {"seconds": seconds, "bytes": _peak(), "added": _peak() - before}


def _status(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    match = re.search(rf"{field}:\s+(\d+) kB", text)
    assert match is not None
    return int(match[1]) * 1024


def _resident() -> int:
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")
