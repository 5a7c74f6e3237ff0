"""``CopiedByCall``: tensor subclasses whose class takes one of its tensors, as ``nn.Parameter`` does."""

from typing import Any

from torch import nn

from fp4dit_ao import _compat


class CopiedByCall(_compat.TensorMeta):  # type: ignore[misc]
    """Metaclass of weights: ``type(weight)(weight, requires_grad=False)`` is a parameter of the same data.

    Libraries that move parameters, such as accelerate when it offloads, call the class of the parameter that they found.
    """

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and isinstance(args[0], cls):
            return nn.Parameter(args[0].detach(), **({"requires_grad": False} | kwargs))
        return super().__call__(*args, **kwargs)
