"""The weight observer for codebook groups: a float for each row, a codebook for each group."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torchao.quantization.granularity import PerGroup

from fp4dit_ao.formats import CodebookSet, codebook_set, register_codebook_set
from fp4dit_ao.observers import codebook_search
from fp4dit_ao.observers.base import add_buffer, refuse_non_finite
from fp4dit_ao.observers.grid import Bracket, Grid, Neighbours
from fp4dit_ao.observers.row_chunks import rows_at_once
from fp4dit_ao.observers.weight import WeightObserver
from fp4dit_ao.ops.codebook import codebook_dequantize

_OPS = torch.ops.fp4dit_ao


class CodebookWeightObserver(WeightObserver):
    """Quantizes a weight ``(out_features, in_features)`` to codes, codebook indices and row scales, which ``convert`` stores.

    Args:
        fmt: a codebook set, or several: then :meth:`resolve` takes the one with the least output error.
        group_size: input features that share a codebook.
        search: ``"mse"``, or ``"weighted_mse"``, which :meth:`resolve` gives the inputs.
        name: the parameter's fully qualified name: for messages, and for the buffers ``…weight_codes``, ``…weight_index``,
            ``…weight_codebooks`` and ``…weight_row_scale``.

    Attributes:
        scale: float32 ``(out_features,)``, set by the first forward.
        index: uint8 ``(out_features, groups)``, set with it.

    Raises:
        ValueError: an unknown codebook set.
    """

    fmt: CodebookSet  # type: ignore[assignment]
    index: Tensor | None

    def __init__(
        self,
        fmt: str | CodebookSet | Sequence[str | CodebookSet],
        group_size: int = 128,
        search: str = "mse",
        name: str = "weight",
        **spec: Any,
    ):
        names = [fmt] if isinstance(fmt, str | CodebookSet) else fmt
        sets: Any = [codebook_set(each) if isinstance(each, str) else register_codebook_set(each) for each in names]
        super().__init__(sets, PerGroup(group_size), search=search, name=name, **spec)
        self.group_size = group_size
        self.register_buffer("index", None)

    def _search(self, weight: Tensor) -> Tensor:
        if weight.shape[1] % self.group_size:
            raise ValueError(
                f"{self.name}: groups of {self.group_size} do not divide the {weight.shape[1]} columns of shape "
                f"{tuple(weight.shape)}; choose a group_size that does"
            )
        scale, self.index = codebook_search.search(weight, self.fmt, self.group_size, self.importance)
        return scale

    def _settle(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """(scale, index), searched for if that was not done."""
        if self.scale is None:
            refuse_non_finite(weight, f"weight {self.name}")
            self.scale = self._search(weight.detach())
        assert self.index is not None
        return self.scale, self.index

    def quantized(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        scale, index = self._settle(weight)
        if self.codes is not None:
            return self.codes, scale
        rows = rows_at_once(weight)
        parts = zip(weight.detach().split(rows), scale.split(rows), index.split(rows), strict=True)
        return torch.cat([self.fmt.encode(part.float() / own[:, None], books) for part, own, books in parts]), scale

    def dequantized(self, weight: Tensor) -> Tensor:
        codes, scale = self.quantized(weight)
        assert self.index is not None
        return codebook_dequantize(codes, self.index, self.fmt.tensor(codes.device), scale, weight.dtype)

    def grid(self, weight: Tensor) -> Grid:
        scale, index = self._settle(weight)
        wide = scale[:, None].expand(weight.shape)
        return CodebookGrid(self.fmt, index.repeat_interleave(self.group_size, 1), wide)

    @torch.no_grad()
    def resolve(self, weight: Tensor, gram: Tensor | None) -> None:
        if self.resolved:
            return
        super().resolve(weight, gram)
        assert self.scale is not None  # of the set that won; the index is of the last that was tried
        self.index = codebook_search.best_books(weight, self.scale, self.fmt, self.group_size, self.importance)

    def pretend_observed(self, weight: Tensor) -> None:
        rows, columns = weight.shape
        self.resolved = True
        self.scale = torch.empty(rows)
        self.index = torch.empty((rows, columns // self.group_size), dtype=torch.uint8)
        self.codes = torch.empty((rows, columns), dtype=torch.uint8)

    def weight_node(self, model: GraphModule, weight: Tensor) -> Node:
        codes, scale = self.quantized(weight)
        assert self.index is not None
        parts = {
            "codes": codes, "index": self.index, "codebooks": self.fmt.tensor(codes.device), "row_scale": scale,
        }  # fmt: skip
        buffers = [add_buffer(model, f"{self.name}_{part}", value) for part, value in parts.items()]
        return model.graph.call_function(_OPS.codebook_dequantize.default, (*buffers, weight.dtype, str(self.fmt)))


class CodebookGrid(Grid):
    """The values that a weight with codebook groups can be rounded to.

    Args:
        codebooks: that groups choose among.
        index: uint8, the codebook of every element, shaped like the weight.
        scale: float32, shaped like the weight.
    """

    def __init__(self, codebooks: CodebookSet, index: Tensor, scale: Tensor):
        self.codebooks, self.index, self.scale, self.stored = codebooks, index, scale, None

    def encode(self, weight: Tensor) -> Tensor:
        return self.codebooks.encode(weight.float() / self.scale, self.index)

    def levels(self, codes: Tensor) -> Tensor:
        return self.codebooks.decode(codes, self.index)

    def round(self, weight: Tensor) -> Tensor:
        return self.decode(self.encode(weight))

    def neighbours(self, weight: Tensor) -> Neighbours:
        return Neighbours(*self.bracket(weight)[:3])

    def position(self, weight: Tensor) -> Tensor:
        books = self.codebooks.tensor(weight.device).float()
        chosen = self.index.int()
        return torch.clamp(weight.float() / self.scale, books[:, 0][chosen], books[:, -1][chosen])

    def bracket(self, weight: Tensor) -> Bracket:
        position = self.position(weight)
        low_codes, up_codes, step = self.codebooks.bracket(position, self.index)
        return Bracket(position, self.levels(low_codes), self.levels(up_codes), step, low_codes, up_codes)

    def columns(self, index: slice | Tensor) -> "CodebookGrid":
        return CodebookGrid(self.codebooks, self.index[..., index], self.scale[..., index])
