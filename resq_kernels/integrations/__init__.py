"""Adapters to other libraries, each loaded only together with its library."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

# The module that holds transformers' table of quantizers, and the adapter that adds ours to it.
_ADAPTERS = {"transformers.quantizers.auto": "resq_kernels.integrations.transformers"}


def register() -> None:
    """Imports the adapters of loaded libraries now, the others when their library is imported.

    So `import resq_kernels` loads none of the libraries, and a checkpoint of ours loads whatever
    the order of the imports.
    """
    for library, adapter in _ADAPTERS.items():
        if library in sys.modules:
            importlib.import_module(adapter)
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules of `_ADAPTERS` as usual; its loader then imports the adapter."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in _ADAPTERS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, _ADAPTERS[name])
        return spec


class _Loader(importlib.abc.Loader):
    """Executes a module with its own loader, then imports an adapter."""

    def __init__(self, loader: importlib.abc.Loader, adapter: str) -> None:
        self.loader, self.adapter = loader, adapter

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        importlib.import_module(self.adapter)

    def __getattr__(self, name: str) -> object:
        return getattr(self.loader, name)
