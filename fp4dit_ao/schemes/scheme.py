"""Interface of a quantization scheme (:class:`QuantizationScheme`), and the registry of schemes."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import Argument

from fp4dit_ao.config import QuantConfig
from fp4dit_ao.config.scheme_rules import RULES, SchemeRules
from fp4dit_ao.formats import parse
from fp4dit_ao.observers import FloatObserver, WeightObserver
from fp4dit_ao.observers.activation import ActivationObserver
from fp4dit_ao.util.registry import Registry

Observer = TypeVar("Observer", bound=FloatObserver, covariant=True)


@dataclass(frozen=True)
class ObserverSpec(Generic[Observer]):
    """An observer to make: ``kind(**arguments)``. Equal specs of one value share an observer.

    Attributes:
        kind: class of the observer; torchao's ``with_args`` makes its constructor.
        arguments: keyword arguments, hashable, without ``name`` and ``collect_gram``.
    """

    kind: type[Observer]
    arguments: Mapping[str, Hashable] = field(default_factory=dict)

    @property
    def key(self) -> tuple[object, ...]:
        """What two specs have in common when they make the same observer."""
        return (self.kind, *sorted(self.arguments.items(), key=lambda item: item[0]))

    def constructor(self, **more: object) -> Callable[[], Observer]:
        """A function without arguments that makes the observer, with the arguments ``more`` besides."""
        make: Callable[[], Observer] = self.kind.with_args(**self.arguments, **more)
        return make


@dataclass(frozen=True)
class LowBitLinear:
    """A linear of a converted graph, as a lowered graph has it: ``linear(x, weight, bias)``.

    Attributes:
        x: what goes in; where the weight's ``linear`` quantizes its input itself, the float value before quantization.
        weight: tensor subclass.
        path: fully qualified name of the float weight, whose place it takes.
    """

    x: Node
    weight: Tensor
    path: str


@dataclass(frozen=True)
class PlainLinear:
    """The linear of a low-bit weight on plain tensors: ``function(x, *tensors, *arguments, bias)``.

    Attributes:
        function: made of aten's and ``torch.ops.fp4dit_ao``'s operators, traceable by ``torch.export``.
        tensors: by the name that is appended to the weight's; of types that ``torch.export.save`` stores.
        arguments: numbers and names, between the tensors and the bias.
    """

    function: Callable[..., Tensor]
    tensors: Mapping[str, Tensor]
    arguments: tuple[Argument, ...] = ()


Arrays = Mapping[str, np.ndarray[Any, Any]]
"""NumPy arrays by name, each of its own type."""
Description = Mapping[str, Any]
"""What a scheme said of a weight or its format in a single file, and reads again: parsed JSON, with keys of its own."""


class QuantizationScheme(Protocol):
    """How weights and inputs become integers and scales, at every stage from config to file. Stateless.

    A scheme is chosen by :func:`scheme_of`. All its forms of one weight must agree: the converted graph's float weight, the
    tensor of :meth:`round_to_nearest` or :meth:`lowered`, dequantized, and :meth:`dequantize` of the file have equal values.

    Attributes:
        rules: when a config means this scheme, and what it must look like then; its ``name`` is the scheme's.
        one_format: whether all layers share one format for weights and inputs, so that a family's rules for single layers
            do not apply.
    """

    rules: SchemeRules
    one_format: bool

    # --- configs -----------------------------------------------------------------------------------------------------

    def quantizes_online(self, config: QuantConfig) -> bool:
        """Whether inputs need no calibration, and the module form can compute them."""

    def block_size(self, config: QuantConfig) -> list[int]:
        """Rows and columns of a weight that share a scale (or a codebook); -1 for all."""

    # --- observers ---------------------------------------------------------------------------------------------------

    def weight_observer(self, config: QuantConfig) -> ObserverSpec[WeightObserver]:
        """Observer of a linear's weight; takes ``name``, and is a ``WeightObserver``."""

    def input_observer(self, config: QuantConfig, fmt: str) -> ObserverSpec[ActivationObserver]:
        """Observer of a linear's input in format ``fmt``; takes ``name`` and ``collect_gram``."""

    def attention_observer(self, config: QuantConfig, fmt: str) -> ObserverSpec[ActivationObserver]:
        """Observer of q, k and v, ``(..., heads, tokens, head_dim)``, in format ``fmt``; arguments as for an input's."""

    # --- tensors -----------------------------------------------------------------------------------------------------

    def empty_parts(self, shape: Sequence[int], config: QuantConfig) -> dict[str, Tensor]:
        """Tensors that are stored for a weight of ``shape`` (out_features, in_features), by name, on the meta device.

        The names are those of the tensor subclass's data attributes, so that ``graph_tensors.flatten`` gives the same.
        """

    def from_parts(self, parts: Mapping[str, Tensor], config: QuantConfig, dtype: torch.dtype) -> Tensor:
        """Builds the weight from the tensors that :meth:`empty_parts` describes; its reported dtype is ``dtype``."""

    def round_to_nearest(self, name: str, weight: Tensor, config: QuantConfig) -> Tensor:
        """Rounds a float weight ``(out_features, in_features)`` to nearest, as its observer would without a learned rounding.

        Args:
            name: of the linear, for messages.
            weight: of any float type, which the result reports as its own.
            config: of this linear.

        Raises:
            ValueError: NaN or Inf in it, or a group size that does not divide it.
        """

    def owns(self, weight: Tensor) -> bool:
        """Whether ``weight`` is a tensor subclass of this scheme."""

    def nearest_codes(self, weight: Tensor, original: Tensor) -> Tensor:
        """uint8 codes that ``original`` would have if it were rounded to nearest with the scales of ``weight``.

        Args:
            weight: a tensor that this scheme owns.
            original: float, of its shape.
        """

    # --- graphs ------------------------------------------------------------------------------------------------------

    def lowered(self, model: GraphModule, linear: Node) -> LowBitLinear | None:
        """The low-bit form of an ``aten.linear`` of a converted graph; None if its weight is not stored in this scheme."""

    def plain_linear(self, weight: Tensor) -> PlainLinear:
        """The linear of a tensor that this scheme owns, without its class."""

    # --- the single file ---------------------------------------------------------------------------------------------

    def describe(self, config: QuantConfig) -> dict[str, object]:
        """JSON of a linear's weight in a single file, besides ``scheme``: ``weight`` (name of the format), ``block_size``, and
        whatever else :meth:`dequantize` needs, as docs/single_file.md has it."""

    def describe_format(self, config: QuantConfig) -> dict[str, object]:
        """JSON of the weight's format in a single file: ``bits`` of a code and ``levels``; see :func:`describe_format`."""

    def input_scale(self, config: QuantConfig, attention: bool) -> str:
        """How the scale of inputs (of q, k and v if ``attention``) is found, in a single file: ``"token"``, ``"tensor"`` or
        ``"block"``."""

    def dequantize(
        self, codes: NDArray[np.uint8], parts: Arrays, layer: Description, fmt: Description
    ) -> NDArray[np.float32]:
        """The weight of a single file in NumPy alone.

        Args:
            codes: uint8, unpacked, ``(out_features, in_features)``.
            parts: the stored tensors of the weight, by the names of :meth:`empty_parts`; of floating-point types that NumPy
                lacks, as float32.
            layer: what :meth:`describe` gave.
            fmt: what :meth:`describe_format` gave.

        Returns:
            float32 ``(out_features, in_features)``, equal to the tensor's ``dequantize(torch.float32)``.
        """


def describe_format(name: str) -> dict[str, object]:
    """JSON of the number format ``name`` in a single file: bits of a code, and the level of each code."""
    fmt = parse(name)
    return {"bits": fmt.bits, "levels": [fmt.level(code) for code in range(2**fmt.bits)]}


SCHEMES: Registry[QuantizationScheme] = Registry("quantization scheme")
"""By name."""


def register_scheme(
    scheme: QuantizationScheme, *, summary: str, source: str = "", cost: str = ""
) -> QuantizationScheme:
    """Adds a scheme, and its rules before those that are there; returns it.

    Raises:
        ValueError: another scheme has its name.
    """
    SCHEMES.register(scheme.rules.name, scheme, summary=summary, source=source, cost=cost)
    if scheme.rules not in RULES:
        RULES.insert(0, scheme.rules)
    return scheme


def scheme_of(config: QuantConfig) -> QuantizationScheme:
    """The scheme that ``config`` means."""
    return SCHEMES.find(config.scheme)


def owner_of(weight: Tensor) -> QuantizationScheme | None:
    """The scheme whose tensor subclass ``weight`` is, if any."""
    return next((scheme for scheme in SCHEMES.values() if scheme.owns(weight)), None)
