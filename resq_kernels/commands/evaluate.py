"""`resq eval`: perplexity, divergence from a reference, zero-shot tasks."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from resq_kernels import texts
from resq_kernels.commands import loading, output
from resq_kernels.commands.arguments import at_least
from resq_kernels.commands.output import CommandError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from resq_kernels.needle import Context

SUMMARY = "perplexity of a 16-bit or quantized model"
DESCRIPTION = """\
Perplexity by the protocol of the GPTQ, QuaRot and ResQ papers: the tokens of the whole text without
BOS, cut into windows of --seqlen (the tail is dropped); exp of the mean cross entropy over the
seqlen - 1 targets of every window. A quantized model rounds its keys and values
to the 4-bit cache format although no cache is used.

examples:
  resq eval out/llama-resq --dataset wikitext2
  resq eval out/llama-resq --text heldout.txt --reference meta-llama/Llama-3.2-1B --json eval.json
  resq eval out/llama-resq --text heldout.txt --reference llama --needle 1024,8192
  resq eval out/llama-resq --tasks arc_easy,hellaswag
  resq eval out/llama-resq --tasks mmlu --num-fewshot 5 --limit 20
"""

NEEDLE_CONTEXTS = 4
TASK_OPTIONS = ("num_fewshot", "limit", "batch_size", "include_path")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `resq eval`."""
    loading.add_model_arguments(parser)
    loading.add_adapter_argument(parser)
    add_text_arguments(parser, "without --text and --tasks")
    parser.add_argument(
        "--reference",
        metavar="MODEL",
        help="also measure the mean KL divergence from this model, usually the 16-bit one, and how "
        "often both find the same token likeliest",
    )
    parser.add_argument(
        "--needle",
        type=_lengths,
        metavar="L,M,...",
        help="also hide eight sentences in contexts of these numbers of tokens, made of the text, "
        "ask for each, and count the right answers",
    )
    parser.add_argument(
        "--needle-contexts",
        type=at_least(1),
        metavar="N",
        help=f"with --needle: contexts of each length (default: {NEEDLE_CONTEXTS})",
    )
    parser.add_argument(
        "--fake-quant",
        action="store_true",
        help="compute a quantized model in plain torch from dequantized values instead of the "
        "kernels; slow, to check them",
    )
    parser.add_argument(
        "--tasks",
        type=_names,
        metavar="A,B,...",
        help="tasks of lm-eval (pip install 'resq_kernels[tasks]')",
    )
    parser.add_argument(
        "--num-fewshot",
        type=at_least(0),
        metavar="K",
        help="with --tasks: examples before every question (default: as many as the task says)",
    )
    parser.add_argument(
        "--limit",
        type=at_least(1),
        metavar="N",
        help="with --tasks: the first N questions of every task only, to try something out",
    )
    parser.add_argument(
        "--batch-size",
        type=at_least(1),
        metavar="N",
        help="with --tasks: questions in one pass (default: 1)",
    )
    parser.add_argument(
        "--include-path",
        metavar="FOLDER",
        help="with --tasks: look for tasks (YAML files) in this folder too",
    )


