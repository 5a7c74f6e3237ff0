"""``QuantizedWeight``: what all tensor subclasses for linear weights share, however their values are stored.

A weight ``(out_features, in_features)`` is stored in tensors of which each element stands for a tile of the weight: a byte of
4-bit codes for 1 x 2 weights, a scale for ``block_size``. A slice of the weight is the same slice of each stored tensor, if it
begins and ends between two tiles. So rows can always be taken and put together where scales belong to rows, and columns at
multiples of the group size; nothing is computed, so nothing changes.

DTensor shards weights by the same slices. Split over rows (``ColwiseParallel``), a linear gives the same bits. Split over
columns (``RowwiseParallel``), every process has a part of each token, and quantizes that with a scale of its own: finer than
unsharded, not equal; :mod:`fp4dit_ao.tensors.whole_tokens` keeps the whole token's. Then, and without quantized input, it is
equal up to the order of float32 sums.

A subclass lists its stored tensors and attributes (``tensor_data_names``, ``tensor_attribute_names``, as torchao asks) and
defines :meth:`QuantizedWeight.tiles`, :meth:`~QuantizedWeight.stored_values`, :meth:`~QuantizedWeight.stored_linear` and
:meth:`~QuantizedWeight.unit`.
"""

import operator
from collections.abc import Callable, Hashable, Sequence
from typing import Any, ClassVar, NoReturn, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torchao.utils import TorchAOBaseTensor

from fp4dit_ao import __version__, _compat
from fp4dit_ao._compat import Arguments, Keywords, Operator
from fp4dit_ao.formats import parse
from fp4dit_ao.kernels import straight_through
from fp4dit_ao.kernels.cpu import native
from fp4dit_ao.kernels.units import Unit
from fp4dit_ao.tensors import float_sum
from fp4dit_ao.tensors.copied_by_call import CopiedByCall
from fp4dit_ao.tensors.stored_bytes import StoredBytes

Override = TypeVar("Override", bound=Callable[..., object])
Result = TypeVar("Result")

_ATEN = torch.ops.aten
_OVERRIDES: dict[Operator, Callable[..., object]] = {}
"""Implementation of each aten operator, registered for every subclass."""


def _overrides(*operators: Operator) -> Callable[[Override], Override]:
    def register(function: Override) -> Override:
        _OVERRIDES.update(dict.fromkeys(operators, function))
        return function

    return register


