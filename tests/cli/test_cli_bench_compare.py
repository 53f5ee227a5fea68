"""`resq bench --compare`: what is slower is marked and ends with 1, other machines are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_support import Result

from resq_kernels.bench import device, models
from resq_kernels.bench.compare import compare, read

RESULTS = sorted((Path(__file__).resolve().parents[2] / "benchmarks/results").glob("*.json"))
MACHINE = {"processor": "P", "cores": 2, "threads": 2, "isa": "avx2", "clock": "wall"}
MACHINE |= {"device": "cpu", "load_average": 0.1}


def row(us: float, ratio: float | None = 2.0, **place: Any) -> dict[str, Any]:
    """A row of `resq bench gemm`, as far as it is compared."""
    baseline = None if ratio is None else "F.linear"
    return {
        "op": "mixed_gemm",
        "model": "m",
        "layer": "o",
        "batch": 1,
        "shape": [1, 8, 8],
        "baseline": baseline,
        "ours_us": us,
        "ratio": ratio,
    } | place


def write(path: Path, rows: list[dict[str, Any]], **machine: Any) -> Path:
    path.write_text(json.dumps({"machine": MACHINE | machine, "rows": rows}))
    return path


@pytest.mark.parametrize(
    ("new", "slower"),
    [
        (row(104.0, 1.92), False),  # within the percent
        (row(106.0, 1.88), True),
        (row(106.0, 2.0), False),  # the baseline too: a busy machine
        (row(100.0, 1.5), False),  # the baseline alone is faster: another torch
        (row(50.0, 4.0), False),
        (row(50.0, 1.0), False),
    ],
)
def test_slower_is_a_longer_time_and_a_smaller_ratio(new: dict[str, Any], slower: bool) -> None:
    (found,) = compare([row(100.0)], [new], 5.0)
    assert found["slower"] is slower
    assert found["time"] == pytest.approx(new["ours_us"] / 100, abs=1e-3)
    assert found["ratio"] == pytest.approx(new["ratio"] / 2, abs=1e-3)


def test_without_a_baseline_the_time_decides() -> None:
    (found,) = compare([row(100.0, None)], [row(106.0, None)], 5.0)
    assert found["slower"] is True and found["ratio"] is None


@pytest.mark.parametrize(
    "place",
    [
        {"op": "hadamard"},
        {"model": "n"},
        {"layer": "qkv"},
        {"layers": 2},
        {"batch": 2},
        {"shape": [1, 8, 16]},
        {"baseline": "F.linear bf16"},
    ],
    ids=str,
)
def test_rows_of_another_place_are_not_compared(place: dict[str, Any]) -> None:
    other = row(900.0, 0.1, **place)
    (found,) = compare([row(100.0)], [other, row(90.0)], 5.0)
    assert found["new_us"] == 90.0
    with pytest.raises(ValueError, match="expected rows that both runs have, got none"):
        compare([row(100.0)], [other], 5.0)


def test_two_files(resq: Callable[..., Result], tmp_path: Path) -> None:
    rows = [row(100.0), row(100.0, layer="qkv"), row(1.0, layer="down")]
    old = write(tmp_path / "old.json", rows)
    new = write(tmp_path / "new.json", [row(120.0, 1.6), row(101.0, layer="qkv")])
    result = resq("bench", "--compare", old, new, "--json", tmp_path / "out.json")
    assert result.code == 1
    assert result.sentence == f"1 of 2 rows are more than 5 % slower than in {old}"
    lines = result.out.splitlines()
    assert [line.endswith("slower") for line in lines[2:4]] == [True, False]
    assert lines[2].split()[-5:] == ["100.0", "120.0", "1.20", "0.80", "slower"]
    assert lines[-1] == "2 rows in both, 1 in one alone"
    written = json.loads((tmp_path / "out.json").read_text())
    assert [found["slower"] for found in written["rows"]] == [True, False]
    assert resq("bench", "--compare", old, new, "--slower", 30).code == 0


@pytest.mark.parametrize(
    "machine",
    [
        {"processor": "Q"},
        {"cores": 4},
        {"threads": 1},
        {"isa": "scalar"},
        {"device": "cuda"},
        {"clock": "thread processor time"},
        {"gpu": {"gpu": "G"}},
    ],
    ids=str,
)
def test_another_machine_is_refused(
    resq: Callable[..., Result], tmp_path: Path, machine: dict[str, Any]
) -> None:
    old = write(tmp_path / "old.json", [row(100.0)])
    new = write(tmp_path / "new.json", [row(200.0, 1.0)], **machine)
    result = resq("bench", "--compare", old, new)
    assert result.code == 1
    start = f"--compare: expected two runs of one machine, got {next(iter(machine))} "
    assert result.sentence.startswith(start)
    result = resq("bench", "--compare", old, new, "--other-machine")
    assert (result.code, "1 of 1 rows" in result.sentence) == (1, True)


def test_load_and_versions_are_not_the_machine(resq: Callable[..., Result], tmp_path: Path) -> None:
    old = write(tmp_path / "old.json", [row(100.0)])
    new = write(tmp_path / "new.json", [row(100.0)], load_average=2.0, torch="2.14", commit="x")
    assert resq("bench", "--compare", old, new).code == 0


def test_a_run_is_compared_with_an_older_one(
    resq: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = ("llama", 256, 192, 1, 4, 2, 320, False)
    monkeypatch.setitem(models.SIZES, "llama-3-8b", sizes)
    monkeypatch.setattr(device.timing, "copy_bandwidth", lambda clock: 1e10)
    options = ["hadamard", "--shapes", "llama-3-8b", "--batch", 1, "--rounds", 1, "--cold-mb", 0]
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    assert resq("bench", *options, "--json", old).code == 0
    figures = json.loads(old.read_text())
    for found in figures["rows"]:  # as if the older run had been a thousand times as fast
        found["ours_us"] /= 1000
        found["ratio"] *= 1000
    old.write_text(json.dumps(figures))
    result = resq("bench", *options, "--json", new, "--compare", old)
    assert result.code == 1
    assert result.sentence == f"2 of 2 rows are more than 5 % slower than in {old}"
    assert len(json.loads(new.read_text())["rows"]) == 2

    figures["machine"]["processor"] = "another"
    old.write_text(json.dumps(figures))
    result = resq("bench", *options, "--compare", old)
    assert "expected two runs of one machine, got processor another" in result.sentence
    assert "hadamard" not in result.out  # refused before anything was timed


@pytest.mark.parametrize("text", ["", "[]", '{"rows": []}', '{"machine": {}, "rows": 3}'])
def test_other_files_are_refused(resq: Callable[..., Result], tmp_path: Path, text: str) -> None:
    path = tmp_path / "old.json"
    path.write_text(text)
    sentence = resq("bench", "--compare", path).sentence
    assert sentence == f"--compare: {path}: expected a file of `resq bench --json`, got another"


def test_files_and_options_that_make_no_sense(resq: Callable[..., Result], tmp_path: Path) -> None:
    old = write(tmp_path / "old.json", [row(100.0)])
    assert "No such file" in resq("bench", "--compare", tmp_path / "none.json").sentence
    for options in ([old, old, old], [old, old, "--out", tmp_path / "x"]):
        sentence = resq("bench", "--compare", *options).sentence
        assert sentence == "--compare: expected OLD, or OLD and NEW without --out"


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_committed_results_stay_comparable(path: Path) -> None:
    """Also those with the names of before: `limits`, `bytes_floor_us` and `products_floor_us`."""
    if "gpu-" in path.name:
        pytest.skip("a report of tools/gpu_check.py, which is not a run of `resq bench`")
    old = read(str(path))["rows"]
    new = [{**was, "ours_us": 1.1 * was["ours_us"], "ratio": was["ratio"] / 1.1} for was in old]
    found = compare(old, new, 5.0)
    assert len(found) == len(old) and all(row["slower"] for row in found)
