"""Mean squared error, relative to the full-precision output's power."""

from torch import Tensor, nn

from fp4dit_ao.passes.reconstruction.objectives.objective import Objective


class MeanSquaredError(Objective):
    """``mean((quantized - full)^2) / mean(full^2)``."""

    def power(self, full: Tensor) -> Tensor:
        return full.float().square().mean()

    def error(self, quantized: Tensor, full: Tensor, power: float) -> Tensor:
        return nn.functional.mse_loss(quantized.float(), full.float()) / power
