"""Values that flow through a graph's segments, for many calibration rows at once.

Samples that fit together (same sizes, same constants) are stacked along the batch, so that a minibatch is any set of rows.
Two streams run side by side: one full precision, one quantized with what has been learned so far. Values that nothing
reads any more are dropped, which bounds the memory to what crosses one cut of the graph.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fp4dit_ao import _compat
from fp4dit_ao.passes.partition import Segment

Values = dict[str, Any]


class Rows:
    """Which values of a graph grow with the batch, read off their symbolic shapes."""

    def __init__(self, model: GraphModule):
        inputs = [n for n in model.graph.nodes if n.op == "placeholder" and isinstance(n.meta.get("val"), Tensor)]
        sizes = {n.name: n.meta["val"].shape[0] for n in inputs if n.meta["val"].ndim}
        self.first = inputs[0].name if inputs else None
        size: Any = sizes.get(self.first or "")
        self.symbol = str(size) if isinstance(size, torch.SymInt) and str(size).isidentifier() else None
        # nothing in the graph may tie the batch of a mask to that of the latents: it then has a symbol of its own
        same = {
            str(s)
            for s in sizes.values()
            if isinstance(s, torch.SymInt) and self.symbol and s.node.hint == size.node.hint
        }
        self._batch = re.compile(rf"\b({'|'.join(sorted(same))})\b")
        self.batched = {node.name for node in model.graph.nodes if self._grows(node)}

    def _grows(self, node: Node) -> bool:
        while node.op == "call_module" and isinstance(node.args[0], Node):  # an observer gives what it is given
            node = node.args[0]
        value = node.meta.get("val")
        size = value.shape[0] if isinstance(value, Tensor) and value.ndim else value
        return self.symbol is not None and isinstance(size, torch.SymInt) and self._batch.search(str(size)) is not None

    def count(self, values: Values) -> int:
        """Rows in one sample's placeholder values."""
        return int(values[self.first].shape[0]) if self.symbol is not None and self.first is not None else 1


class Stream:
    """Stacked values of one group of samples.

    Attributes:
        rows: how many; each sample adds its batch.
        full: values in full precision, by node name; batched ones have ``rows * k`` entries along dimension 0.
        quantized: the same, of the quantized model.
    """

    def __init__(self, values: Sequence[Values], rows: Rows, device: torch.device | None = None):
        self._rows = rows
        self.rows = sum(rows.count(v) for v in values)
        first = values[0]
        self.full: Values = {
            name: torch.cat([v[name] for v in values]) if name in rows.batched and isinstance(x, Tensor) else x
            for name, x in first.items()
        }
        self.quantized: Values = dict(self.full)

    def select(self, values: Values, names: Sequence[str], index: Tensor | slice) -> list[Any]:
        """Arguments for a segment: the named values, of the rows ``index``."""
        count = len(range(self.rows)[index]) if isinstance(index, slice) else len(index)
        return [self._take(values[name], name, index, count) for name in names]

    def _take(self, value: Any, name: str, index: Tensor | slice, count: int) -> Any:
        if name not in self._rows.batched:
            return value
        if not isinstance(value, Tensor):
            return value // self.rows * count
        return value.reshape(self.rows, -1, *value.shape[1:])[index].flatten(0, 1)

    @torch.no_grad()
    def advance(self, values: Values, segment: Segment, chunk: int) -> None:
        """Run ``segment`` over all rows, ``chunk`` at a time, and keep what later segments read."""
        chunks = [slice(i, min(i + chunk, self.rows)) for i in range(0, self.rows, chunk)]
        results = [segment.graph(*self.select(values, segment.inputs, rows)) for rows in chunks]
        for position, name in enumerate(segment.outputs):
            parts = [result[position] for result in results]
            if name not in self._rows.batched:
                values[name] = parts[0]
            elif isinstance(parts[0], Tensor):
                values[name] = torch.cat(parts)
            else:
                values[name] = sum(parts)
        for name in segment.dead:
            values.pop(name, None)

    def nbytes(self) -> int:
        """Bytes of both streams; what they share counts once."""
        tensors = {x.data_ptr(): x for x in (*self.full.values(), *self.quantized.values()) if isinstance(x, Tensor)}
        return sum(x.numel() * x.element_size() for x in tensors.values())


def build(model: GraphModule, samples: Sequence[Mapping[str, Any]]) -> list[Stream]:
    """Group samples that can be stacked.

    Raises:
        ValueError: no samples, one that does not fit the graph's signature, or one that holds NaN or Inf.
    """
    if not samples:
        raise ValueError("no calibration samples; collect_samples(pipe, prompts) records some")
    rows = Rows(model)
    groups: dict[Any, list[Values]] = {}
    for number, sample in enumerate(samples):
        try:
            values = _compat.flat_inputs(model, sample)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"calibration sample {number} does not fit the graph ({error}); "
                f"give the keyword arguments {', '.join(_compat.input_names(model))}"
            ) from error
        for name, value in values.items():
            if isinstance(value, Tensor) and value.is_floating_point() and not torch.isfinite(value).all():
                raise ValueError(f"calibration sample {number}: {name} holds NaN or Inf; check the model's precision")
        key = tuple(_identity(name, value, rows) for name, value in values.items())
        groups.setdefault(key if rows.symbol is not None else number, []).append(values)
    return [Stream(values, rows) for values in groups.values()]


def _identity(name: str, value: Any, rows: Rows) -> Any:
    """What two samples must agree on to be stacked: sizes of batched tensors, and the values of everything else."""
    if not isinstance(value, Tensor):
        return value
    if name in rows.batched:
        return (value.shape[1:], value.dtype)
    return (value.shape, value.dtype, value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
