"""Train the small Llama model of the demonstration on the text that comes with Python.

The corpus is :mod:`stdlib_corpus`, so nothing is downloaded. The script trains a byte-level BPE
tokenizer and a Llama of about 3.7 million parameters, and writes a Hugging Face folder with the
weights in bfloat16, the tokenizer, a model card and ``training_report.json``. Run it as::

    python examples/train_tiny_llama.py --minutes 60

An interrupted run goes on with ``--resume``: weights, optimizer and position come from the state
file, and the order of the data is a function of the seed and the step.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from heldout_perplexity import EVAL_WINDOW, perplexity, unigram_perplexity
from stdlib_corpus import heldout_text, training_documents
from tiny_llama_card import model_card
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

VOCAB_SIZE = 2048
END_TOKEN = "<|endoftext|>"
CONTEXT = 2048
DEFAULT_OUT = Path(__file__).resolve().parent / "tiny-llama"
DEFAULT_STATE = Path(tempfile.gettempdir()) / "tiny-llama-state.pt"


@dataclass
class Progress:
    """Where a training run stands.

    Args:
        step: optimizer steps done.
        seconds: time spent in training so far, over all resumed parts.
        tokens: training tokens seen.
        losses: pairs of step and mean training loss since the pair before.
    """

    step: int
    seconds: float
    tokens: int
    losses: list[tuple[int, float]]


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that adds no special token on its own.

    Args:
        texts: training documents.

    Returns:
        A tokenizer of ``VOCAB_SIZE`` entries whose begin, end and padding token is
        ``<|endoftext|>`` with id 0.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_TOKEN,
        eos_token=END_TOKEN,
        pad_token=END_TOKEN,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Encode a text without special tokens or length limit.

    Args:
        tokenizer: the model's tokenizer.
        text: any text.

    Returns:
        Token ids.
    """
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


def build_model(end_id: int, seed: int) -> LlamaForCausalLM:
    """Create the model with random weights.

    Residual outputs start smaller by ``1 / sqrt(2 * layers)``, which keeps the variance of the
    residual stream independent of depth.

    Args:
        end_id: id of the begin, end and padding token.
        seed: seed of the weights.

    Returns:
        A float32 model with 256 hidden channels, 4 layers, 4 query heads and 2 key/value heads.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=end_id,
        eos_token_id=end_id,
        pad_token_id=end_id,
        initializer_range=0.04,
    )
    model = LlamaForCausalLM(config)
    scale = 1.0 / math.sqrt(2 * config.num_hidden_layers)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(scale)
            layer.mlp.down_proj.weight.mul_(scale)
    return model


def batch_at(tokens: torch.Tensor, step: int, batch: int, length: int, seed: int) -> torch.Tensor:
    """Return the training batch of a step, a pure function of the seed and the step.

    Each pass over the data cuts it into windows at a fresh random offset and visits them in a
    fresh random order.

    Args:
        tokens: one-dimensional training ids.
        step: index of the step.
        batch: windows per batch.
        length: tokens per window.
        seed: seed of the data order.

    Returns:
        Ids of shape (batch, length).
    """
    per_epoch = (tokens.numel() // length - 1) // batch
    epoch, index = divmod(step, per_epoch)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    offset = int(torch.randint(length, (1,), generator=generator))
    order = torch.randperm(per_epoch * batch, generator=generator)
    starts = order[index * batch : (index + 1) * batch] * length + offset
    return tokens[starts[:, None] + torch.arange(length)]


def learning_rate(progress: float, step: int, peak: float, warmup: int) -> float:
    """Return the rate of a step: linear warmup, then a cosine down to 2 % of the peak.

    Args:
        progress: share of the run that is done, 0 to 1.
        step: index of the step.
        peak: highest rate.
        warmup: steps of warmup.

    Returns:
        The learning rate.
    """
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return peak * min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * cosine)


def make_optimizer(model: LlamaForCausalLM, weight_decay: float) -> torch.optim.AdamW:
    """Create AdamW with decay on matrices only; gains of the norms are not decayed.

    Args:
        model: the model to train.
        weight_decay: decay of the matrices.

    Returns:
        The optimizer.
    """
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-8, foreach=True)


def save_state(
    path: Path, model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, progress: Progress
) -> None:
    """Save what ``--resume`` needs, under a temporary name that is then moved into place.

    Args:
        path: state file.
        model: model in training.
        optimizer: its optimizer.
        progress: position of the run.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "progress": vars(progress),
    }
    torch.save(state, temporary)
    os.replace(temporary, path)


