"""From a 16-bit folder to a quantized one: the stages in order."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from resq_kernels.config import ResQConfig
from resq_kernels.ptq import inputs
from resq_kernels.ptq.amplitudes import measure_amplitudes, permutations
from resq_kernels.ptq.basis import Basis, find_basis
from resq_kernels.ptq.calibrate import SecondMoments, calibrate, check_tokens
from resq_kernels.ptq.card import source_name, write_card
from resq_kernels.ptq.check import check_device, check_disk, check_memory, check_shape, work_bytes
from resq_kernels.ptq.decoder import Rope, rope_tables
from resq_kernels.ptq.dialogues import Dialogues, write_dialogues
from resq_kernels.ptq.distill import distill
from resq_kernels.ptq.learn import learn
from resq_kernels.ptq.quantize import quantize
from resq_kernels.ptq.report import finished_report, layer_errors, spectra, write_report
from resq_kernels.ptq.rotate import Rotation, rotate
from resq_kernels.ptq.save import companions, publish, save
from resq_kernels.ptq.source import SourceModel
from resq_kernels.ptq.verdict import verdict_facts, verdicts
from resq_kernels.ptq.workspace import DISTILLED, LEARNED, Workspace, check_out
from resq_kernels.safetensors_io import INDEX_FILE


def quantize_folder(
    source: Path | str,
    out: Path | str,
    calibration: torch.Tensor,
    config: ResQConfig | None = None,
    *,
    held_out: torch.Tensor | None = None,
    dialogues: Dialogues | None = None,
    device: str = "cpu",
    resume: bool = False,
    progress: bool = True,
) -> dict[str, object]:
    """Quantizes a model's folder into a folder that `from_pretrained` loads.

    The same inputs give the same bytes of weights and configuration on the same machine, torch
    and number of threads (which decide the order of sums inside matrix products).

    Args:
        source: Hugging Face folder with 16-bit or float32 weights.
        out: folder that must not exist, or a link to one; it appears complete, by a rename. Until
            then everything is in `<out>.partial`.
        calibration: token windows int64 [windows, seqlen], e.g. of `calibrate.windows`.
        config: the options; default `ResQConfig()`. Its `samples`, `seqlen` and `dialogues` are not
            used here.
        held_out: other windows, int64 [windows, tokens], on which the result is measured
            (`verdict`); by default, and with no windows, it is not.
        dialogues: windows besides those that the model writes, in the first stage; by default none.
        device: where the layers are computed.
        resume: continue an interrupted run of the same inputs, or begin; weights and configuration
            get the same bytes as without the interruption.
        progress: bars on stderr.

    Returns:
        The content of quantization_report.json.

    Raises:
        ValueError: model, tokens and options do not fit each other; the message names what.
        FileExistsError: `out` exists, or an interrupted run does and `resume` is off, or with
            `resume` something that the result depends on has changed (the message says what), or
            another process is at work on `out`.
        OSError: not enough disk.
    """
    config = config or ResQConfig()
    source, out = Path(source), check_out(Path(out), resume)
    began = time.perf_counter()
    check_device(device)
    model = SourceModel(source)
    check_shape(model.shape, config)
    check_tokens(calibration, model.shape)
    check_memory(model.shape, config, device, model.dtype, calibration.shape[1])
    if held_out is None:
        held_out = calibration[:0]
    if len(held_out):
        check_tokens(held_out, model.shape, "held_out")
    index = filter(Path.is_file, [source / INDEX_FILE])
    files = [source / "config.json", *index, *model.reader.files, *companions(source)]

    def describe() -> dict[str, Any]:
        return inputs.describe(source, files, calibration, held_out, dialogues, config, device)

    if out.exists():
        return finished_report(out, describe())
    windows, seqlen = calibration.shape
    if dialogues is not None:
        windows += dialogues.calibration
    rope = rope_tables(model.reader.config, source, max(seqlen, held_out.shape[1]))
    check_disk(out, work_bytes(model.shape, config, windows, seqlen, model.item_bytes))
    work = Workspace.open(out, resume)
    try:
        stamps, description = inputs.stamps(files), describe()
        work.begin(description)
        written, held_out_dialogues = calibration[:0], calibration[:0]
        if dialogues is not None:
            written, held_out_dialogues = write_dialogues(
                model, dialogues, config.seed, work, device, progress
            )
        tokens = torch.cat([written, calibration])
        basis, rotation = _layers(model, tokens, rope, config, work, device, progress)
        folder = save(model, basis, rotation, config, work)
        sets = (held_out, held_out_dialogues)
        found = verdicts(model, folder, sets, rope, config, device, progress)
        judged = dict(zip(("verdict", "verdict_in_dialogues"), found, strict=True))
        write_card(folder, source, config, verdict_facts(judged) if any(found) else ())
        if changed := inputs.file_changes(stamps, inputs.stamps(filter(Path.exists, files))):
            raise ValueError(
                f"{', '.join(changed)} while it was being quantized; remove {work.root} and begin "
                "again"
            )
        report: dict[str, object] = {
            "model": source_name(source),
            **judged,
            "layers": layer_errors(model, work),
            "bytes_before": sum(path.stat().st_size for path in model.reader.files),
            "bytes_after": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
            "seconds": round(time.perf_counter() - began, 3),
            "windows": windows,
            "dialogues": len(written),
            "seqlen": seqlen,
            "preset": config.preset,
            "config": config.to_dict(),
            "inputs": description,
            "files": inputs.hashes(folder, filter(Path.is_file, folder.rglob("*"))),
        }
        if config.rotations == "learned":
            report["learning"] = work.load(LEARNED)["losses"].tolist()
        if config.distill_epochs:
            report["distillation"] = work.load(DISTILLED)["divergences"].tolist()
        if basis is not None:
            report["spectra"] = spectra(basis)
        write_report(folder, report)
        publish(folder, out, work)
    finally:
        work.close()
    return report


def _layers(
    model: SourceModel,
    calibration: torch.Tensor,
    rope: Rope,
    config: ResQConfig,
    work: Workspace,
    device: str,
    progress: bool,
) -> tuple[Basis | None, Rotation | None]:
    """The stages that fill the work folder with quantized layers."""
    basis = rotation = None
    distills = config.distill_epochs > 0

    def moments() -> SecondMoments:
        weighted = config.token_weights == "attention"
        return calibrate(model, calibration, rope, work, device, progress, distills, weighted)

    def permutation() -> Rotation:
        found = measure_amplitudes(model, calibration, rope, work, device, progress, distills)
        return permutations(found, model.shape)

    if config.method == "resq":
        basis = work.stage("basis", Basis, lambda: find_basis(model, moments(), config.bases))
    elif config.method == "quik":
        rotation = work.stage("rotation", Rotation, permutation)
    elif distills and not work.has(DISTILLED):
        moments()  # for the states after the last layer
    if config.rotates:
        rotation = work.stage("rotation", Rotation, lambda: rotate(basis, model.shape, config))
        if config.rotations == "learned":
            rotation = learn(model, rotation, calibration, rope, config, work, device, progress)
    quantize(model, rotation, calibration, rope, config, work, device, progress)
    if distills:
        distill(model, rotation, calibration, rope, config, work, device, progress)
    return basis, rotation
