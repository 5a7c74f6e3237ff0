"""Reconstruction: round every weight by what its block, or layer, or window of blocks puts out (BRECQ, arXiv 2102.05426).

Works in place on a prepared graph. The scope cuts it into units; calibration data streams through them, once as the
original computes it and once as the quantized model does; and for each unit in turn the rounding rule chooses codes, so
that its output on *quantized* inputs comes close to the original's output on the original's inputs. The codes stay in the
weight observers.
"""

import contextlib
import gc
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch.fx import GraphModule
from tqdm import tqdm

from fp4dit_ao.config import AdaRoundConfig, ReconstructionConfig
from fp4dit_ao.observers.fake_quantization import frozen_parameters
from fp4dit_ao.observers.weight import gram_of, weight_of
from fp4dit_ao.passes.device_placement import leave_inference_mode
from fp4dit_ao.passes.graph_stage import misfit, require_graph
from fp4dit_ao.passes.partition import weight_observers
from fp4dit_ao.passes.reconstruction import block_checkpoints
from fp4dit_ao.passes.reconstruction.memory_budget import Need, check, need_of, prefetch_after
from fp4dit_ao.passes.reconstruction.network_tail import NetworkTail, model_results
from fp4dit_ao.passes.reconstruction.objectives import OBJECTIVES
from fp4dit_ao.passes.reconstruction.report import BlockReport, ReconstructionReport
from fp4dit_ao.passes.reconstruction.rounding import ROUNDINGS, ClosedFormRounding
from fp4dit_ao.passes.reconstruction.scopes import SCOPES, Unit
from fp4dit_ao.passes.reconstruction.shards import divide
from fp4dit_ao.passes.reconstruction.streams import Stream
from fp4dit_ao.passes.reconstruction.unit_error import UnitError
from fp4dit_ao.passes.reconstruction.unit_rounding import round_unit, steps_of
from fp4dit_ao.passes.reconstruction.walk import planned_bytes, walk
from fp4dit_ao.util.freed_memory import WORTH_IT, collecting_new_objects_alone, large_tensors_apart, return_freed
from fp4dit_ao.util.mapped_files import MappedFiles, anonymous_bytes
from fp4dit_ao.util.plain_mode import plain_mode
from fp4dit_ao.util.world import current


