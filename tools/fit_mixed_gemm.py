"""Fits the constants of mixed_gemm's dispatch to the measured times of all choices.

SWEEP is a file of `resq bench gemm --device cuda --choices all --out PREFIX`, or the report.json of
a GPU run that made one (tools/gpu_check.py, step gemm-choices). The regret of a shape
is the time of the choice that the constants lead to over the time of the best one. The fit
minimises the geometric mean over all shapes; --write puts the constants into the chip's row of
csrc/ops/mixed_gemm/mixed_gemm_tuning.h. The choice is made by the C++ of csrc/, compiled here with
$CXX (docs/notes/0027).

    python tools/fit_mixed_gemm.py sweep.json [more.json ...] [--write] [--chip NAME]
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEADER = ROOT / "csrc/ops/mixed_gemm/mixed_gemm_tuning.h"
STEP = "gemm-choices"
LARGEST = 1 << 31  # rows and columns that mixed_gemm takes
NAME_BYTES = 64
NO_TIME = 10.0  # regret of a choice that failed or was not measured

Values = list[float]


class Refused(Exception):
    """A sentence for the user."""


class Shape(ctypes.Structure):
    """MixedGemmShape."""

    _fields_ = [(name, ctypes.c_int64) for name in ("m", "n", "k_lo", "k_hi")]
    _fields_ += [("packed", ctypes.c_bool)]


Times = dict[tuple[int, int, int, int, bool], dict[str, float]]  # shape -> choice -> us


class Library:
    """tools/fit_mixed_gemm.cpp, compiled with the header as it is now."""

    def __init__(self, header: Path = HEADER) -> None:
        with tempfile.TemporaryDirectory() as folder:
            overlay = Path(folder) / "include/ops/mixed_gemm"
            overlay.mkdir(parents=True)
            (overlay / HEADER.name).write_text(header.read_text())
            path = Path(folder) / "fit.so"
            sources = [ROOT / "tools/fit_mixed_gemm.cpp", ROOT / "csrc/cuda/family.cpp"]
            # Unique symbols would be shared by the libraries of two headers in one process.
            command = [os.environ.get("CXX", "g++"), "-std=c++20", "-O2", "-shared", "-fPIC"]
            command += ["-fvisibility=hidden"]
            command += [
                f"-I{folder}/include",
                f"-I{ROOT}/csrc",
                *map(str, sources),
                "-o",
                str(path),
            ]
            subprocess.run(command, check=True)
            self.c = ctypes.CDLL(str(path))
        self.c.field_name.restype = self.c.chip_name.restype = ctypes.c_char_p
        self.c.field_next.restype = ctypes.c_double
        self.names = [self.c.field_name(i).decode() for i in range(self.c.field_count())]

    def grid(self, index: int) -> Values:
        """The values of a constant to try, ascending."""
        found: Values = []
        value = math.nan
        while not math.isnan(value := self.c.field_next(index, ctypes.c_double(value))):
            found.append(value)
        return found

    def chip(self, facts: Sequence[int]) -> str:
        """The name of a device's row; empty if it has none."""
        return self.c.chip_name(*facts).decode()

    def values(self, facts: Sequence[int] | None) -> Values:
        """The constants that a device runs with; None: those of a chip without a row."""
        values = (ctypes.c_double * len(self.names))()
        self.c.default_tuning(values) if facts is None else self.c.device_tuning(*facts, values)
        return list(values)

    def choose(self, values: Values, family: str, sms: int, shapes: ctypes.Array) -> list[str]:
        """The choices for the shapes."""
        return self._choose(values, family, sms, shapes, None)

    def predict(
        self, values: Values, family: str, sms: int, shapes: ctypes.Array
    ) -> list[tuple[str, str, float]]:
        """The choice for each shape, what limits it, and the clocks that it should take."""
        clocks = (ctypes.c_double * len(shapes))()
        names = self._choose(values, family, sms, shapes, clocks)
        return [(*name.split(","), time) for name, time in zip(names, clocks, strict=True)]

    def _choose(
        self, values: Values, family: str, sms: int, shapes: ctypes.Array, clocks: object
    ) -> list[str]:
        names = ctypes.create_string_buffer(len(shapes) * NAME_BYTES)
        packed = (ctypes.c_double * len(values))(*values)
        self.c.choose(packed, family.encode(), sms, shapes, len(shapes), names, NAME_BYTES, clocks)
        return [
            names.raw[at : at + NAME_BYTES].rstrip(b"\0").decode()
            for at in range(0, len(names), NAME_BYTES)
        ]


