"""The fine-grained objective of EDA-DM (arXiv 2401.04585): the error of a block, and of every linear inside it."""

from typing import ClassVar

import torch
from torch import Tensor

from fp4dit_ao.passes.reconstruction.objectives.mse import MeanSquaredError
from fp4dit_ao.passes.reconstruction.objectives.objective import Errors


class LayerWeighted(MeanSquaredError):
    """``(MSE(block) + a * sum over its linears of MSE(linear)) / mean(full^2)``.

    A linear's output on quantized inputs is compared with the original's on the original's inputs. All terms are relative to
    the power of the *block's* output, so that they stand to each other as in the paper. Its code leaves the last linear of
    a block out of the sum; here all count. (It also turns the regularizer of AdaRound off; here ``regularizer`` says.)

    Args:
        layer_weight: a; the code has 0.8 to 1.
    """

    needs_layers: ClassVar[bool] = True

    def __init__(self, layer_weight: float = 1.0):
        self.layer_weight = layer_weight

    def combined(self, errors: Errors) -> Tensor:
        block = super().combined(errors)
        return block + self.layer_weight * torch.stack(list(errors.layers)).sum() if errors.layers else block
