"""Base classes of all observers."""

from typing import NoReturn

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.observer import ObserverBase

from fp4dit_ao import _compat
from fp4dit_ao.formats import CodebookFormat, NumberFormat, parse, register_codebook
from fp4dit_ao.ops import choose_scale, fake_quantize


class FloatObserver(ObserverBase):  # type: ignore[misc]
    """A torchao observer for a number format.

    While observing, ``forward`` returns its input unchanged. With ``fake_quantize`` set (by
    :func:`fp4dit_ao.observers.set_fake_quantize`) it returns the quantized and dequantized tensor: exactly what the graph
    computes after ``convert_pt2e``.

    Attributes:
        fmt: the number format. A codebook that is given as an object is registered under its name.
        fake_quantize: whether ``forward`` quantizes.
        paused: whether ``forward`` neither observes nor quantizes.
    """

    def __init__(self, fmt: str | NumberFormat, **spec: object):
        super().__init__(dtype=torch.uint8, is_dynamic=False)
        self.fmt = known(fmt)
        self.fake_quantize = False
        self.paused = False

    def calculate_qparams(self, **kwargs: object) -> NoReturn:
        raise RuntimeError(
            f"{type(self).__name__} emits its own quantize and dequantize nodes; call convert(model, node)"
        )

    def block_size(self, x: Tensor) -> list[int]:
        """torchao's ``block_size`` of a tensor like ``x``, -1 for a whole dimension."""
        raise NotImplementedError

    def convert(self, model: GraphModule, observer_node: Node) -> None:
        """Replace the observer's node in the graph by what it stands for."""
        raise NotImplementedError

    def _quantize_dequantize(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        if scale is None:
            scale = choose_scale(x, self.block_size(x), str(self.fmt), torch.float32)
        rounded = fake_quantize(x, self.block_size(x), scale, str(self.fmt), x.dtype)
        return StraightThrough.apply(x, rounded) if x.requires_grad else rounded  # type: ignore[no-untyped-call, no-any-return]


def known(fmt: str | NumberFormat) -> NumberFormat:
    """The format ``fmt`` names or is; a codebook is registered, since operators and checkpoints look formats up by name.

    Raises:
        ValueError: an unknown name, or a codebook with the name of another format.
    """
    if isinstance(fmt, str):
        return parse(fmt)
    return register_codebook(fmt) if isinstance(fmt, CodebookFormat) else fmt


class StraightThrough(torch.autograd.Function):
    """Gives ``rounded`` and passes its gradient to ``x`` unchanged."""

    @staticmethod
    def forward(ctx: object, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def refuse_non_finite(x: Tensor, what: str) -> None:
    """Raise ``ValueError`` if ``x`` (named ``what`` in the message) holds NaN or Inf."""
    bad = int((~torch.isfinite(x)).sum())
    if bad:
        raise ValueError(
            f"{what} of shape {tuple(x.shape)} holds {bad} NaN or Inf of {x.numel()} values; "
            "repair the checkpoint, or load it in a wider type (float16 overflows at 65504)"
        )


def replace_observer(model: GraphModule, observer_node: Node, new: Node) -> None:
    """Let every user of the observer's node take ``new``, which keeps the observed value's metadata."""
    source = observer_node.args[0]
    assert isinstance(source, Node)
    new.meta.update({key: source.meta[key] for key in ("val", "nn_module_stack", "stack_trace") if key in source.meta})
    observer_node.replace_all_uses_with(new)
    model.graph.erase_node(observer_node)


def add_buffer(model: GraphModule, name: str, value: Tensor) -> Node:
    """A ``get_attr`` node (at the current insertion point) for a new buffer of that dotted name, made unique."""
    return _compat.create_buffer_node(model, name, value)
