"""Quantization of q, k and v inside diffusers attention modules, for any attention processor."""

import copy
import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fp4dit_ao._compat import Arguments, Keywords, Operator
from fp4dit_ao.kernels.attention import arguments_of

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention

_OPS = torch.ops.fp4dit_ao
_INPUTS = ("query", "key", "value")


class Processor(Protocol):
    """A diffusers attention processor."""

    def __call__(self, *args: object, **kwargs: object) -> object: ...


class QuantizedAttention(TorchFunctionMode):
    """Context that quantizes q, k and v of every ``F.scaled_dot_product_attention`` to ``fmt``, per token and head.

    It runs the same operators as a lowered graph.
    """

    def __init__(self, fmt: str):
        super().__init__()
        self.fmt = fmt

    def __torch_function__(
        self, func: Operator, types: object, args: Arguments = (), kwargs: Keywords | None = None
    ) -> object:
        kwargs = kwargs or {}
        # torch.compile knows the method, and cannot trace its function, which calls super()
        if func is Tensor.unflatten:
            return args[0].unflatten(*args[1:], **kwargs)
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        found = arguments_of(args, kwargs)
        if found is not None:
            return _OPS.attention(*found, self.fmt)
        named = dict(zip(_INPUTS, args, strict=False)) | {k: v for k, v in kwargs.items() if k in _INPUTS}
        rounded = [_fake_quantize(named[name], self.fmt) for name in _INPUTS]
        return func(*rounded, *args[len(_INPUTS) :], **{k: v for k, v in kwargs.items() if k not in _INPUTS})


def _fake_quantize(x: Tensor, fmt: str) -> Tensor:
    block_size = [1] * (x.ndim - 1) + [-1]
    scale = _OPS.choose_scale(x, block_size, fmt, torch.float32)
    rounded: Tensor = _OPS.fake_quantize(x, block_size, scale, fmt, x.dtype)
    return rounded


def quantize_attention(module: "Attention", fmt: str, name: str) -> None:
    """Replaces the processor of ``module`` by one that does the same on quantized q, k and v.

    Args:
        module: a diffusers attention module.
        fmt: format of q, k and v.
        name: name of the module, for the message.

    Raises:
        ValueError: the module has no processor.
    """
    processor = getattr(module, "processor", None)
    if processor is None:
        raise ValueError(
            f"{name} is no attention module with a processor, so its q, k and v cannot be quantized; use attention=None"
        )
    _set(module, fmt, processor)
    if hasattr(module, "set_processor"):  # an IP-Adapter, for one, brings its own processors
        module.set_processor = functools.partial(_set, module, fmt)


def restore_attention(modules: Iterable["Attention"]) -> None:
    """Gives attention modules back the processors that :func:`quantize_attention` replaced."""
    for module in modules:
        processor = getattr(module, "processor", None)
        if processor is not None and hasattr(processor, "quantized_fmt"):
            module.__dict__.pop("set_processor", None)
            module.processor = _of_class(processor, _float_class(type(processor)))


def _set(module: "Attention", fmt: str, processor: Processor) -> None:
    """``module.set_processor`` of quantized attention: any processor goes on quantized q, k and v."""
    quantized = _of_class(processor, quantizing(_float_class(type(processor)), fmt))
    given: Callable[..., None] | None = getattr(type(module), "set_processor", None)
    if given is None:
        module.processor = quantized
    else:
        given(module, quantized)


def _float_class(cls: type[Processor]) -> type[Processor]:
    """The class that :func:`quantizing` was called with, or ``cls`` itself."""
    return cls.__mro__[1] if hasattr(cls, "quantized_fmt") else cls


def _of_class(processor: Processor, cls: type[Processor]) -> Processor:
    """Copy of ``processor`` with another class and the same content."""
    copied = copy.copy(processor)
    copied.__class__ = cls
    return copied


@functools.cache
def quantizing(cls: type[Processor], fmt: str) -> type[Processor]:
    """Subclass of a processor's class that quantizes to ``fmt``, with the same constructor.

    It keeps the signature of ``__call__``, which attention modules inspect. Its instances are pickled by ``cls`` and ``fmt``.
    """
    original: Callable[..., object] = cls.__call__

    @functools.wraps(original)
    def call(self: object, *args: object, **kwargs: object) -> object:
        with QuantizedAttention(fmt):
            return original(self, *args, **kwargs)

    def reduce(self: object, protocol: object) -> tuple[object, ...]:
        return _unpickled, (cls, fmt, dict(self.__dict__))

    return type(f"Quantized{cls.__name__}", (cls,), {"__call__": call, "__reduce_ex__": reduce, "quantized_fmt": fmt})


def _unpickled(cls: type[Processor], fmt: str, state: dict[str, object]) -> Processor:
    kind = quantizing(cls, fmt)
    made = kind.__new__(kind)
    made.__dict__.update(state)
    return made
