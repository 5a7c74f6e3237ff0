"""Weights in the hardware's block formats: torchao's ``MXTensor`` and ``NVFP4Tensor``, which here also run on other hardware.

:mod:`fp4dit_ao.kernels.block_scaled_linear` picks what computes ``linear``: torchao with native block-scaled instructions, or
the emulation.
"""

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torchao.quantization.quantize_.common.kernel_preference import KernelPreference
from torchao.utils import TorchAOBaseTensor

from fp4dit_ao import __version__, _compat
from fp4dit_ao._compat import Arguments, Keywords, Operator
from fp4dit_ao._compat.torchao_prototype import (
    DTYPE_FP6_E2M3,
    DTYPE_FP6_E3M2,
    MXTensor,
    NVFP4Tensor,
    QuantizeTensorToMXKwargs,
    QuantizeTensorToNVFP4Kwargs,
    ScaleCalculationMode,
)  # fmt: skip
from fp4dit_ao.formats import FloatFormat, pack, unpack
from fp4dit_ao.kernels import block_scaled_linear, straight_through
from fp4dit_ao.kernels.units import Unit
from fp4dit_ao.ops.block_scale import BLOCKS, unit
from fp4dit_ao.tensors import float_sum
from fp4dit_ao.tensors.copied_by_call import CopiedByCall
from fp4dit_ao.tensors.stored_bytes import StoredBytes

_ATEN = torch.ops.aten
ELEMENTS = {"e2m1": torch.float4_e2m1fn_x2, "e2m3": DTYPE_FP6_E2M3, "e3m2": DTYPE_FP6_E3M2}
"""torchao's name for each MX element format."""


class _BlockTensor(block_scaled_linear.BlockWeight, Protocol):
    """What the methods below need of torchao's tensors and their subclasses."""

    device: torch.device
    dtype: torch.dtype
    by_largest: bool

    @property
    def fmt(self) -> str: ...

    def dequantize(self, output_dtype: torch.dtype) -> Tensor: ...


class _OnAnyHardware(StoredBytes):
    """Methods that both weights add to torchao's tensors."""

    by_largest = True
    # torchao's block tensors disable the handlers of torch functions
    __torch_function__: object = classmethod(TorchAOBaseTensor.__torch_function__.__func__)

    def unit(self: _BlockTensor, device: torch.device | str | None = None) -> Unit[Any]:
        """The unit that computes this weight's linear for input of its type, on ``device`` or where the weight is."""
        operands = block_scaled_linear.BlockOperands(
            self.fmt, torch.device(device or self.device), self.dtype, self.by_largest
        )
        return block_scaled_linear.BLOCK_SCALED_LINEAR.pick(operands)

    def stored_linear(self: _BlockTensor, x: Tensor, bias: Tensor | None) -> Tensor:
        """``x @ W^T + bias`` with ``x`` quantized to the weight's format."""
        return block_scaled_linear.linear(x, self, bias, self.fmt)

    def stored_values(self: _BlockTensor, output_dtype: torch.dtype) -> Tensor:
        """The weight's values, ``(out_features, in_features)``."""
        return self.dequantize(output_dtype)

    def _stable_hash_for_caching(self) -> str:
        """Key of this tensor in torch's on-disk compile caches: everything that shapes the generated code."""
        parts = {name: getattr(self, name) for name in _compat.parts(type(self))}
        plain = {
            k: (v.dtype, tuple(v.shape), v.stride(), v.device) if isinstance(v, Tensor) else v for k, v in parts.items()
        }
        return repr((__version__, type(self).__name__, plain))


