"""``ScaledLinear``: a linear whose input is multiplied, channel by channel, before it is quantized."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

INPUT_SCALE = "smooth_scale"
"""Name of the factors of the input, ``(in_features,)``, beside ``weight`` and ``bias``."""


class ScaledLinear(nn.Linear):
    """``linear(x * smooth_scale)``. An ``nn.Linear`` for whoever looks for one, such as a LoRA, which sees ``x`` itself.

    Args:
        linear: that it replaces; its parameters are shared.
        scale: ``(in_features,)``, of the input's type.
        stored: whether the scale is one of the model's own tensors, rather than that of another linear with the same input.
    """

    def __init__(self, linear: nn.Linear, scale: Tensor, stored: bool = True):
        nn.Module.__init__(self)  # nn.Linear's own would make a weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)
        self.register_buffer(INPUT_SCALE, scale, persistent=stored)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``(…, in_features)`` to ``(…, out_features)``; ``bias`` is added in place of its own."""
        return F.linear(scaled_input(self, x), self.weight, self.bias if bias is None else bias)


def scaled_input(module: Any, x: Tensor) -> Tensor:
    """The input of ``module``, times its scale if it has one."""
    scale: Tensor | None = getattr(module, INPUT_SCALE, None)
    return x if scale is None else x * scale


def unscale_modules(model: nn.Module) -> None:
    """Put an ``nn.Linear`` of the unscaled function in the place of every :class:`ScaledLinear` with a float weight."""
    for name, module in list(model.named_modules()):
        if isinstance(module, ScaledLinear):
            parent, _, leaf = name.rpartition(".")
            plain = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            weight = module.weight.detach()
            plain.weight = nn.Parameter(weight * getattr(module, INPUT_SCALE).to(weight), requires_grad=False)
            plain.bias = module.bias
            setattr(model.get_submodule(parent), leaf, plain)
