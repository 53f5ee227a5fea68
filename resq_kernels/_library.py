"""Loads the compiled libraries that register torch.ops.resq.*"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.autograd import forward_ad

NAMESPACE = "resq"  # of the operators, in torch.ops
_CPU_LIBRARY = Path(__file__).with_name("_C_cpu.so")
CUDA_LIBRARY = Path(__file__).with_name("_C_cuda.so")
MINIMUM_TORCH = (2, 11)
# Of this thread's dispatcher; the key stands for autograd on every device.
_AUTOGRAD = torch._C.DispatchKey.AutogradCPU
_is_excluded = torch._C._dispatch_tls_is_dispatch_key_excluded
_set_excluded = torch._C._dispatch_tls_set_dispatch_key_excluded


def load() -> None:
    """Registers torch.ops.resq.* on the CPU; safe to call again.

    Raises:
        ImportError: torch is older than 2.11, or the library is missing or does not load; the
            message says which and what to do.
    """
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < MINIMUM_TORCH:
        raise ImportError(f"resq_kernels: expected torch >= 2.11, got {torch.__version__}")
    if not _CPU_LIBRARY.exists():
        raise ImportError(
            f"resq_kernels: {_CPU_LIBRARY.name} is not built; run "
            "`pip install -e .` in the source folder"
        )
    _load(_CPU_LIBRARY)


def load_cuda() -> str:
    """Registers the CUDA kernels where they can run; safe to call again, and needs no GPU.

    Returns:
        "" if they are registered, else the sentence that says why not.

    Raises:
        ImportError: torch and the library both have CUDA, and the library does not load.
    """
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    if not CUDA_LIBRARY.exists():
        why = (
            f"{CUDA_LIBRARY.name} is not built: install the CUDA toolkit (nvcc) and run "
            "`RESQ_CUDA=1 pip install -e .` in the source folder"
        )
        refuse_cuda(why)
        return why
    _load(CUDA_LIBRARY)
    return ""


@cache
def refuse_cuda(why: str) -> torch.library.Library:
    """Makes every operator raise "op: device: ..." with `why` when it is given CUDA tensors.

    Without this, torch's own error lists dispatch keys instead of the reason.

    Returns:
        The registrations, kept alive by the cache until their `_destroy`.
    """
    library = torch.library.Library(NAMESPACE, "IMPL", "CUDA")
    for name in _operators():
        library.impl(name, _refusal(name, why))
    return library


def _refusal(op: str, why: str) -> Callable[..., NoReturn]:
    def refuse(*args: object, **kwargs: object) -> NoReturn:
        raise RuntimeError(f"{op}: device: expected tensors on the CPU, got cuda: {why}")

    return refuse


@cache
def refuse_gradients() -> torch.library.Library:
    """Makes every operator raise where it would lose a gradient: none of them has a backward.

    Without this, the result would silently need no gradient, and `backward` would stop there.

    Returns:
        The registrations, kept alive by the cache.
    """
    library = torch.library.Library(NAMESPACE, "IMPL")
    for name in _operators():
        library.impl(name, _without_backward(name), "Autograd", with_keyset=True)
    return library


def _without_backward(name: str) -> Callable[..., Any]:
    op = _operator(name)
    names = [argument.name for argument in op._schema.arguments]

    def check_and_compute(keyset: torch._C.DispatchKeySet, *args: Any, **kwargs: Any) -> Any:
        for argument, value in (*zip(names, args, strict=False), *kwargs.items()):
            for place, tensor in _tensors(argument, value):
                if _needs_gradient(tensor):
                    raise RuntimeError(
                        f"{name}: {place}: expected a tensor that needs no gradient, got one that "
                        "requires it: quantized operators have no backward and train nothing "
                        "before them; call under torch.no_grad() or with a detached tensor"
                    )
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *args, **kwargs)

    return check_and_compute


def _tensors(argument: str, value: Any) -> list[tuple[str, torch.Tensor]]:
    """The tensors of an argument by their names: itself, or those of a list."""
    named = [(argument, value)]
    if isinstance(value, list | tuple):
        named = [(f"{argument}[{i}]", item) for i, item in enumerate(value)]
    return [(name, item) for name, item in named if isinstance(item, torch.Tensor)]


def _needs_gradient(tensor: torch.Tensor) -> bool:
    """Whether autograd records an operation on the tensor, backward or forward."""
    if (
        forward_ad._current_level >= 0
        and forward_ad.unpack_dual(tensor, level=0).tangent is not None
    ):
        return True
    return torch.is_grad_enabled() and tensor.requires_grad


def call(op: Any, *args: Any) -> Any:
    """Calls an operator `torch.ops.resq.<op>.default`, past the check for gradients where none is
    recorded.

    That check is in Python and costs 4 us, more than a small operator itself, and a decode step
    calls ten operators a layer. Going past it costs 0.4 us (torch's guard object for the same:
    0.9), which calling the overload's C++ function instead of its Python object gives back.
    """
    if torch.compiler.is_compiling():
        return op(*args)
    recorded = torch.is_grad_enabled() or forward_ad._current_level >= 0
    goes_past = not recorded and not _is_excluded(_AUTOGRAD)  # inference mode excludes it
    if goes_past:
        _set_excluded(_AUTOGRAD, True)
    try:
        return op._op(*args)  # one line for both: torch.jit.trace compares the places of calls
    finally:
        if goes_past:
            _set_excluded(_AUTOGRAD, False)


def register_fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates the fake of an operator: sizes and dtypes of its results, without values.

    A call with one tensor on the meta device comes here too. The fake would answer it with memory
    that nothing has written, so it first checks that all tensors are on one device.
    """
    names = [argument.name for argument in _operator(name)._schema.arguments]

    def decorate(fake: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(fake)
        def checked(*args: Any, **kwargs: Any) -> Any:
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            _check_devices(name, [pair for k, v in given.items() for pair in _tensors(k, v)])
            return fake(*args, **kwargs)

        torch.library.register_fake(f"{NAMESPACE}::{name}", checked)
        return checked

    return decorate


def _check_devices(name: str, tensors: list[tuple[str, torch.Tensor]]) -> None:
    first, device = next((argument, tensor.device) for argument, tensor in tensors)
    for argument, tensor in tensors:
        if tensor.device != device:
            raise RuntimeError(
                f"{name}: {argument}: expected a tensor on {device} as {first}, got one on "
                f"{tensor.device}"
            )


def _operators() -> list[str]:
    """The names of the operators on tensors."""
    registered = torch._C._dispatch_get_registrations_for_dispatch_key("CPU")
    found = sorted(name for name in registered if name.startswith(f"{NAMESPACE}::"))
    return [name.removeprefix(f"{NAMESPACE}::") for name in found]


def _operator(name: str) -> Any:
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def _load(library: Path) -> None:
    try:
        torch.ops.load_library(str(library))
    except OSError:
        # torch hides the loader's message; ctypes gives it.
        try:
            ctypes.CDLL(str(library))
        except OSError as cause:
            raise ImportError(f"resq_kernels: {library.name} does not load: {cause}") from cause
        raise


load()
refuse_gradients()
CUDA_MISSING = load_cuda()
