"""``ScaledLinear``: a linear whose input is multiplied, channel by channel, before it is quantized."""

from torch import Tensor, nn

from fp4dit_ao.passes.transforms.transformed_linear import TransformedLinear, restore_linears

INPUT_SCALE = "smooth_scale"
"""Name of the factors of the input, ``(in_features,)``, beside ``weight`` and ``bias``."""

unscale_modules = restore_linears


class _Scale:
    def before(self, module: nn.Module, x: Tensor) -> Tensor:
        return scaled_input(module, x)

    def beside(self, module: nn.Module, x: Tensor) -> None:
        return None

    def undone(self, module: nn.Module, weight: Tensor) -> Tensor:
        scale: Tensor = getattr(module, INPUT_SCALE)
        return weight * scale.to(weight)


class ScaledLinear(TransformedLinear):
    """``linear(x * smooth_scale)``.

    Args:
        linear: that it replaces; its parameters are shared.
        scale: ``(in_features,)``, of the input's type.
        stored: whether the scale is one of the model's own tensors, rather than that of another linear with the same input.
    """

    def __init__(self, linear: nn.Linear, scale: Tensor, stored: bool = True):
        super().__init__(linear, _Scale(), {INPUT_SCALE: scale}, {INPUT_SCALE: stored})


def scaled_input(module: nn.Module, x: Tensor) -> Tensor:
    """The input of ``module``, times its scale if it has one."""
    scale: Tensor | None = getattr(module, INPUT_SCALE, None)
    return x if scale is None else x * scale
