"""The loop of fine-tuning: the quantized model, as the student, learns the float model's outputs on the float model's own
trajectories, without other data (EfficientDM, arXiv 2310.03270).

The samples are calls of the float transformer while it denoises: its noise, its intermediate latents, its timesteps. Each step
takes some of them from all timesteps, where the paper takes one trajectory's timesteps in turn; both halves of guidance count
alike, where the paper compares their guided sum.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from tqdm import tqdm

from fp4dit_ao.observers import WeightObserver, set_fake_quantize
from fp4dit_ao.observers.fake_quantization import frozen_parameters
from fp4dit_ao.observers.weight import gram_of, weight_of
from fp4dit_ao.passes.fine_tuning.activation_range import TunedRange, tuned_ranges
from fp4dit_ao.passes.fine_tuning.biases import own_biases, put_biases, trainable_copies
from fp4dit_ao.passes.fine_tuning.blockwise import BlockwiseModel
from fp4dit_ao.passes.fine_tuning.fine_tune import FineTuneConfig, FineTuneReport
from fp4dit_ao.passes.fine_tuning.optimizers import Adam, Stepper, nbytes_of
from fp4dit_ao.passes.fine_tuning.q_galore import QGaLore
from fp4dit_ao.passes.fine_tuning.student import ParameterGroup, Student
from fp4dit_ao.passes.fine_tuning.training_state import State, TrainingState, fingerprint
from fp4dit_ao.passes.model_error import Call, calls_of, relative_error, teacher, total_error
from fp4dit_ao.passes.partition import weight_observers
from fp4dit_ao.passes.reconstruction.unit_error import rounding_by
from fp4dit_ao.util.world import World, current


@dataclass
class Lesson:
    """Inputs of a method's plan, which chooses students and the loss.

    Attributes:
        prepared: the graph, set to fake quantization.
        calls: samples to train on.
        targets: the float model's outputs for them.
        config: the settings.
        weights: float weights by observer; each observer once, with its scale found.
        biases: copies of biases that may be trained, by name; the graph has them already.
    """

    prepared: GraphModule
    calls: Sequence[Call]
    targets: Sequence[Sequence[Tensor]]
    config: FineTuneConfig
    weights: dict[WeightObserver, Tensor]
    biases: Mapping[str, nn.Parameter] = field(default_factory=dict)

    @cached_property
    def plain(self) -> BlockwiseModel:
        """The model, block by block."""
        return BlockwiseModel(self.prepared, self.config.checkpoint_activations)

    def output_error(self, index: int) -> Tensor:
        """The loss that all methods have: the error of the student's outputs for a sample."""
        return relative_error(self.plain.run(self.calls[index])[0], self.targets[index])


@dataclass
class Course:
    """A method's plan: students, and the loss that trains them.

    Attributes:
        students: in place of the rounding of their observers.
        loss: differentiable error of a sample, by its number; about 1 times that of the outputs at first.
        lr: learning rate of students; they say in which unit.
        rank: of Q-GaLore's projections; None for a quarter of each weight's shorter side.
        biases: names of those of the lesson's that are trained.
        bias_lr: their learning rate, in parts of their mean magnitude.
        range_lr: learning rate of logarithms of static input ranges; None where they stay.
    """

    students: dict[WeightObserver, Student]
    loss: Callable[[int], Tensor]
    lr: float
    rank: int | None = None
    biases: Sequence[str] = ()
    bias_lr: float = 0.0
    range_lr: float | None = None


@contextlib.contextmanager
def computing_floats(prepared: GraphModule) -> Iterator[None]:
    """While open the graph computes the float model; afterwards the quantized one again."""
    set_fake_quantize(prepared, weight=False, activation=False, paused=True)
    try:
        yield
    finally:
        set_fake_quantize(prepared, weight=True, activation=True)


@dataclass(frozen=True)
class Distilled:
    """A fine-tuning (:class:`~fp4dit_ao.passes.fine_tuning.FineTune`) that trains what a plan says, and keeps it if the model
    errs less.

    Attributes:
        name: for the progress bar and the saved state.
        plan: called once, with the student set up.
        with_biases: whether the lesson has biases of quantized linears.
    """

    name: str
    plan: Callable[[Lesson], Course]
    with_biases: bool = False

    def __call__(
        self,
        prepared: GraphModule,
        samples: Sequence[Mapping[str, object]],
        config: FineTuneConfig,
        *,
        checkpoint_dir: str | Path | None = None,
        progress: bool = True,
    ) -> FineTuneReport:
        """See :class:`~fp4dit_ao.passes.fine_tuning.FineTune`."""
        found = own_biases(prepared) if self.with_biases else {}
        return distil(self.name, self.plan, prepared, samples, config, found, checkpoint_dir, progress)


