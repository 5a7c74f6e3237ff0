"""Fine-tuning of weight scales, with codes frozen.

A quantized weight is ``level * scale``. Codes are what rounding made them; the scales of groups stay continuous, and are few
(one in 128 values), so that training them end to end takes little memory and cannot overfit much. PEQA (arXiv 2305.14152,
eq. 2) adds a learned difference to each scale. Here the difference is relative, ``scale * exp(delta)``: scales stay positive,
and one learning rate serves layers of any magnitude.
"""

import torch
from torch import Tensor, nn

from fp4dit_ao.observers import WeightObserver
from fp4dit_ao.observers.weight import Settled
from fp4dit_ao.ops import expand_scale, to_scale_dtype
from fp4dit_ao.passes.fine_tuning.distillation import Course, Distilled, Lesson
from fp4dit_ao.passes.fine_tuning.fine_tune import FINE_TUNINGS
from fp4dit_ao.passes.fine_tuning.student import ParameterGroup, Student

LR = 1e-3
"""Relative learning rate: moves a scale by up to 0.1 % a step."""


class TunedScale(Student):
    """A weight with frozen codes and learned scales, in the place of an observer's own rounding.

    Args:
        weight: float ``(out_features, in_features)``.
        observer: of that weight, with its scale found.

    Attributes:
        delta: float32, shaped like the scale: the logarithm of the factor on each scale, zero at first.
    """

    levels: Tensor
    initial: Tensor

    def __init__(self, weight: Tensor, observer: WeightObserver):
        super().__init__()
        codes, scale = observer.quantized(weight)
        self.codes = codes
        self.dtype, self.scale_dtype = weight.dtype, scale.dtype
        self.register_buffer("levels", observer.fmt.decode(codes), persistent=False)
        self.register_buffer("initial", scale.float(), persistent=False)
        self.delta = nn.Parameter(torch.zeros_like(self.initial))

    def scale(self) -> Tensor:
        """The learned scale, as it will be stored."""
        return to_scale_dtype(self.initial * self.delta.detach().exp(), self.scale_dtype)

    def forward(self, weight: Tensor) -> Tensor:
        exact = self.initial * self.delta.exp()
        scale = exact + (self.scale().float() - exact).detach()  # the stored scale's value, the exact one's gradient
        return (self.levels * expand_scale(scale, self.levels, block_of(self.levels, scale))).to(self.dtype)

    def settled(self) -> Settled:
        return Settled(self.codes, self.scale())

    def groups(self, lr: float) -> list[ParameterGroup]:
        return [{"params": [self.delta], "lr": lr}]


def block_of(values: Tensor, scale: Tensor) -> list[int]:
    """torchao's ``block_size`` of a tensor whose scales have the shape of ``scale``."""
    return [size // count for size, count in zip(values.shape, scale.shape, strict=True)]


def plan(lesson: Lesson) -> Course:
    """All scales of weights, and the error of the outputs. ``lr`` is relative.

    Raises:
        ValueError: a weight whose scales are no free numbers (block formats, codebook groups).
    """
    for observer in lesson.weights:
        if type(observer) is not WeightObserver:
            raise ValueError(
                f"{observer.name}: the scales of {type(observer).__name__} are no free numbers, so there is nothing to "
                "tune; use a recipe with scales of groups, such as w4a6"
            )
    tuned = {observer: TunedScale(weight, observer) for observer, weight in lesson.weights.items()}
    return Course(dict(tuned), lesson.output_error, lesson.config.lr or LR)


FINE_TUNINGS.register(
    "scales", Distilled("scales", plan),
    summary="Trains the scales of weights end to end, codes frozen, against the float model's output.",
    source="PEQA, arXiv 2305.14152, eq. 2", cost="some hundred forward and backward passes of the whole model",
)  # fmt: skip
