"""The weight observer: format, scale and, once learned, the rounding of one linear's weight."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torchao.quantization.granularity import Granularity, PerAxis, PerGroup, PerTensor

from fp4dit_ao.formats import NumberFormat
from fp4dit_ao.observers.activation import ActivationObserver
from fp4dit_ao.observers.base import FloatObserver, add_buffer, known, refuse_non_finite, replace_observer
from fp4dit_ao.observers.grid import Grid
from fp4dit_ao.observers.row_chunks import rows_at_once
from fp4dit_ao.observers.scale_search import INPUT_SEARCHES, SEARCHES
from fp4dit_ao.ops import dequantize, expand_scale, full_block, quantize

_OPS = torch.ops.fp4dit_ao


class Settled(NamedTuple):
    """A rounding that was decided on.

    Attributes:
        codes: uint8, shaped like the weight; None for nearest.
        scale: as the observer stores it.
    """

    codes: Tensor | None
    scale: Tensor | None


class WeightObserver(FloatObserver):
    """Quantizes a weight ``(out_features, in_features)`` to codes and scales that ``convert`` stores as buffers.

    Args:
        fmt: the format, or several: then :meth:`resolve` takes the one with the least output error.
        granularity: torchao's ``PerTensor()``, ``PerAxis(0)`` or ``PerGroup(n)``.
        search: a name in ``scale_search.SEARCHES``; one that looks at inputs is given them by :meth:`resolve`.
        scale_dtype: type of the stored scales.
        name: the parameter's fully qualified name, such as ``blocks.0.fc.weight``: for messages, and for the buffers
            ``…weight_codes`` and ``…weight_scale`` that ``convert`` creates beside it.

    Raises:
        ValueError: an unknown format or search.

    Attributes:
        scale: ``(out_features or 1, groups)``, set by the first forward.
        codes: uint8, shaped like the weight, once a rounding was learned; None means round to nearest.
        importance: float32 ``(in_features,)``, mean squares of the inputs, for searches that look at them; None before.
        deferred: whether ``convert_pt2e`` leaves this observer in the graph, so that it can be converted alone.
        rounding: a module that maps the weight to its (softly) rounded value while a rounding is being learned.
    """

    scale: Tensor | None
    codes: Tensor | None
    importance: Tensor | None
    _searched: Tensor | None
    """The search's scale, where a rounding settled on another."""

    def __init__(
        self,
        fmt: str | NumberFormat | Sequence[str | NumberFormat],
        granularity: Granularity = PerGroup(128),
        search: str = "absmax",
        scale_dtype: torch.dtype = torch.float32,
        name: str = "weight",
        **spec: object,
    ):
        names = [fmt] if isinstance(fmt, str | NumberFormat) else fmt
        candidates = tuple(known(f) for f in names)
        super().__init__(candidates[0], **spec)
        self.candidates = candidates
        self.on_data = search in INPUT_SEARCHES
        self.resolved = len(candidates) == 1 and not self.on_data
        self.granularity, self.search, self.scale_dtype, self.name = granularity, search, scale_dtype, name
        self.find_scale = SEARCHES.find(search)
        self.rounding: nn.Module | None = None
        self.deferred = False
        self.register_buffer("scale", None)
        self.register_buffer("codes", None)
        self.register_buffer("importance", None, persistent=False)
        self.register_buffer("_searched", None, persistent=False)

    def block_size(self, x: Tensor) -> list[int]:
        if isinstance(self.granularity, PerGroup):
            return [1, self.granularity.group_size]
        if isinstance(self.granularity, PerAxis) and self.granularity.axis == 0:
            return [1, -1]
        if isinstance(self.granularity, PerTensor):
            return [-1, -1]
        raise ValueError(
            f"{self.name}: granularity {self.granularity}; a weight takes PerTensor, PerAxis(0) or PerGroup"
        )

    def forward(self, weight: Tensor) -> Tensor:
        if self.paused:
            return weight
        if self.scale is None:
            refuse_non_finite(weight, f"weight {self.name}")
            self.scale = self._search(weight.detach())
        if not self.fake_quantize:
            return weight
        if self.rounding is not None:
            rounded: Tensor = self.rounding(weight)
            return rounded
        return self.dequantized(weight)

    def _search(self, weight: Tensor) -> Tensor:
        block_size = self.block_size(weight)
        if self.importance is None:
            scale = self.find_scale(weight, block_size, self.fmt, self.scale_dtype)
        else:
            scale = INPUT_SEARCHES[self.search](weight, block_size, self.fmt, self.scale_dtype, self.importance)
        expected = tuple(n // b for n, b in zip(weight.shape, full_block(weight.shape, block_size), strict=True))
        fits = tuple(scale.shape) == expected
        if not fits or not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise ValueError(
                f"weight {self.name}: the scale search {self.search!r} found scales of shape {tuple(scale.shape)}"
                f"{' that are not all positive and finite' if fits else ''}; it must return positive numbers of shape "
                f"{expected}"
            )
        return scale

    def quantized(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """(codes, scale): the learned codes if there are any, else to nearest."""
        if self.scale is None:
            refuse_non_finite(weight, f"weight {self.name}")
            self.scale = self._search(weight.detach())
        if self.codes is not None:
            return self.codes, self.scale
        return self._nearest(weight, self.scale), self.scale

    def _nearest(self, weight: Tensor, scale: Tensor) -> Tensor:
        """The codes nearest to ``weight``, some rows at a time: intermediates are several times as large as the codes."""
        block_size, rows = self.block_size(weight), rows_at_once(weight)
        if block_size[0] != 1 or len(weight) <= rows:
            return quantize(weight, block_size, scale, str(self.fmt))
        parts = zip(weight.split(rows), scale.split(rows), strict=True)
        return torch.cat([quantize(part, block_size, own, str(self.fmt)) for part, own in parts])

    def dequantized(self, weight: Tensor) -> Tensor:
        """The weight as the converted graph will have it."""
        codes, scale = self.quantized(weight)
        return dequantize(codes, self.block_size(weight), scale, str(self.fmt), weight.dtype)

    def grid(self, weight: Tensor) -> Grid:
        """The values that each element of ``weight`` can be rounded to: the format's levels times the element's scale."""
        if self.scale is None:
            self.quantized(weight)
        assert self.scale is not None
        return Grid(self.fmt, expand_scale(self.scale, weight, self.block_size(weight)), self._free_scale())

    def _free_scale(self) -> Tensor | None:
        """:attr:`Grid.stored`."""
        return self.scale

    @property
    def settled(self) -> Settled:
        """The rounding as it stands."""
        return Settled(self.codes, self.scale)

    def settle(self, rounding: Settled) -> None:
        """Takes a rounding: one that was learned, or an earlier one again."""
        if rounding.scale is not self.scale and self._searched is None:
            self._searched = self.scale
        self.codes, self.scale = rounding

    @property
    def rescaled(self) -> bool:
        """Whether the scale is another one than the search found."""
        return self._searched is not None and self._searched is not self.scale

    def forget(self) -> None:
        """Back to nearest rounding, with the scale that the search found."""
        if self._searched is not None:
            self.scale = self._searched
        self.codes, self._searched = None, None

    def store(self, keep: Callable[[Tensor], Tensor]) -> None:
        """Puts codes and scales where ``keep`` copies them; what was one tensor stays one."""
        kept: dict[int, Tensor] = {}
        for name, x in list(self.named_buffers(recurse=False, remove_duplicate=False)):
            if id(x) not in kept:
                kept[id(x)] = keep(x)
            setattr(self, name, kept[id(x)])

    @torch.no_grad()
    def candidate_errors(self, weight: Tensor, gram: Tensor | None) -> dict[NumberFormat, float]:
        """Output error of rounding to nearest in each candidate format, ``||(W - W^) X||^2 = tr(E G E^T)``, ``G = X^T X``.

        Args:
            weight: float ``(out_features, in_features)``.
            gram: float32 ``(in_features, in_features)`` of the calibration inputs.

        Raises:
            RuntimeError: no Gram matrix.
        """
        if gram is None:
            raise RuntimeError(
                f"{self.name}: choosing a weight format{' or scale' if self.on_data else ''} needs data; run "
                "calibrate(prepared, samples) first"
            )
        if self.on_data:
            self.importance = importance_of(gram)
        errors = {}
        for candidate in self.candidates:
            self.choose(candidate, weight)
            error = (self.dequantized(weight) - weight).float()
            errors[candidate] = float(((error @ gram) * error).sum())
        self.scale, self.resolved = None, False
        return errors

    def choose(self, fmt: NumberFormat, weight: Tensor) -> None:
        """Fixes the format to ``fmt``, one of the candidates, and searches the scale of ``weight`` in it."""
        self.fmt, self.resolved = fmt, True
        self.scale, self._searched = self._search(weight), None

    @torch.no_grad()
    def resolve(self, weight: Tensor, gram: Tensor | None) -> None:
        """Fixes the format to the candidate with the least output error (:meth:`candidate_errors`), and a scale that depends on
        inputs, if they are still open.

        Args:
            weight: float ``(out_features, in_features)``.
            gram: float32 ``(in_features, in_features)`` of the calibration inputs.

        Raises:
            RuntimeError: several candidates, or a search that looks at inputs, and no Gram matrix.
        """
        if self.resolved:
            return
        errors = self.candidate_errors(weight, gram)
        self.choose(min(errors, key=errors.__getitem__), weight)

    def pretend_observed(self, weight: Tensor) -> None:
        """Gives the observer scales and codes without values, shaped as for ``weight``, so that a graph of fake tensors can be
        converted."""
        self.resolved = True
        blocks = [n // b for n, b in zip(weight.shape, full_block(weight.shape, self.block_size(weight)), strict=True)]
        self.scale = torch.empty(blocks, dtype=self.scale_dtype)
        self.codes = torch.empty(weight.shape, dtype=torch.uint8)

    def scale_node(self, model: GraphModule, weight: Tensor, scale: Tensor) -> Node:
        """The node of the stored scale, at the current insertion point."""
        return add_buffer(model, f"{self.name}_scale", scale)

    def weight_node(self, model: GraphModule, weight: Tensor) -> Node:
        """The node of the dequantized weight, made of stored codes and scales, at the current insertion point."""
        codes, scale = self.quantized(weight)
        arguments = (
            add_buffer(model, f"{self.name}_codes", codes),
            self.block_size(weight),
            self.scale_node(model, weight, scale),
            str(self.fmt),
            weight.dtype,
        )
        return model.graph.call_function(_OPS.dequantize.default, arguments)

    def convert(self, model: GraphModule, observer_node: Node) -> None:
        if self.deferred:
            return
        source = observer_node.args[0]
        assert isinstance(source, Node)
        weight = weight_of(model, observer_node)
        self.resolve(weight, gram_of(model, observer_node))
        with model.graph.inserting_before(observer_node):
            new = self.weight_node(model, weight)
        replace_observer(model, observer_node, new)
        release(model, source)


def importance_of(gram: Tensor) -> Tensor:
    """How often the error of each input's weights counts: its mean square relative to that of all, and a hundredth, so that an
    input that calibration hardly saw still does.

    Args:
        gram: float ``(in_features, in_features)``.
    """
    power = gram.diagonal().float()
    mean = power.mean()
    return power / mean + 0.01 if mean > 0 else torch.ones_like(power)


def release(model: GraphModule, node: Node) -> None:
    """Erases a node that nothing reads any more, and lets go of the tensors that it alone is computed from.

    With the float weights, converting would take the model's size twice.
    """
    if node.users:
        return
    sources, path = node.all_input_nodes, str(node.target)
    is_tensor = node.op == "get_attr"
    model.graph.erase_node(node)
    if is_tensor and not any(other.op == "get_attr" and other.target == path for other in model.graph.nodes):
        owner, _, leaf = path.rpartition(".")
        delattr(model.get_submodule(owner), leaf)
    for source in sources:
        release(model, source)


def weight_of(model: GraphModule, observer_node: Node) -> Tensor:
    """The float weight that a weight observer's node looks at."""
    source = observer_node.args[0]
    assert isinstance(source, Node) and source.op == "get_attr"
    value: object = model
    for part in str(source.target).split("."):
        value = getattr(value, part)
    assert isinstance(value, Tensor)
    return value.detach()


def gram_of(model: GraphModule, observer_node: Node) -> Tensor | None:
    """The Gram matrix that the observer at the same linear's input accumulated, if it did."""
    for user in observer_node.users:
        source = user.args[0] if user.args else None
        if isinstance(source, Node) and source.op == "call_module":
            observer = model.get_submodule(str(source.target))
            if isinstance(observer, ActivationObserver):
                return observer.gram
    return None