class Sweep:
    """The measured times of one chip, and the regret of constants.

    Attributes:
        facts: compute capability (two numbers), multiprocessors, bits of the memory bus.
        family: of kernels.
        times: the choices of each shape that have been timed.
        failed: number of records without a time.
    """

    def __init__(self, library: Library, paths: Iterable[str]) -> None:
        self.library = library
        self.failed = 0
        self.facts: tuple[int, ...] = ()
        self.family = ""
        found: dict[tuple, dict[str, list[float]]] = {}
        for path in paths:
            facts, family, records = read(path)
            if self.facts and (facts, family) != (self.facts, self.family):
                raise Refused(
                    f"{path}: expected a sweep of the same chip as the first, "
                    f"{describe(self.facts)} ({self.family}), got {describe(facts)} ({family})"
                )
            self.facts, self.family = facts, family
            for shape, choice, us in records:
                choices = found.setdefault(shape, {})
                if us is None:
                    self.failed += 1
                else:
                    choices.setdefault(choice, []).append(us)
        self.times: Times = {
            shape: {choice: sum(us) / len(us) for choice, us in choices.items()}
            for shape, choices in found.items()
            if choices
        }
        if not self.times:
            raise Refused("expected at least one shape with a measured choice, got none")
        self._shapes = (Shape * len(self.times))(*(Shape(*shape) for shape in self.times))
        self._best = [min(choices.values()) for choices in self.times.values()]

    def chosen(self, values: Values) -> list[str]:
        """The choice of each shape."""
        return self.library.choose(values, self.family, self.facts[2], self._shapes)

    def regrets(self, values: Values) -> list[float]:
        """Of each shape: at least 1."""
        measured = zip(self.chosen(values), self.times.values(), self._best, strict=True)
        return [times.get(choice, NO_TIME * best) / best for choice, times, best in measured]

    def loss(self, values: Values) -> float:
        """Mean of the logarithms."""
        return sum(map(math.log, self.regrets(values))) / len(self._best)


def read(path: str) -> tuple[tuple[int, ...], str, list[tuple]]:
    """Device, family and records (shape, choice, us or None) of one file."""
    try:
        figures = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise Refused(f"{path}: expected a JSON file, got {error}") from error
    try:
        if "steps" in figures:
            steps = [step for step in figures["steps"] if step["name"] == STEP]
            figures = (steps[0].get("figures") if steps else None) or {}
        device = figures["device"]
        names = ("major", "minor", "multiprocessors", "memory_bits")
        facts = tuple(int(device[name]) for name in names)
        family = device["family"]
        records = []
        for row in figures["choices"]:
            shape = (*(row[name] for name in ("m", "n", "k_lo", "k_hi")), row["packed"])
            records.append((shape, str(row["choice"]), row["us"]))
    except (KeyError, TypeError, ValueError) as error:
        raise Refused(
            f"{path}: expected a file of `resq bench gemm --choices all`, got one without {error}"
        ) from error
    # A sweep of a forced family says nothing about the chip's own choices.
    own = "sm80" if facts[0] == 8 else "sm90" if facts[:2] == (9, 0) else "portable"
    if family != own:
        raise Refused(f"{path}: family: expected {own}, which {describe(facts)} runs, got {family}")
    if facts[2] < 1:
        raise Refused(f"{path}: multiprocessors: expected at least 1, got {facts[2]}")
    for shape, choice, us in records:
        if not whole(shape):
            raise Refused(
                f"{path}: {choice}: expected a shape (m, n, k_lo, k_hi, packed), got {shape}"
            )
        if not (us is None or (type(us) in (int, float) and 0 < us < 1e12)):
            raise Refused(f"{path}: us of {choice}, {shape}: expected a time or null, got {us}")
    return facts, family, records


