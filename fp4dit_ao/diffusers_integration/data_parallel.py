"""Training beside low-bit weights in several processes: ``DistributedDataParallel`` leaves these weights alone.

It copies the first process's parameters to all, joined into flat buffers, which low-bit weights cannot be. They do not change
while a LoRA learns, and are the same wherever the same model was loaded.
"""

from collections.abc import Iterator

from torch import nn

from fp4dit_ao import _compat
from fp4dit_ao.tensors.low_bit_weight import LowBitWeight

_PEFT = "base_model.model."
"""Prefix of names in a model that ``peft.get_peft_model`` wrapped; such a model has the attributes of the one inside of it."""


class LowBitNames:
    """Names of the low-bit parameters of a model as it is when it is iterated over, which a LoRA changes.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module):
        self._model = model

    def __iter__(self) -> Iterator[str]:
        for name, parameter in self._model.named_parameters():
            if isinstance(parameter, LowBitWeight):
                yield from (name, f"{_PEFT}{name}")


def leave_low_bit_weights(model: nn.Module) -> None:
    """Lets ``DistributedDataParallel(model)`` leave low-bit weights alone."""
    _compat.leave_in_data_parallel(model, LowBitNames(model))
