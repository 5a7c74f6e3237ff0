"""EfficientDM (arXiv 2310.03270): a low-rank adapter that is merged into the weight *before* it is quantized (QALoRA).

    W^ = Q(W + B A),    rank 32, A at random, B = 0

so that what comes out is ordinary codes and scales, and nothing runs beside the linear. Scale-aware optimisation: an adapter's
learning rate is in proportion to its layer's mean step, since the same change of a weight crosses more levels where they are
closer. Scales are trained where they are free numbers, static input ranges too (one for all timesteps, see
:mod:`~fp4dit_ao.passes.fine_tuning.activation_range`).

Differences: the code adds the adapter to a *dequantized* INT4 weight, to save memory; the paper, and this, to the float one.
Adam's pace falls as a cosine here, along a line there. It takes 16 000 steps at a rate of 1 / 2500 of a step; for some hundred
steps the rate has to be larger (``LR``). There all is INT4 with a scale a row; here it is whatever the recipe says.
"""

import math

import torch
from torch import Tensor, nn

from fp4dit_ao.observers import WeightObserver
from fp4dit_ao.passes.fine_tuning.activation_range import RANGE_PACE
from fp4dit_ao.passes.fine_tuning.distillation import Course, Distilled, Lesson
from fp4dit_ao.passes.fine_tuning.fine_tune import FINE_TUNINGS
from fp4dit_ao.passes.fine_tuning.latent_weight import LatentWeight
from fp4dit_ao.passes.fine_tuning.student import ParameterGroup

RANK = 32
"""Rank of adapters in the paper and in its code."""
LR = 0.02
"""Learning rate in steps of the format, for some hundred optimisation steps."""


class LowRankAdapter(LatentWeight):
    """A weight with an adapter.

    Args:
        rank: the adapter's rank.
        seed: seed of A's random start.

    Attributes:
        down: float32 ``(rank, in_features)``, A, uniform within ``± in_features ** -0.5`` at first (Kaiming, as in LoRA).
        up: float32 ``(out_features, rank)``, B, 0 at first.
    """

    def __init__(self, weight: Tensor, observer: WeightObserver, rank: int = RANK, seed: int = 0):
        super().__init__(weight, observer)
        rows, columns = weight.shape
        start = torch.rand(rank, columns, generator=torch.Generator().manual_seed(seed)) * 2 - 1
        self.down = nn.Parameter(start.div(math.sqrt(columns)).to(weight.device))
        self.up = nn.Parameter(torch.zeros(rows, rank, device=weight.device))

    def latent(self) -> Tensor:
        return self.started() + self.up @ self.down

    def groups(self, lr: float) -> list[ParameterGroup]:
        return [{"params": [self.down, self.up], "lr": lr * self.step}, *super().groups(lr)]


def plan(lesson: Lesson) -> Course:
    """An adapter for every quantized weight, and the error of the outputs. ``lr`` is in steps of the format; ``optimizer`` and
    ``share`` have no part in it."""
    config = lesson.config
    adapters = {
        observer: LowRankAdapter(weight, observer, config.rank or RANK, config.seed * 100_003 + number)
        for number, (observer, weight) in enumerate(lesson.weights.items())
    }
    lr = config.lr or LR
    return Course(dict(adapters), lesson.output_error, lr, range_lr=lr * RANGE_PACE)


FINE_TUNINGS.register(
    "efficientdm", Distilled("efficientdm", plan),
    summary="Trains a low-rank adapter of every weight, merged before it is rounded, against the float model's output.",
    source="EfficientDM, arXiv 2310.03270", cost="some hundred forward and backward passes of the whole model",
)  # fmt: skip
