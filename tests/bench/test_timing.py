"""How benchmarks time: the order of the calls, medians, and bandwidths that are possible."""

from __future__ import annotations

import json
import time

import pytest

from resq_kernels.bench import timing


def test_alternate_takes_turns_and_counts_calls() -> None:
    calls: list[tuple[str, int]] = []
    result = timing.alternate(
        {"a": lambda i: calls.append(("a", i)), "b": lambda i: calls.append(("b", i))},
        rounds=3,
        max_calls=2,
    )
    turns = "".join(name for name, _ in calls)
    assert turns == "aabb" + 3 * "aaabbb"  # two trial calls each, then one untimed and two timed
    assert result["a"].calls == result["b"].calls == 6
    timed_indices = [index for _, index in calls[4:]]
    assert timed_indices == sorted(timed_indices)  # every call sees another copy of its data


def test_alternate_reports_the_median_not_the_mean() -> None:
    durations = iter([0.0, 0.0, 0.0, 0.002, 0.002, 0.05])

    def call(index: int) -> None:
        time.sleep(next(durations))

    result = timing.alternate({"sleep": call}, rounds=1, burst_seconds=1.0, max_calls=3)
    assert 2000 <= result["sleep"].best_us <= result["sleep"].median_us < 40_000


def test_alternate_uses_the_given_clock() -> None:
    ticks = iter(range(100))
    result = timing.alternate({"x": lambda i: None}, rounds=1, clock=lambda: float(next(ticks)))
    assert result["x"].median_us == result["x"].best_us == 1e6


def test_alternate_refuses_nothing_to_time() -> None:
    with pytest.raises(ValueError, match="alternate: expected candidates and rounds >= 1"):
        timing.alternate({})
    with pytest.raises(ValueError, match="got 0 rounds"):
        timing.alternate({"a": lambda i: None}, rounds=0)


def test_machine_is_json_and_names_the_instruction_set() -> None:
    stamp = json.loads(json.dumps(timing.machine()))
    assert stamp["isa"] in ("scalar", "avx2", "avx512vnni", "amx")
    assert stamp["processor"] and stamp["threads"] >= 1 and stamp["torch"]


def test_bandwidths_are_possible() -> None:
    # No machine reads below 0.1 or above 10,000 GB/s; a unit off by 1000 would.
    assert 1e8 < timing.read_bandwidth(megabytes=64, repeats=3) < 1e13
    assert 1e8 < timing.copy_bandwidth(megabytes=64, repeats=3) < 1e13


def test_against_returns_the_ratio_of_the_medians_or_nulls() -> None:
    ours = timing.Timing(median_us=2.0, best_us=1.0, calls=3)
    theirs = timing.Timing(median_us=5.0, best_us=4.0, calls=3)
    row = timing.against(ours, "other", theirs)
    assert (row["baseline"], row["baseline_us"], row["ratio"]) == ("other", 5.0, 2.5)
    row = timing.against(ours, None, None)
    assert (row["ours_us"], row["baseline"], row["ratio"]) == (2.0, None, None)