class MXWeight(_OnAnyHardware, MXTensor, metaclass=CopiedByCall):  # type: ignore[misc]
    """A linear weight in MXFP4 or MXFP6, whose input is quantized to the same format, online.

    Tensor Attributes:
        qdata: uint8 codes, E2M1 two to a byte, the first in the low nibble; MXFP6 one to a byte.
        scale: float8_e8m0fnu, ``(out_features, in_features / 32)``.

    Non-Tensor Attributes: those of torchao's ``MXTensor``.
    """

    @property
    def fmt(self) -> str:
        """Format of the elements."""
        return next(name for name, element in ELEMENTS.items() if element == self.elem_dtype)

    @property
    def codes(self) -> Tensor:
        """uint8 codes, unpacked, ``(out_features, in_features)``."""
        return unpack(self.qdata, FloatFormat.parse(self.fmt).bits)

    @classmethod
    def from_codes(cls, codes: Tensor, step: Tensor, fmt: str, dtype: torch.dtype) -> "MXWeight":
        """From uint8 codes ``(out_features, in_features)`` and float32 steps, powers of two."""
        lattice = FloatFormat.parse(fmt)
        exponent = (step / unit(lattice)).view(torch.int32) >> 23
        scale = exponent.to(torch.uint8).view(torch.float8_e8m0fnu)
        return cls.from_parts(pack(codes, lattice.bits), scale, fmt, dtype)

    @classmethod
    def from_parts(cls, qdata: Tensor, scale: Tensor, fmt: str, dtype: torch.dtype) -> "MXWeight":
        """From packed codes and E8M0 scales."""
        preference = KernelPreference.AUTO if fmt == "e2m1" else KernelPreference.EMULATED
        inputs = QuantizeTensorToMXKwargs(ELEMENTS[fmt], BLOCKS["e8m0"], ScaleCalculationMode.RCEIL, preference)
        return cls(qdata, scale, ELEMENTS[fmt], BLOCKS["e8m0"], dtype, preference, inputs, False)

    def on_torchao(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``linear`` as torchao computes it, bfloat16 out."""
        weight = MXTensor(*(getattr(self, name) for name in _compat.parts(MXTensor)))
        return F.linear(x, weight, None if bias is None else bias.bfloat16())

    def emulated(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``linear`` in exact operands of a wider type."""
        return block_scaled_linear.mx_linear(x, self.qdata, self.scale, self.fmt, bias)


class NVFP4Weight(_OnAnyHardware, NVFP4Tensor, metaclass=CopiedByCall):  # type: ignore[misc]
    """A linear weight in NVFP4, whose input is quantized to the same format, online.

    Tensor Attributes:
        qdata: uint8 codes, two to a byte, the first in the low nibble.
        scale: float8_e4m3fn, ``(out_features, in_features / 16)``.
        per_tensor_scale: float32 scalar.

    Non-Tensor Attributes: those of torchao's ``NVFP4Tensor``.
    """

    fmt = "e2m1"

    @property
    def codes(self) -> Tensor:
        """uint8 codes, unpacked, ``(out_features, in_features)``."""
        return unpack(self.qdata, 4)

    @classmethod
    def from_codes(cls, codes: Tensor, scale: Tensor, tensor_scale: Tensor, dtype: torch.dtype) -> "NVFP4Weight":
        """From uint8 codes ``(out_features, in_features)`` and the two scales of ``ops.block_scale.two_level_scale``."""
        whole = tensor_scale / unit(FloatFormat.parse("e2m1"))
        return cls.from_parts(pack(codes, 4), scale.to(torch.float8_e4m3fn), whole, dtype)

    @classmethod
    def from_parts(cls, qdata: Tensor, scale: Tensor, per_tensor_scale: Tensor, dtype: torch.dtype) -> "NVFP4Weight":
        """From packed codes, E4M3 scales and the tensor's own."""
        inputs = QuantizeTensorToNVFP4Kwargs(use_dynamic_per_tensor_scale=True)
        return cls(qdata, scale, BLOCKS["e4m3"], dtype, per_tensor_scale=per_tensor_scale, act_quant_kwargs=inputs)

    def get_hp_scales(self) -> Tensor:
        """float32 scales, both levels as one; torchao 0.17 would round them to the weight's type."""
        exact = {name: getattr(self, name) for name in _compat.parts(NVFP4Tensor)} | {"orig_dtype": torch.float32}
        scales: Tensor = NVFP4Tensor(**exact).get_hp_scales()
        return scales

    def on_torchao(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``linear`` as torchao computes it."""
        weight = NVFP4Tensor(
            self.qdata, self.scale, self.block_size, x.dtype, self.per_tensor_scale,
            act_quant_kwargs=self.act_quant_kwargs,
        )  # fmt: skip
        return F.linear(x, weight, bias)

    def emulated(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``linear`` in exact operands of a wider type."""
        return block_scaled_linear.nvfp4_linear(x, self.qdata, self.scale, self.per_tensor_scale, bias)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={tuple(self.shape)}, {self._quantization_type()})"


class FourOverSixWeight(NVFP4Weight):
    """An NVFP4 weight whose input has, block by block, the better of two scales (Four over six, arXiv 2512.02010)."""

    by_largest = False

    def emulated(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return block_scaled_linear.four_over_six_linear(x, self.qdata, self.scale, self.per_tensor_scale, bias)


def _linear(func: Operator, types: object, args: Arguments, kwargs: Keywords) -> Tensor:
    x, weight, bias = args[0], args[1], args[2] if len(args) > 2 else kwargs.get("bias")
    return straight_through.linear(x, weight, bias)


def _to_copy(func: Operator, types: object, args: Arguments, kwargs: Keywords) -> Tensor:
    """``.to(device)`` moves codes and scales; ``.to(dtype)`` changes only what the tensor presents itself as."""
    self, device = args[0], kwargs.get("device")
    moved = {name: getattr(self, name) for name in _compat.parts(type(self))}
    for name, value in moved.items():
        moved[name] = value.to(device) if isinstance(value, Tensor) and device is not None else value
    moved["orig_dtype"] = kwargs.get("dtype") or self.orig_dtype
    return type(self)(**moved)


for _cls in (MXWeight, NVFP4Weight, FourOverSixWeight):
    _cls.implements(_ATEN.linear.default)(_linear)
    _cls.implements_torch_function([F.linear, _ATEN.linear.default])(_linear)
    _cls.implements(_ATEN._to_copy.default)(_to_copy)
    _cls.implements(_ATEN.add.Tensor)(float_sum.add)


torch.serialization.add_safe_globals([MXWeight, NVFP4Weight, FourOverSixWeight])
