"""``torch.ops.fp4dit_ao.int8_linear`` on NVIDIA GPUs: says where it can run, and imports Triton when it first does."""

import functools
import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor

from fp4dit_ao.kernels.token_quantization import add_digits
from fp4dit_ao.ops import LIBRARY

CAPABILITY = (8, 0)
"""Ampere: the first for which Triton multiplies bytes on tensor cores."""


def supports(x: Tensor, bits: int, group: int) -> bool:
    """Whether ``int8_linear`` can take ``x``: on such a GPU, with weights of at most ``bits=4`` and groups of whole bytes."""
    return x.is_cuda and bits <= 4 and group % 2 == 0 and _available(x.device)


@functools.cache
def _available(device: torch.device) -> bool:
    installed = torch.version.cuda is not None and importlib.util.find_spec("triton") is not None
    return installed and torch.cuda.get_device_capability(device) >= CAPABILITY


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
    """See :func:`fp4dit_ao.kernels.cpu.native.run`; several digits are a product each, and float32 until they are added."""
    from fp4dit_ao.kernels.cuda import triton_linear

    if digits == 1:
        return triton_linear.run(tokens, token_scale, qdata, scale, table, bias, output_dtype)
    y = triton_linear.run(tokens, token_scale.repeat(digits, 1), qdata, scale, table, None, torch.float32)
    y = add_digits(y, digits)
    return (y if bias is None else y + bias.float()).to(output_dtype)


LIBRARY.impl("int8_linear", run, "CUDA")
