"""Calibration text that a chat model writes itself: conversations in its own template."""

from __future__ import annotations

import dataclasses
import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessor

from resq_kernels.architecture import ModelShape
from resq_kernels.chat_template import Template, read_template
from resq_kernels.config import ResQConfig
from resq_kernels.ptq.check import device_memory
from resq_kernels.ptq.decoder import product_dtype
from resq_kernels.ptq.source import SourceModel
from resq_kernels.ptq.workspace import Workspace

TOKENS = 512
"""Tokens of a dialogue behind the template's start; a longer window holds several."""
SHARE = 0.25
"""Of the calibration windows, by default (docs/notes/0038-dialogues.md)."""
BATCH = 48
"""Most dialogues that are written at once: bounds their KV cache, and decides what is drawn."""
MEMORY_SHARE = 0.75
"""Of a device's memory, for the model that writes them: something else is in memory too."""
TOP_K = 50
"""Each token is drawn among so many, at temperature 1."""


@dataclass(frozen=True)
class Dialogues:
    """Windows for the model to write.

    Attributes:
        template: of the model's tokenizer.
        calibration: windows that are put before those of the text.
        held_out: windows for the verdict.
        seqlen: tokens of a window.
    """

    template: Template
    calibration: int
    held_out: int
    seqlen: int

    @property
    def length(self) -> int:
        """Tokens of a dialogue."""
        return min(len(self.template.start) + TOKENS, self.seqlen)


def plan(
    config: ResQConfig,
    tokenizer: Any,
    shape: ModelShape,
    dtype: torch.dtype,
    device: str,
    held_out: int = 0,
) -> tuple[ResQConfig, Dialogues | None]:
    """Decides how many of the calibration windows the model writes.

    Where the options leave it open (`ResQConfig.dialogues` is None): a quarter, if the tokenizer
    has a chat template that dialogues can be written in, the whole model fits the memory, and
    anything depends on the windows.

    Args:
        config: the options.
        tokenizer: the model's.
        shape: the model's sizes.
        dtype: of its weights.
        device: where the layers are computed.
        held_out: dialogues for the verdict, if there are any.

    Returns:
        The options with a number, and what is written if it is not 0.

    Raises:
        ValueError: dialogues are asked for and cannot be written; names the option.
    """
    wanted = config.dialogues
    count = int(SHARE * config.samples) if wanted is None else wanted
    if wanted is None and config.method == config.weights == "rtn":
        count = 0
    template = None
    try:
        if count:
            template = read_template(tokenizer)
            _check(template, config.seqlen, shape, dtype, device)
    except ValueError as error:
        if wanted is not None:
            raise ValueError(f"dialogues: expected 0, got {wanted}: {error}") from error
        if template is not None:
            warnings.warn(f"dialogues: none are written: {error}", stacklevel=2)
        count = 0
    config = dataclasses.replace(config, dialogues=count)
    if not count or template is None:
        return config, None
    return config, Dialogues(template, count, held_out, config.seqlen)


def _check(
    template: Template, seqlen: int, shape: ModelShape, dtype: torch.dtype, device: str
) -> None:
    """Refuses windows that end where the first question does, and a model that does not fit."""
    if seqlen < 2 * len(template.start):
        raise ValueError(
            f"the chat template begins with {len(template.start)} tokens, windows have {seqlen}"
        )
    size = product_dtype(dtype, device).itemsize
    weights = sum(map(math.prod, shape.source_tensors().values()))
    cache = 2 * shape.layers * shape.kv_heads * shape.head_dim
    cache *= BATCH * (len(template.start) + TOKENS)
    needed = size * (weights + cache) + 8 * BATCH * shape.vocab
    memory = device_memory(device)
    if needed > MEMORY_SHARE * memory:
        raise ValueError(
            f"the whole model takes {needed / 1e9:.1f} GB, more than {MEMORY_SHARE:.0%} of the "
            f"memory of {device}, {memory / 1e9:.1f} GB"
        )


