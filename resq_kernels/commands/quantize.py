"""`resq quantize`: a 16-bit model in, a quantized Hugging Face folder out."""

from __future__ import annotations

import argparse
import dataclasses
import glob
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resq_kernels import texts
from resq_kernels.commands import loading, output
from resq_kernels.commands.arguments import at_least, real
from resq_kernels.commands.output import CommandError, UsageError
from resq_kernels.config import (
    BASES,
    DISTILL_LR,
    HADAMARD_BLOCK,
    HADAMARD_BLOCKS,
    HELD_OUT,
    HESSIAN_INPUTS,
    METHODS,
    PRESETS,
    ROTATION_LR,
    ROTATION_STEPS,
    ROTATIONS,
    TOKEN_WEIGHTS,
    WEIGHT_METHODS,
    ResQConfig,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from resq_kernels.architecture import ModelShape

SUMMARY = "turn a 16-bit model into a 4-bit one (weights, activations, KV cache)"
DESCRIPTION = """\
Reads a Llama, Mistral, Qwen2.5, Qwen3 or SmolLM3 model, finds the directions that need 8 bits on a
calibration text, rotates and quantizes layer by layer, and writes a Hugging Face folder that
`resq eval`, `resq generate` and AutoModelForCausalLM load. Memory: one decoder layer and its
activations, whatever the model's size; a chat model that fits the memory is there as a whole first,
and writes a quarter of the calibration windows itself (--dialogues).
OUT appears complete or not at all. An interrupted run leaves OUT.partial; --resume continues it.
MODEL is a folder of safetensors or of pytorch_model.bin, or a GGUF file, or a folder that is
quantized with fp8, compressed-tensors or bitsandbytes. All but the first are written to OUT.source
as 16-bit safetensors for the time of the run.

examples:
  resq quantize meta-llama/Llama-3.2-1B out/llama-resq
  resq quantize ./model out/model-resq --calib calibration.txt --samples 64 --seqlen 1024
  resq quantize ./model out/model-rtn --method rtn --weights rtn --calib calibration.txt
  resq quantize model.gguf out/model-resq --calib calibration.txt
  resq quantize ./model out/model-paper --preset paper
  resq quantize ./model out/model-learned --rotations learned
  resq quantize ./model out/model-quik --preset quik
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `resq quantize`; those of ResQConfig that are not given are None."""
    defaults = ResQConfig()
    parser.add_argument(
        "model", metavar="MODEL", help="HF folder or hub name, or a GGUF file; see above"
    )
    parser.add_argument("out", metavar="OUT", help="folder to write; must not exist")
    parser.add_argument(
        "--tokenizer",
        metavar="FOLDER",
        help="HF folder or hub name with the tokenizer, chat template, generation settings and "
        "licence of MODEL, a GGUF file (default: what the file says)",
    )
    parser.add_argument(
        "--calib",
        metavar="TEXT",
        default=texts.WIKITEXT2,
        help="calibration text: a UTF-8 file, or wikitext2 (its training part; the default)",
    )
    parser.add_argument(
        "--samples",
        type=at_least(1),
        metavar="N",
        help=f"calibration windows (default: {defaults.samples})",
    )
    parser.add_argument(
        "--seqlen",
        type=at_least(2),
        metavar="L",
        help=f"tokens of a window (default: {defaults.seqlen}, or the model's positions if fewer)",
    )
    parser.add_argument(
        "--dialogues",
        type=at_least(0),
        metavar="N",
        help="how many of the windows the 16-bit model writes itself, in its chat template: a chat "
        "model that is calibrated on prose alone loses more in a chat (default: a quarter, if it "
        "has a template and fits the memory)",
    )
    parser.add_argument(
        "--held-out",
        type=at_least(0),
        default=HELD_OUT,
        metavar="N",
        help="other windows of the text, on which the result is measured against the 16-bit model "
        f"(default: {HELD_OUT}; 0: no verdict)",
    )
    paper, spinquant, quik = (
        ", ".join(f"{_flag(name)} {value}" for name, value in PRESETS[preset].items())
        for preset in ("paper", "spinquant", "quik")
    )
    parser.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        help=f"the choices of a paper as its authors' code makes them. paper: of ResQ's, {paper}; "
        f"spinquant: of SpinQuant's, {spinquant}; quik: of QUIK's, {quik}; options "
        "that are given as well override them",
    )
    parser.add_argument(
        "--method",
        choices=METHODS,
        help="resq: PCA bases, rotated inside each part, INT4 and INT8 (default); quarot: rotation "
        "only, INT4; quik: no rotation, the channels of the largest amplitude in INT8, the others "
        "in INT4; rtn: plain INT4",
    )
    parser.add_argument(
        "--weights",
        choices=WEIGHT_METHODS,
        help="how weights are rounded (default: gptq)",
    )
    parser.add_argument(
        "--bases",
        choices=BASES,
        help="bases of keys and values: balanced against what reads them (default), or principal, "
        "by their own variance alone",
    )
    parser.add_argument(
        "--rotations",
        choices=ROTATIONS,
        help="rotations of the hidden states and of values inside the INT4 part and the INT8 part: "
        "random (default), or learned on the calibration windows, with the whole model in memory",
    )
    parser.add_argument(
        "--rotation-steps",
        type=at_least(1),
        metavar="N",
        help=f"windows on which rotations are learned, one a step (default: {ROTATION_STEPS})",
    )
    parser.add_argument(
        "--rotation-lr",
        type=real(0.0, 100.0, open_low=True),
        metavar="R",
        help=f"learning rate of the first step, which falls to 0 (default: {ROTATION_LR})",
    )
    parser.add_argument(
        "--token-weights",
        choices=TOKEN_WEIGHTS,
        help="how tokens count in the basis of the hidden states and in GPTQ of q, k and v: by the "
        "attention that they receive (default), or uniform",
    )
    parser.add_argument(
        "--hessian-inputs",
        choices=HESSIAN_INPUTS,
        help="on which inputs GPTQ rounds: rounded as at run time (default), or exact",
    )
    parser.add_argument(
        "--high-fraction",
        type=real(0.0, 1.0),
        metavar="F",
        help=f"share of every input dimension in INT8 (default: {defaults.high_fraction} with "
        "methods resq and quik, 0 otherwise)",
    )
    parser.add_argument(
        "--hadamard-block",
        type=int,
        choices=HADAMARD_BLOCKS,
        metavar="B",
        help="largest block of the Hadamard transform of down_proj's input, a power of two from 8 "
        "to 256: the channels that matter most stay in INT8 beside the blocks; 0: the whole row is "
        f"transformed, without INT8 (default: {HADAMARD_BLOCK} with method resq, 0 otherwise)",
    )
    parser.add_argument(
        "--lo-bits",
        type=int,
        choices=(4, 8),
        help="bits of the low part of the activations (default: 4)",
    )
    parser.add_argument(
        "--kv-bits",
        type=int,
        choices=(4, 16),
        help="4 quantizes keys and values (default), 16 leaves them",
    )
    parser.add_argument(
        "--embedding-bits",
        type=int,
        choices=(8, 16),
        help="8 quantizes embedding and head (default), 16 leaves them",
    )
    parser.add_argument(
        "--symmetric",
        action="store_true",
        default=None,
        help="symmetric instead of asymmetric activations",
    )
    parser.add_argument(
        "--activation-clip",
        type=real(0.0, 1.0, open_low=True),
        metavar="C",
        help="factor on the range of the low part of the activations (default: what fits each "
        "width; 1 with methods quik and rtn and with --lo-bits 8)",
    )
    parser.add_argument(
        "--damping",
        type=real(0.0, 1.0, open_low=True),
        metavar="D",
        help=f"GPTQ's damping, as a share of the mean diagonal (default: {defaults.damping})",
    )
    parser.add_argument(
        "--distill-epochs",
        type=at_least(0),
        metavar="N",
        help="train the INT8 columns and the rows' gains of the rounded weights to give the 16-bit "
        "model's predictions, in N passes over the calibration windows (default: 0, no training)",
    )
    parser.add_argument(
        "--distill-lr",
        type=real(0.0, 1.0, open_low=True),
        metavar="R",
        help="largest learning rate of that training, in steps of the INT8 weights "
        f"(default: {DISTILL_LR})",
    )
    loading.add_device_argument(parser)
    parser.add_argument("--seed", type=at_least(0), metavar="S", help="default: 0")
    parser.add_argument(
        "--resume", action="store_true", help="continue an interrupted run of the same inputs"
    )


