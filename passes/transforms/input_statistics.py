"""Statistics of node outputs in a float graph on calibration samples: largest magnitudes by channel, and a few rows."""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from tqdm import tqdm

from fp4dit_ao import _compat
from fp4dit_ao._compat import pytree


class InputStatistics:
    """What was seen of one tensor ``(…, channels)``.

    Args:
        rows: how many rows of each sample to keep, evenly spread over them.

    Attributes:
        absmax: float32 ``(channels,)``, over all rows of all samples.
        by_sample: the same of each sample alone.
        kept: ``(rows, channels)`` a sample, in the tensor's own type.
    """

    def __init__(self, rows: int):
        self._rows = rows
        self.absmax: Tensor | None = None
        self.by_sample: list[Tensor] = []
        self.kept: list[Tensor] = []

    def update(self, x: Tensor) -> None:
        """Take note of one sample's tensor."""
        rows = x.detach().reshape(-1, x.shape[-1])
        absmax = rows.abs().amax(0).float()
        self.by_sample.append(absmax)
        self.absmax = absmax if self.absmax is None else torch.maximum(self.absmax, absmax)
        # midpoints of equal stretches: no part of the batch or of the sequence is preferred
        count = min(self._rows, len(rows))
        positions = (torch.arange(count, device=rows.device) * 2 + 1) * len(rows) // (2 * count)
        self.kept.append(rows[positions].clone())


class _Watch(Interpreter):
    def __init__(self, graph: GraphModule, watched: Mapping[Node, InputStatistics]):
        super().__init__(graph)
        self.watched = watched

    def run_node(self, n: Node) -> object:
        value = super().run_node(n)
        if n in self.watched:
            self.watched[n].update(value)
        return value


def kept_rows(seen: Sequence[InputStatistics]) -> Tensor:
    """The rows that were kept of several tensors of one width, joined."""
    return torch.cat([x for statistics in seen for x in statistics.kept])


@torch.no_grad()
def input_statistics(
    graph: GraphModule,
    samples: Sequence[Mapping[str, object]],
    nodes: Collection[Node],
    rows: int,
    progress: bool = False,
    kind: type[InputStatistics] = InputStatistics,
) -> dict[Node, InputStatistics]:
    """Run ``graph`` on ``samples`` and watch ``nodes``.

    Args:
        graph: the float graph, where it is to be computed.
        samples: keyword arguments of ``forward``; moved to the graph's device.
        nodes: of tensors ``(…, channels)``.
        rows: how many rows of each tensor to keep, over all samples (one a sample at least).
        progress: show a progress bar with the time left.
        kind: what is noted of each tensor.

    Raises:
        ValueError: no samples, one that does not fit the graph's signature, or NaN or Inf in what was watched.
    """
    if isinstance(samples, Mapping) or not samples:
        raise ValueError(
            "a graph transform that learns from data needs a list of samples, one dict of keyword arguments a forward call; "
            f"found {'a single dict' if samples else 'none'}; see collect_samples(pipe, prompts)"
        )
    share = -(-rows // len(samples))
    statistics = {node: kind(share) for node in nodes}
    watch = _Watch(graph, statistics)
    device = next((x.device for x in (*graph.parameters(), *graph.buffers())), torch.device("cpu"))
    for index, sample in enumerate(tqdm(samples, desc="inputs of linears", unit="sample", disable=not progress)):
        try:
            if not isinstance(sample, Mapping):
                raise TypeError(f"found {type(sample).__name__}; give a dict of keyword arguments")
            values = _compat.flat_inputs(graph, sample)
        except (TypeError, ValueError) as error:
            raise ValueError(f"calibration sample {index} does not fit the graph: {error}") from error
        watch.run(
            *pytree.tree_map_only(Tensor, lambda x: x.to(device), list(values.values())), enable_io_processing=False
        )
    for node, seen in statistics.items():
        if seen.absmax is None or not bool(torch.isfinite(seen.absmax).all()):
            raise ValueError(
                f"calibration data at {node.name} holds NaN or Inf; run the pipeline in a wider type, such as torch.bfloat16 "
                "instead of torch.float16"
            )
    return statistics
