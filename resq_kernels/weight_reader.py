"""Reads quantized weights from the files of a folder into memory, on several threads."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from mmap import PAGESIZE

import numpy as np
import numpy.typing as npt
import torch

from resq_kernels.formats import QuantizedWeight
from resq_kernels.safetensors_io import CheckpointError, CheckpointReader, TensorInfo


@contextmanager
def reading(
    reader: CheckpointReader,
) -> Iterator[Callable[[Sequence[str], int, int], QuantizedWeight]]:
    """A function `read(linears, start, stop)`, for any thread: rows start <= row < stop of the
    matrix that has the rows of all these linears, one after the other.

    The linears, named as "model.layers.0.mlp.up_proj", have the same columns. The tensors lie in
    memory that the thread's next call overwrites. Files are not mapped: some network file systems
    stand still when threads read a mapping.

    Args:
        reader: the folder; its tensors may be parts of those in the files.

    Raises:
        CheckpointError: from the function: a file is shorter than it was when it was opened.
    """
    memory = _Memory()
    with ExitStack() as stack:
        files = {file: stack.enter_context(file.open("rb")).fileno() for file in reader.files}

        def rows(field: str, linears: Sequence[str], start: int, stop: int) -> torch.Tensor:
            infos = [reader.info(f"{linear}.{field}") for linear in linears]
            first = infos[0]
            row_bytes = first.bytes // first.shape[0]
            data = memory.take(field, (stop - start) * row_bytes)
            end = 0  # the rows of the parts so far
            for info in infos:
                begin, end = end, end + info.shape[0]
                a, b = max(start, begin), min(stop, end)
                if a < b:
                    into = data.data[(a - start) * row_bytes : (b - start) * row_bytes]
                    _fill(into, files[info.file], info, (a - begin) * row_bytes)
            return torch.from_numpy(data).view(first.dtype).view(stop - start, *first.shape[1:])

        yield lambda *what: QuantizedWeight(
            *(rows(field, *what) for field in QuantizedWeight._fields)
        )


def _fill(memory: memoryview, file: int, info: TensorInfo, start: int) -> None:
    """Fills memory with a tensor's bytes from `start` on."""
    place = info.start + start
    while memory:  # a call reads 2 GB at most
        got = os.preadv(file, [memory], place)
        if got == 0:
            raise CheckpointError(f"{info.file}: {info.name}: truncated")
        memory, place = memory[got:], place + got


class _Memory(threading.local):
    """Memory of a thread that begins with a page and is used again.

    Linux copies a file into it at 6 GB/s, and at 1.5 into what begins 16 bytes after a page, as
    large memory from malloc does (Zen 3). New memory costs a fault for every 4 KB: 1 ms per MB on
    a virtual machine.
    """

    def __init__(self) -> None:
        self._kept: dict[str, npt.NDArray[np.uint8]] = {}

    def take(self, use: str, size: int) -> npt.NDArray[np.uint8]:
        """`size` bytes, which may be those that were taken for the same use before."""
        if use not in self._kept or len(self._kept[use]) < size:
            memory = np.empty(size + PAGESIZE, dtype=np.uint8)
            self._kept[use] = memory[-memory.ctypes.data % PAGESIZE :]
        return self._kept[use][:size]
