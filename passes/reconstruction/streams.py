"""Values that flow through a graph's segments, for many calibration rows at once.

Samples that fit together (same sizes, same constants) are stacked along the batch, so that a minibatch is any set of rows.
Two streams run side by side: one full precision, one quantized with what has been learned so far. Values that nothing
reads any more are dropped, which bounds the memory to what crosses one cut of the graph.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fp4dit_ao import _compat
from fp4dit_ao.passes.partition import Segment
from fp4dit_ao.util.mapped_files import MappedFiles

Values = dict[str, Any]
"""Values by the name of their node: tensors, whole numbers that grow with the batch, constants."""


class Rows:
    """Which values of a graph grow with the batch, and along which dimension, read off their symbolic shapes.

    Without a batch symbol, or if a value grows otherwise, nothing can be stacked: each sample then is one row.

    Args:
        model: the whole graph.
        samples: its placeholders' values, by node name.

    Attributes:
        dims: the dimension of each tensor that grows; -1 for a whole number that does.
    """

    def __init__(self, model: GraphModule, samples: Sequence[Values]):
        inputs = [n for n in model.graph.nodes if n.op == "placeholder" and isinstance(n.meta.get("val"), Tensor)]
        sizes = {n.name: n.meta["val"].shape[0] for n in inputs if n.meta["val"].ndim}
        self.first = next(iter(sizes), "")
        size = sizes.get(self.first)
        self.dims: dict[str, int] = {}
        if not isinstance(size, torch.SymInt) or not str(size).isidentifier():
            return
        # nothing in the graph may tie the batch of a mask to that of the latents: it then has a symbol of its own
        same = {
            str(s)
            for name, s in sizes.items()
            if isinstance(s, torch.SymInt)
            and s.node.hint == size.node.hint
            and all(len(sample[name]) == len(sample[self.first]) for sample in samples)
        }
        for node in model.graph.nodes:
            value = _observed(node).meta.get("val")
            if isinstance(value, torch.SymInt) and _growth(value, same) == _TIMES:
                self.dims[node.name] = -1
            elif isinstance(value, Tensor):
                growth = [_growth(s, same) if isinstance(s, torch.SymInt) else 1 for s in value.shape]
                grown = [dim for dim, times in enumerate(growth) if times != 1]
                if len(grown) > 1 or any(growth[dim] != _TIMES for dim in grown):
                    self.dims.clear()
                    return
                if grown:
                    self.dims[node.name] = grown[0]

    def count(self, values: Values) -> int:
        """Rows in one sample's placeholder values."""
        return len(values[self.first]) if self.dims else 1

    def identity(self, name: str, value: object) -> object:
        """What two samples must agree on to be stacked: other sizes of what grows, and the values of everything else."""
        if not isinstance(value, Tensor):
            return value
        if name in self.dims:
            return (*(s for i, s in enumerate(value.shape) if i != self.dims[name]), value.dtype)
        return (value.shape, value.dtype, value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())


_TIMES = 3


def _growth(size: torch.SymInt, batch: set[str]) -> float:
    """How many times as large ``size`` is at ``_TIMES`` the batch."""
    at = [_compat.size_at(size, dict.fromkeys(batch, rows), others=64) for rows in (2, 2 * _TIMES)]
    return at[1] / at[0] if at[0] else 1.0


def _observed(node: Node) -> Node:
    """An observer gives what it is given, and has no metadata of its own."""
    while node.op == "call_module" and node.args and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