class QuantizedWeight(StoredBytes, TorchAOBaseTensor, metaclass=CopiedByCall):  # type: ignore[misc]
    """A linear weight in low bits, stored as several plain tensors.

    Non-Tensor Attributes:
        dtype: the float type that the tensor presents itself as, and the default of ``dequantize()``.
        transposed: whether the tensor presents itself as ``(in_features, out_features)``, as ``t()`` gives it. The stored
            tensors stay as they are. Such a tensor is the right operand of ``mm``, ``addmm`` and ``matmul``.
    """

    optional_tensor_attribute_names: ClassVar[list[str]] = ["transposed"]
    format_names: ClassVar[tuple[str, ...]] = ("fmt", "act_fmt")
    """Attributes that name number formats which generated code depends on."""

    tensor_data_names: ClassVar[list[str]]
    tensor_attribute_names: ClassVar[list[str]]
    transposed: bool

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        for overridden, override in _OVERRIDES.items():
            cls.implements(overridden)(override)
        cls.implements_torch_function([F.linear, _ATEN.linear.default])(_linear)

    # --- what a subclass defines

    def tiles(self) -> dict[str, tuple[int, int] | None]:
        """Rows and columns of the weight that one element of each stored tensor stands for; -1 for all of them.

        A tensor that all of the weight shares, such as a table of levels, has None.
        """
        raise NotImplementedError

    def stored_values(self, output_dtype: torch.dtype) -> Tensor:
        """The weight's values, ``(out_features, in_features)`` whether ``transposed`` or not."""
        raise NotImplementedError

    def stored_linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``x @ W^T + bias`` with ``W`` ``(out_features, in_features)``, ``(..., out_features)`` in the type of ``x``."""
        raise NotImplementedError

    def unit(self, device: torch.device | str | None = None) -> Unit[Any]:
        """The unit that computes this weight's linear, on ``device`` or where the weight is."""
        raise NotImplementedError

    def attributes_of_part(self, rows: int, columns: int) -> dict[str, object]:
        """Attributes that differ in a part of the weight of that size."""
        return {}

    # --- what it gets

    @property
    def stored_shape(self) -> tuple[int, int]:
        """(out_features, in_features), whether ``transposed`` or not."""
        rows, columns = self.shape
        return (columns, rows) if self.transposed else (rows, columns)

    def dequantize(self, output_dtype: torch.dtype | None = None) -> Tensor:
        """The weight as a float tensor of ``output_dtype``, or of ``dtype``, in the shape of this tensor."""
        values = self.stored_values(output_dtype or self.dtype)
        return values.t() if self.transposed else values

    def with_parts(self, **changes: object) -> Self:
        """A tensor of the same kind with some of its stored tensors or attributes replaced."""
        return type(self)(**{name: getattr(self, name) for name in _compat.parts(type(self))} | changes)

    def map_data(self, function: Callable[[Tensor], Tensor]) -> Self:
        """A tensor of the same kind whose stored tensors are ``function`` of this one's."""
        return self.with_parts(**{name: function(getattr(self, name)) for name in self.tensor_data_names})

    def refuse(self, problem: str) -> NoReturn:
        """Raise ``ValueError`` with the tensor's kind and shape before ``problem``."""
        raise ValueError(f"{type(self).__name__} {tuple(self.shape)}: {problem}")

    def part(self, dim: int, start: int, stop: int) -> Self:
        """Rows (``dim`` 0) or columns ``start`` to ``stop``, as views of the stored tensors.

        Raises:
            ValueError: the part begins or ends inside of a tile, such as a group that shares a scale.
        """
        stored_dim = dim ^ 1 if self.transposed else dim
        shape = list(self.stored_shape)
        views: dict[str, Tensor] = {}
        for name, tile in self.tiles().items():
            x: Tensor = getattr(self, name)
            step = -1 if tile is None else tile[stored_dim]
            if step == -1 or step >= shape[stored_dim]:
                continue  # one element along this dimension, which every part shares
            if start % step or stop % step:
                self.refuse(
                    f"{'columns' if stored_dim else 'rows'} {start} to {stop} of the weight begin or end inside an "
                    f"element of {name}, which stands for {step}; slice at multiples of {self._least(stored_dim)}"
                )
            views[name] = x.narrow(stored_dim, start // step, (stop - start) // step)
        shape[stored_dim] = stop - start
        return self.with_parts(**views, **self.attributes_of_part(*shape))

    def kind_of_rows(self) -> Hashable | None:
        """Equal for weights that ``torch.cat`` can put one below the other; None if this one's rows share more than a table."""
        parts: list[Hashable] = [type(self), self.stored_shape[1]]
        for name, tile in self.tiles().items():
            x: Tensor = getattr(self, name)
            if self.transposed or (tile is not None and tile[0] == -1):
                return None
            parts += [x.dtype, x.device, x.shape[1:], str(x.tolist()) if tile is None else None]
        values = (getattr(self, name) for name in _compat.parts(type(self)) if name not in self.tensor_data_names)
        return (*parts, *(tuple(value) if isinstance(value, list) else value for value in values))

    def _least(self, stored_dim: int) -> int:
        """The shortest part along a stored dimension."""
        tiles = [tile[stored_dim] for tile in self.tiles().values() if tile is not None]
        return max([size for size in tiles if size < self.stored_shape[stored_dim]], default=1)

    def _stable_hash_for_caching(self) -> str:
        """Key of this tensor in torch's on-disk compile caches: everything that shapes the generated code."""
        parts = {name: getattr(self, name) for name in _compat.parts(type(self))}
        described: dict[str, object] = {
            name: (x.dtype, tuple(x.shape), x.stride(), x.device) if isinstance(x, Tensor) else x
            for name, x in parts.items()
        }
        for name in self.format_names:  # a codebook with its levels: another process may know other ones by that name
            described[name] = parts.get(name) and parse(parts[name])
        library = native.VERSION if native.is_built() else None
        return repr((__version__, library, type(self).__name__, described))


# --- products --------------------------------------------------------------------------------------------------------


@_overrides(_ATEN.linear.default)
def _linear(func: Operator, types: object, args: Arguments, kwargs: Keywords) -> Tensor:
    """``linear(x, weight, bias)``."""
    x, weight = args[0], args[1]
    bias = args[2] if len(args) > 2 else kwargs.get("bias")
    if not isinstance(weight, QuantizedWeight):
        raise ValueError(f"linear: the input is a {type(x).__name__}; a quantized tensor must be the weight")
    if weight.transposed:
        weight.refuse("a transposed weight cannot be that of a linear; call t() again, or use matmul")
    return straight_through.linear(x, weight, bias)


@_overrides(_ATEN.mm.default, _ATEN.addmm.default)
def _matrix_product(func: Operator, types: object, args: Arguments, kwargs: Keywords) -> Tensor:
    """``x @ weight.t()`` and ``bias + x @ weight.t()``: what a linear becomes under DTensor."""
    bias, x, weight = args if func is _ATEN.addmm.default else (None, *args)
    if not isinstance(weight, QuantizedWeight) or not weight.transposed:
        quantized = weight if isinstance(weight, QuantizedWeight) else x
        quantized.refuse("only x @ weight.t() is computed in low bits; for other products take dequantize()")
    if any(kwargs.get(name, 1) != 1 for name in ("alpha", "beta")):
        weight.refuse(f"addmm with {kwargs}; expected alpha = beta = 1")
    return weight.stored_linear(x, bias)


# --- sums ------------------------------------------------------------------------------------------------------------

_overrides(_ATEN.add.Tensor)(float_sum.add)


# --- parts -----------------------------------------------------------------------------------------------------------


@_overrides(_ATEN.slice.Tensor)
def _slice(func: Operator, types: object, args: Arguments, kwargs: Keywords) -> QuantizedWeight:
    """``weight[a:b]``, ``weight[:, a:b]``, ``narrow``."""
    defaults: Arguments = (0, None, None, 1)
    weight, dim, start, stop, step = (*args, *defaults[len(args) - 1 :])
    dim, size = dim % 2, weight.shape[dim]
    if step != 1:
        weight.refuse(f"a slice with step {step}; expected consecutive rows or columns")
    start, stop, _ = slice(start, stop).indices(size)
    return _view(func, args, kwargs, weight.part(dim, start, max(start, stop)))


@_overrides(_ATEN.split.Tensor, _ATEN.split_with_sizes.default)
def _split(func: Operator, types: object, args: Arguments, kwargs: Keywords) -> list[QuantizedWeight]:
    """``split`` and ``chunk``."""
    weight, sizes = args[0], args[1]
    dim = (args[2] if len(args) > 2 else kwargs.get("dim", 0)) % 2
    total = weight.shape[dim]
    if isinstance(sizes, int):
        sizes = [min(sizes, total - start) for start in range(0, total, sizes)]
    stops = [sum(sizes[: index + 1]) for index in range(len(sizes))]
    parts = [weight.part(dim, stop - size, stop) for size, stop in zip(sizes, stops, strict=True)]
    return _view(func, args, kwargs, parts)


@_overrides(_ATEN.cat.default)
def _cat(func: Operator, types: object, args: Arguments, kwargs: Keywords) -> QuantizedWeight:
    """Weights one below the other, or side by side, whose tiles do not span the seam."""
    weights: Sequence[QuantizedWeight] = args[0]
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % 2
    first = weights[0]
    kinds = {type(x) for x in weights}
    if kinds != {type(first)}:
        raise ValueError(f"cat: found {sorted(kind.__name__ for kind in kinds)}; expected weights of one kind")
    attributes = [name for name in _compat.parts(type(first)) if name not in first.tensor_data_names]
    for other in weights[1:]:
        for name in attributes:
            if getattr(other, name) != getattr(first, name):
                first.refuse(f"cat with a weight whose {name} is {getattr(other, name)}, not {getattr(first, name)}")
    stored_dim = dim ^ 1 if first.transposed else dim
    if any(x.stored_shape[1 - stored_dim] != first.stored_shape[1 - stored_dim] for x in weights):
        first.refuse(f"cat along dimension {dim} with {', '.join(str(tuple(x.shape)) for x in weights[1:])}")
    joined: dict[str, Tensor] = {}
    for name, tile in first.tiles().items():
        parts = [getattr(x, name) for x in weights]
        if tile is None:
            if not all(torch.equal(part, parts[0]) for part in parts[1:]):
                first.refuse(f"cat with a weight of another {name}, which all of a weight shares")
        elif tile[stored_dim] == -1:
            first.refuse(
                f"cat along {'columns' if stored_dim else 'rows'} where one {name} stands for all of them; "
                "expected scales of groups"
            )
        else:
            joined[name] = torch.cat(parts, stored_dim)
    return first.with_parts(**joined)


# --- the same weight, presented or stored otherwise ------------------------------------------------------------------


@_overrides(_ATEN.t.default, _ATEN.transpose.int, _ATEN.permute.default)
def _transpose(func: Operator, types: object, args: Arguments, kwargs: Keywords) -> QuantizedWeight:
    """``t()``, ``T``, ``mT``, ``transpose`` and ``permute``."""
    weight = args[0]
    dims = args[1] if func is _ATEN.permute.default else args[1:]
    kept = [dim % 2 for dim in dims] == [0, 1] if func is _ATEN.permute.default else len({d % 2 for d in dims}) == 1
    return _view(func, args, kwargs, weight.with_parts(transposed=weight.transposed if kept else not weight.transposed))


@_overrides(_ATEN.view.default, _ATEN._unsafe_view.default)
def _reshape(func: Operator, types: object, args: Arguments, kwargs: Keywords) -> QuantizedWeight:
    """A view of the same shape."""
    weight, shape = args[0], list(args[1])
    if -1 in shape:
        shape[shape.index(-1)] = weight.numel() // max(1, -torch.Size(shape).numel())
    if shape != list(weight.shape):
        weight.refuse(f"cannot be viewed as {tuple(args[1])}; expected its own two dimensions")
    return _view(func, args, kwargs, weight.with_parts())


@_overrides(_ATEN.select.int)
def _select(func: Operator, types: object, args: Arguments, kwargs: Keywords) -> NoReturn:
    """``weight[row]``, which would have one dimension."""
    weight: QuantizedWeight = args[0]
    weight.refuse(f"dimension {args[1]} cannot be dropped; take weight[{args[2]}:{args[2] + 1}], or dequantize() first")


@_overrides(_ATEN.empty_like.default)
def _empty_like(func: Operator, types: object, args: Arguments, kwargs: Keywords) -> QuantizedWeight:
    """The same kind and shape, with stored tensors that are not set."""
    device, dtype = kwargs.get("device"), kwargs.get("dtype") or args[0].dtype
    return args[0].map_data(lambda x: torch.empty_like(x, device=device)).with_parts(dtype=dtype)


@_overrides(_ATEN.copy_.default)
def _copy(func: Operator, types: object, args: Arguments, kwargs: Keywords) -> QuantizedWeight:
    """``weight.copy_(other)``: the stored tensors of a weight of the same kind, shape and formats."""
    weight, source = args[0], args[1]
    if not isinstance(weight, QuantizedWeight):
        source.refuse(
            f"copy_ into a float tensor {tuple(weight.shape)}; copy its dequantize(), or assign it as a parameter"
        )
    if type(source) is not type(weight) or source.shape != weight.shape:
        weight.refuse(
            f"copy_ of a {type(source).__name__} {tuple(source.shape)}; expected the same kind and shape: load other weights "
            "into the float model, and quantize that"
        )
    for name in _compat.parts(type(weight)):
        mine, other = getattr(weight, name), getattr(source, name)
        if not isinstance(mine, Tensor) and name != "dtype" and mine != other:
            weight.refuse(f"copy_ of a weight whose {name} is {other}, not {mine}")
    for name in weight.tensor_data_names:
        getattr(weight, name).copy_(getattr(source, name))
    return weight


@_overrides(_ATEN._to_copy.default)
def _to_copy(func: Operator, types: object, args: Arguments, kwargs: Keywords) -> QuantizedWeight:
    """``.to(device)`` moves the stored tensors; ``.to(dtype)`` changes only what the tensor presents itself as."""
    weight, device = args[0], kwargs.get("device")
    moved = weight.map_data(lambda x: x.to(device or x.device, non_blocking=bool(kwargs.get("non_blocking"))))
    return moved.with_parts(dtype=kwargs.get("dtype") or weight.dtype)


@_overrides(_ATEN.is_pinned.default)
def _is_pinned(func: Operator, types: object, args: Arguments, kwargs: Keywords) -> bool:
    return all(getattr(args[0], name).is_pinned() for name in args[0].tensor_data_names)


@_overrides(_ATEN._pin_memory.default)
def _pin_memory(func: Operator, types: object, args: Arguments, kwargs: Keywords) -> QuantizedWeight:
    return args[0].map_data(Tensor.pin_memory)


# --- sharding by torch.distributed.tensor --------------------------------------------------------------------------


def _collective(func: Operator, types: object, args: Arguments, kwargs: Keywords) -> tuple[object, object]:
    """A collective that sends weights: one of every stored tensor, in order."""
    first = next(x for x in _compat.pytree.tree_leaves(args) if isinstance(x, QuantizedWeight))
    work = None
    for name in first.tensor_data_names:
        if work is not None:
            work.wait()
        parts = _compat.pytree.tree_map_only(QuantizedWeight, operator.attrgetter(name), args)
        _, work = func(*parts, **kwargs)
    return args[0], work


if torch.distributed.is_available():  # distribute_tensor and parallelize_module, where one process has the weights
    _OVERRIDES |= dict.fromkeys((torch.ops.c10d.scatter_.default, torch.ops.c10d.broadcast_.default), _collective)


def _view(func: Operator, args: Arguments, kwargs: Keywords, result: Result) -> Result:
    """``result`` with the storage that autograd expects of a view of ``args[0]``."""
    return _compat.aliased(func, args, kwargs, result)