def run(args: argparse.Namespace) -> None:
    """Quantizes and prints a summary; writes --json last.

    Raises:
        UsageError: options that do not go together, or --json where it cannot be written.
        CommandError, ValueError, OSError: the model, the text, the options or the output folder
            cannot be used; everything that can be known is checked before the work begins.
    """
    out = Path(args.out)
    output.check_target(args.json, out=out, reads=[args.model, args.calib, args.tokenizer])
    _check_out(out, args.resume)
    if args.tokenizer is not None and not loading.is_gguf(args.model):
        raise UsageError(f"--tokenizer: expected a GGUF file as MODEL, got {args.model}")
    device = loading.choose_device(args.device)
    model_config = loading.load_config(args.model)
    texts.check_source(args.calib, "--calib")
    seqlen = loading.choose_seqlen(args.seqlen, model_config, ResQConfig().seqlen)
    try:
        config = _config(args, seqlen)
    except ValueError as error:
        raise UsageError(str(error)) from error
    shape = _check_model(args.model, model_config, config, device)

    import torch

    from resq_kernels.ptq.calibrate import windows
    from resq_kernels.ptq.dialogues import plan
    from resq_kernels.ptq.float_folder import Source, float_folder
    from resq_kernels.ptq.pipeline import quantize_folder

    tokenizer = loading.load_tokenizer(args.tokenizer or args.model)
    dtype = model_config.dtype or torch.float32
    config, dialogues = plan(config, tokenizer, shape, dtype, device, args.held_out)
    calibration, held_out = windows(
        tokenizer,
        texts.load_text(args.calib, "train"),
        config.text_samples,
        config.seqlen,
        config.seed,
        args.held_out,
    )
    beside = None if args.tokenizer is None else _beside(args.tokenizer)
    source = Source(_folder(args.model), beside)
    target = Path(os.path.realpath(out))
    try:
        with float_folder(source, target, shape, args.resume) as folder:
            report = quantize_folder(
                folder,
                out,
                calibration,
                config,
                held_out=held_out,
                dialogues=dialogues,
                device=device,
                resume=args.resume,
            )
    except FileExistsError:  # refused before the work
        raise
    except BaseException:
        _say_what_is_kept(target)
        raise
    _print(args.model, out, report)
    output.write_json(args.json, report)