def distil(
    method: str,
    plan: Callable[[Lesson], Course],
    prepared: GraphModule,
    samples: Sequence[Mapping[str, object]],
    config: FineTuneConfig,
    biases: Mapping[str, nn.Parameter],
    checkpoint_dir: str | Path | None,
    progress: bool,
) -> FineTuneReport:
    """Trains what ``plan`` says, which may be some of the ``biases``, too; see :class:`Distilled`."""
    began = time.monotonic()
    calls = calls_of(prepared, samples)
    held = int(config.held_out * len(calls))
    weights = _weights(prepared)
    world, store = current(), None
    if checkpoint_dir is not None:
        key = fingerprint(prepared, samples, config, method)
        store = TrainingState(Path(checkpoint_dir) / f"{method}.safetensors", key, world)
    trained = {name: bias.requires_grad for name, bias in biases.items()}
    bar = tqdm(total=config.steps, desc=f"fine-tune {method}", disable=not (progress and world.first))
    with frozen_parameters(prepared), bar, trainable_copies(prepared, biases) as copies:
        targets = teacher(prepared, calls)
        set_fake_quantize(prepared, weight=True, activation=True)
        judges = slice(len(calls) - held, None) if held else slice(None)
        before = total_error(prepared, calls[judges], targets[judges])
        last = len(calls) - held
        course = plan(Lesson(prepared, calls[:last], targets[:last], config, weights, copies))
        own = {name: copies[name] for name in course.biases}
        ranges = tuned_ranges(prepared) if course.range_lr is not None else []
        with rounding_by(course.students), rounding_by({each.observer: each for each in ranges}):
            steppers = _steppers(course, ranges, own, config)
            state_bytes = _optimise(course, ranges, list(own.values()), steppers, last, config, store, bar)
        error = partial(total_error, prepared, calls[judges], targets[judges])
        after, kept = _kept_if_better(course.students, ranges, error, before, world)
        if not kept:
            put_biases(prepared, biases)
    for name, wanted in trained.items():
        prepared.get_parameter(name).requires_grad_(wanted)
    count = sum(map(_count, course.students.values())) + sum(x.numel() for x in own.values()) + len(ranges)
    return FineTuneReport(before, after if kept else before, kept, count, time.monotonic() - began, held, state_bytes)


def _weights(prepared: GraphModule) -> dict[WeightObserver, Tensor]:
    found: dict[WeightObserver, Tensor] = {}
    for node, observer in weight_observers(prepared):
        if observer not in found:
            found[observer] = weight_of(prepared, node)
            observer.resolve(found[observer], gram_of(prepared, node))
            observer.quantized(found[observer])  # finds its scale
    if not found:
        raise ValueError("this graph has no quantized weight that could be trained")
    return found


def _steppers(
    course: Course, ranges: Sequence[TunedRange], biases: Mapping[str, nn.Parameter], config: FineTuneConfig
) -> list[Stepper]:
    groups = [group for student in course.students.values() for group in student.groups(course.lr)]
    sizes = [float(bias.detach().abs().mean()) for bias in biases.values()]
    usual = sum(sizes) / max(1, len(sizes))  # a bias of zeros learns as fast as the others
    groups += [_group(x, course.bias_lr * max(size, usual)) for x, size in zip(biases.values(), sizes, strict=True)]
    if course.range_lr is not None:
        groups += [_group(each.log_factor, course.range_lr) for each in ranges]
    found: list[Stepper] = [Adam(groups)] if groups else []
    if latents := [each for student in course.students.values() for each in student.latents(course.lr)]:
        found.append(QGaLore(latents, course.rank, max(1, min(200, config.steps // 10)), config.seed))
    return found


def _group(parameter: nn.Parameter, lr: float) -> ParameterGroup:
    return {"params": [parameter], "lr": lr}


def _optimise(
    course: Course,
    ranges: Sequence[TunedRange],
    biases: Sequence[nn.Parameter],
    steppers: Sequence[Stepper],
    samples: int,
    config: FineTuneConfig,
    store: TrainingState | None,
    bar: tqdm,
) -> int:
    """Takes the steps that a saved state has not taken; returns :attr:`FineTuneReport.state_bytes`."""
    modules: list[nn.Module] = [*course.students.values(), *ranges]

    def state() -> State:
        return {
            "modules": [dict(module.state_dict()) for module in modules],
            "biases": [bias.detach() for bias in biases],
            "optimizers": [stepper.state() for stepper in steppers],
        }

    saved, first = store.load() if store is not None else (None, 0)
    if saved is not None:
        for module, values in zip(modules, saved["modules"], strict=True):
            module.load_state_dict(values)
        for bias, value in zip(biases, saved["biases"], strict=True):
            bias.data.copy_(value)
        for stepper, own in zip(steppers, saved["optimizers"], strict=True):
            stepper.restore(own)
    bar.initial = bar.n = first
    for step in range(first, config.steps):
        for student in course.students.values():
            student.advance(step, config.steps)
        # one generator a step: resuming needs no state of it
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        chosen = torch.randperm(samples, generator=generator)[: config.batch_size].tolist()
        for stepper in steppers:
            stepper.zero_grad()
        with torch.enable_grad():
            for index in chosen:
                torch.autograd.backward(course.loss(index) / len(chosen))
        for stepper in steppers:
            stepper.step(0.5 * (1 + math.cos(math.pi * step / config.steps)))
        bar.update()
        if store is not None and ((step + 1) % config.save_every == 0 or step + 1 == config.steps):
            store.save(state(), step + 1)
    return nbytes_of(state())


def _kept_if_better(
    students: Mapping[WeightObserver, Student], ranges: Sequence[TunedRange], error: Callable[[], float], before: float,
    world: World,
) -> tuple[float, bool]:  # fmt: skip
    """(error with what was learned, whether that is less than ``before``); observers keep the better rounding."""
    old = {observer: observer.settled for observer in students}
    for observer, student in students.items():
        observer.settle(student.settled())
    factors = [each.settle() for each in ranges]
    after = error()
    if world.agreed(lambda: after < before):
        return after, True
    for observer, rounding in old.items():
        observer.settle(rounding)
    for each, factor in zip(ranges, factors, strict=True):
        each.observer.factor = factor
    return after, False


def _count(student: Student) -> int:
    return sum(latent.codes.numel() for latent, _ in student.latents(1.0)) + sum(
        x.numel() for x in student.parameters()
    )
