"""``StoredBytes``: what low-bit weights say of their memory."""

from torch import Tensor

from fp4dit_ao import _compat


class StoredBytes:
    """Mixed into low-bit weights, which present themselves as float tensors of their shape.

    ``nbytes`` is the memory that they take. ``dtype``, ``numel()``, ``element_size()`` and the storage's size stay those of the
    float tensor: libraries check shapes, cast, and find shared memory by them.
    """

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        parts = (getattr(self, name) for name in _compat.parts(type(self)))
        return sum(part.nbytes for part in parts if isinstance(part, Tensor))
