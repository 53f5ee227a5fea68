"""A CUDA device without one: runs a Python module as on a GPU, with the CPU's operators and values.

Tensors say that they are on `cuda`, and an operation that mixes devices fails as on a GPU. Streams
are in order; a captured graph keeps its operations and repeats them on the same tensors, and
refuses what may not be captured. Nothing is compiled, and times mean nothing. So that imports,
paths, options and devices of the GPU run are tried before the GPU is there:

    python tools/gpu/dry_cuda.py -m pytest tests/gpu
    python tools/gpu/dry_cuda.py -m resq_kernels bench quantize --device cuda
"""

from __future__ import annotations

import contextlib
import functools
import os
import runpy
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.attention import bias
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
from torch.utils.cpp_extension import load_inline

GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace c10::impl { C10_REGISTER_GUARD_IMPL(CUDA, NoOpDeviceGuardImpl<DeviceType::CUDA>) }
"""  # without one, torch refuses to index a CUDA tensor
CUDA = torch.device("cuda", 0)
NAME = "dry run on a CPU"
aten = torch.ops.aten
# Take tensors of two devices; every other operator takes at most a CPU scalar beside the others.
MIXED = {aten.copy_.default, aten._to_copy.default, aten.index.Tensor, aten.index_put_.default}
# Read on the host, which a capture refuses.
READ_BACK = {aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default}


class DryTensor(torch.Tensor):
    """A tensor on the dry device: `inner` holds the values, on the CPU."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> DryTensor:
        """Wraps a CPU tensor; views share its memory."""
        wrapped = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            requires_grad=False,
            device=CUDA,
        )
        wrapped.inner = inner
        return wrapped

    def data_ptr(self) -> int:
        """The address of the values."""
        return self.inner.data_ptr()

    def tolist(self) -> Any:
        """The values as Python numbers."""
        return self.inner.tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> DryTensor:
        """A copy that is a parameter if this is one."""
        copied = DryTensor(self.inner.clone())
        copied._is_param = getattr(self, "_is_param", False)
        memo[id(self)] = copied
        return copied

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """All operators."""
        return dispatch(func, args, kwargs or {})


class Recorded:
    """torch.cuda.CUDAGraph: operations on CPU tensors, repeated by `replay`."""

    capturing: Recorded | None = None

    def __init__(self, *_: Any, **__: Any) -> None:
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def replay(self) -> None:
        """Repeats every operation and writes its results where the captured ones are."""
        for func, args, kwargs, results in self.operations:
            for kept, new in zip(
                tree_leaves(results), tree_leaves(func(*args, **kwargs)), strict=True
            ):
                if isinstance(kept, torch.Tensor) and kept.data_ptr() != new.data_ptr():
                    kept.copy_(new)


@contextlib.contextmanager
def capture(graph: Recorded, *_: Any, **__: Any) -> Iterator[None]:
    """torch.cuda.graph."""
    if Recorded.capturing is not None:
        raise RuntimeError("a stream that is capturing cannot begin another capture")
    Recorded.capturing = graph
    try:
        yield
    finally:
        Recorded.capturing = None


def is_cuda(device: Any) -> bool:
    """Whether a device argument names the dry device."""
    return device is not None and torch.device(device).type == "cuda"


def dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Runs an operator on the CPU; its results are where the operator would put them."""
    leaves = tree_leaves((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    here = any(isinstance(tensor, DryTensor) for tensor in tensors)
    named = [leaf for leaf in leaves if isinstance(leaf, torch.device)]
    there = is_cuda(named[0]) if named else here
    if not (here or there):
        return func(*args, **kwargs)
    if here and func not in MIXED:
        for tensor in tensors:
            if not isinstance(tensor, DryTensor) and tensor.dim() > 0:
                raise RuntimeError(
                    f"{func}: expected all tensors to be on the same device, got cuda:0 and cpu"
                )
    args, kwargs = tree_map_only(DryTensor, lambda t: t.inner, (args, kwargs))
    args, kwargs = tree_map_only(torch.device, lambda _: torch.device("cpu"), (args, kwargs))
    kwargs.pop("pin_memory", None)
    graph = Recorded.capturing
    if graph is not None and (func in READ_BACK or (func is aten._to_copy.default and not there)):
        raise RuntimeError(f"{func}: operation not permitted when stream is capturing")
    result = func(*args, **kwargs)
    if func is aten._to_copy.default:
        result = result.clone() if result is args[0] else result
    if graph is not None:
        graph.operations.append((func, args, kwargs, result))
    if not there:
        return result
    return tree_map(lambda r: DryTensor(r) if isinstance(r, torch.Tensor) else r, result)


class TensorOnCuda(TorchFunctionMode):
    """torch.tensor, which fills its memory below the dispatcher."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One call of torch's Python functions."""
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and is_cuda(kwargs.get("device")):
            return func(*args, **kwargs | {"device": "cpu"}).to(CUDA)
        return func(*args, **kwargs)


class DryCuda(TorchDispatchMode):
    """Sends every operator to `dispatch`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One operator."""
        return dispatch(func, args, kwargs or {})