@plain_mode()
def reconstruct(
    prepared: GraphModule,
    samples: Sequence[Mapping[str, object]],
    config: ReconstructionConfig | None = None,
    *,
    checkpoint_dir: str | Path | None = None,
    memory: int | None = None,
    progress: bool = True,
) -> ReconstructionReport:
    """Round every quantized weight of ``prepared``, unit by unit, in place.

    Inside of :func:`fp4dit_ao.util.world.joined`, processes share out the rows of ``samples``, which each of them has in full;
    all end with the same codes, and the first one writes the checkpoint.

    Args:
        prepared: from ``prepare_pt2e`` with :class:`~fp4dit_ao.FP4DiTQuantizer`, calibrated.
        samples: keyword arguments of forward calls (:func:`~fp4dit_ao.collect_samples`).
        config: which methods, and how to learn; ``AdaRoundConfig()`` by default.
        checkpoint_dir: keep each finished unit there; the same call after a kill resumes, and ends with the same bits.
        memory: bytes that this process may take, beside pages of files that it has mapped. What does not fit beside the unit at
            work goes into files in ``checkpoint_dir``; the bits are the same. None for no limit.
        progress: show a progress bar with the time left.

    Returns:
        A report with a row per unit.

    Raises:
        ValueError: an unknown method; a graph without observed weights; samples that are empty, do not fit, or hold NaN; a
            checkpoint of another run; too little memory allowed.
        RuntimeError: formats are to be chosen on data, but the graph was not calibrated.
    """
    config = config or AdaRoundConfig()
    if not isinstance(config, ReconstructionConfig):
        raise ValueError(
            f"reconstruct: found config={config!r:.60}; give ReconstructionConfig(rounding=…), or AdaRoundConfig()"
        )
    require_graph(prepared, "reconstruct", "the result of prepare_pt2e")
    if next(weight_observers(prepared), None) is None:
        raise ValueError(
            "reconstruct: no weight in this graph has an observer of FP4DiTQuantizer; give it the result of prepare_pt2e, "
            "before convert_pt2e"
        )
    leave_inference_mode(prepared)
    rule, objective = ROUNDINGS.find(config.rounding), OBJECTIVES.find(config.objective)
    scope = SCOPES.find(config.scope)
    began = time.monotonic()
    device = next((p.device for p in prepared.parameters()), torch.device("cpu"))
    files = files_for(memory, checkpoint_dir)
    world = current()
    count = config.shards or world.size
    config = replace(config, shards=count)
    shards = divide(prepared, samples, count, config.batch_size, world)
    streams = shards.streams
    for node, observer in weight_observers(prepared):
        weight = weight_of(prepared, node)
        observer.resolve(weight, gram_of(prepared, node))
        observer.forget()  # an earlier reconstruction
        observer.quantized(weight)
        if files is not None:
            observer.store(files.keep)
            return_freed(WORTH_IT)
    plan = scope(prepared, config)
    store = (
        block_checkpoints.Store(checkpoint_dir, block_checkpoints.fingerprint(prepared, samples, config, rule), world)
        if checkpoint_dir
        else None
    )
    report, results = ReconstructionReport([], 0.0, 0), model_results(prepared)
    total = sum(steps_of(unit.segment, rule, config) for unit in plan.units)
    silent = not (progress and world.first)
    apart = contextlib.nullcontext() if memory is None else large_tensors_apart()
    with apart, frozen_parameters(prepared), tqdm(total=total, desc="reconstruct", disable=silent) as bar:
        keep_inputs = objective.needs_layers or (objective.drop > 0 and not isinstance(rule, ClosedFormRounding))
        needs: list[Need] = []

        def note(unit: Unit, row: Stream) -> None:
            if memory is not None:
                needs.append(need_of(unit, rule, row, shards.chunk))
                return_freed(WORTH_IT)

        try:
            planned = planned_bytes(plan, streams, device, keep_inputs, note)
        except (AssertionError, RuntimeError) as failure:
            wrong = next((found for x in streams if (found := misfit(prepared, x.first_row().full)) is not None), None)
            if wrong is None:
                raise
            raise ValueError(f"reconstruct: {wrong}") from failure
        _check_memory(planned, streams, config)
        in_files = None
        if memory is not None:
            gc.collect()
            return_freed(WORTH_IT)
        if memory is not None and device.type == "cpu" and needs:
            left = check(memory, anonymous_bytes(), max(needs, key=lambda need: need.total), shards.chunk)
            in_files = files if planned > left else None
        elif memory is not None:
            in_files = files if planned > memory - anonymous_bytes() else None
        for stream in streams:
            stream.move_to(device, _offload(planned, device, config), in_files)

        def rounded(index: int, unit: Unit) -> BlockReport:
            """A function of its own, so that nothing of one unit is left when the next one begins."""
            tail = NetworkTail(plan.steps[unit.last + 1 :], results) if objective.needs_tail else None
            error = UnitError(unit.segment, shards, objective, tail, unit.recompute)
            return round_unit(error, rule, config, index, bar)

        with collecting_new_objects_alone():
            for index, unit in enumerate(walk(plan, streams, shards.chunk, keep_inputs)):
                bar.set_postfix_str(unit.segment.name)
                prefetch_after(plan, unit)
                row = store.load(index, unit.segment) if store else None
                if row is None:
                    row = rounded(index, unit)
                    if store:
                        store.save(index, unit.segment, row)
                else:  # the time left is that of what is left
                    bar.initial = bar.n = bar.n + steps_of(unit.segment, rule, config)
                report.rows.append(row)
                _let_go(unit, files)
    report.stream_bytes = sum(stream.peak for stream in streams)
    report.seconds = time.monotonic() - began
    return report


def files_for(memory: int | None, folder: str | Path | None) -> MappedFiles | None:
    """Files for what a limited memory has no room for; None without a limit.

    Raises:
        ValueError: there is a limit, and no folder.
    """
    if memory is None:
        return None
    if folder is None:
        raise ValueError(
            f"memory={memory} puts what does not fit into files; give checkpoint_dir, a folder on a disk, for them"
        )
    return MappedFiles(folder)


def _let_go(unit: Unit, files: MappedFiles | None) -> None:
    """Frees what a unit took while it was at work, some of which is in cycles."""
    size = 0
    for node, observer in unit.segment.observers:
        size += weight_of(unit.segment.graph, node).numel()
        if files is not None:
            observer.store(files.keep)
    if files is not None or size >= WORTH_IT:
        gc.collect()
        return_freed(WORTH_IT)


def _offload(planned: int, device: torch.device, config: ReconstructionConfig) -> bool:
    """Whether the values stay in host memory: as asked, or if they would fill half of what an accelerator has free."""
    if config.offload is not None or device.type != "cuda":
        return bool(config.offload)
    return planned > torch.cuda.mem_get_info(device)[0] // 2


def _check_memory(used: int, streams: list[Stream], config: ReconstructionConfig) -> None:
    if config.memory_limit_bytes is not None and used > config.memory_limit_bytes:
        rows = sum(stream.rows for stream in streams)
        fit = rows * config.memory_limit_bytes // used
        raise ValueError(
            f"reconstruction would hold {used / 2**20:.1f} MiB of block inputs and outputs for {rows} calibration rows, "
            f"over the limit of {config.memory_limit_bytes / 2**20:.1f} MiB; give about {fit} rows, or raise the limit"
        )
