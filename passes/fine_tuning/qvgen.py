"""QVGen (arXiv 2505.11497): weights trained through their rounding, beside a branch in high precision that is faded out.

    W^ = Q(V) + L diag(m) R,    L R = SVD_r(W - Q(W)) at first, r = 32

The branch takes the largest part of the rounding error, so that gradients are small from the first step. Training has
``log2(r) + 1`` phases of equal length. In a phase the first half of the current ranks keeps the weight m = 1; the second
half's falls as ``u = (1 + cos(pi t)) / 2`` from 1 to 0. At its end the rank is halved, and what is left is decomposed
anew, so that the next phase fades the least singular values out. The last phase fades the last rank; steps that are left
over have no branch. What comes out is ordinary codes and scales.

Left out: a learned clip of token-wise inputs for each of 50 stretches of the timesteps, which our online quantization has no
place for (nor a zero point), and training data: as in EfficientDM, samples are the teacher's own. The paper's teacher sees
videos with noise added. Its code warms up, decays weights and restarts; here the pace falls once, as a cosine.
"""

import math

import torch
from torch import Tensor, nn

from fp4dit_ao.observers import WeightObserver
from fp4dit_ao.passes.fine_tuning.distillation import Course, Distilled, Lesson
from fp4dit_ao.passes.fine_tuning.fine_tune import FINE_TUNINGS
from fp4dit_ao.passes.fine_tuning.full_weights import LR
from fp4dit_ao.passes.fine_tuning.latent_weight import FullWeight
from fp4dit_ao.passes.fine_tuning.student import ParameterGroup

RANK = 32
"""r at first, the paper's."""


class FadingBranch(FullWeight):
    """A weight with a branch.

    Args:
        rank: r at first, rounded down to a power of two that the weight allows.

    Attributes:
        left: float32 ``(out_features, rank)``, L.
        right: float32 ``(rank, in_features)``, R.
        alive: the rank that counts, halved from phase to phase, at last 0.
        fading: u, the weight of the second half of it.
    """

    alive: Tensor
    fading: Tensor

    def __init__(self, weight: Tensor, observer: WeightObserver, by: str = "adam", rank: int = RANK):
        super().__init__(weight, observer, by)
        self.rank = 2 ** int(math.log2(min(rank, *weight.shape)))
        error = weight.float() - observer.dequantized(weight).float()
        left, right = decomposed(error, self.rank)
        self.left, self.right = nn.Parameter(left), nn.Parameter(right)
        self.register_buffer("alive", torch.tensor(self.rank))
        self.register_buffer("fading", torch.ones((), device=weight.device))

    def advance(self, step: int, steps: int) -> None:
        phases = int(math.log2(self.rank)) + 1
        length = max(1, steps // phases)
        phase, within = divmod(step, length)
        rank = self.rank >> phase
        if 0 < rank < int(self.alive):
            self._halve(rank)
        self.alive.fill_(rank)
        self.fading.fill_((1 + math.cos(math.pi * within / length)) / 2)

    @torch.no_grad()
    def _halve(self, rank: int) -> None:
        left, right = decomposed(self.left[:, :rank] @ self.right[:rank], rank)
        self.left[:, :rank], self.right[:rank] = left, right

    def weights_of_ranks(self) -> Tensor:
        """m, float32 ``(rank,)``: 1, u and 0 for what stays, fades and is gone."""
        alive = int(self.alive)
        found = torch.zeros(self.rank, device=self.left.device)
        found[:alive] = self.fading
        found[: alive // 2] = 1
        return found

    def beside(self, latent: Tensor, value: Tensor) -> Tensor:
        return value + (self.left * self.weights_of_ranks()) @ self.right if int(self.alive) else value

    def groups(self, lr: float) -> list[ParameterGroup]:
        return [{"params": [self.left, self.right], "lr": lr * self.step}, *super().groups(lr)]


def decomposed(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """L ``(rows, rank)`` and R ``(rank, columns)`` whose product is nearest to a float32 matrix; each gets the square roots of
    the singular values."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    root = values[:rank].sqrt()
    return (left[:, :rank] * root).contiguous(), (root[:, None] * right[:rank]).contiguous()


def plan(lesson: Lesson) -> Course:
    """Every quantized weight with a branch, and the error of the outputs. ``lr`` is in steps of the format, ``rank`` the
    branch's; ``share`` has no part in it."""
    config = lesson.config
    by = config.optimizer or "adam"
    students = {
        observer: FadingBranch(weight, observer, by, config.rank or RANK) for observer, weight in lesson.weights.items()
    }
    return Course(dict(students), lesson.output_error, config.lr or LR[by])


FINE_TUNINGS.register(
    "qvgen", Distilled("qvgen", plan),
    summary="Trains all weights through their rounding, beside a branch of low rank that fades out.",
    source="QVGen, arXiv 2505.11497", cost="some hundred forward and backward passes; 12 bytes a weight",
)  # fmt: skip