class Stream(contextlib.nullcontext):
    """torch.cuda.Stream: work is done when it is asked for."""

    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def wait_stream(self, _: Any) -> None:
        """Nothing: all streams are in order."""

    def synchronize(self) -> None:
        """Nothing."""

    def wait_event(self, _: Any) -> None:
        """Nothing."""


class Event:
    """torch.cuda.Event."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.seconds = 0.0

    def record(self, *_: Any) -> None:
        """Now."""
        self.seconds = time.perf_counter()

    def synchronize(self) -> None:
        """Nothing."""

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds."""
        return (end.seconds - self.seconds) * 1e3


def returning(value: Any) -> Callable[..., Any]:
    """A function of its own, as torch._dynamo wants every function of torch.cuda to be."""
    return lambda *_, **__: value


def outside_modes(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that makes a tensor of a class of its own, which a dispatch mode is in the way
    of."""

    def call(*args: Any) -> Any:
        with _disable_current_modes():
            return function(*args)

    return call


def refuse_pointers(library: object) -> None:
    """Ends where a library would get addresses, which are not a GPU's."""
    raise RuntimeError(f"{type(library).__name__} was opened, but the dry device has no addresses")


def install() -> None:
    """Makes torch.cuda the dry device, and resq_kernels take it for a supported one."""
    load_inline(  # all of torch's headers would be 20 s more
        "resq_dry_cuda_guard",
        GUARD,
        is_python_module=False,
        extra_cflags=["-O0"],
        no_implicit_headers=True,
    )
    properties = SimpleNamespace(
        name=NAME, major=9, minor=0, multi_processor_count=132, total_memory=80 << 30
    )
    replacements: dict[str, Any] = {
        "_lazy_init": returning(None),
        "is_available": returning(True),
        "device_count": returning(1),
        "current_device": returning(0),
        "get_device_properties": returning(properties),
        "get_device_capability": returning((9, 0)),
        "get_device_name": returning(NAME),
        "device": contextlib.nullcontext,
        "set_device": returning(None),
        "synchronize": returning(None),
        "empty_cache": returning(None),
        "reset_peak_memory_stats": returning(None),
        "max_memory_allocated": returning(0),
        "memory_allocated": returning(0),
        "mem_get_info": returning((80 << 30, 80 << 30)),
        "_sleep": returning(None),
        "Stream": Stream,
        "Event": Event,
        "current_stream": Stream,
        "stream": lambda stream: stream,
        "CUDAGraph": Recorded,
        "graph": capture,
    }
    for name, value in replacements.items():
        setattr(torch.cuda, name, value)
    torch.compile = lambda function=None, **_: function or (lambda f: f)
    # A parameter's memory cannot be replaced by a DryTensor's: a module gets other parameters.
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    lower_right = bias.causal_lower_right
    bias.causal_lower_right = outside_modes(lower_right)
    torch.library.opcheck = lambda op, args: op(*args)
    from resq_kernels import _library
    from resq_kernels.bench import cuda_timing, cutlass_s4s8, models, peaks

    _library.CUDA_MISSING = ""
    for name in ("cuda_family", "cuda_pdl", "mixed_gemm_kernel"):
        setattr(torch.ops.resq, name, returning("dry"))
    torch.ops.resq.mixed_gemm_choices = returning(["dry", "other"])
    torch.ops.resq.force_kernel = returning("")
    torch.ops.resq.cuda_device = returning([9, 0, 132, 5120])
    sizes = {"llama": (256, 192, 2, 4, 2, 320), "qwen2": (256, 192, 2, 4, 2, 320)}
    for name, (kind, *_, tied) in models.SIZES.items():
        models.SIZES[name] = (kind, *sizes[kind], tied)
    opened = cutlass_s4s8.load
    cutlass_s4s8.load = lambda: refuse_pointers(opened())
    cuda_timing.COLD_BYTES = 1 << 20
    peaks.WIDTH["cuda"] = 64
    alternate = cuda_timing.alternate
    cuda_timing.alternate = lambda candidates, rounds, calls=2: alternate(candidates, 1, 2)
    # 2 GB copied ten times and the rate of an instruction: the functions run, on less.
    for name in ("read_bandwidth", "copy_bandwidth"):
        smaller = functools.partial(getattr(cuda_timing, name), megabytes=4)
        setattr(cuda_timing, name, smaller)


def main() -> None:
    """Runs `-m MODULE ARGUMENTS...` or `FILE ARGUMENTS...` on the dry device."""
    arguments = sys.argv[1:]
    os.environ["RESQ_DRY_CUDA"] = str(Path(__file__).resolve())  # for a test's other processes
    as_module = arguments[0] == "-m"
    sys.argv = arguments[as_module:]
    sys.path[0] = str(Path.cwd() if as_module else Path(sys.argv[0]).resolve().parent)
    install()
    with TensorOnCuda(), DryCuda():
        run: Callable[..., Any] = runpy.run_module if as_module else runpy.run_path
        run(sys.argv[0], run_name="__main__", **({"alter_sys": True} if as_module else {}))


if __name__ == "__main__":
    main()
