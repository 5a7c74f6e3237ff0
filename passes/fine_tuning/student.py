"""The contract of a student: what stands for an observer's own rounding while a model is fine-tuned."""

from abc import ABC, abstractmethod
from typing import TypedDict

from torch import Tensor, nn

from fp4dit_ao.observers.weight import Settled
from fp4dit_ao.passes.fine_tuning.int8_latent import Int8Latent


class ParameterGroup(TypedDict):
    """Parameters that share a learning rate, as torch's optimizers take them."""

    params: list[nn.Parameter]
    lr: float


class Student(nn.Module, ABC):
    """One weight while it is trained. Its ``state_dict`` is all that a resumed run needs of it."""

    @abstractmethod
    def forward(self, weight: Tensor) -> Tensor:
        """The weight that the model computes with, differentiable in what is trained; shaped and typed like ``weight``, the
        float model's ``(out_features, in_features)``."""

    @abstractmethod
    def settled(self) -> Settled:
        """Codes and scales that the training amounts to; :meth:`forward` gives their values at the end of it."""

    @abstractmethod
    def groups(self, lr: float) -> list[ParameterGroup]:
        """Parameters for Adam, with learning rates in proportion to ``lr``."""

    def latents(self, lr: float) -> list[tuple[Int8Latent, float]]:
        """INT8 weights for Q-GaLore, each with its learning rate, in proportion to ``lr``."""
        return []

    def advance(self, step: int, steps: int) -> None:
        """Called before step ``step`` of ``steps``, for what follows a schedule."""
