"""How many rows of a weight are worked on together: intermediates take many times the room of the codes that come out."""

from torch import Tensor

_AT_ONCE = {"cpu": 2**18, "cuda": 2**24}
"""Weights, by device: some 10 MB of intermediates, which stay in a processor's cache; and enough to keep a GPU busy."""


def rows_at_once(weight: Tensor) -> int:
    """Rows of ``weight`` ``(out_features, in_features)`` to work on together."""
    return max(1, _AT_ONCE.get(weight.device.type, 2**18) // max(1, weight.shape[1]))
