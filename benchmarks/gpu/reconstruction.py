"""Part ``reconstruction``: learning the rounding of PixArt-XL's blocks at batch 16, beside the bfloat16 roofline."""

import contextlib
import copy
import statistics
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

from benchmarks.gpu.measuring import Run, alone, error_of, within
from fp4dit_ao import AdaRoundConfig, capture, quantizer_for, reconstruct
from fp4dit_ao._compat import pytree
from fp4dit_ao.benchmark.transformers import PIXART_XL, TEXT_TOKENS, quantized, random_model, sample
from fp4dit_ao.calibration import calibrate
from fp4dit_ao.passes.partition import weight_observers
from fp4dit_ao.passes.reconstruction import engine, learned_rounding
from fp4dit_ao.util.markdown import markdown_table

RECIPE = "w4a6_codebook"
BATCH = 16
WHOLE = {"blocks": 28, "iterations": 2500}
"""Size of the whole task, PixArt-XL: done in an hour, it leaves 50 ms for an iteration."""
PEAKS = {"H100": 989e12, "H200": 989e12}
"""Dense bfloat16 operations a second, of the SXM modules, by a part of the GPU's name."""
WARM_UP = 10
"""Iterations of a block that are not counted: they compile, and capture the graph."""
LEAST = 15
"""Seconds below which no further variant is started."""


class How(NamedTuple):
    """A variant: settings of reconstruction, whether steps may be captured, and iterations a block."""

    settings: Mapping[str, Any]
    captured: bool
    iterations: int


VARIANTS = {
    "bfloat16, CUDA graph": How({"bfloat16": True}, True, 40),
    "bfloat16, compiled, CUDA graph": How({"bfloat16": True, "compile": True}, True, 400),
    "bfloat16": How({"bfloat16": True}, False, 40),
    "float32": How({"bfloat16": False}, False, 40),
    "float32, compiled, CUDA graph": How({"bfloat16": False, "compile": True}, True, 400),
}
"""Most telling first. Those of 40 iterations learn from the same minibatches at the same rate, and so do those of 400."""