def _say_what_is_kept(out: Path) -> None:
    from resq_kernels.ptq.float_folder import source_root
    from resq_kernels.ptq.workspace import INPUTS_FILE, work_folder

    if (work_folder(out) / INPUTS_FILE).exists():
        converted = source_root(out)
        also = f", the converted model in {converted}" if converted.exists() else ""
        sys.stderr.write(
            f"\nresq: finished layers are kept in {work_folder(out)}{also} (--resume)\n"
        )


def _config(args: argparse.Namespace, seqlen: int) -> ResQConfig:
    names = {field.name for field in dataclasses.fields(ResQConfig)} - {"seqlen"}
    given = {k: v for k, v in vars(args).items() if k in names and v is not None}
    if args.preset is None:
        return ResQConfig(seqlen=seqlen, **given)
    return ResQConfig.from_preset(args.preset, seqlen=seqlen, **given)


def _flag(name: str) -> str:
    """The option of a field."""
    return f"--{name.replace('_', '-')}"


def _check_out(out: Path, resume: bool) -> None:
    """Refuses an output folder that exists or cannot be made, before any work is done."""
    from resq_kernels.ptq.workspace import check_out

    out = check_out(out, resume)
    parent = out.parent
    while not parent.exists():
        parent = parent.parent
    try:
        if not parent.is_dir():
            raise NotADirectoryError(0, os.strerror(20))
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:
        raise CommandError(f"{out}: cannot write to {parent}: {error.strerror}") from error


