"""torchao's tensor subclasses, and what its graph passes keep. Nothing is imported from torchao, which takes seconds."""

import sys


def parts(cls: type) -> list[str]:
    """Parts of a torchao tensor, tensors and attributes, in the order of its constructor's arguments."""
    kinds = ("tensor_data", "tensor_attribute", "optional_tensor_data", "optional_tensor_attribute")
    return [name for kind in kinds for name in getattr(cls, f"{kind}_names", ())]


_CACHES = {
    "torchao.utils": "_assert_and_get_unique_device",
    "torch.ao.quantization.fx.utils": "assert_and_get_unique_device",
}
"""Functions of ``prepare_pt2e`` and ``convert_pt2e`` with an unbounded cache whose keys are graphs, by module."""


def forget_graphs() -> None:
    """Empties torchao's caches, which keep every graph that was prepared or converted, its float weights included, alive.

    They hold one device per graph, which is looked up again where it is asked for.
    """
    for module, name in _CACHES.items():
        clear = getattr(getattr(sys.modules.get(module), name, None), "cache_clear", None)
        if clear is not None:
            clear()