def products(rows: int, pixels: int, config: Mapping[str, int] = PIXART_XL) -> int:
    """Floating-point operations of an iteration on one block, in linears and attention alone; what a backward pass computes
    again is not counted.

    Args:
        rows: of a minibatch.
        pixels: side of the image; a token stands for 16 of them.
        config: of the model.
    """
    width, text_width = config["num_attention_heads"] * config["attention_head_dim"], config["cross_attention_dim"]
    tokens, text = rows * (pixels // 8 // config["patch_size"]) ** 2, rows * TEXT_TOKENS
    first = 2 * tokens * 3 * width**2 + 2 * text * 2 * text_width * width  # their inputs take no gradient
    later = 2 * tokens * (1 + 2 + 8) * width**2  # outputs of both attentions, the second's queries, feed-forward
    attention = 4 * tokens * (tokens + text) // rows * width
    return 2 * first + 3 * later + 3 * attention


class Ticks:
    """Stands in for the progress bar, and notes when the device has finished each iteration."""

    def __init__(self, device: str):
        self._device, self._ticks = device, list[Any]()

    def update(self, steps: int = 1) -> None:
        if self._device == "cuda":
            tick = torch.cuda.Event(enable_timing=True)
            tick.record()
            self._ticks.append(tick)
        else:
            self._ticks.append(time.perf_counter())

    def set_postfix_str(self, text: str) -> None:
        """Says nothing."""

    def __enter__(self) -> "Ticks":
        return self

    def __exit__(self, *error: object) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()

    def seconds(self, iterations: int, warm_up: int) -> list[float]:
        """Seconds of each iteration, without the first ``warm_up`` of the ``iterations`` of each block."""
        pairs = zip(self._ticks, self._ticks[1:], strict=False)
        return [self._between(a, b) for n, (a, b) in enumerate(pairs, 1) if n % iterations >= warm_up]

    def _between(self, first: Any, second: Any) -> float:
        return first.elapsed_time(second) / 1e3 if self._device == "cuda" else second - first


def measure(run: Run, layers: int = 2, pixels: int = 512, samples: int = 16) -> None:
    """A row for each variant, with seconds, errors, and how many weights differ from those of the same without a graph."""
    began = time.monotonic()
    model = random_model(PIXART_XL | {"num_layers": layers}, pixels, torch.float32).to(run.device)
    given = [_moved(sample(pixels, torch.float32, PIXART_XL), run.device, seed) for seed in range(samples)]
    if run.has_time("to nearest", LEAST):
        quantized(model, given[0], RECIPE)
        _synchronize(run.device)
        run.say(f"to nearest, from capture to lowered graph: {time.monotonic() - began:.1f} s")
    prepared = prepare_pt2e(capture(model, given[0]), quantizer_for(model, RECIPE))
    calibrate(prepared, given, progress=False)
    work = products(BATCH, pixels)
    peak = _peak(run)
    rows: dict[str, dict[str, Any]] = {}
    codes: dict[str, list[Tensor]] = {}
    for name, how in VARIANTS.items():
        if not run.has_time(name, LEAST):
            continue
        try:
            with within(min(run.until - time.monotonic(), 3600.0)):
                rows[name], codes[name] = one(copy.deepcopy(prepared), given, how, run)
        except Exception as error:
            run.record("errors", {"row": name, "traceback": traceback.format_exc()[-4000:]})
            run.say(f"{name}: {error_of(error)}")
            continue
        torch.compiler.reset()
        rows[name] |= {"variant": name, "layers": layers, "pixels": pixels, "operations": work}
        rows[name]["roofline"] = work / peak / statistics.median(rows[name]["seconds"]) if peak else None
        run.record("reconstruction", rows[name])
        run.say(f"{name}: {statistics.median(rows[name]['seconds']) * 1e3:.1f} ms")
    run.say(f"\n{table(rows)}\n")
    for first, second in (("bfloat16, CUDA graph", "bfloat16"), ("bfloat16", "float32")):
        if first in codes and second in codes:
            run.say(f"Weights that {first} and {second} round alike: {_alike(codes[first], codes[second]):.4%}")


def one(prepared: GraphModule, given: list[Any], how: How, run: Run) -> tuple[dict[str, Any], list[Tensor]]:
    """Reconstructs in one way: seconds of iterations and blocks, errors, memory, warnings; and the codes."""
    ticks = Ticks(run.device)
    config = AdaRoundConfig(iters=how.iterations, batch_size=BATCH, **how.settings)
    launched: Callable[..., bool] = learned_rounding.can_capture if how.captured else lambda *_: False
    if run.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with contextlib.ExitStack() as changes:
        changes.enter_context(mock.patch.object(engine, "tqdm", lambda **_: ticks))
        changes.enter_context(mock.patch.object(learned_rounding, "can_capture", launched))
        changes.enter_context(torch.enable_grad())
        changes.enter_context(alone(run.lock))
        report = reconstruct(prepared, given, config, progress=False)
    seconds = ticks.seconds(how.iterations, min(WARM_UP, how.iterations // 2))
    median = statistics.median(seconds)
    result = {
        "seconds": seconds,
        "blocks": [row.seconds for row in report.rows],
        "around": [row.seconds - how.iterations * median for row in report.rows],
        "errors": [[row.loss_before, row.loss_after] for row in report.rows],
        "kept": [row.kept for row in report.rows],
        "memory": torch.cuda.max_memory_allocated() if run.device == "cuda" else 0,
    }
    return result, [observer.codes for _, observer in weight_observers(prepared) if observer.codes is not None]


def whole(row: Mapping[str, Any]) -> float:
    """Seconds that all of PixArt-XL would take: the iterations asked for, and what is around them in the first block and in the
    last one measured, which stands for the others."""
    first, *_, later = [*row["around"], row["around"][-1]]
    return (
        WHOLE["blocks"] * WHOLE["iterations"] * statistics.median(row["seconds"])
        + first
        + (WHOLE["blocks"] - 1) * later
    )


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Iterations, roofline, and the time of the whole model."""
    lines = []
    for name, row in rows.items():
        roofline = row.get("roofline")
        lines.append([
            name, f"{statistics.median(row['seconds']) * 1e3:.1f}",
            f"{min(row['seconds']) * 1e3:.1f} to {max(row['seconds']) * 1e3:.1f}",
            "–" if roofline is None else f"{roofline:.1%}", ", ".join(f"{s:.0f}" for s in row["around"]),
            f"{whole(row) / 60:.0f}", f"{row['memory'] / 2**30:.1f}",
            ", ".join(f"{before:.2e} to {after:.2e}" for before, after in row["errors"]),
        ])  # fmt: skip
    head = [
        "", "ms / iteration", "of all", "of the bfloat16 roofline", "s around them, by block", "whole model, min", "GiB",
        "error, by block",
    ]  # fmt: skip
    return markdown_table(head, lines)


def _peak(run: Run) -> float | None:
    name = str(run.report.get("gpu", {}).get("name", ""))
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def _alike(first: list[Tensor], second: list[Tensor]) -> float:
    if len(first) != len(second):
        return 0.0
    same = sum(int((a == b).sum()) for a, b in zip(first, second, strict=True))
    return same / max(1, sum(a.numel() for a in first))


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _moved(given: dict[str, Any], device: str, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    given["hidden_states"] = torch.randn(given["hidden_states"].shape, generator=generator)
    return pytree.tree_map_only(Tensor, lambda x: x.to(device), given)
