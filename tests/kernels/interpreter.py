"""Modules of Triton kernels, interpreted where there is no GPU: Triton decides when it sees a kernel's definition."""

import importlib
import sys
from types import ModuleType

import torch
import triton

from fp4dit_ao.kernels import cuda

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_FOLDER = "fp4dit_ao.kernels.cuda"
_KERNELS = tuple(
    f"{_FOLDER}.{name}"
    for name in ("triton_lookup", "triton_decode", "triton_linear", "triton_codebook_linear", "triton_attention")
)


def loaded(name: str) -> ModuleType:
    """The module ``name`` of ``kernels/cuda``; an interpreted copy on a CPU."""
    if DEVICE == "cuda":
        return importlib.import_module(f"{_FOLDER}.{name}")
    known = {full: sys.modules.pop(full, None) for full in _KERNELS}
    before, attributes = triton.knobs.runtime.interpret, dict(vars(cuda))
    triton.knobs.runtime.interpret = True
    try:
        module = importlib.import_module(f"{_FOLDER}.{name}")
    finally:
        triton.knobs.runtime.interpret = before
        for full, old in known.items():
            interpreted = sys.modules.pop(full, None)
            if interpreted is not None:
                sys.modules[f"interpreted.{full}"] = interpreted  # the interpreter looks a kernel's module up by name
            leaf = full.rpartition(".")[2]
            if old is not None:
                sys.modules[full] = old
            if leaf in attributes:
                setattr(cuda, leaf, attributes[leaf])
            elif hasattr(cuda, leaf):
                delattr(cuda, leaf)
    assert module.INTERPRETED
    return module