def add_text_arguments(parser: argparse.ArgumentParser, default: str) -> None:
    """Which text, and its windows; `default` says when it is WikiText-2."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--text", metavar="FILE", help="a UTF-8 text file to evaluate on")
    source.add_argument(
        "--dataset",
        choices=(texts.WIKITEXT2,),
        help=f"the test split of WikiText-2 raw (default {default}); read from the folder "
        f"{texts.WIKITEXT2_VARIABLE} or through the datasets package",
    )
    parser.add_argument(
        "--seqlen",
        type=at_least(2),
        metavar="L",
        help="tokens of a window (default: 2048, or the model's positions if fewer)",
    )
    parser.add_argument(
        "--max-windows", type=at_least(1), metavar="N", help="use the first N windows only"
    )


def run(args: argparse.Namespace) -> None:
    """Measures and prints; writes --json last.

    Raises:
        CommandError, UsageError, ValueError: the model, the reference or the text cannot be used.
    """
    output.check_target(args.json, reads=[args.model, args.reference, args.text])
    wants_perplexity = args.text is not None or bool(args.dataset or not args.tasks)
    if args.reference is not None and not wants_perplexity:
        raise UsageError("--reference: needs a text, add --text FILE or --dataset wikitext2")
    _check_task_options(args)
    if args.needle_contexts is not None and not args.needle:
        raise UsageError("--needle-contexts: needs --needle")
    if args.needle and not wants_perplexity:
        raise UsageError("--needle: needs a text, add --text FILE or --dataset wikitext2")
    if args.adapter is not None and args.fake_quant:
        raise UsageError("--fake-quant: expected a model without --adapter")
    device = loading.choose_device(args.device)
    config = loading.load_config(args.model, args.lo_bits)
    source = texts.WIKITEXT2 if args.text is None else args.text
    if wants_perplexity:
        texts.check_source(source, "--text")
    longest, limit = max(args.needle or [0]), loading.window_limit(config)
    if limit is not None and longest > limit:
        raise UsageError(
            f"--needle: expected at most {limit} (the model's max_position_embeddings), got "
            f"{longest}"
        )
    stored = loading.quantization(config)
    if args.fake_quant and (stored is None or stored.get("quant_method") != "resq"):
        raise UsageError(f"--fake-quant: expected a model quantized by resq, got {args.model}")
    harness = _harness() if args.tasks else None
    tasks = None if harness is None else _find_tasks(harness, args)
    tokenizer = loading.load_tokenizer(args.model)
    bits = None if stored is None else stored.get("lo_bits")
    figures: dict[str, Any] = {"model": args.model, "adapter": args.adapter, "lo_bits": bits}
    tokens, seqlen, contexts = None, 0, []
    if wants_perplexity:
        seqlen = loading.choose_seqlen(args.seqlen, config)
        tokens = texts.tokenize(tokenizer, texts.load_text(source, "test"))
        from resq_kernels.evaluate import cut_windows

        cut_windows(tokens, seqlen)  # a short text is refused before a large model is loaded
        figures["text"] = source
        if args.needle:
            from resq_kernels.needle import make_contexts

            count = args.needle_contexts or NEEDLE_CONTEXTS
            contexts = [make_contexts(tokenizer, tokens, length, count) for length in args.needle]
    reference = None
    model = loading.load_model(args.model, args.dtype, device, args.lo_bits, args.adapter)
    if args.reference is not None:
        reference = loading.load_model(args.reference, args.dtype, device, adapter=args.adapter)
    figures["fake_quant"] = args.fake_quant
    with _path(model, args.fake_quant):
        if tokens is not None:
            from resq_kernels.evaluate import perplexity

            evaluation = perplexity(
                model,
                tokens,
                seqlen=seqlen,
                max_windows=args.max_windows,
                reference=reference,
                progress="eval",
            )
            figures |= dataclasses.asdict(evaluation)
        if contexts:
            figures["needle"] = _needle(contexts, model, reference)
        if harness is not None:
            figures["task_options"] = {name: getattr(args, name) for name in TASK_OPTIONS}
            figures["tasks"] = _run_tasks(harness, tasks, args, model, tokenizer)
    _print(figures)
    output.write_json(args.json, figures)


def _path(model: PreTrainedModel, fake_quant: bool) -> contextlib.AbstractContextManager[object]:
    """A context in which the model runs the path that was asked for."""
    if not fake_quant:
        return contextlib.nullcontext()
    from resq_kernels.fake_quant import fake_quantized

    return fake_quantized(model)


def _needle(
    contexts: Sequence[Sequence[Context]],
    model: PreTrainedModel,
    reference: PreTrainedModel | None,
) -> list[dict[str, Any]]:
    """The figures of each length."""
    from resq_kernels.needle import recall

    models = {"model": model} if reference is None else {"model": model, "reference": reference}
    rows = []
    for same_length in contexts:
        found = recall(models, same_length, progress="needle")
        row = dataclasses.asdict(found["model"])
        for name in ("found", "log_probability"):
            exact = found.get("reference")
            row[f"reference_{name}"] = None if exact is None else getattr(exact, name)
        rows.append(row)
    return rows


def _print(figures: dict[str, Any]) -> None:
    rows = [("model", str(figures["model"]))]
    if figures["adapter"] is not None:
        rows.append(("adapter", figures["adapter"]))
    if figures["lo_bits"] is not None:
        rows.append(("activations", f"low part in {figures['lo_bits']} bits"))
    if figures["fake_quant"]:
        rows.append(("path", "reference (fake quantization in plain torch)"))
    if "perplexity" in figures:
        rows.append(("perplexity", f"{figures['perplexity']:.4f}"))
        if figures["kl_to_reference"] is not None:
            rows.append(("KL to reference", f"{figures['kl_to_reference']:.6f} nats"))
            rows.append(("top-1 agreement", f"{figures['top1_agreement']:.2%}"))
        rows += [
            ("text", str(figures["text"])),
            ("tokens", "{tokens} ({windows} windows of {seqlen})".format_map(figures)),
            ("speed", f"{figures['tokens_per_second']:.0f} tokens/s"),
        ]
    for row in figures.get("needle", []):
        text = f"{row['found']} of {row['asked']} found, log p {row['log_probability']:.2f}"
        if row["reference_found"] is not None:
            text += "; reference {reference_found}, {reference_log_probability:.2f}".format_map(row)
        rows.append((f"needle {row['length']}", text))
    for task, metrics in figures.get("tasks", {}).items():
        rows += [(task, f"{name} {value:.4f}") for name, value in metrics.items()]
    if figures.get("task_options", {}).get("limit"):
        rows.append(
            (
                "limit",
                "the first {limit} questions of each task".format_map(figures["task_options"]),
            )
        )
    print(output.table(rows))


def _lengths(text: str) -> list[int]:
    try:
        lengths = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected numbers of tokens separated by commas, got {text!r}"
        ) from None
    if min(lengths) < 1 or len(set(lengths)) < len(lengths):
        raise argparse.ArgumentTypeError(f"expected different lengths of at least 1, got {text!r}")
    return lengths


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError("expected task names separated by commas")
    return names


def _harness() -> ModuleType:
    try:
        import lm_eval
        import lm_eval.models.huggingface
        import lm_eval.tasks
    except ImportError:
        raise CommandError(
            "--tasks: needs lm-eval, which is not installed; "
            "run `pip install 'resq_kernels[tasks]'`"
        ) from None
    return lm_eval


def _check_task_options(args: argparse.Namespace) -> None:
    """Refuses options of --tasks without it, and a folder that is none."""
    for name in TASK_OPTIONS:
        if getattr(args, name) is not None and not args.tasks:
            raise UsageError(f"--{name.replace('_', '-')}: needs --tasks")
    folder = args.include_path
    if folder is not None and not (folder and Path(folder).is_dir()):
        raise UsageError(f"--include-path: expected a folder, got {folder!r}")


def _find_tasks(harness: ModuleType, args: argparse.Namespace) -> Any:
    """lm-eval's table of tasks; it must have those of --tasks.

    Raises:
        UsageError: there is no task of this name.
    """
    table = harness.tasks.TaskManager(include_path=args.include_path)
    for name in args.tasks:
        if name not in table.all_tasks:
            raise UsageError(f"--tasks: expected a task that lm-eval knows, got {name!r}")
    return table


def _run_tasks(
    harness: ModuleType,
    table: Any,
    args: argparse.Namespace,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, dict[str, float]]:
    """Results, task -> metric -> value; only metrics that are numbers."""
    wrapped = harness.models.huggingface.HFLM(
        pretrained=model, tokenizer=tokenizer, batch_size=args.batch_size or 1
    )
    results = harness.simple_evaluate(
        model=wrapped,
        tasks=args.tasks,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        task_manager=table,
        bootstrap_iters=0,
    )["results"]
    return {
        task: {
            name.split(",")[0]: float(value)
            for name, value in metrics.items()
            if isinstance(value, int | float) and "stderr" not in name
        }
        for task, metrics in results.items()
    }
