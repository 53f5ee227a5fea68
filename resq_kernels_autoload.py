"""Makes transformers load quantized folders, and peft adapt them, in a program that never imports
resq_kernels.

`import torch` imports this module and calls `register`, because the package names it as an entry
point of the group "torch.backends" (the environment variable TORCH_DEVICE_BACKEND_AUTOLOAD=0 turns
that off). It therefore runs in every program that uses torch: it lies outside of the package,
imports nothing but the standard library, and raises nothing.

Source: PyTorch's "Out-of-tree extension autoloading", https://github.com/pytorch/pytorch/issues/122468
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

_TRANSFORMERS = "resq_kernels.integrations.transformers"
TRIGGERS = {
    "transformers.quantizers.auto": _TRANSFORMERS,
    "transformers.modeling_utils": _TRANSFORMERS,
    "peft": "resq_kernels.integrations.peft",
}
"""Module -> the adapter that is imported after it. Of transformers, the table of quantizers that
the adapter adds to, and the module of `from_pretrained`, which reads the table: when `register` is
called, the first may be half imported, importing torch."""


def register() -> None:
    """Imports the adapters of those modules of `TRIGGERS` that are loaded now, and of the others
    once they are."""
    for name, adapter in TRIGGERS.items():
        if _loaded(name):
            _import_adapter(adapter)
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _loaded(name: str) -> bool:
    spec = getattr(sys.modules.get(name), "__spec__", None)
    return spec is not None and not getattr(spec, "_initializing", False)


@functools.cache
def _import_adapter(adapter: str) -> None:
    """A fault must not stop a program that needs none of our models: a folder of ours then fails
    to load, since it holds a tensor that no other loader accepts (docs/formats.md section 6)."""
    try:
        importlib.import_module(adapter)
    except Exception as error:
        purpose = "load" if adapter == _TRANSFORMERS else "take adapters"
        text = f"resq_kernels: models quantized with ResQ do not {purpose} in this program: {error}"
        try:
            warnings.warn(text, RuntimeWarning, stacklevel=2)
        except RuntimeWarning:  # this program makes errors of warnings
            sys.stderr.write(f"{text}\n")


class _Finder(importlib.abc.MetaPathFinder):
    """Lets the finders after it find the modules of `TRIGGERS`; their adapter is imported next."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in TRIGGERS:
            return None
        after = next((i + 1 for i, finder in enumerate(sys.meta_path) if finder is self), 0)
        finders = [f for f in sys.meta_path[after:] if hasattr(f, "find_spec")]
        specs = (finder.find_spec(name, path, target) for finder in finders)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _Loader(spec.loader, TRIGGERS[name])
        return spec


class _Loader(importlib.abc.Loader):
    """Executes a module with its own loader, then imports the adapter."""

    def __init__(self, loader: importlib.abc.Loader, adapter: str) -> None:
        self.loader, self.adapter = loader, adapter

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader  # what looks at the module finds it as it always is
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        _import_adapter(self.adapter)
