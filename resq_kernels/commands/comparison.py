"""Folders, what was measured of them, and the rows that `resq compare` makes of both."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from resq_kernels.commands import loading
from resq_kernels.commands.info import model_figures
from resq_kernels.commands.output import CommandError, UsageError
from resq_kernels.config import ResQConfig
from resq_kernels.intervals import Interval, mean_interval

if TYPE_CHECKING:
    from resq_kernels.evaluate import Measured


class LayerError(NamedTuple):
    """Relative output error of one linear on the calibration text; layer and kind of `name`."""

    name: str
    layer: int
    kind: str
    error: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Folder:
    """What a model folder says about itself, before it is loaded.

    Attributes:
        name: as given, also a hub name.
        label: in tables and plots.
        config: its transformers configuration.
        quantization: its `quantization_config`, or None.
        options: how resq quantized it, or None.
        report: its quantization_report.json, or None.
        layers: of the report, every linear in the order of the model.
        bytes: of its weights; None of a hub name and where they are not in safetensors files.
    """

    name: str
    label: str
    config: Any
    quantization: dict[str, Any] | None
    options: ResQConfig | None
    report: dict[str, Any] | None
    layers: list[LayerError]
    bytes: int | None

    @property
    def method(self) -> str | None:
        """How it was quantized; None of a model that is not."""
        if self.quantization is None:
            return None
        if self.options is None:
            method = self.quantization.get("quant_method", "unknown")
            return str(getattr(method, "value", method))
        report = self.report or {}
        preset, made = report.get("preset"), report.get("config", {})
        parts = [
            self.options.method,
            self.options.weights,
            preset and f"preset {preset}",
            "learned rotations" if made.get("rotations") == "learned" else None,
            "distilled" if made.get("distill_epochs") else None,
        ]
        return ", ".join(filter(None, parts))

    @property
    def bits(self) -> dict[str, list[int]] | None:
        """Widths of weights, activations, keys and values, and embedding: the low part's, and 8
        where there is a high part. None if resq did not quantize it."""
        options = self.options
        if options is None:
            return None

        def widths(low: int) -> list[int]:
            return [low, 8] if options.high_fraction and low < 8 else [low]

        return {
            "weights": widths(4),
            "activations": widths(options.lo_bits),
            "kv": widths(options.kv_bits),
            "embedding": [options.embedding_bits],
        }

    @property
    def lo_bits(self) -> int | None:
        """For `loading.load_model`."""
        return None if self.options is None else self.options.lo_bits

    @property
    def family(self) -> str | None:
        """Equal for folders that differ in their seed alone, as far as their files tell; None if
        resq did not quantize it."""
        if self.options is None:
            return None
        report = self.report or {}
        options = {**self.options.to_dict(), **report.get("config", {})}
        del options["seed"]
        source = report.get("inputs", {}).get("files")
        return json.dumps([options, source, self.report is None], sort_keys=True)


def labels(names: Sequence[str]) -> list[str]:
    """The last parts of paths where those differ, else the paths."""
    last = [Path(name).name for name in names]
    return last if all(last) and len(set(last)) == len(last) else list(names)


def read_folder(name: str, label: str, lo_bits: int | None = None) -> Folder:
    """Reads what a folder says, and checks what can be checked without loading it.

    Args:
        name: a folder or hub name.
        label: what tables call it.
        lo_bits: bits of its activations' low part instead of its own, if resq quantized it.

    Raises:
        CommandError, CheckpointError: there is no such model, or its files are damaged.
    """
    from resq_kernels import checkpoint
    from resq_kernels.ptq.workspace import REPORT_FILE
    from resq_kernels.safetensors_io import read_json

    config = loading.load_config(name)
    entry = loading.quantization(config)
    ours = entry is not None and entry.get("quant_method") == checkpoint.QUANT_METHOD
    options, report, layers, size = None, None, [], None
    if not Path(name).is_dir():
        options = checkpoint.parse_quantization_config(entry or {}).config if ours else None
    else:
        figures = model_figures(name)
        if figures["weights"] is None:
            raise CommandError(f"{name}: holds no weights that transformers loads")
        size = None if figures["bytes"] is None else figures["bytes"]["total"]
        options = checkpoint.validate(Path(name)) if ours else None
        path = Path(name) / REPORT_FILE
        if ours and path.exists():
            report = read_json(path)
            layers = _layers(path, report)
    if lo_bits is not None and entry is not None and options is not None:
        entry, options = checkpoint.with_lo_bits(entry, lo_bits), options.with_lo_bits(lo_bits)
    return Folder(
        name=name,
        label=label,
        config=config,
        quantization=entry,
        options=options,
        report=report,
        layers=layers,
        bytes=size,
    )


def _layers(path: Path, report: dict[str, Any]) -> list[LayerError]:
    """The errors of a report.

    Raises:
        CommandError: they are not those that `resq quantize` writes.
    """
    found = []
    try:
        for row in report["layers"]:
            place = re.fullmatch(r".*\.(\d+)\..*?(\w+)", row["name"])
            layer, kind = place.groups() if place else ("", "")
            found.append(LayerError(row["name"], int(layer), kind, float(row["error"])))
    except (KeyError, TypeError, ValueError):
        raise CommandError(f"{path}: layers: expected name and error of every linear") from None
    return found


def seed_groups(folders: Sequence[Folder]) -> list[list[int]]:
    """The places of folders that differ in their seed alone, groups in the order of their first
    folder, each in the order of its seeds.

    Raises:
        UsageError: no two folders do, or two of a group have one seed.
    """
    groups: dict[str, list[int]] = {}
    for place, folder in enumerate(folders):
        groups.setdefault(folder.family or f"alone {place}", []).append(place)
    for group in groups.values():
        group.sort(key=lambda place: _seed(folders[place]) or 0)
        for one, other in zip(group, group[1:], strict=False):
            if _seed(folders[one]) == _seed(folders[other]):
                raise UsageError(
                    f"--seeds: expected folders with seeds of their own, got {folders[one].name} "
                    f"and {folders[other].name} with the same configuration and the seed "
                    f"{_seed(folders[one])}"
                )
    if len(groups) == len(folders):
        raise UsageError("--seeds: expected folders that differ in their seed alone, got none")
    return list(groups.values())


def _seed(folder: Folder) -> int | None:
    return None if folder.options is None else folder.options.seed


class Result(NamedTuple):
    """A folder, what was measured of it, and the dtype of what is not quantized."""

    folder: Folder
    measured: Measured
    dtype: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the table: a folder, or the folders of several seeds.

    Attributes:
        results: of the folders.
        perplexity: exp of the mean cross entropy over targets (and seeds).
        gap: cross entropy above the reference's, in nats.
        kl: KL(reference || model), in nats.
        kl_difference: its KL less that of the first row; None of the first row itself.
        top1: share of the targets whose likeliest token is the reference's.
    """

    results: Sequence[Result]
    perplexity: float
    gap: Interval
    kl: Interval
    kl_difference: Interval | None
    top1: Interval

    @property
    def label(self) -> str:
        """Of its first folder."""
        return self.results[0].folder.label

    @property
    def layers(self) -> list[LayerError]:
        """Error of every linear, over seeds their mean; none if a folder has no report."""
        columns = zip(*(result.folder.layers for result in self.results), strict=False)
        return [
            column[0]._replace(error=fmean(place.error for place in column)) for column in columns
        ]

    @property
    def layer_error(self) -> float | None:
        """Mean of `layers`."""
        return fmean(place.error for place in self.layers) if self.layers else None

    def figures(self) -> dict[str, Any]:
        """Its numbers under their keys in JSON."""
        difference = self.kl_difference or Interval(math.nan, None)
        return {
            "perplexity": self.perplexity,
            "gap": self.gap.mean,
            "gap_interval": self.gap.half,
            "kl_to_reference": self.kl.mean,
            "kl_interval": self.kl.half,
            "kl_difference": difference.mean,
            "kl_difference_interval": difference.half,
            "top1_agreement": self.top1.mean,
            "top1_interval": self.top1.half,
            "layer_error": self.layer_error,
        }


