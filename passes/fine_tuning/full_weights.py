"""All weights trained through their rounding, with Q-GaLore (arXiv 2407.08296) as the optimizer that makes it fit.

Quantization-aware training needs a float copy of every weight and Adam's two moments: 12 bytes a weight. Q-GaLore keeps the
weight in INT8 and Adam on a quarter of the rank in 8 bits: some 2 bytes. ``optimizer="adam"`` takes the 12 bytes, and is
what it is compared with.
"""

from fp4dit_ao.passes.fine_tuning.activation_range import RANGE_PACE
from fp4dit_ao.passes.fine_tuning.distillation import Course, Distilled, Lesson
from fp4dit_ao.passes.fine_tuning.fine_tune import FINE_TUNINGS
from fp4dit_ao.passes.fine_tuning.latent_weight import FullWeight

LR = {"adam": 2e-3, "q_galore": 1e-2}
"""Learning rates in steps of the format. A projected step is smaller than Adam's: Q-GaLore multiplies it by a quarter and it
has a part of the rank."""


def plan(lesson: Lesson) -> Course:
    """Every quantized weight, and the error of the outputs. ``lr`` is in steps of the format; ``share`` has no part in it."""
    by = lesson.config.optimizer or "q_galore"
    lr = lesson.config.lr or LR[by]
    students = {observer: FullWeight(weight, observer, by) for observer, weight in lesson.weights.items()}
    return Course(dict(students), lesson.output_error, lr, lesson.config.rank, range_lr=lr * RANGE_PACE)


FINE_TUNINGS.register(
    "q_galore", Distilled("q_galore", plan),
    summary="Trains all weights through their rounding, stored in INT8, by Adam on projected gradients.",
    source="Q-GaLore, arXiv 2407.08296", cost="some hundred forward and backward passes; singular values of each gradient",
)  # fmt: skip
