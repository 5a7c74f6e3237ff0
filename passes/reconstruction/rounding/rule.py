"""The contract of a rounding rule. There are two kinds: learned by gradient descent, and in closed form."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fp4dit_ao.config import ReconstructionConfig
from fp4dit_ao.observers import Grid
from fp4dit_ao.util.registry import Registry


class LearnedRounding(nn.Module, ABC):
    """The rounding of one weight as parameters that gradient descent learns; the class itself is what is registered.

    ``reconstruct`` does the following with the weights of a unit, in this order:

    1. makes an instance for each weight, ``Rule(weight, grid)``, and calls :meth:`start_from` where an earlier unit settled
       codes;
    2. calls :meth:`optimizer` on all of them: Adam over all ``parameters()``, at the learning rate ``config.lr``, or
       :meth:`learning_rate` if that is None;
    3. in each step calls :meth:`forward` once per weight, under autograd, then, after the warm-up, :meth:`regularizer`; and
       takes the step, at :meth:`pace` times the learning rate. On a GPU, if the optimizer is capturable, all steps are one CUDA
       graph, for which neither may read a tensor as a number;
    4. calls :meth:`scale_factor` and :meth:`hard_codes` once, and keeps them only if the unit's error on all calibration rows
       is less than before.

    Values are in weight units unless said otherwise. Parameters and buffers live on the weight's device, in float32.

    Args:
        weight: float ``(out_features, in_features)``, the original; not to be changed.
        grid: the values that it can be rounded to. Where ``grid.stored`` is not None, scales may be learned as well.
    """

    needs_samples = True
    keeps_best: ClassVar[bool] = False
    """Whether the state counts whose minibatch had the least error, rather than the last: for steps that do not settle."""

    def __init__(self, weight: Tensor, grid: Grid):
        super().__init__()

    @classmethod
    def optimizer(cls, rules: Sequence["LearnedRounding"], config: ReconstructionConfig) -> Optimizer:
        """Optimizer over the parameters of all weights of a unit."""
        on_gpu = all(parameter.is_cuda for rule in rules for parameter in rule.parameters())
        return torch.optim.Adam(
            [{"params": list(rule.parameters()), "lr": rule._rate(config)} for rule in rules],
            eps=1e-20,  # one weight's share of millions in the gradient is far below the usual 1e-8
            fused=True,
            capturable=on_gpu,
        )

    def _rate(self, config: ReconstructionConfig) -> float | Tensor:
        """The learning rate; on a GPU as a tensor, which a CUDA graph reads anew in each step."""
        rate = config.lr or self.learning_rate(config.step_in_logits)
        device = next(self.parameters()).device
        return torch.tensor(rate, device=device) if device.type == "cuda" else rate

    @classmethod
    def pace(cls, progress: float) -> float:
        """The factor on learning rates after a fraction ``progress`` of the steps (at least 0, less than 1): a schedule."""
        return 1.0

    def scale_factor(self) -> Tensor | None:
        """Learned factors of the stored scales, shaped like ``grid.stored``; None if the scales stay.

        :meth:`hard_codes` are codes on ``grid.rescaled`` of it.
        """
        return None

    @abstractmethod
    def start_from(self, codes: Tensor) -> None:
        """Lean toward codes that an earlier unit settled: :meth:`hard_codes` then gives them, and each can still change.

        Args:
            codes: uint8, shaped like the weight: what :meth:`hard_codes` gave there.
        """

    @abstractmethod
    def learning_rate(self, relative: float) -> float:
        """The learning rate at which the median weight's gate moves ``relative`` logits per step, in the parameters' units."""

    @abstractmethod
    def forward(self, weight: Tensor) -> Tensor:
        """The softly rounded weight, differentiable in the parameters; shaped and typed like ``weight``, the original again."""

    @abstractmethod
    def regularizer(self, beta: float | Tensor) -> Tensor:
        """A differentiable scalar: 0 where every element of the last :meth:`forward` is one of the grid's values, at most 1.

        Args:
            beta: exponent, more than 1, as a number or a scalar tensor; the larger, the less elements in the middle between
                two values are penalised.
        """

    @abstractmethod
    def hard_codes(self) -> Tensor:
        """uint8 codes, shaped like the weight: what the parameters amount to."""


class ClosedFormRounding(ABC):
    """A rounding that is computed at once from the weight and, if it asks, the Hessian; an instance is what is registered.

    ``reconstruct`` calls :meth:`solve` once per weight of a unit, in topological order. Before, if the rule asks, it runs
    the unit up to the linear on all calibration rows of the *quantized* stream, in which every weight before this one is
    rounded already; linears that share their input share the run. The unit's codes are kept only if its error on all rows
    is less than before.

    Its ``repr`` states the options: it is part of the fingerprint by which checkpoints are recognised.
    """

    needs_samples: bool = True
    """Whether it looks at calibration data at all. ``quantize_pipeline`` skips reconstruction where a rule does not."""
    needs_hessian: bool = True
    """Whether :meth:`solve` gets the Hessian."""

    @abstractmethod
    def solve(self, weight: Tensor, grid: Grid, hessian: Tensor | None, name: str) -> Tensor:
        """Codes for one weight.

        Args:
            weight: float ``(out_features, in_features)``; not to be changed.
            grid: the values that it can be rounded to. Scales are fixed.
            hessian: float64 ``(in_features, in_features)``, ``2 X^T X`` over all tokens X ``(tokens, in_features)`` of the
                linear's quantized inputs; symmetric, on the weight's device, and the rule's to overwrite. None unless
                ``needs_hessian``.
            name: fully qualified name of the weight, for messages.

        Returns:
            uint8 codes, shaped like the weight.

        Raises:
            ValueError: no solution for this Hessian.
        """


RoundingRule = type[LearnedRounding] | ClosedFormRounding

ROUNDINGS: Registry[RoundingRule] = Registry("rounding")
"""Rounding rules by name."""
