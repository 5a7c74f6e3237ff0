"""``StoredBytes``: what low-bit weights say of their memory."""

from typing import NoReturn

from torch import Tensor

from fp4dit_ao import _compat
from fp4dit_ao.util.plain_mode import plain_mode


class StoredBytes:
    """Mixed into low-bit weights, which present themselves as float tensors of their shape.

    ``nbytes`` is the memory that they take. ``dtype``, ``numel()``, ``element_size()`` and the storage's size stay those of the
    float tensor: libraries check shapes, cast, and find shared memory by them.
    """

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return sum(part.nbytes for part in self._stored())

    def _stored(self) -> list[Tensor]:
        parts = (getattr(self, name) for name in _compat.parts(type(self)))
        return [part for part in parts if isinstance(part, Tensor)]

    @plain_mode()
    def detach(self) -> Tensor:
        """The same values without gradients; within ``torch.inference_mode``, too, where PyTorch cannot detach a subclass."""
        return Tensor.detach(self)  # type: ignore[arg-type]

    def share_memory_(self) -> "StoredBytes":
        """Moves the stored tensors into memory that processes share, in place."""
        for part in self._stored():
            part.share_memory_()
        return self

    def is_shared(self) -> bool:
        """Whether processes share the stored tensors."""
        return all(part.is_shared() for part in self._stored())

    def storage(self) -> NoReturn:
        """Refuses what only a tensor with memory of its own has; safetensors' functions ask for it before they write.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"a {type(self).__name__} has no storage of its own, only those of its codes and scales: save the model with its "
            "save_pretrained(folder), or its state_dict() with torch.save"
        )