def _check_model(
    model: str, model_config: PretrainedConfig, config: ResQConfig, device: str
) -> ModelShape:
    """The model's sizes; refuses one that is quantized in a way that cannot be turned back, of
    another architecture, or cannot be split."""
    import torch

    from resq_kernels.architecture import ModelShape
    from resq_kernels.ptq.check import check_memory, check_shape
    from resq_kernels.ptq.dequantized import check_method
    from resq_kernels.ptq.source import check_class

    stored = loading.quantization(model_config)
    try:
        if stored is not None:
            check_method(stored)
        settings = model_config.to_dict()
        check_class(settings)
        shape = ModelShape.from_config(settings)
        check_shape(shape, config)
        dtype = model_config.dtype or torch.float32
        check_memory(shape, config, device, dtype, config.seqlen)
    except (ValueError, ImportError) as error:
        raise CommandError(f"{model}: {error}") from error
    return shape


def _folder(model: str) -> Path:
    """The folder, or GGUF file, of a model; of a hub name, what is read and copied is downloaded
    into the hub's cache first: many repositories hold the weights two or three times."""
    if Path(model).exists():
        return Path(model)
    from huggingface_hub import snapshot_download

    from resq_kernels import safetensors_io as files

    folder = _beside(model, "config.json")

    def download(*names: str) -> None:
        # The name of the folder is the commit: all files come from the same one.
        exact = [glob.escape(name) for name in names]
        snapshot_download(model, revision=folder.name, allow_patterns=exact)

    config = files.read_json(folder / "config.json")
    named = config.get("transformers_weights")
    for name in (str(named),) if named else files.weight_names():
        download(name)
        if found := files.find_weights(folder, config):
            if found.suffix == ".json" and found.is_file():
                shards = files.indexed_files(found)
                download(*(path.relative_to(folder).as_posix() for path in shards))
            break
    return folder


def _beside(model: str, *others: str) -> Path:
    """The folder of the files beside the weights, tokenizer and licence; of a hub name, those are
    downloaded, with others by name."""
    if Path(model).exists():
        return Path(model)
    from huggingface_hub import snapshot_download

    from resq_kernels.ptq.float_folder import ADAPTER
    from resq_kernels.ptq.save import companion_patterns

    allowed, ignored = companion_patterns()
    allowed += [ADAPTER, *others]
    return Path(snapshot_download(model, allow_patterns=allowed, ignore_patterns=ignored))


def _print(model: str, out: Path, report: dict[str, Any]) -> None:
    layers = report["layers"]
    worst = max(layers, key=lambda layer: layer["error"])
    mean = sum(layer["error"] for layer in layers) / len(layers)
    before, after = report["bytes_before"], report["bytes_after"]
    from resq_kernels.ptq.report import distillation_fact, learning_fact
    from resq_kernels.ptq.verdict import verdict_facts

    rows = [
        ("model", model),
        ("quantized", f"{len(layers)} linears in {report['seconds']:.1f} s"),
        *learning_fact(report),
        *distillation_fact(report),
        ("relative error", f"mean {mean:.4f}, worst {worst['error']:.4f} ({worst['name']})"),
        ("size", f"{output.size(before)} -> {output.size(after)} ({before / after:.2f}x smaller)"),
        *verdict_facts(report),
        *_advice(report),
        ("written to", str(out)),
        ("report", str(out / "quantization_report.html")),
    ]
    print(output.table(rows))


def _advice(report: dict[str, Any]) -> list[tuple[str, str]]:
    """The options that would bring a model nearer to the 16-bit one that is worse, as a row."""
    from resq_kernels.ptq.verdict import is_close

    config = report["config"]
    if is_close(report):
        return []
    better = {"method": "resq", "weights": "gptq", "distill_epochs": 1}
    options = [
        f"{_flag(name)} {value}"
        for name, value in better.items()
        if config[name] != value and not (name == "distill_epochs" and config[name])
    ]
    return [("to come nearer", ", ".join(options))] if options else []
