"""What ``import fp4dit_ao`` adds to torch and diffusers, once they are imported, and without importing them."""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

METHOD = "fp4dit_ao"
"""The name of this way of quantizing, in a config and in diffusers' tables."""
OPERATORS = "fp4dit_ao.ops"
"""The module that registers ``torch.ops.fp4dit_ao``."""
_ADDS = {
    "torch": OPERATORS,
    "diffusers.quantizers.auto": "fp4dit_ao.diffusers_integration.hf_quantizer",
    "diffusers.pipelines.pipeline_utils": "fp4dit_ao.diffusers_integration.call_defaults",
    "diffusers.pipelines.auto_pipeline": "fp4dit_ao.diffusers_integration.auto_pipelines",
    "transformers.quantizers.auto": "fp4dit_ao.diffusers_integration.transformers_quantizer",
}
"""The module that adds itself when it is imported, by the module that it adds to: operators to ``torch.ops``, the quantizer
to diffusers' tables, default call arguments to pipelines that are loaded or made of others, a refusal to transformers'
tables."""


def register() -> None:
    """Add what can be added now; the rest as soon as the module that it adds to is imported."""
    for module in _ADDS:
        if module in sys.modules:
            importlib.import_module(_ADDS[module])
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Finds each module of the table once: where everybody else would, with a loader that imports another one after it."""

    def __init__(self) -> None:
        self._awaited = set(_ADDS) - set(sys.modules)

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in self._awaited:
            return None
        self._awaited.remove(name)
        if not self._awaited:
            sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, _ADDS[name])
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader, adds: str):
        self._loader, self._adds = loader, adds

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        if self._adds != OPERATORS or not _is_importing_itself():
            importlib.import_module(self._adds)


def _is_importing_itself() -> bool:
    """Whether a module of this package, half imported, may be what asks for torch; operators then wait for a public name."""
    return any(name.startswith("fp4dit_ao.") and name != __name__ for name in sys.modules)
