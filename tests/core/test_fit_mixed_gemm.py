"""tools/fit_mixed_gemm.py on sweeps whose best choices come from known constants."""

from __future__ import annotations

import importlib.util
import json
import math
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools/fit_mixed_gemm.py"
H100 = {"major": 9, "minor": 0, "multiprocessors": 132, "memory_bits": 5120, "family": "sm90"}
A100 = {"major": 8, "minor": 0, "multiprocessors": 108, "memory_bits": 5120, "family": "sm80"}
LAYERS = [(6144, 3584, 512), (4096, 3584, 512), (28672, 3584, 512), (4096, 14336, 0)]
ROWS = (1, 4, 16, 32, 48, 64, 96, 128, 256, 2048)


@pytest.fixture(scope="module")
def fit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fit_mixed_gemm", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def library(fit: ModuleType) -> object:
    return fit.Library()


def apart(choice: str, best: str) -> float:
    """Microseconds lost: a choice that is less like the best one takes longer."""
    (kernel, m, splits), (other, *numbers) = (
        re.fullmatch(r"(\w+) (\d+)x\d+ splits=(\d+)", name).groups() for name in (choice, best)
    )
    ratios = [abs(math.log2(int(a) / int(b))) for a, b in zip((m, splits), numbers, strict=True)]
    return 0.5 + sum(ratios) + 3 * (kernel != other)


Maker = Callable[..., list[dict[str, object]]]


@pytest.fixture
def records(fit: ModuleType, library: object, core: ModuleType) -> Maker:
    """Records of a chip with these constants: what they choose takes the least time."""

    def make(device: dict[str, object], **planted: float) -> list[dict[str, object]]:
        draw = random.Random(5)
        facts = ("major", "minor", "multiprocessors", "memory_bits")
        values = library.values([device[name] for name in facts])
        for name, value in planted.items():
            values[library.names.index(name)] = value
        packed = device["family"] == "sm80"
        found = []
        for n, k_lo, k_hi in LAYERS:
            for m in ROWS:
                shape = (fit.Shape * 1)(fit.Shape(m, n, k_lo, k_hi, packed))
                family, sms = device["family"], device["multiprocessors"]
                (best,) = library.choose(values, family, sms, shape)
                of = getattr(core.CudaFamily, family.upper())
                place = {"m": m, "n": n, "k_lo": k_lo, "k_hi": k_hi, "packed": packed}
                for choice in map(str, core.legal_choices(m, n, k_lo, k_hi, packed, of)):
                    us = 10.0 if choice == best else 10 + apart(choice, best) + draw.random() / 5
                    found.append({**place, "choice": choice, "us": us, "error": None})
        return found

    return make


def write(path: Path, device: dict[str, object], records: list[dict[str, object]]) -> str:
    path.write_text(json.dumps({"machine": {}, "device": device, "choices": records}))
    return str(path)


PLANTED = [
    (H100, {"memory_bytes": 26}),
    (H100, {"second_launch": 14000, "l2_bytes": 14}),
    (H100, {"shared_bytes": 64}),
    (A100, {"l2_bytes": 64, "second_launch": 600, "least_k_tiles": 24}),
]


@pytest.mark.parametrize(("device", "planted"), PLANTED, ids=str)
def test_planted_constants_are_found(
    device: dict[str, object],
    planted: dict[str, float],
    fit: ModuleType,
    library: object,
    records: Maker,
    tmp_path: Path,
) -> None:
    sweep = fit.Sweep(library, [write(tmp_path / "s.json", device, records(device, **planted))])
    before = library.values(sweep.facts)
    assert sweep.loss(before) > 0.01  # the constants of today are wrong on that chip
    after = fit.fit(sweep)
    assert max(sweep.regrets(after)) == 1.0
    for name, old, new in zip(library.names, before, after, strict=True):
        if device is A100 and name.startswith(("sm90", "wgmma", "shared")):
            assert old == new, name  # these times say nothing about it


def test_constants_that_are_right_do_not_move(
    fit: ModuleType, library: object, records: Maker, tmp_path: Path
) -> None:
    sweep = fit.Sweep(library, [write(tmp_path / "s.json", H100, records(H100))])
    assert fit.fit(sweep) == library.values(sweep.facts)
    assert sweep.regrets(library.values(sweep.facts)) == [1.0] * len(LAYERS) * len(ROWS)


def test_failed_and_missing_choices(
    fit: ModuleType, library: object, records: Maker, tmp_path: Path
) -> None:
    """The fit avoids a choice that failed, and a shape of which nothing ran is left out."""
    rows = [row for row in records(H100) if row["m"] in (1, 64, 128)]
    for row in rows:
        if row["m"] == 128 and row["n"] == 6144:
            row["us"], row["error"] = None, "out of memory"
        if row["m"] == 64 and row["choice"].startswith("sm90 32x128"):
            row["us"], row["error"] = None, "differs from the result of the dispatch's choice"
    sweep = fit.Sweep(library, [write(tmp_path / "s.json", H100, rows)])
    assert len(sweep.times) == 3 * len(LAYERS) - 1
    assert sweep.failed == 64 + 13 + 4 * 4
    before = library.values(sweep.facts)
    assert "sm90 32x128 splits=1" in sweep.chosen(before)
    assert max(sweep.regrets(before)) == fit.NO_TIME
    after = fit.fit(sweep)
    assert max(sweep.regrets(after)) < 2
    times = zip(sweep.chosen(after), sweep.times.values(), strict=True)
    assert all(choice in measured for choice, measured in times)


