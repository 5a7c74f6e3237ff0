"""A hash of what a learned result depends on, by which a killed run knows its own files."""

import hashlib
from collections.abc import Mapping, Sequence

from torch import Tensor
from torch.fx import GraphModule

from fp4dit_ao._compat import pytree
from fp4dit_ao.observers import FloatObserver, WeightObserver
from fp4dit_ao.util.tensor_state import bytes_of


def fingerprint(settings: str, prepared: GraphModule, samples: Sequence[Mapping[str, object]]) -> str:
    """SHA-256 of settings, graph, parameters, formats, scales, codes and static ranges, and of the samples."""
    digest = hashlib.sha256(settings.encode() + prepared.code.encode())
    for name, module in prepared.named_modules():
        if isinstance(module, FloatObserver):
            digest.update(f"{name} {module.name} {module.fmt}".encode())
        if isinstance(module, WeightObserver):
            digest.update(str(module.granularity).encode())
    for name, x in (*prepared.named_parameters(), *prepared.named_buffers()):
        digest.update(name.encode() + bytes_of(x))
    for sample in samples:
        for leaf in pytree.tree_leaves(dict(sample)):
            digest.update(bytes_of(leaf) if isinstance(leaf, Tensor) else repr(leaf).encode())
    return digest.hexdigest()
