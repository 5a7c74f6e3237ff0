"""One step of learning a unit's roundings, without waiting for the device."""

import contextlib
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.optim import Optimizer

from fp4dit_ao._compat import cpu_multiplies_bfloat16
from fp4dit_ao.config import ReconstructionConfig
from fp4dit_ao.observers import WeightObserver
from fp4dit_ao.passes.reconstruction.bfloat16_products import multiplies_alone, with_bfloat16_products
from fp4dit_ao.passes.reconstruction.dropping import Dropping
from fp4dit_ao.passes.reconstruction.minibatches import Minibatches
from fp4dit_ao.passes.reconstruction.recomputed import Recomputed
from fp4dit_ao.passes.reconstruction.rounding import LearnedRounding
from fp4dit_ao.passes.reconstruction.shards import Shard
from fp4dit_ao.passes.reconstruction.shared_compilation import Runs, compiled
from fp4dit_ao.passes.reconstruction.soft_weights import SoftWeights
from fp4dit_ao.passes.reconstruction.unit_error import UnitError


class Iteration:
    """A step: soft weights, the error of a minibatch, gradients, and the optimizer's step.

    What changes from step to step (rows, exponent, weight of the penalty, learning rates) is in tensors on the device, so that
    :meth:`run` can be captured in a CUDA graph.

    Args:
        error: of the unit.
        rules: the roundings.
        config: how to learn.
        minibatches: rows of every step.
        before: the unit's error with the rounding before; more than 0. Losses are relative to it.
        index: position of the unit; with the seed it determines what the objective drops.

    Attributes:
        soft: the soft weights.
        optimizer: over the rules' parameters.
    """

    def __init__(
        self,
        error: UnitError,
        rules: Mapping[WeightObserver, LearnedRounding],
        config: ReconstructionConfig,
        minibatches: Minibatches,
        before: float,
        index: int = 0,
    ):
        self._error, self._rules, self._minibatches, self._before = error, list(rules.values()), minibatches, before
        self._class = type(self._rules[0])
        self._device = error.streams[0].device
        low = products_in_bfloat16(config, self._device)
        graph = with_bfloat16_products(error.graph) if low else error.graph
        fixed = minibatches.fixed and not error.objective.drop
        run: Callable[[GraphModule], Runs] = functools.partial(compiled, fixed=fixed) if config.compile else _as_it_is
        self._run: Runs = Recomputed(graph, run) if error.recompute else run(graph)
        self.soft = SoftWeights(rules, error.weights, _types(error, low), config.compile)
        self.optimizer = self._class.optimizer(self._rules, config)
        self._rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        self._pace = 1.0
        self._step = 0
        drop = error.objective.drop
        self._dropping = Dropping(drop, f"{config.seed} {index}") if drop else None
        self._regularizer = config.regularizer
        self._penalty_weight = torch.zeros((), device=self._device)
        self._sums = torch.zeros(2, dtype=torch.float64, device=self._device)
        self._parameters = [parameter for rule in self._rules for parameter in rule.parameters()]
        self._least = torch.full((), float("inf"), device=self._device)
        self._best = [p.detach().clone() for p in self._parameters] if self._class.keeps_best else []

    def prepare(self, step: int, beta: float | None, pace: float) -> None:
        """Say what the next :meth:`run` does.

        Args:
            step: whose rows it takes.
            beta: exponent of the penalty; None for no penalty.
            pace: factor on learning rates.
        """
        self._step = step
        self._minibatches.load(step)
        self._penalty_weight.fill_(0.0 if beta is None else self._regularizer)
        if beta is not None:
            self.soft.beta.fill_(beta)
        if pace != self._pace:
            set_rates(self.optimizer, [rate * pace for rate in self._rates])
            self._pace = pace

    def run(self, penalised: bool = True) -> None:
        """Take one step.

        Args:
            penalised: whether the penalty is computed at all; where it is not, its weight is 0.
        """
        self.optimizer.zero_grad(set_to_none=True)
        self.soft.soften(penalised)
        loss, *gradients = self._error.shards.sum_tensors(self._learned_from)
        self.soft.put_gradients(gradients)
        self._remember(loss)
        self.soft.backward(self._penalty_weight)
        self._sums += torch.stack([torch.addcmul(loss, self._penalty_weight, self.soft.penalty), self.soft.penalty])
        self.optimizer.step()

    def _learned_from(self, shard: Shard) -> list[Tensor]:
        """What a shard's rows add to the loss, and to the gradients of the soft weights."""
        loss = torch.zeros((), device=self._device)
        for batch, weight in self._minibatches.batches(shard):
            with self._drawn(shard.number, batch.number):
                share = self._error.of(batch, self._run, self._dropping) * (weight / self._before)
                share.backward()  # type: ignore[no-untyped-call]
            loss += share.detach()
        return [loss, *self.soft.take_gradients()]

    def _drawn(self, *numbers: int) -> contextlib.AbstractContextManager[None]:
        """Context in which the objective drops elements of this step's rows of a shard and a stream."""
        if self._dropping is None:
            return contextlib.nullcontext()
        return self._dropping.drawn(self._error.graph, self._device, self._step, *numbers)

    def _remember(self, loss: Tensor) -> None:
        """Keep the parameters if their loss is the least so far."""
        if not self._best:
            return
        better = loss < self._least
        if (
            not better.is_cuda and not better
        ):  # saves a pass over all parameters; of a GPU it would have to be waited for
            return
        self._least.copy_(torch.where(better, loss, self._least))
        for kept, parameter in zip(self._best, self._parameters, strict=True):
            kept.copy_(torch.where(better, parameter.detach(), kept))

    def losses(self) -> tuple[float, float]:
        """Sums since the last call of what is minimised, and of the penalty in it without its weight; waits for the device."""
        loss, penalty = map(float, self._sums)
        self._sums.zero_()
        return loss, penalty

    @torch.no_grad()
    def finish(self) -> None:
        """Let the rules hold what counts: the last parameters, or the best; waits for the device."""
        self.losses()
        for kept, parameter in zip(self._best, self._parameters, strict=False):
            parameter.copy_(kept)


def _as_it_is(graph: GraphModule) -> Runs:
    return graph


def products_in_bfloat16(config: ReconstructionConfig, device: torch.device) -> bool:
    """Whether a step multiplies in bfloat16: as asked, or on a GPU that can.

    Warns:
        UserWarning: it is asked for on a CPU that does not have it.
    """
    if config.bfloat16 and device.type == "cpu" and not cpu_multiplies_bfloat16():
        warnings.warn(
            "bfloat16=True: this CPU has no products in bfloat16 (AVX-512 BF16, AMX) and emulates them, slower than float32; "
            "leave it out",
            stacklevel=2,
        )
    if config.bfloat16 is not None:
        return config.bfloat16
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def _types(error: UnitError, low: bool) -> dict[WeightObserver, torch.dtype]:
    """The type that each soft weight is made in: that of the products, or where it goes elsewhere too, the weight's own."""
    return {
        observer: torch.bfloat16
        if low and error.weights[observer].dtype == torch.float32 and multiplies_alone(node)
        else error.weights[observer].dtype
        for node, observer in error.segment.observers
    }


def set_rates(optimizer: Optimizer, rates: Sequence[float]) -> None:
    """The learning rates of the groups; in place where they are tensors, which a CUDA graph reads."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
