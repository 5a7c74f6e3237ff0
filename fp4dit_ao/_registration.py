"""Tell diffusers of this package's quantizer once diffusers is imported, and without importing it."""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

METHOD = "fp4dit_ao"
"""The name of this way of quantizing, in a config and in diffusers' tables."""
_TABLES = "diffusers.quantizers.auto"
_ADDS = "fp4dit_ao.diffusers_integration.hf_quantizer"
"""The module that adds itself to the tables when it is imported."""


def register() -> None:
    """Add the quantizer to diffusers' tables: now if they are there, otherwise as soon as they are imported."""
    if _TABLES in sys.modules:
        importlib.import_module(_ADDS)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module, once: where everybody else would, with a loader that imports another one after it."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _TABLES:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: Any):
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        importlib.import_module(_ADDS)