def export(
    out: Path,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    report: Callable[[LlamaForCausalLM], dict[str, Any]],
) -> dict[str, Any]:
    """Write the Hugging Face folder, each file moved into place when complete.

    Args:
        out: destination folder.
        model: float32 model in training; it is not changed.
        tokenizer: its tokenizer.
        report: computes the report from the weights as stored, rounded to bfloat16.

    Returns:
        The report.
    """
    stored = copy.deepcopy(model).to(torch.bfloat16)
    stored.generation_config = GenerationConfig(
        bos_token_id=0, eos_token_id=0, pad_token_id=0, do_sample=False, max_new_tokens=128
    )
    out.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        stored.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        settings = json.loads((temporary / "tokenizer_config.json").read_text(encoding="utf-8"))
        # The name that both current and older releases of the library can load.
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        settings.pop("backend", None)
        (temporary / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
        content = report(stored.float())
        (temporary / "training_report.json").write_text(json.dumps(content, indent=2) + "\n")
        (temporary / "README.md").write_text(model_card(content), encoding="utf-8")
        for path in temporary.iterdir():
            path.chmod(0o644)  # the weights are written with private permissions
            os.replace(path, out / path.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return content


def autocast(enabled: bool) -> AbstractContextManager[Any]:
    """Return the bfloat16 autocast context, or one that does nothing."""
    return torch.autocast("cpu", dtype=torch.bfloat16) if enabled else nullcontext()


def train_step(
    model: LlamaForCausalLM,
    optimizer: torch.optim.Optimizer,
    batch: torch.Tensor,
    rate: float,
    bf16: bool,
) -> float:
    """Do one optimizer step with the gradient norm clipped to 1.

    Args:
        model: model in training.
        optimizer: its optimizer.
        batch: token ids of shape (batch, length).
        rate: learning rate of this step.
        bf16: whether matrix products run in bfloat16.

    Returns:
        The mean cross entropy before the step.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate
    with autocast(bf16):
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    loss = functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--state", type=Path, default=DEFAULT_STATE)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument(
        "--minutes",
        type=float,
        default=math.inf,
        help="time limit; the learning rate follows whichever limit is nearer",
    )
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument(
        "--short-share",
        type=float,
        default=0.6,
        help="share of the run with twice as many windows of half the length, which is faster",
    )
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--prose-repeats", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-bf16", action="store_true", help="train in float32 throughout")
    parser.add_argument("--save-every", type=float, default=5.0, help="minutes between saves")
    parser.add_argument("--log-every", type=int, default=20, help="steps between log lines")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, evaluate and write the model folder.

    Args:
        argv: command-line arguments; those of the process when None.
    """
    args = parse_arguments(argv)
    torch.set_num_threads(args.threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    texts = [d.text for d in training_documents(args.prose_repeats)]
    corpus_hash = hashlib.sha256("\0".join(texts).encode("utf-8")).hexdigest()
    tokenizer = train_tokenizer(texts)
    ids: list[int] = []
    for text in texts:
        ids.extend(encode(tokenizer, text))
        ids.append(tokenizer.eos_token_id)
    training = torch.tensor(ids)
    heldout = torch.tensor(encode(tokenizer, heldout_text()))
    unigram = unigram_perplexity(training, heldout, VOCAB_SIZE)
    print(
        f"{training.numel()} training and {heldout.numel()} held-out tokens, "
        f"unigram perplexity {unigram:.1f}",
        flush=True,
    )

    model = build_model(tokenizer.eos_token_id, args.seed)
    model.train()
    optimizer = make_optimizer(model, args.weight_decay)
    progress = Progress(step=0, seconds=0.0, tokens=0, losses=[])
    if args.resume and args.state.exists():
        state = torch.load(args.state, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        progress = Progress(**state["progress"])

    def make_report(finished: bool) -> Callable[[LlamaForCausalLM], dict[str, Any]]:
        def report(stored: LlamaForCausalLM) -> dict[str, Any]:
            measured = perplexity(stored, heldout, limit=None if finished else 64)
            return {
                "finished": finished,
                "heldout_perplexity": round(measured, 4),
                "unigram_perplexity": round(unigram, 4),
                "heldout_windows": heldout.numel() // EVAL_WINDOW if finished else 64,
                "window_tokens": EVAL_WINDOW,
                "parameters": sum(p.numel() for p in stored.parameters()),
                "steps": progress.step,
                "tokens_seen": progress.tokens,
                "training_tokens": training.numel(),
                "minutes_limit": args.minutes if math.isfinite(args.minutes) else None,
                "training_minutes": round(progress.seconds / 60, 1),
                "last_training_loss": progress.losses[-1][1] if progress.losses else None,
                "losses": progress.losses[-1::-10][::-1],
                "batch": args.batch,
                "length": args.length,
                "short_share": args.short_share,
                "peak_learning_rate": args.rate,
                "weight_decay": args.weight_decay,
                "prose_repeats": args.prose_repeats,
                "seed": args.seed,
                "bf16_autocast": not args.no_bf16,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "training_text_sha256": corpus_hash,
            }

        return report

    def share() -> float:
        return max(progress.step / args.steps, progress.seconds / 60 / args.minutes)

    saved = logged = time.monotonic()
    recent: list[float] = []
    while share() < 1.0:
        begin = time.monotonic()
        rate = learning_rate(share(), progress.step, args.rate, args.warmup)
        short = 2 if share() < args.short_share else 1
        batch = batch_at(
            training, progress.step, args.batch * short, args.length // short + 1, args.seed
        )
        recent.append(train_step(model, optimizer, batch, rate, not args.no_bf16))
        now = time.monotonic()
        progress.step += 1
        progress.seconds += now - begin
        progress.tokens += args.batch * args.length
        if progress.step % args.log_every == 0:
            mean = round(sum(recent) / len(recent), 4)
            speed = len(recent) * args.batch * args.length / (now - logged)
            progress.losses.append((progress.step, mean))
            print(
                f"step {progress.step} ({share():.1%}) loss {mean:.3f} ppl {math.exp(mean):.2f} "
                f"rate {rate:.2e} {speed:.0f} tokens/s",
                flush=True,
            )
            recent, logged = [], now
        if now - saved > args.save_every * 60:
            save_state(args.state, model, optimizer, progress)
            content = export(args.out, model, tokenizer, make_report(finished=False))
            print(
                f"saved: held-out perplexity {content['heldout_perplexity']:.2f} (64 windows)",
                flush=True,
            )
            saved = logged = time.monotonic()
            recent = []
    save_state(args.state, model, optimizer, progress)
    content = export(args.out, model, tokenizer, make_report(finished=True))
    print(
        f"done: held-out perplexity {content['heldout_perplexity']:.3f}, unigram "
        f"{content['unigram_perplexity']:.1f}",
        flush=True,
    )
    print(sample(model, tokenizer))


def sample(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> str:
    """Generate greedy continuations of a few prompts.

    Args:
        model: trained model.
        tokenizer: its tokenizer.

    Returns:
        The prompts with their continuations, between separators.
    """
    parts: list[str] = []
    for prompt in ("The with statement is used to", "def read(self, size=-1):\n", "module json\n"):
        ids = torch.tensor([encode(tokenizer, prompt)])
        done = model.eval().generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=96, do_sample=False
        )
        parts.append(tokenizer.decode(done[0]))
    return "\n----\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
