"""Bias correction: the mean error of every linear's output, taken out by its bias.

    b <- b + E[W X + b] - E[W^ X^ + b]

with W^ the rounded weight, X^ the quantized input of the model whose linears before this one are quantized and corrected, and
the means over all calibration tokens, for each output channel (empirical bias correction: data-free quantization, arXiv
1906.04721; for minifloats: arXiv 2311.12359). It comes after rounding, whichever it was, because the error depends
on it; and not before quantization, as a graph transform would, because the float model is what rounding is judged by.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from tqdm import tqdm

from fp4dit_ao.config import ReconstructionConfig
from fp4dit_ao.observers import set_fake_quantize
from fp4dit_ao.observers.fake_quantization import frozen_parameters
from fp4dit_ao.observers.weight import gram_of, weight_of
from fp4dit_ao.passes.fine_tuning.biases import bias_of, own_biases, put_biases
from fp4dit_ao.passes.fine_tuning.fine_tune import FINE_TUNINGS, FineTuneConfig, FineTuneReport
from fp4dit_ao.passes.model_error import calls_of, teacher, total_error
from fp4dit_ao.passes.partition import Segment, weight_observers
from fp4dit_ao.passes.reconstruction.scopes import SCOPES
from fp4dit_ao.passes.reconstruction.streams import Stream, build
from fp4dit_ao.passes.reconstruction.unit_error import settled
from fp4dit_ao.passes.reconstruction.walk import walk


def correct_biases(
    prepared: GraphModule,
    samples: Sequence[Mapping[str, object]],
    config: FineTuneConfig,
    *,
    checkpoint_dir: str | Path | None = None,
    progress: bool = True,
) -> FineTuneReport:
    """Corrects the biases of quantized linears, in the order of the graph.

    See :class:`~fp4dit_ao.passes.fine_tuning.FineTune`. Of ``config``, ``batch_size`` alone counts: rows at a time. Nothing is
    kept in ``checkpoint_dir``: it takes two forwards of the model. Linears without a bias, and biases that several linears add,
    stay as they are.

    Raises:
        ValueError: no samples, or no quantized linear has a bias of its own.
    """
    began = time.monotonic()
    calls = calls_of(prepared, samples)
    for node, observer in weight_observers(prepared):
        observer.resolve(weight_of(prepared, node), gram_of(prepared, node))
    old = own_biases(prepared)
    if not old:
        raise ValueError("no quantized linear of this graph has a bias of its own, so there is none to correct")
    trained = {name: bias.requires_grad for name, bias in old.items()}
    with frozen_parameters(prepared), torch.no_grad():
        targets = teacher(prepared, calls)
        set_fake_quantize(prepared, weight=True, activation=True)
        before = total_error(prepared, calls, targets)
        corrected = _corrected(prepared, samples, old, config.batch_size, progress)
        put_biases(prepared, corrected)
        set_fake_quantize(prepared, weight=True, activation=True)
        after = total_error(prepared, calls, targets)
        kept = after < before
        if not kept:
            put_biases(prepared, old)
    for name, wanted in trained.items():
        prepared.get_parameter(name).requires_grad_(wanted)
    count = sum(bias.numel() for bias in old.values())
    return FineTuneReport(before, after if kept else before, kept, count, time.monotonic() - began)


def _corrected(
    prepared: GraphModule,
    samples: Sequence[Mapping[str, object]],
    old: Mapping[str, nn.Parameter],
    rows: int,
    progress: bool,
) -> dict[str, nn.Parameter]:
    """The new biases; the graph's own stay."""
    plan, streams = SCOPES["layer"](prepared, ReconstructionConfig(scope="layer")), build(prepared, samples)
    device = next(iter(old.values())).device
    for stream in streams:
        stream.move_to(device)
    found: dict[str, nn.Parameter] = {}
    units = tqdm(walk(plan, streams, rows), desc="correct biases", total=len(plan.units), disable=not progress)
    for unit in units:
        (put_out,) = next(node for node in unit.segment.graph.graph.nodes if node.op == "output").args
        for position, node in enumerate(put_out):
            bias = bias_of(node)
            if bias is not None and bias in old:
                error = _mean_error(unit.segment, position, streams, rows)
                new = nn.Parameter((old[bias].double() + error).to(old[bias].dtype), requires_grad=False)
                put_biases(unit.segment.graph, {bias: new})  # the walk goes on with it
                found[bias] = new
    return found


def _mean_error(segment: Segment, position: int, streams: Sequence[Stream], chunk: int) -> Tensor:
    """``E[full] - E[quantized]`` of one output of a segment, over all tokens: float64 ``(out_features,)``."""
    name = segment.outputs[position]
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    with settled(segment):
        for stream in streams:
            for rows in stream.chunks(chunk):
                (full,) = stream.select(stream.full, [name], rows)
                outputs = segment.graph(*stream.select(stream.quantized, segment.inputs, rows))
                difference = (full.double() - outputs[position].double()).reshape(-1, full.shape[-1])
                total, tokens = total.to(difference.device) + difference.sum(0), tokens + len(difference)
    return total / tokens


FINE_TUNINGS.register(
    "bias_correction", correct_biases, summary="Takes the mean error of every linear's output out by its bias.",
    source="arXiv 1906.04721; minifloats: arXiv 2311.12359", cost="some forwards of the model; no training",
)  # fmt: skip