def make_rows(
    groups: Sequence[Sequence[Result]], reference: Measured, over_seeds: bool = False
) -> list[Row]:
    """The rows of a table; `mean_interval` says how intervals are computed.

    Over windows (one folder in each group), a row's values are those of the windows: its gaps are
    differences from the reference, and its differences from the first row are taken in each window.
    Over seeds, a row's values are the means of its folders; differences from the first row are
    taken seed by seed, and have no interval unless both rows have the same seeds.

    Args:
        groups: results of each row's folders.
        reference: on the same windows.
        over_seeds: which of both.
    """

    def values(group: Sequence[Result], of: Callable[[Measured], list[float]]) -> list[float]:
        lists = [of(result.measured) for result in group]
        return [fmean(each) for each in lists] if over_seeds else lists[0]

    rows = []
    first = values(groups[0], lambda measured: measured.divergences)
    seeds = [_seed(result.folder) for result in groups[0]]
    for group in groups:
        kl = values(group, lambda measured: measured.divergences)
        if over_seeds and [_seed(result.folder) for result in group] != seeds:
            difference = Interval(fmean(kl) - fmean(first), None)
        else:
            difference = mean_interval([a - b for a, b in zip(kl, first, strict=True)])
        rows.append(
            Row(
                results=group,
                perplexity=math.exp(fmean(values(group, lambda measured: measured.losses))),
                gap=mean_interval(values(group, lambda measured: measured.gaps(reference))),
                kl=mean_interval(kl),
                kl_difference=None if group is groups[0] else difference,
                top1=mean_interval(values(group, lambda measured: measured.agreements)),
            )
        )
    return rows
