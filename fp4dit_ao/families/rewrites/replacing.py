"""Context in which methods of a model, and functions that they call, are replaced, so that ``torch.export`` can record
them."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from types import MethodType, ModuleType

from torch import nn

Method = Callable[..., object]


@contextlib.contextmanager
def methods_replaced(model: nn.Module, *rewrites: Mapping[str, Method]) -> Iterator[None]:
    """Context in which methods of ``model``'s modules are replaced, and none looks its result up in a cache.

    Args:
        model: any module.
        rewrites: replacing functions by ``"Class.method"``, or by ``"module.function"`` for a function of a module of diffusers
            that a class of ``model`` is defined in; of two for one method, the last holds.
    """
    replaced = []
    chosen = {key: method for table in rewrites for key, method in table.items()}
    functions = [
        (vars(space), name, vars(space)[name], method)
        for space in defining_modules(model)
        for key, method in chosen.items()
        for owner, _, name in [key.rpartition(".")]
        if owner == space.__name__.rpartition(".")[2]
    ]
    for module in model.modules():
        kind = type(module)
        own = {key.rpartition(".")[2]: x for key, x in chosen.items() if key.rpartition(".")[0] == kind.__name__}
        for attribute, method in (_uncached(kind) | own).items():
            vars(module)[attribute] = MethodType(method, module)
            replaced.append((module, attribute))
    try:
        for space, name, _, method in functions:
            space[name] = method
        yield
    finally:
        for space, name, original, _ in functions:
            space[name] = original
        for module, attribute in replaced:
            del vars(module)[attribute]


def defining_modules(model: nn.Module) -> list[ModuleType]:
    """Modules of diffusers that the classes of ``model``'s modules are defined in, by name."""
    names = {base.__module__ for module in model.modules() for base in type(module).__mro__}
    return [sys.modules[name] for name in sorted(names) if name.startswith("diffusers.")]


def _uncached(kind: type[nn.Module]) -> dict[str, Method]:
    """Functions under the ``lru_cache`` of a class's methods: a cache would look up sizes that are symbols, and keep
    tensors that exist only while a graph is recorded."""
    cached = (
        (name, value)
        for base in reversed(kind.__mro__)
        if base.__module__.startswith("diffusers.")
        for name, value in vars(base).items()
        if hasattr(value, "cache_info")
    )
    return {name: value.__wrapped__ for name, value in cached}