def whole(shape: tuple) -> bool:
    """Whether these are sizes that mixed_gemm takes."""
    m, n, k_lo, k_hi, packed = shape
    numbers = all(type(size) is int and 0 <= size < LARGEST for size in (m, n, k_lo, k_hi))
    return numbers and m > 0 and n > 0 and k_lo + k_hi > 0 and type(packed) is bool


def describe(facts: Sequence[int]) -> str:
    """A device in words."""
    major, minor, sms, memory_bits = facts
    return f"sm_{major}{minor} with {sms} multiprocessors and {memory_bits} bits of memory bus"


def fit(sweep: Sweep) -> Values:
    """Coordinate descent over one constant, then over pairs, until nothing gets better.

    The regret is constant but for jumps, so every value of a grid is tried. Equal ones keep the
    value that is there: constants that these shapes say nothing about do not move.
    """
    values = sweep.library.values(sweep.facts)
    best = sweep.loss(values)
    grids = [sweep.library.grid(i) for i in range(len(values))]
    felt = [i for i in range(len(values)) if feels(sweep, values, i, grids[i])]
    sizes = (1, 2)
    at = 0
    while at < len(sizes) and best > 1e-9:
        before = best
        for fields in itertools.combinations(felt, sizes[at]):
            for tried in itertools.product(*(near(grids[i], values[i]) for i in fields)):
                candidate = list(values)
                for i, value in zip(fields, tried, strict=True):
                    candidate[i] = value
                loss = sweep.loss(candidate)
                if loss < best - 1e-9:
                    best, values = loss, candidate
        at = 0 if best < before else at + 1
    return values


def feels(sweep: Sweep, values: Values, index: int, grid: Values) -> bool:
    """Whether any value of one constant changes any choice."""
    present = sweep.chosen(values)
    return any(
        sweep.chosen([*values[:index], value, *values[index + 1 :]]) != present for value in grid
    )


def near(grid: Values, value: float) -> Values:
    """The grid, the values nearest to `value` first."""
    return sorted(grid, key=lambda x: abs(math.log((x + 1) / (value + 1))))


def table(sweep: Sweep, before: Values, after: Values) -> str:
    """Geometric mean and maximum of the regret before and after, by M up to a power of two."""
    rows: dict[int, list[tuple[float, float]]] = {}
    pairs = zip(sweep.regrets(before), sweep.regrets(after), strict=True)
    for (m, *_), pair in zip(sweep.times, pairs, strict=True):
        rows.setdefault(1 << (m - 1).bit_length(), []).append(pair)
    lines = [f"{'M up to':>8}{'shapes':>8}{'before':>9}{'worst':>8}{'after':>9}{'worst':>8}"]
    everything = [pair for pairs in rows.values() for pair in pairs]
    for title, pairs in [*sorted(rows.items()), ("all", everything)]:
        text = f"{title:>8}{len(pairs):>8}"
        for column in zip(*pairs, strict=True):
            mean = math.exp(sum(map(math.log, column)) / len(column))
            text += f"{mean:9.3f}{max(column):8.2f}"
        lines.append(text)
    return "\n".join(lines)


def worst(sweep: Sweep, values: Values, count: int = 5) -> list[str]:
    """The shapes that the constants serve worst: the model, not its constants, is wrong there."""
    rows = zip(sweep.regrets(values), sweep.times, sweep.chosen(values), strict=True)
    found = sorted(rows, key=lambda row: -row[0])[:count]
    lines = []
    for regret, shape, choice in found:
        times = sweep.times[shape]
        m, n, k_lo, k_hi, _ = shape
        best = min(times, key=lambda name: times[name])
        place = f"{m} x {n} x ({k_lo} | {k_hi})"
        lines.append(f"{regret:6.2f}  {place:28}{choice}, best {best} ({times[best]:.1f} us)")
    return lines if found and found[0][0] > 1.02 else []


