"""Block-wise reconstruction: learn every weight's rounding from what its block puts out (BRECQ, arXiv 2102.05426).

Works in place on a prepared graph: it cuts the graph into blocks, streams calibration data through them, and for each block
in turn minimises the difference between its output on *quantized* inputs and the original's output on the original's
inputs, by the rounding of its weights alone. What is learned stays in the weight observers, as codes.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from tqdm import tqdm

from fp4dit_ao.observers import set_fake_quantize
from fp4dit_ao.observers.weight import gram_of, weight_of
from fp4dit_ao.passes import resume
from fp4dit_ao.passes.partition import Segment, partition, weight_observers
from fp4dit_ao.passes.report import BlockReport, ReconstructionReport
from fp4dit_ao.passes.rounding import RULES, AdaRound
from fp4dit_ao.passes.streams import Stream, build


@dataclass(frozen=True)
class AdaRoundConfig:
    """How the rounding is learned. The defaults are FP4DiT's (arXiv 2503.15465), in portable units.

    Raises:
        ValueError: a value out of range.
    """

    iters: int = 2500
    """Optimisation steps a block; 0 keeps round-to-nearest."""
    batch_size: int = 16
    """Calibration rows (a sample of guidance batch 2 is two rows) in one step."""
    lr: float | None = None
    """Adam's learning rate, absolute: in weight units if scale-aware (the paper: 1e-4), else logits. None: ``relative_lr``."""
    relative_lr: float | None = None
    """Logits that the median weight's gate moves in a step. The paper's 1e-4 lies between 3e-3 and 1e-2 where group maxima
    are near 0.1. None: 5e-3, or ``12.5 / iters`` if that is more, so that a short run can still cross from gate to gate."""
    scale_aware: bool = True
    """Scale-aware AdaRound (the paper's), else plain AdaRound."""
    regularizer: float = 1.0
    """Weight of the mean of ``1 - |2h - 1|^beta`` beside a reconstruction error that starts at 1. The paper's 0.01 multiplies
    the *sum* over the block's n weights, beside an error summed over dimension 1 (a DiT's tokens, T of them) and averaged over
    the rest (D channels): equal to ``0.01 n / (T e)`` here, with e the mean squared error of round-to-nearest. There it
    dwarfs the error once beta is small; here error and regulariser start alike, whatever the model's scale."""
    beta: tuple[float, float] = (20.0, 2.0)
    """First and last exponent of the regulariser; linear in between."""
    warmup: float = 0.2
    """Fraction of the steps without regulariser."""
    seed: int = 0
    """Of the minibatches; each block has its own generator, so a resumed run continues with the same bits."""
    chunk: int = 64
    """Rows at a time when streams advance from block to block."""
    memory_limit_bytes: int | None = None
    """Ceiling for the streams' values; exceeding it is an error that says how many rows would fit."""

    def __post_init__(self) -> None:
        for name, low in (("iters", 0), ("batch_size", 1), ("chunk", 1), ("regularizer", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"AdaRoundConfig: {name}={getattr(self, name)}; it must be at least {low}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"AdaRoundConfig: warmup={self.warmup}; it must be at least 0 and less than 1")

    @property
    def rule(self) -> str:
        """Name of the rounding rule in ``rounding.RULES``."""
        return "scale_aware" if self.scale_aware else "adaround"

    @property
    def step_in_logits(self) -> float:
        """``relative_lr``, or its default."""
        return self.relative_lr if self.relative_lr is not None else max(5e-3, 12.5 / max(1, self.iters))


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
    streams = build(prepared, samples)
    for node, observer in weight_observers(prepared):
        weight = weight_of(prepared, node)
        observer.resolve(weight, gram_of(prepared, node))
        observer.quantized(weight)
    segments = partition(prepared)
    store = resume.Store(checkpoint_dir, resume.fingerprint(prepared, samples, config)) if checkpoint_dir else None
    report = ReconstructionReport([], 0.0, 0)
    blocks = [segment for segment in segments if segment.observers]
    with _frozen(prepared), tqdm(total=len(blocks) * config.iters, desc="reconstruct", disable=not progress) as bar:
        for segment in segments:
            index = len(report.rows)
            set_fake_quantize(segment.graph, False, False, paused=True)
            inputs = [dict(stream.quantized) for stream in streams]
            for stream in streams:
                stream.advance(stream.full, segment, config.chunk)
            report.stream_bytes = max(report.stream_bytes, sum(stream.nbytes() for stream in streams))
            _check_memory(report.stream_bytes, streams, config)
            set_fake_quantize(segment.graph, True, True)
            if segment.observers:
                bar.set_postfix_str(segment.name)
                row = store.load(index, segment) if store else None
                if row is None:
                    row = _Block(segment, streams, inputs, config, index).learn(bar)
                    if store:
                        store.save(index, segment, row)
                else:
                    bar.update(config.iters)
                report.rows.append(row)
            for stream in streams:
                stream.advance(stream.quantized, segment, config.chunk)
    set_fake_quantize(prepared, False, False)
    report.seconds = time.monotonic() - began
    return report


class _Block:
    """The reconstruction of one block."""

    def __init__(
        self, segment: Segment, streams: list[Stream], inputs: list[dict[str, Any]], config: AdaRoundConfig, index: int
    ):
        self.segment, self.streams, self.inputs, self.config = segment, streams, inputs, config
        self.generator = torch.Generator().manual_seed(config.seed * 1_000_003 + index)
        self.began = time.monotonic()
        self.targets: list[int] = []

    def learn(self, bar: Any) -> BlockReport:
        """Optimise, harden, and keep what is better on all rows: the learned rounding or the nearest."""
        weights = {observer: weight_of(self.segment.graph, node) for node, observer in self.segment.observers}
        nearest = {observer: observer.quantized(weight)[0] for observer, weight in weights.items()}
        rules: dict[Any, AdaRound] = {o: RULES[self.config.rule](w, o) for o, w in weights.items()}
        self.targets = self._differentiable(rules)
        before = self._error()
        after, changed, kept = before, 0.0, "nearest"
        if self.config.iters and self.targets and before > 0:
            self._optimise(rules, before, bar)
            moved = 0
            for observer, rule in rules.items():
                observer.codes = observer.fmt.encode(rule.hard_levels())
                moved += int((observer.codes != nearest[observer]).sum())
            learned = self._error()
            changed = moved / sum(codes.numel() for codes in nearest.values())
            if learned < before:
                after, kept = learned, "learned"
            else:
                changed = 0.0
                for observer in rules:
                    observer.codes = None
        else:
            bar.update(self.config.iters)
        seconds = time.monotonic() - self.began
        return BlockReport(self.segment.name, len(rules), before, after, changed, kept, seconds)

    def _differentiable(self, rules: dict[Any, AdaRound]) -> list[int]:
        """Positions of the outputs that depend on this block's weights."""
        with self._learning(rules):
            stream = self.streams[0]
            outputs = self.segment.graph(*stream.select(self.inputs[0], self.segment.inputs, slice(0, 1)))
        return [i for i, y in enumerate(outputs) if isinstance(y, Tensor) and y.requires_grad and self._compared(i)]

    def _compared(self, position: int) -> bool:
        return self.segment.outputs[position] in self.streams[0].full

    @contextlib.contextmanager
    def _learning(self, rules: dict[Any, AdaRound]) -> Iterator[None]:
        try:
            for observer, rule in rules.items():
                observer.rounding = rule
            with torch.enable_grad():
                yield
        finally:
            for observer in rules:
                observer.rounding = None

    def _optimise(self, rules: dict[Any, AdaRound], before: float, bar: Any) -> None:
        config = self.config
        groups = [
            {"params": [rule.alpha], "lr": config.lr or rule.learning_rate(config.step_in_logits)}
            for rule in rules.values()
        ]
        # gradients of one weight of millions are far below Adam's usual eps of 1e-8
        optimizer = torch.optim.Adam(groups, eps=1e-20)
        count = sum(rule.alpha.numel() for rule in rules.values())
        shares = torch.tensor([float(stream.rows) for stream in self.streams])
        start = round(config.warmup * config.iters)
        with self._learning(rules):
            for iteration in range(config.iters):
                number = int(torch.multinomial(shares, 1, generator=self.generator))
                rows = torch.randperm(self.streams[number].rows, generator=self.generator)[: config.batch_size]
                loss = self._loss(number, rows) / before
                if iteration >= start and config.regularizer:
                    progress = (iteration - start) / max(1, config.iters - start)
                    beta = config.beta[0] + (config.beta[1] - config.beta[0]) * progress
                    penalty = sum(rule.regularizer(beta) * (rule.alpha.numel() / count) for rule in rules.values())
                    loss = loss + config.regularizer * penalty
                optimizer.zero_grad(set_to_none=True)
                torch.autograd.backward(loss)
                optimizer.step()
                bar.update()

    def _loss(self, number: int, rows: Tensor | slice) -> Tensor:
        """Squared error, relative to the power of the full-precision output, of some rows of one stream."""
        stream = self.streams[number]
        outputs = self.segment.graph(*stream.select(self.inputs[number], self.segment.inputs, rows))
        names = [self.segment.outputs[i] for i in self.targets]
        targets = stream.select(stream.full, names, rows)
        parts = [
            (outputs[i].float() - y.float()).square().mean() / y.float().square().mean().clamp_min(1e-20)
            for i, y in zip(self.targets, targets, strict=True)
        ]
        return torch.stack(parts).mean()

    @torch.no_grad()
    def _error(self) -> float:
        """:meth:`_loss` over all rows."""
        total, rows = 0.0, 0
        for number, stream in enumerate(self.streams):
            for first in range(0, stream.rows, self.config.chunk):
                part = slice(first, min(first + self.config.chunk, stream.rows))
                total += float(self._loss(number, part)) * (part.stop - part.start)
                rows += part.stop - part.start
        return total / rows


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