@torch.no_grad()
def write_dialogues(
    model: SourceModel,
    dialogues: Dialogues,
    seed: int,
    work: Workspace,
    device: str = "cpu",
    progress: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows of dialogues, questions and answers, that the model writes.

    A dialogue begins with the template's start. The model goes on, each token drawn among the
    `TOP_K` likeliest at temperature 1, and where it ends a message the template's tokens up to the
    next message follow. A window begins where a dialogue begins.

    Memory: the whole model, and the KV cache of `BATCH` dialogues. Every batch is a piece of the
    work folder.

    Args:
        model: the source.
        dialogues: how many, and in which template.
        seed: of the draw.
        work: keeps the batches.
        device: where the model runs.
        progress: a bar on stderr.

    Returns:
        Windows for calibration and those that are held out, int64 [windows, seqlen].

    Source: arXiv 2406.08464, where aligned models write questions behind their template's start.
    """
    windows, length = dialogues.calibration + dialogues.held_out, dialogues.length
    each = -(-dialogues.seqlen // length)
    # Batches of one size, within one: a small one takes nearly as long as a large one.
    total = windows * each
    parts = [len(part) for part in torch.arange(total).tensor_split(-(-total // BATCH))]
    missing = [index for index in range(len(parts)) if not work.has(_piece(index))]
    if missing:
        writer = AutoModelForCausalLM.from_pretrained(
            model.reader.folder, dtype=product_dtype(model.dtype, device)
        ).to(device)
        writer.generation_config = GenerationConfig()  # nothing of how its makers draw
        if writer.device.type == "cpu" and writer.dtype == torch.float32:
            _multiply_few_rows(writer)
        steps = len(missing) * (length - len(dialogues.template.start))
        bar = tqdm(total=steps, desc="dialogues", unit="token", disable=not progress)
        with bar, torch.random.fork_rng([device] if device.startswith("cuda") else []):
            for index in missing:
                torch.manual_seed(seed + index)
                written = _write(writer, dialogues, parts[index], bar)
                work.save(_piece(index), {"tokens": written})
    pieces = [work.load(_piece(index))["tokens"] for index in range(len(parts))]
    tokens = torch.cat(pieces).view(windows, each * length)[:, : dialogues.seqlen].contiguous()
    return tokens[: dialogues.calibration], tokens[dialogues.calibration :]


def _piece(index: int) -> str:
    return f"dialogues-{index:05d}"


def _write(writer: Any, dialogues: Dialogues, count: int, bar: tqdm[Any]) -> torch.Tensor:
    """A batch of dialogues, int64 [count, length]."""
    start = torch.tensor([dialogues.template.start]).repeat(count, 1).to(writer.device)
    settings = GenerationConfig(
        do_sample=False,  # `_Draws` does
        max_new_tokens=dialogues.length - start.shape[1],
        pad_token_id=0,
        cache_implementation="static",  # 4/3 as fast as one that grows: SmolLM2, 20 dialogues
        disable_compile=True,
    )
    written: torch.Tensor = writer.generate(
        start,
        attention_mask=torch.ones_like(start),
        generation_config=settings,
        logits_processor=[_Draws(), _Messages(dialogues.template, count, bar)],
    )
    return written.cpu()


class _FewRows(torch.nn.Linear):
    """A linear as (W x^T)^T: of MKL's ways to the same product the faster one for few rows.

    SmolLM2's products of a step of 2, 20, 48 rows, float32, two Zen 3 cores: 62, 143, 249 ms, and
    151, 179, 326 as x W^T.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        columns = x.reshape(-1, x.shape[-1]).t()
        y = torch.mm(self.weight, columns).t().contiguous().view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


def _multiply_few_rows(writer: torch.nn.Module) -> None:
    """Makes every linear a `_FewRows`, with the same parameters."""
    for module in writer.modules():
        if type(module) is torch.nn.Linear:
            module.__class__ = _FewRows


class _Draws(LogitsProcessor):
    """Leaves one token of each row, drawn among the `TOP_K` likeliest at temperature 1.

    transformers draws among the whole vocabulary, whose other tokens it has given no probability:
    29 ms a step of 20 dialogues with 49,152 tokens.
    """

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        likeliest = scores.topk(min(TOP_K, scores.shape[-1]))
        drawn = torch.multinomial(likeliest.values.softmax(-1), 1)
        chosen = likeliest.indices.gather(-1, drawn)
        return torch.full_like(scores, -torch.inf).scatter_(-1, chosen, 0.0)


class _Messages(LogitsProcessor):
    """Puts the template's tokens behind each message that the model ends."""

    def __init__(self, template: Template, count: int, bar: tqdm[Any]) -> None:
        self._between, self._bar = template.between, bar
        self._ended = [0] * count
        self._waiting: list[list[int]] = [[] for _ in range(count)]
        self._drawn = [False] * count  # whether the model chose the last token

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._bar.update()
        for row, last in enumerate(input_ids[:, -1].tolist()):
            between = self._between[self._ended[row] % len(self._between)]
            if self._drawn[row] and last in between.ends:
                self._waiting[row] = list(between.following)
                self._ended[row] += 1
            self._drawn[row] = not self._waiting[row]
            if not self._drawn[row]:
                scores[row] = -torch.inf
                scores[row, self._waiting[row].pop(0)] = 0.0
        return scores