def row_text(
    name: str, facts: Sequence[int], names: list[str], values: Values, usual: Values
) -> str:
    """A chip's row: the constants that are not the usual ones."""
    fields = [
        f".{field} = {value:.6g}"
        for field, value, other in zip(names, values, usual, strict=True)
        if value != other
    ]
    text = f'{{"{name}", {", ".join(map(str, facts))}, {{{", ".join(fields)}}}}},'
    glued = text.replace(" = ", "\xa0=\xa0")
    lines = textwrap.wrap(glued, 100, initial_indent="    ", subsequent_indent="     ")
    return "\n".join(lines).replace("\xa0", " ")


def write_row(header: Path, name: str, text: str) -> None:
    """Replaces the chip's row, or adds it after the others; the file appears whole."""
    source = header.read_text()
    pattern = re.compile(r' *\{"' + re.escape(name) + r'",[^{}]*\{[^{}]*\}\},\n')
    if len(pattern.findall(source)) == 1:
        changed = pattern.sub(lambda _: text + "\n", source)
    else:
        changed = source.replace("};\n// clang-format on", f"{text}\n}};\n// clang-format on", 1)
    if changed.count(text) != 1:
        raise Refused(f"{header}: expected a table of rows between clang-format off and on")
    partial = header.with_name(f".{header.name}.{os.getpid()}.partial")
    partial.write_text(changed)
    partial.replace(header)


def main() -> int:
    """Fits, prints, and writes if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sweeps", nargs="+", metavar="SWEEP", help="files of --choices all")
    parser.add_argument("--write", action="store_true", help="put the constants into the header")
    parser.add_argument("--chip", help="with --write: name of the row of a chip that has none yet")
    parser.add_argument("--header", type=Path, default=HEADER, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    try:
        run(arguments)
    except Refused as refused:
        sys.stderr.write(f"fit_mixed_gemm: {refused}\n")
        return 1
    return 0


def run(arguments: argparse.Namespace) -> None:
    """The program after its arguments.

    Raises:
        Refused: a file is not a sweep, or the chip's row has no name.
    """
    library = Library(arguments.header)
    sweep = Sweep(library, arguments.sweeps)
    name = library.chip(sweep.facts)
    if arguments.chip and name not in ("", arguments.chip):
        raise Refused(f"--chip: expected {name}, the row of this chip, got {arguments.chip}")
    if arguments.write and not name and f'"{arguments.chip}"' in arguments.header.read_text():
        raise Refused(
            f"--chip: expected a new name, as {describe(sweep.facts)} has no row, got "
            f"{arguments.chip}, the row of another chip"
        )
    name = name or arguments.chip or ""
    if arguments.write and not re.fullmatch(r"[a-z0-9_]+", name):
        raise Refused(
            f"--chip: expected a name like h100 for {describe(sweep.facts)}, which has no row, "
            f"got {name or 'none'}"
        )
    before = library.values(sweep.facts)
    after = fit(sweep)
    print(f"{name or 'no row'}: {describe(sweep.facts)}, family {sweep.family}")
    measured = sum(map(len, sweep.times.values()))
    print(f"{len(sweep.times)} shapes, {measured} choices with a time, {sweep.failed} without")
    print(table(sweep, before, after))
    for field, old, new in zip(library.names, before, after, strict=True):
        print(f"{field:24}{old:10.6g}" + (f" -> {new:.6g}" if new != old else ""))
    print("\n".join(["worst after:", *lines] if (lines := worst(sweep, after)) else []))
    if arguments.write:
        text = row_text(name, sweep.facts, library.names, after, library.values(None))
        write_row(arguments.header, name, text)
        print(f"{arguments.header.name}:\n{text}")


if __name__ == "__main__":
    sys.exit(main())
