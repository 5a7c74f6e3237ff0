"""Context in which methods of a model are replaced, so that ``torch.export`` can record them."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from types import MethodType

from torch import nn

Method = Callable[..., object]


@contextlib.contextmanager
def methods_replaced(model: nn.Module, *rewrites: Mapping[str, Method]) -> Iterator[None]:
    """Context in which methods of ``model``'s modules are replaced, and none looks its result up in a cache.

    Args:
        model: any module.
        rewrites: replacing functions by ``"Class.method"``; of two for one method, the last holds.
    """
    replaced = []
    chosen = {key: method for table in rewrites for key, method in table.items()}
    for module in model.modules():
        kind = type(module)
        own = {key.rpartition(".")[2]: x for key, x in chosen.items() if key.rpartition(".")[0] == kind.__name__}
        for attribute, method in (_uncached(kind) | own).items():
            vars(module)[attribute] = MethodType(method, module)
            replaced.append((module, attribute))
    try:
        yield
    finally:
        for module, attribute in replaced:
            del vars(module)[attribute]


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