def run(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_program_writes_the_row(
    fit: ModuleType, records: Maker, tmp_path: Path, library: object
) -> None:
    header = Path(shutil.copy(fit.HEADER, tmp_path))
    path = write(tmp_path / "s.json", H100, records(H100, memory_bytes=26, l2_bytes=14))
    done = run(path, "--write", "--header", header)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("h100: sm_90 with 132 multiprocessors and 5120 bits")
    assert "40 shapes, 3080 choices with a time, 0 without" in done.stdout
    before, after = re.search(r"^ +all +40 +([\d.]+) +[\d.]+ +([\d.]+)", done.stdout, re.M).groups()
    assert float(before) > 1.02 and float(after) == 1.0
    written = fit.Library(header)
    facts = tuple(H100.values())[:4]
    sweep = fit.Sweep(written, [path])
    assert max(sweep.regrets(written.values(facts))) == 1.0
    for other in ((9, 0, 132, 6144), (8, 0, 108, 5120)):  # other rows are as they were
        assert written.values(other) == library.values(other)
    text = header.read_text()
    assert text.count('{"h100"') == 1 and max(map(len, text.splitlines())) <= 100
    again = run(path, "--write", "--header", header)
    assert again.returncode == 0 and header.read_text() == text


def test_a_chip_without_a_row_gets_one(fit: ModuleType, records: Maker, tmp_path: Path) -> None:
    header = Path(shutil.copy(fit.HEADER, tmp_path))
    device = H100 | {"multiprocessors": 114}
    path = write(tmp_path / "s.json", device, records(device, memory_bytes=26))
    done = run(path, "--write", "--header", header)
    assert done.returncode == 1
    assert done.stderr == (
        "fit_mixed_gemm: --chip: expected a name like h100 for sm_90 with 114 multiprocessors and "
        "5120 bits of memory bus, which has no row, got none\n"
    )
    assert header.read_text() == fit.HEADER.read_text()
    taken = run(path, "--write", "--header", header, "--chip", "h100")
    assert taken.returncode == 1 and "expected a new name, as sm_90 with 114" in taken.stderr
    assert header.read_text() == fit.HEADER.read_text()
    done = run(path, "--write", "--header", header, "--chip", "h100_pcie")
    assert done.returncode == 0, done.stderr
    row = r' {4}\{"h100_pcie", 9, 0, 114, 5120, \{\.memory_bytes = 2\d[^{}]*\}\},\n\};'
    assert re.search(row, header.read_text())
    assert fit.Library(header).chip((9, 0, 114, 5120)) == "h100_pcie"


ROW = {"m": 1, "n": 64, "k_lo": 64, "k_hi": 0, "packed": False, "choice": "x", "us": 1.0}
ODD = [
    ("", "expected a JSON file, got "),
    ("[]", "expected a file of `resq bench gemm --choices all`, got one without "),
    ('{"machine": {}, "rows": []}', "got one without 'device'"),
    (json.dumps({"device": H100, "choices": [{**ROW, "us": -1}]}),
     r"us of x, \(1, 64, 64, 0, False\): expected a time or null, got -1"),
    (json.dumps({"device": H100, "choices": [{**ROW, "us": "fast"}]}), "or null, got fast"),
    (json.dumps({"device": H100, "choices": [{**ROW, "us": None}]}),
     "expected at least one shape with a measured choice, got none"),
    (json.dumps({"device": H100, "choices": [{"m": 1}]}), "got one without 'n'"),
    (json.dumps({"device": H100 | {"family": "portable"}, "choices": [ROW]}),
     "family: expected sm90, which sm_90 with .* runs, got portable"),
    (json.dumps({"device": H100 | {"multiprocessors": 0}, "choices": [ROW]}),
     "multiprocessors: expected at least 1, got 0"),
    (json.dumps({"device": H100, "choices": [{**ROW, "m": 0}]}), "x: expected a shape"),
    (json.dumps({"device": H100, "choices": [{**ROW, "n": 2**40}]}), "x: expected a shape"),
    (json.dumps({"device": H100, "choices": [{**ROW, "packed": "false"}]}), "x: expected a shape"),
    (json.dumps({"device": H100, "choices": [{**ROW, "us": True}]}), "or null, got True"),
    (json.dumps({"device": H100, "choices": [{**ROW, "us": 10**400}]}), "or null, got 1000"),
    ("[" * 100_000, "expected a JSON file, got "),
    ('{"steps": [{"name": "info"}]}', "got one without 'device'"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), ODD)
def test_odd_files_are_refused(
    text: str, message: str, fit: ModuleType, library: object, tmp_path: Path
) -> None:
    path = tmp_path / "odd.json"
    path.write_text(text)
    with pytest.raises(fit.Refused, match=message):
        fit.Sweep(library, [str(path)])


def test_sweeps_of_two_chips_are_refused(fit: ModuleType, library: object, tmp_path: Path) -> None:
    one = write(tmp_path / "1.json", H100, [ROW])
    two = write(tmp_path / "2.json", A100, [ROW])
    with pytest.raises(fit.Refused, match="expected a sweep of the same chip as the first, sm_90"):
        fit.Sweep(library, [one, two])
    figures = json.loads(Path(one).read_text())
    report = tmp_path / "report.json"
    report.write_text(json.dumps({"steps": [{"name": "gemm-choices", "figures": figures}]}))
    assert fit.Sweep(library, [str(report)]).times == fit.Sweep(library, [one]).times
    twice = fit.Sweep(library, [one, write(tmp_path / "3.json", H100, [{**ROW, "us": 3.0}])])
    assert list(twice.times.values()) == [{"x": 2.0}]
