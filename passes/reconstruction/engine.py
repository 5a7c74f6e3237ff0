"""Block-wise reconstruction: learn every weight's rounding from what its block puts out (BRECQ, arXiv 2102.05426).

Works in place on a prepared graph: it cuts the graph into blocks, streams calibration data through them, and for each block
in turn minimises the difference between its output on *quantized* inputs and the original's output on the original's
inputs, by the rounding of its weights alone. What is learned stays in the weight observers, as codes.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule
from tqdm import tqdm

from fp4dit_ao.config import AdaRoundConfig
from fp4dit_ao.observers import set_fake_quantize
from fp4dit_ao.observers.weight import gram_of, weight_of
from fp4dit_ao.passes.partition import Segment, partition, weight_observers
from fp4dit_ao.passes.reconstruction import block_checkpoints
from fp4dit_ao.passes.reconstruction.block_learning import Block, settled
from fp4dit_ao.passes.reconstruction.report import ReconstructionReport
from fp4dit_ao.passes.reconstruction.streams import Stream, build


def reconstruct(
    prepared: GraphModule,
    samples: Sequence[Mapping[str, Any]],
    config: AdaRoundConfig | None = None,
    *,
    checkpoint_dir: str | Path | None = None,
    progress: bool = True,
) -> ReconstructionReport:
    """Learn the rounding of every quantized weight of ``prepared``, block by block, in place.

    Args:
        prepared: from ``prepare_pt2e`` with :class:`~fp4dit_ao.FP4DiTQuantizer`, calibrated.
        samples: keyword arguments of forward calls (:func:`~fp4dit_ao.collect_samples`).
        config: how to learn.
        checkpoint_dir: keep each finished block there; the same call after a kill resumes, and ends with the same bits.
        progress: show a progress bar with the time left.

    Returns:
        A report with a row per block.

    Raises:
        ValueError: samples that are empty, do not fit, or hold NaN; a checkpoint of another run; too little memory allowed.
        RuntimeError: formats are to be chosen on data, but the graph was not calibrated.
    """
    config = config or AdaRoundConfig()
    began = time.monotonic()
    device = next((p.device for p in prepared.parameters()), torch.device("cpu"))
    streams = build(prepared, samples)
    for node, observer in weight_observers(prepared):
        weight = weight_of(prepared, node)
        observer.resolve(weight, gram_of(prepared, node))
        observer.codes = None  # of an earlier reconstruction
        observer.quantized(weight)
    segments = partition(prepared)
    store = (
        block_checkpoints.Store(checkpoint_dir, block_checkpoints.fingerprint(prepared, samples, config))
        if checkpoint_dir
        else None
    )
    report = ReconstructionReport([], 0.0, 0)
    blocks = [segment for segment in segments if segment.observers]
    with _frozen(prepared), tqdm(total=len(blocks) * config.iters, desc="reconstruct", disable=not progress) as bar:
        planned = _planned_bytes(segments, streams, device)
        _check_memory(planned, streams, config)
        for stream in streams:
            stream.move_to(device, offload=_offload(planned, device, config))
        for segment in segments:
            _advance_full(segment, streams, config.batch_size)
            if segment.observers:
                bar.set_postfix_str(segment.name)
                index = len(report.rows)
                row = store.load(index, segment) if store else None
                if row is None:
                    row = Block(segment, streams, config, index).learn(bar)
                    if store:
                        store.save(index, segment, row)
                else:
                    bar.initial = bar.n = bar.n + config.iters  # the time left is that of what is left
                report.rows.append(row)
            _advance_quantized(segment, streams, config.batch_size)
    report.stream_bytes = sum(stream.peak for stream in streams)
    report.seconds = time.monotonic() - began
    return report


def _advance_full(segment: Segment, streams: list[Stream], chunk: int) -> None:
    """Leaves the segment's observers set to fake quantization."""
    set_fake_quantize(segment.graph, False, False, paused=True)
    for stream in streams:
        stream.advance_full(segment, chunk)
    set_fake_quantize(segment.graph, True, True)


def _advance_quantized(segment: Segment, streams: list[Stream], chunk: int) -> None:
    with settled(segment):
        for stream in streams:
            stream.advance_quantized(segment, chunk)


def _planned_bytes(segments: list[Segment], streams: list[Stream], device: torch.device) -> int:
    """What the streams will take, found by sending one row of each through the whole graph."""
    total = 0
    for stream in streams:
        alone = [stream.first_row()]
        alone[0].move_to(device)
        for segment in segments:
            _advance_full(segment, alone, 1)
            _advance_quantized(segment, alone, 1)
        total += alone[0].peak
    return total


def _offload(planned: int, device: torch.device, config: AdaRoundConfig) -> bool:
    """Whether the values stay in host memory: as asked, or if they would fill half of what an accelerator has free."""
    if config.offload is not None or device.type != "cuda":
        return bool(config.offload)
    return planned > torch.cuda.mem_get_info(device)[0] // 2


@contextlib.contextmanager
def _frozen(model: GraphModule) -> Iterator[None]:
    """No gradients for the model's own parameters; observers back to observing afterwards, come what may."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    try:
        for p in wanted:
            p.requires_grad_(False)
        yield
    finally:
        for p in wanted:
            p.requires_grad_(True)
        set_fake_quantize(model, False, False)


def _check_memory(used: int, streams: list[Stream], config: AdaRoundConfig) -> None:
    if config.memory_limit_bytes is not None and used > config.memory_limit_bytes:
        rows = sum(stream.rows for stream in streams)
        fit = rows * config.memory_limit_bytes // used
        raise ValueError(
            f"reconstruction would hold {used / 2**20:.1f} MiB of block inputs and outputs for {rows} calibration rows, "
            f"over the limit of {config.memory_limit_bytes / 2**20:.1f} MiB; give about {fit} rows, or raise the limit"
        )
