"""Samples as JSON and back. A sample is the keyword arguments of one ``forward``: tensors, constants, and dicts, lists
and tuples of them. In JSON, tensors are stored apart, or described by shape and type.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, TypedDict

import torch
from torch import Tensor

_CONSTANTS = (type(None), bool, int, float, str)

Description = dict[str, Any]
"""JSON of one value of a sample, such as ``{"tensor": …}`` or ``{"dict": {…}}``; see :func:`encode`."""


class TensorSpec(TypedDict):
    """What :func:`describe` says of a tensor."""

    shape: list[int]
    dtype: str


def encode(value: object, tensor: Callable[[Tensor], object], where: str = "sample") -> Description:
    """Encodes ``value`` as JSON: ``{"tensor": tensor(x)}``, ``{"constant": …}``, ``{"dict": {…}}``, ``{"list": […]}``
    or ``"tuple"``.

    Args:
        value: a tree of tensors and constants.
        tensor: returns the JSON that stands for a tensor.
        where: the name of ``value``, for the message.

    Raises:
        ValueError: ``value`` holds something else; the message says where.
    """
    if isinstance(value, Tensor):
        return {"tensor": tensor(value)}
    if isinstance(value, _CONSTANTS):
        return {"constant": value}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"dict": {key: encode(item, tensor, f"{where}.{key}") for key, item in value.items()}}
    if isinstance(value, list | tuple):
        items = [encode(item, tensor, f"{where}[{i}]") for i, item in enumerate(value)]
        return {"list" if isinstance(value, list) else "tuple": items}
    raise ValueError(
        f"{where} is a {type(value).__name__}; a sample holds tensors, numbers, strings, None, dicts and lists"
    )


def decode(data: object, tensor: Callable[[Any], Tensor]) -> object:
    """Inverse of :func:`encode`; ``tensor`` returns the tensor for the JSON that stands for it.

    Raises:
        ValueError: ``data`` was not written by ``encode``.
    """
    if not isinstance(data, dict) or len(data) != 1:
        raise ValueError(f"not the description of a sample: {str(data)[:60]}")
    ((kind, value),) = data.items()
    if kind == "tensor":
        return tensor(value)
    if kind == "constant":
        return value
    if kind == "dict":
        return {key: decode(item, tensor) for key, item in value.items()}
    if kind in ("list", "tuple"):
        items = [decode(item, tensor) for item in value]
        return items if kind == "list" else tuple(items)
    raise ValueError(f"not the description of a sample: unknown kind {kind!r}")


def decode_arguments(data: object, tensor: Callable[[Any], Tensor]) -> dict[str, object]:
    """A whole sample; see :func:`decode`.

    Raises:
        ValueError: ``data`` describes none.
    """
    sample = decode(data, tensor)
    if not isinstance(sample, dict):
        raise ValueError("not the description of a sample: a dict of keyword arguments is expected")
    return sample


def describe(sample: Mapping[str, object]) -> Description:
    """Describes ``sample`` as JSON, with shapes and types in place of tensors."""
    return encode(sample, lambda x: {"shape": list(x.shape), "dtype": str(x.dtype).removeprefix("torch.")})


def empty_like(description: Description, dtype: torch.dtype | None = None) -> dict[str, object]:
    """Sample of uninitialised tensors that fits ``description``.

    Args:
        description: the result of :func:`describe`.
        dtype: replaces the type of every floating-point tensor.

    Raises:
        ValueError: ``description`` is none.
    """

    def tensor(spec: TensorSpec) -> Tensor:
        own: torch.dtype = getattr(torch, spec["dtype"])
        return torch.empty(spec["shape"], dtype=dtype if dtype is not None and own.is_floating_point else own)

    return decode_arguments(description, tensor)


def tensors(value: object, where: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yields (dotted name, tensor) for every tensor of a sample."""
    if isinstance(value, Tensor):
        yield where, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensors(item, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from tensors(item, f"{where}[{i}]")


def difference(description: Description, value: object, where: str, varying: Collection[str] = ()) -> str | None:
    """Reason why a captured graph cannot take ``value`` for the argument in ``description``; None if it can.

    Tensors may have other sizes, but not another rank; constants are part of the graph and must be equal, but for whole
    numbers at the paths in ``varying``.
    """
    ((kind, spec),) = description.items()
    if kind == "tensor":
        if not isinstance(value, Tensor):
            return f"{where} must be a tensor, found {_brief(value)}"
        if value.ndim != len(spec["shape"]):
            return f"{where} must have {len(spec['shape'])} dimensions, found shape {tuple(value.shape)}"
        return None
    if kind == "constant":
        same = type(value) is type(spec) and (value == spec or (where in varying and type(value) is int))
        return None if same else f"{where} is fixed to {spec!r}, found {_brief(value)}"
    if kind == "dict":
        if not isinstance(value, Mapping) or set(value) != set(spec):
            return f"{where} must be a dict with keys {', '.join(spec)}, found {_brief(value)}"
        pairs = [(spec[key], value[key], f"{where}.{key}") for key in spec]
    else:
        if not isinstance(value, list | tuple) or len(value) != len(spec):
            return f"{where} must hold {len(spec)} items, found {_brief(value)}"
        pairs = [(item, value[i], f"{where}[{i}]") for i, item in enumerate(spec)]
    return next((found for pair in pairs if (found := difference(*pair, varying)) is not None), None)


def difference_of_kind(first: Mapping[str, object], other: Mapping[str, object]) -> str | None:
    """Reason why a graph that is captured with ``first`` could not take ``other``; None if it could.

    Whole numbers may differ, as sizes do; what a sample cannot hold is left to :func:`encode`.
    """
    for name in {**first, **other}:
        was, value = first.get(name), other.get(name)
        if name == "return_dict" or type(was) is type(value) is int:
            continue
        try:
            spec = encode(was, lambda x: {"shape": list(x.shape)}, name)
        except ValueError:
            continue
        if wrong := difference(spec, value, name):
            return wrong.replace(" is fixed to ", " is ").replace(", found ", " in one call, and in another ")
    return None


def check(description: Description, arguments: Mapping[str, object], who: str, varying: Collection[str] = ()) -> None:
    """Refuses arguments that a captured graph would ignore or misread.

    Args:
        description: the captured arguments. ``return_dict`` is ignored: it does not change the computation.
        arguments: arguments of the call; a missing one counts as None.
        who: the beginning of the message.
        varying: paths (``rows``, ``shapes[0][1]``) of whole numbers that may differ from the captured ones.

    Raises:
        ValueError: an argument is unknown, has another rank, or differs from the captured constant.
    """
    captured = {name: spec for name, spec in description["dict"].items() if name != "return_dict"}
    unknown = sorted(set(arguments) - set(captured) - {"return_dict"})
    if unknown:
        raise ValueError(f"{who}: no argument {', '.join(unknown)}; it takes {', '.join(captured)}")
    for name, spec in captured.items():
        if wrong := difference(spec, arguments.get(name), name, varying):
            raise ValueError(
                f"{who}: {wrong}; quantize again with a call like this one to change it, or use the module form"
            )


def specs(description: Description) -> dict[str, Any]:
    """Descriptions of the tensors in a description, by the names that :func:`tensors` gives them."""
    found: list[object] = []

    def tensor(spec: object) -> Tensor:
        found.append(spec)
        return torch.empty(0)

    names = [name for name, _ in tensors(decode(description, tensor))]
    return dict(zip(names, found, strict=True))


def _brief(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"a dict with keys {', '.join(map(str, value)) or '(none)'}"
    return repr(value)[:80]
