"""``TransformedLinear``: a linear in the module form with what transforms put before and beside it, in their order."""

from collections.abc import Mapping
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from fp4dit_ao import _compat


class Step(Protocol):
    """One transform's change of a linear, given the module that holds its tensors."""

    def before(self, module: nn.Module, x: Tensor) -> Tensor:
        """The changed input ``(…, in_features)``, before it is quantized."""

    def beside(self, module: nn.Module, x: Tensor) -> Tensor | None:
        """A term of the linear's output, given its input as it was before :meth:`before`; None for none."""

    def undone(self, module: nn.Module, weight: Tensor) -> Tensor:
        """The weight that would give the same output without this step."""


class TransformedLinear(nn.Linear):
    """An ``nn.Linear`` for whoever looks for one, such as a LoRA, which sees the input of the float model.

    Args:
        linear: that it replaces; its parameters are shared. The steps of another :class:`TransformedLinear` come first.
        step: what is done to the input and added to the output.
        tensors: the step's, by name, beside ``weight`` and ``bias``.
        stored: names of those that are the model's own, rather than another linear's with the same input.
    """

    def __init__(self, linear: nn.Linear, step: Step, tensors: Mapping[str, Tensor], stored: Mapping[str, bool]):
        nn.Module.__init__(self)  # nn.Linear's own would make a weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)
        for name, buffer in linear.named_buffers(recurse=False):
            self.register_buffer(name, buffer, persistent=_compat.is_persistent(linear, name))
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=stored[name])
        self.steps: list[Step] = [*getattr(linear, "steps", []), step]

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``(…, in_features)`` to ``(…, out_features)``; ``bias`` is added in place of its own."""
        added: list[Tensor] = []
        for step in self.steps:
            branch = step.beside(self, x)
            if branch is not None:
                added.append(branch)
            x = step.before(self, x)
        y = F.linear(x, self.weight, self.bias if bias is None else bias)
        for branch in reversed(added):  # a graph adds the last transform's first: it stands next to the linear
            y = y + branch
        return y

    def plain_weight(self) -> Tensor:
        """The weight of an ``nn.Linear`` of the same function, given that this one's is float."""
        weight = self.weight.detach()
        for step in reversed(self.steps):
            weight = step.undone(self, weight)
        return weight


def restore_linears(model: nn.Module) -> None:
    """Put an ``nn.Linear`` of the same function in the place of every :class:`TransformedLinear` with a float weight."""
    for name, module in list(model.named_modules()):
        if isinstance(module, TransformedLinear):
            plain = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            plain.weight = nn.Parameter(module.plain_weight(), requires_grad=False)
            plain.bias = module.bias
            model.set_submodule(name, plain)
