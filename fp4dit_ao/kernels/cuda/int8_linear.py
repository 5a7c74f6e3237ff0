"""``torch.ops.fp4dit_ao.int8_linear`` on NVIDIA GPUs: says where it can run, and imports Triton when it first does."""

import functools
import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor

from fp4dit_ao.kernels.token_quantization import add_digits
from fp4dit_ao.ops import LIBRARY

CAPABILITY = (8, 0)
"""Ampere: the first capability for which Triton multiplies bytes on tensor cores."""
FP8_CAPABILITY = (8, 9)
"""Ada: the first capability with FP8 tensor cores."""
_MOST_BITS = 4
_MULTIPLE = 2
"""Group sizes are multiples of this: a group is whole bytes of two codes."""


def supports(device: torch.device, bits: int, group_size: int) -> bool:
    """Whether ``int8_linear`` takes weights of so many bits and groups of that size on the device."""
    fits = bits <= _MOST_BITS and group_size % _MULTIPLE == 0
    return fits and capability(device) >= CAPABILITY and _triton_installed()


def decodes(device: torch.device, group_size: int) -> bool:
    """Whether Triton decodes codebook groups of that size on the device."""
    return group_size % _MULTIPLE == 0 and capability(device) >= CAPABILITY and _triton_installed()


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of an NVIDIA GPU; (0, 0) for any other device."""
    nvidia = device.type == "cuda" and torch.version.cuda is not None
    return torch.cuda.get_device_capability(device) if nvidia else (0, 0)


@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def run(
    tokens: Tensor,
    token_scale: Tensor,
    qdata: Tensor,
    scale: Tensor,
    table: Sequence[int],
    bias: Tensor | None,
    output_dtype: torch.dtype,
    digits: int = 1,
) -> Tensor:
    """See :func:`fp4dit_ao.kernels.cpu.int8_linear.run`. Each digit is a product of its own, float32 until they are added."""
    from fp4dit_ao.kernels.cuda import triton_linear

    if digits == 1:
        return triton_linear.run(tokens, token_scale, qdata, scale, table, bias, output_dtype)
    y = triton_linear.run(tokens, token_scale.repeat(digits, 1), qdata, scale, table, None, torch.float32)
    y = add_digits(y, digits)
    return (y if bias is None else y + bias.float()).to(output_dtype)


LIBRARY.impl("int8_linear", run, "CUDA")
