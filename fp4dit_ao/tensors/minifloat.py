"""``MinifloatTensor``: a weight held as packed low-bit codes and group scales, multiplied without becoming a float weight."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torchao.utils import TorchAOBaseTensor

from fp4dit_ao import __version__, kernels
from fp4dit_ao.formats import pack, parse, unpack
from fp4dit_ao.kernels.cpu import native
from fp4dit_ao.ops import choose_scale, dequantize, quantize

_ATEN = torch.ops.aten


class MinifloatTensor(TorchAOBaseTensor):  # type: ignore[misc]
    """A linear weight ``(out_features, in_features)`` in an ``ExMy`` format.

    Tensor Attributes:
        qdata: uint8 codes; 4-bit formats two to a byte, ``(out_features, in_features / 2)``, the first in the low nibble.
        scale: float, ``(out_features / block_size[0], in_features / block_size[1])``.

    Non-Tensor Attributes:
        block_size: elements along each dimension that share a scale; -1 for all of them.
        fmt: name of the weight's format.
        act_fmt: format that ``linear`` quantizes its input to, token-wise and online; None leaves the input as it is.
        dtype: the type this tensor presents itself as, and of ``dequantize()``.
    """

    tensor_data_names: ClassVar[list[str]] = ["qdata", "scale"]
    tensor_attribute_names: ClassVar[list[str]] = ["block_size", "fmt", "act_fmt", "dtype"]

    qdata: Tensor
    scale: Tensor

    def __new__(
        cls, qdata: Tensor, scale: Tensor, block_size: list[int], fmt: str, act_fmt: str | None, dtype: torch.dtype
    ) -> "MinifloatTensor":
        shape = list(qdata.shape)
        shape[-1] *= 2 if parse(fmt).bits <= 4 else 1
        wrapper: MinifloatTensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, shape, dtype=dtype, device=qdata.device, requires_grad=False
        )
        return wrapper

    def __init__(
        self, qdata: Tensor, scale: Tensor, block_size: list[int], fmt: str, act_fmt: str | None, dtype: torch.dtype
    ):
        super().__init__()
        self.qdata = qdata
        self.scale = scale
        self.block_size = block_size
        self.fmt = fmt
        self.act_fmt = act_fmt

    @classmethod
    def from_codes(
        cls, codes: Tensor, scale: Tensor, block_size: list[int], fmt: str, act_fmt: str | None, dtype: torch.dtype
    ) -> "MinifloatTensor":
        """From unpacked uint8 codes ``(out_features, in_features)`` and their scales."""
        return cls(pack(codes, parse(fmt).bits), scale, block_size, fmt, act_fmt, dtype)

    @classmethod
    def from_hp(
        cls,
        weight: Tensor,
        block_size: list[int],
        fmt: str,
        act_fmt: str | None = None,
        scale_dtype: torch.dtype = torch.float32,
    ) -> "MinifloatTensor":
        """Round a float weight to nearest, with absmax scales."""
        scale = choose_scale(weight, block_size, fmt, scale_dtype)
        return cls.from_codes(quantize(weight, block_size, scale, fmt), scale, block_size, fmt, act_fmt, weight.dtype)

    @property
    def codes(self) -> Tensor:
        """uint8 codes, unpacked, ``(out_features, in_features)``."""
        return unpack(self.qdata, parse(self.fmt).bits)

    def dequantize(self, output_dtype: torch.dtype | None = None) -> Tensor:
        """The weight as a float tensor of ``dtype``."""
        return dequantize(self.codes, self.block_size, self.scale, self.fmt, output_dtype or self.dtype)

    def _stable_hash_for_caching(self) -> str:
        """What torch's on-disk compile caches know this tensor by: everything that shapes the generated code."""
        parts = [(part.dtype, tuple(part.shape), part.stride(), part.device) for part in (self.qdata, self.scale)]
        return repr(
            (
                __version__,
                native.VERSION if native.shared_object() is not None else None,
                parts,
                list(self.block_size),
                parse(self.fmt),  # a codebook with its levels: another process may know other ones by that name
                self.act_fmt and parse(self.act_fmt),
                self.dtype,
            )
        )

    def _quantization_type(self) -> str:
        return f"fmt={self.fmt}, act_fmt={self.act_fmt}, block_size={list(self.block_size)}, shape={tuple(self.shape)}"

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        """One line: thousands of codes tell a reader nothing."""
        scale = str(self.scale.dtype).removeprefix("torch.")
        return (
            f"MinifloatTensor({self._quantization_type()}, scale={scale}, dtype={self.dtype}, device='{self.device}')"
        )


@MinifloatTensor.implements(_ATEN.linear.default)  # type: ignore[untyped-decorator]
@MinifloatTensor.implements_torch_function([torch.nn.functional.linear, _ATEN.linear.default])  # type: ignore[untyped-decorator]
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    x, weight = args[0], args[1]
    bias = args[2] if len(args) > 2 else kwargs.get("bias")
    return kernels.linear(x, weight.qdata, weight.scale, weight.block_size, weight.fmt, weight.act_fmt, bias)


@MinifloatTensor.implements(_ATEN._to_copy.default)  # type: ignore[untyped-decorator]
def _(func: Any, types: Any, args: Any, kwargs: Any) -> MinifloatTensor:
    """``.to(device)`` moves codes and scales; ``.to(dtype)`` changes only what the tensor presents itself as."""
    self = args[0]
    device = kwargs.get("device") or self.device
    return MinifloatTensor(
        self.qdata.to(device),
        self.scale.to(device),
        self.block_size,
        self.fmt,
        self.act_fmt,
        kwargs.get("dtype") or self.dtype,
    )


@MinifloatTensor.implements(_ATEN.is_pinned.default)  # type: ignore[untyped-decorator]
def _(func: Any, types: Any, args: Any, kwargs: Any) -> bool:
    return all(getattr(args[0], name).is_pinned() for name in MinifloatTensor.tensor_data_names)


@MinifloatTensor.implements(_ATEN._pin_memory.default)  # type: ignore[untyped-decorator]
def _(func: Any, types: Any, args: Any, kwargs: Any) -> MinifloatTensor:
    pinned: MinifloatTensor = args[0]._apply_fn_to_data(lambda x: x.pin_memory())
    return pinned


torch.serialization.add_safe_globals([MinifloatTensor])