class Stream:
    """Stacked values of one group of samples.

    Args:
        values: placeholders' values, sample by sample.
        rows: of the whole graph.

    Attributes:
        rows: how many; each sample adds its batch.
        full: values in full precision, by node name; what grows has ``rows * k`` entries along its dimension.
        quantized: the same, of the quantized model. What depends on nothing quantized, the two share.
        peak: the most bytes that the values took so far.
        device: where the graph runs.
    """

    def __init__(self, values: Sequence[Values], rows: Rows):
        self._rows = rows
        self.device = self._home = torch.device("cpu")
        self._files: MappedFiles | None = None
        self._standing_for: int | None = None
        self.rows = sum(rows.count(v) for v in values)
        self.peak = 0
        self.full: Values = {}
        for name, value in values[0].items():
            stacked = torch.cat([v[name] for v in values], rows.dims[name]) if rows.dims.get(name, -1) >= 0 else value
            self.full[name] = stacked.detach() if isinstance(stacked, Tensor) else stacked
        self.quantized: Values = dict(self.full)
        self._exact = set(self.full)
        self._held: set[str] = set()
        self._overdue: set[str] = set()

    def move_to(self, device: torch.device, offload: bool = False, files: MappedFiles | None = None) -> None:
        """Compute on ``device``, and keep the values there too, or ``offload`` all but the rows in use to host memory; in these
        ``files``, if any."""
        self.device, self._home, self._files = device, torch.device("cpu") if offload else device, files
        self.full = {name: self._kept(x) if isinstance(x, Tensor) else x for name, x in self.full.items()}
        self.quantized = dict(self.full)

    @property
    def offloaded(self) -> bool:
        """Whether the values are kept in host memory, and not on :attr:`device`."""
        return self._home != self.device

    def grows(self, name: str) -> bool:
        """Whether a value has entries for each row."""
        return name in self._rows.dims or not self._rows.dims

    def chunks(self, size: int) -> list[slice]:
        """All rows, at most ``size`` at a time."""
        return [slice(i, min(i + size, self.rows)) for i in range(0, self.rows, size)]

    def select(self, values: Values, names: Sequence[str], rows: Tensor | slice) -> list[Any]:
        """Arguments for a segment, on its device: the named values, of some rows."""
        return [self._take(name, values[name], rows) for name in names]

    def _take(self, name: str, value: Any, rows: Tensor | slice) -> Any:
        dim = self._rows.dims.get(name)
        if not isinstance(value, Tensor):
            return value if dim is None else value // self.rows * _length(rows)
        if dim is not None:
            split = value.unflatten(dim, (self.rows, -1))
            if isinstance(rows, slice):
                split = split.narrow(dim, rows.start, _length(rows))
            else:
                split = _rows_of(split, dim, rows.to(split.device), pinned=self.device.type == "cuda")
            value = split.flatten(dim, dim + 1)
        return value.to(self.device, non_blocking=True)

    def first_row(self) -> "Stream":
        """A stream of one row, whose ``peak`` will be that of all."""
        names = list(self.full)
        alone = Stream([dict(zip(names, self.select(self.full, names, slice(0, 1)), strict=True))], self._rows)
        alone._standing_for = self.rows
        return alone

    def hold(self, names: set[str]) -> None:
        """Keep full-precision values of these names when nothing reads them any more, and let go of others that were kept."""
        for name in self._overdue - names:
            self.full.pop(name, None)
        self._held, self._overdue = names, self._overdue & names

    def advance_full(self, segment: Segment, chunk: int) -> None:
        """Run ``segment`` (observers paused) over all rows, ``chunk`` at a time, and keep what later segments read.

        Values that depend on nothing quantized go into both streams.
        """
        if not segment.quantizes and self._exact.issuperset(segment.inputs):
            self._exact.update(segment.outputs)
            self._advance([self.full, self.quantized], segment, chunk)
        else:
            self._advance([self.full], segment, chunk)
        self._drop(self.full, segment, self._held)
        self._overdue |= self._held.intersection(segment.dead)

    def advance_quantized(self, segment: Segment, chunk: int) -> None:
        """Likewise, the quantized stream; :meth:`advance_full` comes first, and may be several segments ahead."""
        if not self._exact.issuperset(segment.outputs):
            self._advance([self.quantized], segment, chunk)
        self._drop(self.quantized, segment)

    @torch.no_grad()
    def _advance(self, streams: list[Values], segment: Segment, chunk: int) -> None:
        """Compute a segment from the first of these streams, for all of them."""
        kept = [(i, name) for i, name in enumerate(segment.outputs) if name not in segment.dead]

        def outputs_of(rows: slice) -> list[object]:
            outputs = segment.graph(*self.select(streams[0], segment.inputs, rows))
            return [outputs[position] for position, _ in kept]

        results = self.collected([name for _, name in kept], outputs_of, chunk)
        for values in streams:
            values.update(results)
        self.peak = max(self.peak, self._nbytes())

    @torch.no_grad()
    def collected(self, names: Sequence[str], compute: Callable[[slice], Sequence[object]], chunk: int) -> Values:
        """Values of all rows, by name, from what ``compute`` gives for the named ones of a slice of rows."""
        results: Values = {}
        for rows in self.chunks(chunk):
            for name, value in zip(names, compute(rows), strict=True):
                self._store(results, name, value, rows)
        return results

    def _drop(self, values: Values, segment: Segment, held: Collection[str] = ()) -> None:
        for name in segment.dead:
            if name not in held:
                values.pop(name, None)

    def _store(self, results: Values, name: str, value: Any, rows: slice) -> None:
        """Put the value of some rows in its place among all rows, which the first chunk allocates."""
        dim = self._rows.dims.get(name)
        if dim is None or rows == slice(0, self.rows):
            results[name] = self._kept(value) if isinstance(value, Tensor) else value
        elif not isinstance(value, Tensor):
            results[name] = results.get(name, 0) + value
        else:
            each = value.shape[dim] // _length(rows)
            if name not in results:
                shape = [*value.shape[:dim], each * self.rows, *value.shape[dim + 1 :]]
                results[name] = self._empty(shape, value.dtype)
            results[name].narrow(dim, rows.start * each, value.shape[dim]).copy_(value)

    def _empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Room for all rows of a value."""
        if self._files is None or self._home.type != "cpu":
            return torch.empty(shape, dtype=dtype, device=self._home)
        return self._files.empty(shape, dtype)

    def _kept(self, value: Tensor) -> Tensor:
        """All rows of a value, where the values are."""
        value = value.to(self._home)
        return value if self._files is None else self._files.keep(value)

    def _nbytes(self) -> int:
        """Bytes of both streams; what they share counts once."""
        factor = (self._standing_for or self.rows) // self.rows
        values = {
            id(x): (name, x) for name, x in (*self.full.items(), *self.quantized.items()) if isinstance(x, Tensor)
        }
        return sum(x.nbytes * (factor if self.grows(name) else 1) for name, x in values.values())


def _rows_of(split: Tensor, dim: int, rows: Tensor, pinned: bool) -> Tensor:
    """The rows; if they are to go from host memory to a GPU, in memory that it can read by itself."""
    if split.is_cuda or not pinned:
        return split.index_select(dim, rows)
    shape = [*split.shape[:dim], len(rows), *split.shape[dim + 1 :]]
    return torch.index_select(split, dim, rows, out=torch.empty(shape, dtype=split.dtype, pin_memory=True))


def _length(rows: Tensor | slice) -> int:
    return rows.stop - rows.start if isinstance(rows, slice) else len(rows)


def build(model: GraphModule, samples: Sequence[Mapping[str, object]]) -> list[Stream]:
    """Group samples that can be stacked.

    Raises:
        ValueError: see :func:`checked`.
    """
    flat = checked(model, samples)
    return stacked(flat, Rows(model, flat))


def checked(model: GraphModule, samples: Sequence[Mapping[str, object]]) -> list[Values]:
    """The placeholders' values of every sample.

    Raises:
        ValueError: no samples, one that does not fit the graph's signature, or one that holds NaN or Inf.
    """
    if isinstance(samples, Mapping):
        raise ValueError("samples must be a list of dicts, one a forward call; found a single dict")
    if not samples:
        raise ValueError("no calibration samples; collect_samples(pipe, prompts) records some")
    return [_checked(model, number, sample) for number, sample in enumerate(samples)]


def stacked(samples: Sequence[Values], rows: Rows) -> list[Stream]:
    """A stream for all samples that can be stacked."""
    groups: dict[object, list[Values]] = {}
    for number, values in enumerate(samples):
        key = tuple(rows.identity(name, value) for name, value in values.items()) if rows.dims else number
        groups.setdefault(key, []).append(values)
    return [Stream(values, rows) for values in groups.values()]


def _checked(model: GraphModule, number: int, sample: Mapping[str, object]) -> Values:
    try:
        if not isinstance(sample, Mapping):
            raise TypeError(f"found {type(sample).__name__}")
        values = _compat.flat_inputs(model, sample)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"calibration sample {number} does not fit the graph ({error}); "
            f"give the keyword arguments {', '.join(_compat.input_names(model))}"
        ) from error
    for name, value in values.items():
        if isinstance(value, Tensor) and value.is_floating_point() and not torch.isfinite(value).all():
            raise ValueError(f"calibration sample {number}: {name} holds NaN or Inf; check the model's precision")
    return values
