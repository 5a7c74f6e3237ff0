"""Python's numbers of sizes, kept symbolic while a model is captured."""

import builtins
import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import SymFloat, SymInt, Tensor, nn
from torch.overrides import TorchFunctionMode


@contextlib.contextmanager
def numbers_kept_symbolic(model: nn.Module) -> Iterator[None]:
    """Context in which ``torch.tensor`` of sizes, and ``int``, ``len``, ``max`` and ``min`` in the modules of diffusers that
    ``model``'s classes are defined in, do not turn them into constants.

    Python's own would: a graph would then hold the larger side of the example for the larger side of every image.
    """
    names = {base.__module__ for module in model.modules() for base in type(module).__mro__}
    spaces = [vars(sys.modules[name]) for name in sorted(names) if name.startswith("diffusers.")]
    own = {"int": _Int, "len": _len, "max": _extreme(max, torch.sym_max), "min": _extreme(min, torch.sym_min)}
    replaced = [(space, name) for space in spaces for name in own if name not in space]
    for space, name in replaced:
        space[name] = own[name]
    try:
        with _SizesInTensors():
            yield
    finally:
        for space, name in replaced:
            del space[name]


class _IntType(type):
    def __instancecheck__(cls, x: object) -> bool:
        return isinstance(x, builtins.int)

    def __call__(cls, x: Any = 0, *base: Any) -> Any:
        if isinstance(x, SymInt | SymFloat):
            return torch.sym_int(x)
        return builtins.int(x, *base)


class _Int(metaclass=_IntType):
    """``int``, but for numbers that are symbols."""


def _len(x: Any) -> Any:
    return x.shape[0] if isinstance(x, Tensor) and x.ndim else len(x)


def _extreme(plain: Callable[..., Any], symbolic: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """``max`` or ``min``, without a comparison where a number is a symbol."""

    def extreme(*args: Any, **options: Any) -> Any:
        items = args if len(args) > 1 else list(args[0])
        if any(isinstance(x, SymInt) for x in items) and not options:
            return functools.reduce(symbolic, items)
        return plain(items, **options)

    return extreme


class _SizesInTensors(TorchFunctionMode):
    """``torch.tensor`` and ``as_tensor`` of numbers that are symbols record them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.tensor, torch.as_tensor) and args and _holds_symbol(args[0]):
            return _tensor(args[0], **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _holds_symbol(data: Any) -> bool:
    if isinstance(data, list | tuple):
        return any(_holds_symbol(item) for item in data)
    return isinstance(data, SymInt)


def _tensor(data: Any, dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
    if isinstance(data, list | tuple):
        return torch.stack([_tensor(item, dtype, device) for item in data])
    return torch.full((), data, dtype=dtype or torch.int64, device=device)
