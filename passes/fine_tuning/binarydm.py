"""What BinaryDM (arXiv 2404.05662) has for weights of more than one bit.

*Evolvable basis.* In the first and the last block a weight has a second, binary basis while it is trained,

    W^ = Q(V) + a sign(V - Q(V)),    a = mean |W - Q(W)| of a row at first,

which a penalty on a^2 drives out, so that one basis remains. In the paper Q is binary, too; with 16 levels it is the same
equation, with a smaller remainder. Here a also fades as half a cosine, so that nothing is dropped at the end.

*Low-rank representation mimicking.* Beside the outputs' error, the student follows the teacher's features in the space of
their principal components K, a quarter of the channels, found from the first sample:

    mean over blocks of |(f_student - f_teacher) K|^2, here relative to |f_teacher K|^2.

Left out, since it means nothing here: binary scales and the clipped gradient of their sign, progressive initialisation (the
start is a good one at 4 bits), and training on data with the noise as the target. The code decomposes the last axis of a
U-Net's features, a row of pixels; here it is the channels. The mimicking loss counts 1e-4 there, beside features of any size;
``MIMICKING`` is a relative weight.
"""

import math

import torch
from torch import Tensor, nn

from fp4dit_ao.observers import WeightObserver
from fp4dit_ao.passes.fine_tuning.blockwise import BlockwiseModel, block_features
from fp4dit_ao.passes.fine_tuning.distillation import Course, Distilled, Lesson, computing_floats
from fp4dit_ao.passes.fine_tuning.fine_tune import FINE_TUNINGS
from fp4dit_ao.passes.fine_tuning.full_weights import LR
from fp4dit_ao.passes.fine_tuning.latent_weight import FullWeight
from fp4dit_ao.passes.fine_tuning.student import ParameterGroup
from fp4dit_ao.passes.model_error import relative_error

MIMICKING = 0.1
"""Weight of the mimicking loss."""
PENALTY = 0.09
"""Weight of the mean of ``(a / a at first)^2``, beside an error that starts at 1: the code's, of the sum of a^2."""
PART = 4
"""Channels over principal components."""


class EvolvableBasis(FullWeight):
    """A weight with a second basis that fades out.

    Attributes:
        second: float32 ``(out_features, 1)``, a over its first value, 1 at first.
        fading: what a is multiplied by, from 1 to 0.
    """

    first: Tensor
    fading: Tensor

    def __init__(self, weight: Tensor, observer: WeightObserver, by: str = "adam"):
        super().__init__(weight, observer, by)
        error = weight.float() - observer.dequantized(weight).float()
        self.register_buffer("first", error.abs().mean(1, keepdim=True), persistent=False)
        self.second = nn.Parameter(torch.ones_like(self.first))
        self.register_buffer("fading", torch.ones((), device=weight.device))

    def advance(self, step: int, steps: int) -> None:
        self.fading.fill_((1 + math.cos(math.pi * step / steps)) / 2)

    def beside(self, latent: Tensor, value: Tensor) -> Tensor:
        return value + self.fading * self.second * self.first * (latent - value).detach().sign()

    def penalty(self) -> Tensor:
        """Mean square of a, relative to its first value."""
        return self.second.square().mean()

    def groups(self, lr: float) -> list[ParameterGroup]:
        return [{"params": [self.second], "lr": lr}, *super().groups(lr)]


class Mimicking:
    """The error of the outputs, and of blocks' features in the space of the teacher's principal components.

    Args:
        lesson: of the model.
    """

    def __init__(self, lesson: Lesson):
        self.lesson = lesson
        recompute = lesson.config.checkpoint_activations
        taps = block_features(BlockwiseModel(lesson.prepared))
        self.model = BlockwiseModel(lesson.prepared, recompute, taps)
        self.components = [principal_components(x) for x in self._teachers(0)]

    @torch.no_grad()
    def _teachers(self, index: int) -> list[Tensor]:
        with computing_floats(self.lesson.prepared):
            return self.model.run(self.lesson.calls[index])[1]

    def __call__(self, index: int) -> Tensor:
        wanted = self._teachers(index)
        outputs, found = self.model.run(self.lesson.calls[index])
        error = relative_error(outputs, self.lesson.targets[index])
        if not found:
            return error
        pairs = [
            [x.float() @ k for x, k in zip(features, self.components, strict=True)] for features in (found, wanted)
        ]
        return error + MIMICKING * relative_error(*pairs)


@torch.no_grad()
def principal_components(features: Tensor) -> Tensor:
    """The leading eigenvectors of the covariance of ``(…, channels)``: float32 ``(channels, channels / 4)``."""
    rows = features.reshape(-1, features.shape[-1]).double()
    rows = rows - rows.mean(0)
    _, vectors = torch.linalg.eigh(rows.T @ rows)  # eigenvalues ascend
    return vectors[:, -max(1, features.shape[-1] // PART) :].flip(1).float()


def plan(lesson: Lesson) -> Course:
    """Every quantized weight; a second basis in the first and the last block; outputs and features as the loss. ``lr`` is in
    steps of the format; ``share`` has no part in it."""
    by = lesson.config.optimizer or "adam"
    blocks = [segment for segment in lesson.plain.segments if segment.block and segment.observers]
    ends = {observer for segment in (blocks[0], blocks[-1]) for _, observer in segment.observers}
    students = {
        observer: (EvolvableBasis if observer in ends else FullWeight)(weight, observer, by)
        for observer, weight in lesson.weights.items()
    }
    bases = [student for student in students.values() if isinstance(student, EvolvableBasis)]
    mimicking = Mimicking(lesson)
    power = float(sum(lesson.output_error(i).detach() for i in range(len(lesson.calls))) / len(lesson.calls))

    def loss(index: int) -> Tensor:
        penalty = torch.stack([basis.penalty() for basis in bases]).mean()
        return mimicking(index) + PENALTY * power * penalty

    return Course(dict(students), loss, lesson.config.lr or LR[by], lesson.config.rank)


FINE_TUNINGS.register(
    "binarydm", Distilled("binarydm", plan),
    summary="Trains all weights on the outputs and on blocks' principal components, with a second basis that fades out.",
    source="BinaryDM, arXiv 2404.05662", cost="as 'qvgen', and a forward more a step",
)  # fmt: skip
