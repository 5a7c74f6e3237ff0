"""How torchao's tensor subclasses declare what they are made of."""

from typing import Any


def parts(cls: type[Any]) -> list[str]:
    """Parts of a torchao tensor, tensors and attributes, in the order of its constructor's arguments."""
    kinds = ("tensor_data", "tensor_attribute", "optional_tensor_data", "optional_tensor_attribute")
    return [name for kind in kinds for name in getattr(cls, f"{kind}_names", ())]
