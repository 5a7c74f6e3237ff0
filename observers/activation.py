"""Activation observers: token-wise online (the paper's), and one static range per tensor (what it argues against)."""

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fp4dit_ao._compat import Operator
from fp4dit_ao.formats import NumberFormat
from fp4dit_ao.observers.base import FloatObserver, add_buffer, refuse_non_finite, replace_observer
from fp4dit_ao.ops import choose_scale

_OPS = torch.ops.fp4dit_ao


class ActivationObserver(FloatObserver):
    """An observer of activations that can also accumulate their Gram matrix ``X^T X``.

    Attributes:
        gram: float32 ``(features, features)``, summed over all observed tokens; None until seen or if not asked for.
        drop: probability that fake quantization leaves an element as it is, which learned rounding may ask for; else 0.
    """

    gram: Tensor | None

    def __init__(self, fmt: str | NumberFormat, name: str = "activation", collect_gram: bool = False, **spec: object):
        super().__init__(fmt, **spec)
        self.name = name
        self.collect_gram = collect_gram
        self.drop = 0.0
        self.register_buffer("gram", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.paused:
            return x
        if self.fake_quantize:
            rounded = self._fake_quantize(x)
            return torch.where(torch.rand(x.shape, device=x.device) < self.drop, x, rounded) if self.drop else rounded
        refuse_non_finite(x, f"calibration data at {self.name}")
        if self.collect_gram:
            rows = x.detach().reshape(-1, x.shape[-1]).float()
            gram = rows.T @ rows
            self.gram = gram if self.gram is None else self.gram.add_(gram)
        self.observe(x.detach())
        return x

    def observe(self, x: Tensor) -> None:
        """Take note of one calibration tensor."""

    def _fake_quantize(self, x: Tensor) -> Tensor:
        return self._quantize_dequantize(x)

    def _quantize_online(
        self, model: GraphModule, observer_node: Node, choose: Operator, kind: torch.dtype | str
    ) -> None:
        """Put ``choose(x, block_size, fmt, kind) -> quantize -> dequantize`` in the place of the observer's node."""
        source = observer_node.args[0]
        assert isinstance(source, Node)
        value = source.meta["val"]
        block_size, fmt = self.block_size(value), str(self.fmt)
        with model.graph.inserting_before(observer_node):
            call = model.graph.call_function
            scale = call(choose, (source, block_size, fmt, kind))
            codes = call(_OPS.quantize.default, (source, block_size, scale, fmt))
            new = call(_OPS.dequantize.default, (codes, block_size, scale, fmt, value.dtype))
        replace_observer(model, observer_node, new)


class TokenActivationObserver(ActivationObserver):
    """Online quantization of every token by its own absmax (FP4DiT): nothing to calibrate, at any timestep.

    ``convert`` emits ``choose_scale -> quantize -> dequantize``; the scale is float32 ``(..., tokens, 1)``.
    """

    def block_size(self, x: Tensor) -> list[int]:
        return [1] * (x.ndim - 1) + [-1]

    def convert(self, model: GraphModule, observer_node: Node) -> None:
        self._quantize_online(model, observer_node, _OPS.choose_scale.default, torch.float32)


class StaticActivationObserver(ActivationObserver):
    """One range for the whole tensor, the largest magnitude seen in calibration: the baseline.

    Attributes:
        absmax: float32 scalar; negative until something was seen.
        factor: float32 scalar by which training multiplied the range that calibration found; None for 1.
        rounding: a module that maps an input to its quantized value while the range is being trained.
    """

    absmax: Tensor
    factor: Tensor | None

    def __init__(self, fmt: str | NumberFormat, name: str = "activation", collect_gram: bool = False, **spec: object):
        super().__init__(fmt, name, collect_gram, **spec)
        self.register_buffer("absmax", torch.tensor(-1.0))
        self.register_buffer("factor", None)
        self.rounding: nn.Module | None = None

    def block_size(self, x: Tensor) -> list[int]:
        return [-1] * x.ndim

    def observe(self, x: Tensor) -> None:
        self.absmax = torch.maximum(self.absmax.to(x.device), x.abs().amax().float())

    def scale(self, rank: int) -> Tensor:
        """float32, ``[1] * rank``.

        Raises:
            RuntimeError: nothing was observed.
        """
        found = self._calibrated_scale(rank)
        return found if self.factor is None else found * self.factor

    def _calibrated_scale(self, rank: int) -> Tensor:
        """:meth:`scale` as calibration found it."""
        if self.absmax < 0:
            raise RuntimeError(f"the static range at {self.name} saw no data; run calibrate(prepared, samples) first")
        return choose_scale(self.absmax.reshape([1] * rank), [-1] * rank, str(self.fmt), torch.float32)

    def _fake_quantize(self, x: Tensor) -> Tensor:
        if self.rounding is not None:
            rounded: Tensor = self.rounding(x)
            return rounded
        return self._quantize_dequantize(x, self.scale(x.ndim))

    def convert(self, model: GraphModule, observer_node: Node) -> None:
        source = observer_node.args[0]
        assert isinstance(source, Node)
        value = source.meta["val"]
        found = self.scale(value.ndim)  # may settle the format
        block_size, fmt = self.block_size(value), str(self.fmt)
        with model.graph.inserting_before(observer_node):
            call = model.graph.call_function
            scale = add_buffer(model, f"{self.name}_scale", found)
            codes = call(_OPS.quantize.default, (source, block_size, scale, fmt))
            new = call(_OPS.dequantize.default, (codes, block_size, scale, fmt, value.dtype))
        replace_observer(model, observer_node, new)
