"""Predicts kv_attention of decode steps on an H200 from counts of its SASS; never measured.

Blocks take units (a split of an item) in the order of the kernel, three to a multiprocessor, in
steps of CYCLES each. In every slice of time

    copies     share the bandwidth of memory evenly, each block at most RING steps ahead
    a step     takes the latency of its warps, or the issue slots of all blocks of the
               multiprocessor that are in a step, whichever is longer, and not before its copies
    a unit     begins and ends with instructions between steps, which take latency only

Instructions and cycles are those of `python -m sass_time path` (benchmarks/predicted/decode.json,
docs/notes/0055); bandwidth, latency of memory and launches are assumed. The limit of a cell is what
most of its time is spent on.

    python benchmarks/kv_attention_times.py                 print the table
    python benchmarks/kv_attention_times.py --json PATH     and write its rows
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

MHZ = 1755
SMS, BLOCKS = 132, 3  # multiprocessors of an H200, blocks on each
MEMORY = 4.3e6 * 0.94 / MHZ  # bytes a cycle, of all; 94 % of what a copy reaches, assumed
LATENCY = 1000  # cycles from a copy's start to its bytes, assumed
LAUNCH = 0.7  # us before a dependent launch runs, assumed (benchmarks/weights_in_l2.py)
PAGE = 64  # tokens of a step, at head_dim 128
STEP_BYTES = 160 * PAGE
HEADS, KV_HEADS = 32, 8  # Llama-3-8B
SLICE = 50  # cycles


class Kernel(NamedTuple):
    """Counts of one version of the kernel."""

    tiers: tuple[tuple[int, int], ...]  # (tokens that a row sees at most, tokens of a split)
    step_cycles: float  # latency of a warp's tile, mean
    step_instructions: float  # of a warp, mean
    raise_cycles: int  # added to a unit's first step
    first: int  # cycles to the first copy: wait, lengths, block table
    begin: int  # from the start of a unit to its first step
    begin_last: int  # the same for a block's last unit
    end: int  # from the last step of a unit to the start of the next
    ahead: bool  # the ring goes on with the next unit
    merge: int  # cycles of the second kernel behind its wait, without its batches
    batch: int  # of splits whose loads are in flight at once
    batch_splits: int


LONG = 1 << 31
BEFORE = Kernel(
    tiers=((LONG, 1024),),
    step_cycles=1022 + 0.48 * 250 + 334 / 4,  # raised in 7.7 of 16 tiles; a refill by one of four
    step_instructions=351 + 0.48 * 150 + 67 / 4,
    raise_cycles=0,
    first=2744,
    begin=1504,
    begin_last=1504,
    end=1109 + 1817 + 394,  # the next item is found behind the merge
    ahead=False,
    merge=452,
    batch=935,
    batch_splits=8,
)
NOW = Kernel(
    tiers=((2048, 256), (16384, 512), (LONG, 1024)),
    step_cycles=855 + 0.02 * 270 + 120 / 4,
    step_instructions=353 + 0.02 * 155 + 32 / 4,
    raise_cycles=270,  # at the first step of a unit; later ones raise in 2 of 100
    first=2168 + 394,
    begin=1730 + 310,
    begin_last=1730 + 310 - 776,
    end=343 + 524,
    ahead=True,
    merge=401,
    batch=854,
    batch_splits=16,
)

TARGETS = {(1, 1024): 7, (1, 32768): 15, (8, 8192): 26, (8, 32768): 90, (64, 8192): 172}
RING = 5


def row_splits(kernel: Kernel, context: int) -> tuple[int, int]:
    """Splits of a row, and tokens of each."""
    tokens = next(tokens for most, tokens in kernel.tiers if context <= most)
    return -(-context // tokens), min(tokens, context)


def units(kernel: Kernel, batch: int, context: int) -> tuple[int, int]:
    """Units of a call, and steps of each (of equal splits)."""
    splits, tokens = row_splits(kernel, context)
    return batch * splits * KV_HEADS, -(-tokens // PAGE)


def attend_cycles(kernel: Kernel, batch: int, context: int) -> tuple[float, dict[str, float]]:
    """Cycles of the attention kernel, and block cycles by what a block waits for."""
    count, steps = units(kernel, batch, context)
    blocks = min(count, SMS * BLOCKS)
    sm = np.arange(blocks) % SMS
    left = np.array([len(range(b, count, blocks)) for b in range(blocks)])  # units
    fetched = np.zeros(blocks)  # steps of all units
    done = np.zeros(blocks)
    total = left * steps
    begin = np.where(left == 1, kernel.begin_last, kernel.begin) + float(kernel.raise_cycles)
    wait = begin.copy()  # cycles before the next step may run
    ready = float(kernel.first + LATENCY)  # the first bytes
    spent = {"memory": 0.0, "issue": 0.0, "latency": 0.0, "between steps": 0.0}
    now = float(kernel.first)
    while True:
        active = done < total
        if not active.any():
            return now, spent
        now += SLICE
        # Copies.
        known = np.floor(done / steps + 1e-9) * steps + steps * (2 if kernel.ahead else 1)
        window = np.minimum(np.minimum(done + RING, known), total)
        if not kernel.ahead:  # the copies of a unit begin when the one before is merged
            window = np.where((done % steps < 1e-9) & (wait > begin), fetched, window)
        wants = np.clip(window - fetched, 0, None)
        budget = MEMORY * SLICE / STEP_BYTES
        granted = np.zeros(blocks)
        for _ in range(4):
            asking = wants - granted > 1e-12
            if not asking.any() or budget <= 1e-12:
                break
            given = np.where(asking, np.minimum(wants - granted, budget / asking.sum()), 0.0)
            granted += given
            budget -= given.sum()
        fetched += granted
        # Steps.
        in_step = active & (wait <= 0)
        spent["between steps"] += SLICE * float((active & (wait > 0)).sum())
        wait = np.where(active, wait - SLICE, wait)
        if now < ready:
            spent["memory"] += SLICE * float(in_step.sum())
            continue
        crowd = np.bincount(sm[in_step], minlength=SMS)[sm] * kernel.step_instructions
        by_speed = SLICE / np.maximum(crowd, kernel.step_cycles)
        by_data = fetched - done
        unit_end = (np.floor(done / steps + 1e-9) + 1) * steps
        progress = np.where(in_step, np.minimum(np.minimum(by_speed, by_data), unit_end - done), 0)
        starved = in_step & (by_data < by_speed)
        crowded = in_step & ~starved & (crowd > kernel.step_cycles)
        spent["memory"] += SLICE * float(starved.sum())
        spent["issue"] += SLICE * float(crowded.sum())
        spent["latency"] += SLICE * float((in_step & ~starved & ~crowded).sum())
        done = np.where(
            unit_end - done - progress < 1e-9, np.where(in_step, unit_end, done), done + progress
        )
        ended = in_step & (done >= unit_end - 1e-9)
        last = total - done < steps + 1e-9
        begin = np.where(last, kernel.begin_last, kernel.begin) + float(kernel.raise_cycles)
        wait = np.where(ended, kernel.end + begin, wait)
        now_end = ended & (done >= total - 1e-9)
        if now_end.any() and not (done < total).any():
            now += kernel.end


def predict(kernel: Kernel, batch: int, context: int) -> dict:
    """A cell: microseconds of both kernels."""
    cycles, spent = attend_cycles(kernel, batch, context)
    splits, _ = row_splits(kernel, context)
    merge = kernel.merge + kernel.batch * -(-splits // kernel.batch_splits) if splits > 1 else 0
    us = cycles / MHZ + LAUNCH + (merge / MHZ + LAUNCH if splits > 1 else 0)
    return {"us": round(us, 1), "limit": max(spent, key=spent.get)}


def rows() -> list[dict]:
    """All cells."""
    cells = []
    for (batch, context), target in TARGETS.items():
        before, now = predict(BEFORE, batch, context), predict(NOW, batch, context)
        size = batch * context * KV_HEADS * 160
        cells.append(
            {
                "shape": f"{batch} x {context}, {HEADS} / {KV_HEADS} heads, head_dim 128",
                "chip": "H200",
                "before_us": before["us"],
                "us": now["us"],
                "target_us": target,
                "copy_us": round(size / 4.3e6, 1),
                "limit": now["limit"],
            }
        )
    return cells


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the cells; writes them where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    cells = rows()
    for row in cells:
        print(
            f"{row['shape']}: {row['before_us']} -> {row['us']} us (target {row['target_us']}, "
            f"copy {row['copy_us']}), limit: {row['limit']}"
        )
    if options.json:
        options.json.write_text(json.dumps(cells, indent=2) + "\n")


if __name__ == "__main__":
    main()
