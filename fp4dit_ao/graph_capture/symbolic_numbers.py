"""Python's numbers of sizes, kept symbolic while a model is captured."""

import builtins
import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TypeAlias

import torch
from torch import SymFloat, SymInt, Tensor, nn
from torch.overrides import TorchFunctionMode

from fp4dit_ao._compat import Arguments, Keywords, Operator
from fp4dit_ao.families.rewrites.replacing import defining_modules

_Numbers: TypeAlias = "float | list[_Numbers] | tuple[_Numbers, ...]"
"""Numbers as ``torch.tensor`` takes them; a symbol counts as the number that it stands for."""


@contextlib.contextmanager
def numbers_kept_symbolic(model: nn.Module) -> Iterator[None]:
    """Context in which ``torch.tensor`` of sizes, and ``int``, ``len``, ``max`` and ``min`` in the modules of diffusers that
    ``model``'s classes are defined in, do not turn them into constants.

    Python's own would: a graph would then hold the larger side of the example for the larger side of every image.
    """
    spaces = [vars(space) for space in defining_modules(model)]
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

    def __call__(cls, x: object = 0, *base: object) -> object:
        if isinstance(x, SymInt | SymFloat):
            return torch.sym_int(x)
        own: Callable[..., int] = builtins.int
        return own(x, *base)


class _Int(metaclass=_IntType):
    """``int``, but for numbers that are symbols."""


def _len(x: Sized) -> int:
    return x.shape[0] if isinstance(x, Tensor) and x.ndim else len(x)


def _extreme(plain: Callable[..., object], symbolic: Callable[[object, object], object]) -> Callable[..., object]:
    """``max`` or ``min``, without a comparison where a number is a symbol."""

    def extreme(first: object, *others: object, **options: object) -> object:
        if others:
            items = [first, *others]
        elif isinstance(first, Iterable):
            items = list(first)
        else:
            return plain(first, **options)  # which refuses it
        if any(isinstance(x, SymInt) for x in items) and not options:
            return functools.reduce(symbolic, items)
        return plain(items, **options)

    return extreme


class _SizesInTensors(TorchFunctionMode):
    """``torch.tensor`` and ``as_tensor`` of numbers that are symbols record them."""

    def __torch_function__(
        self, func: Operator, types: object, args: Arguments = (), kwargs: Keywords | None = None
    ) -> object:
        if func in (torch.tensor, torch.as_tensor) and args and _holds_symbol(args[0]):
            return _tensor(args[0], **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _holds_symbol(data: object) -> bool:
    if isinstance(data, list | tuple):
        return any(_holds_symbol(item) for item in data)
    return isinstance(data, SymInt)


def _tensor(data: _Numbers, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Tensor:
    if isinstance(data, list | tuple):
        return torch.stack([_tensor(item, dtype, device) for item in data])
    return torch.full((), data, dtype=dtype or torch.int64, device=device)
