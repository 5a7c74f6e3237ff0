"""What CUDA asks of operators and CPUs do not, checked on tensors that pretend to be on a GPU."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fp4dit_ao import _compat

_ATEN = torch.ops.aten
GPU = _compat.fake_mode()
"""A mode in which tensors may say that they are on a GPU: only shapes and types are computed."""
_DIVISIONS = {_ATEN.div, _ATEN.div_, _ATEN.true_divide, _ATEN.true_divide_, _ATEN.floor_divide, _ATEN.floor_divide_}


class CudaRules(TorchDispatchMode):
    """Refuses what would fail or differ in a bit on a GPU, whatever device the tensors are on.

    - A float32 tensor divided by a number, or by a tensor without dimensions on the CPU, is multiplied by the reciprocal:
      exact for powers of two alone.
    - ``_int_mm`` takes more than 16 rows, and columns and input features in eights.
    - ``_scaled_mm`` takes a row-major and a column-major matrix, both sizes of the latter in sixteens, and float32 scales for
      rows ``(rows, 1)`` and columns ``(1, columns)``, contiguous; row-wise scales give bfloat16.
    - Triton converts no integer to FP8.

    Attributes:
        seen: operators that were called.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[Any] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.seen.add(func.overloadpacket)
        if func.overloadpacket in _DIVISIONS:
            _check_division(*args[:2])
        if func.overloadpacket is _ATEN._int_mm:
            _check_int8_product(*args)
        if func.overloadpacket is _ATEN._scaled_mm:
            _check_fp8_product(*args, **kwargs)
        if func.overloadpacket is _ATEN._to_copy and kwargs.get("dtype") == torch.float8_e4m3fn:
            assert args[0].is_floating_point(), f"{args[0].dtype} converted to FP8"
        return func(*args, **kwargs)


def on_gpu(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors like these that say they are on a GPU and hold no values. Operators are called on them within :data:`GPU`."""
    with GPU:
        return tuple(torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda") for x in tensors)


def _check_division(x: Any, divisor: Any) -> None:
    rounded_again = isinstance(x, Tensor) and x.dtype in (torch.float64, torch.int64, torch.int32)
    if rounded_again or not isinstance(x, Tensor):
        return
    on_cpu_beside_gpu = isinstance(divisor, Tensor) and not divisor.ndim and divisor.device != x.device
    assert not on_cpu_beside_gpu, f"{x.dtype} tensor on {x.device} divided by a tensor without dimensions on the CPU"
    if not isinstance(divisor, Tensor):
        exact = divisor and abs(math.frexp(divisor)[0]) == 0.5
        assert exact, f"{x.dtype} tensor {tuple(x.shape)} divided by {divisor}; see ops.divided"


def _check_int8_product(x: Tensor, y: Tensor) -> None:
    (rows, depth), columns = x.shape, y.shape[1]
    fits = rows > 16 and depth > 0 and depth % 8 == 0 and columns > 0 and columns % 8 == 0
    assert x.device.type != "cuda" or fits, f"_int_mm of {rows} x {depth} and {depth} x {columns} on CUDA"


def _check_fp8_product(
    x: Tensor, y: Tensor, x_scale: Tensor, y_scale: Tensor, bias: Tensor | None = None, result: Any = None,
    out_dtype: torch.dtype | None = None, use_fast_accum: bool = False,
) -> None:  # fmt: skip
    (rows, depth), columns = x.shape, y.shape[1]
    assert x.stride() == (depth, 1), f"left matrix with strides {x.stride()}"
    assert y.stride() == (1, depth), f"right matrix with strides {y.stride()}"
    assert depth % 16 == columns % 16 == 0, f"{depth} x {columns} on the right"
    assert x_scale.shape == (rows, 1) and y_scale.shape == (1, columns), f"scales {x_scale.shape}, {y_scale.shape}"
    for scale in (x_scale, y_scale):
        assert scale.dtype == torch.float32 and scale.is_contiguous(), f"scale {scale.dtype}, {scale.stride()}"
    assert out_dtype == torch.bfloat16, out_dtype
    assert bias is None or bias.dtype == torch.bfloat16, bias
