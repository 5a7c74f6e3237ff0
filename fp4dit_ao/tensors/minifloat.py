"""``MinifloatTensor``: a weight held as packed low-bit codes and group scales, multiplied without becoming a float weight."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from fp4dit_ao import _compat, kernels
from fp4dit_ao.formats import pack, parse, unpack
from fp4dit_ao.kernels.units import Unit
from fp4dit_ao.ops import choose_scale, dequantize, quantize
from fp4dit_ao.tensors.quantized_weight import QuantizedWeight


class MinifloatTensor(QuantizedWeight):
    """A linear weight ``(out_features, in_features)`` in a number format of at most 8 bits.

    Tensor Attributes:
        qdata: uint8 codes; formats of at most 4 bits two to a byte, ``(out_features, in_features / 2)``, the first in the low
            nibble.
        scale: float, ``(out_features / block_size[0], in_features / block_size[1])``.

    Non-Tensor Attributes:
        block_size: elements along each dimension that share a scale; -1 for all of them.
        fmt: name of the weight's format.
        act_fmt: format that ``linear`` quantizes its input to, token-wise and online; None leaves the input as it is.
        dtype, transposed: as in :class:`QuantizedWeight`.
    """

    tensor_data_names: ClassVar[list[str]] = ["qdata", "scale"]
    tensor_attribute_names: ClassVar[list[str]] = ["block_size", "fmt", "act_fmt", "dtype"]

    qdata: Tensor
    scale: Tensor

    def __new__(
        cls,
        qdata: Tensor,
        scale: Tensor,
        block_size: list[int],
        fmt: str,
        act_fmt: str | None,
        dtype: torch.dtype,
        transposed: bool = False,
        *,
        requires_grad: bool = False,
    ) -> "MinifloatTensor":
        rows, columns = qdata.shape[0], qdata.shape[1] * _codes_a_byte(fmt)
        shape = (columns, rows) if transposed else (rows, columns)
        return _compat.wrapper_tensor(cls, shape, dtype, qdata.device, requires_grad)

    def __init__(
        self,
        qdata: Tensor,
        scale: Tensor,
        block_size: list[int],
        fmt: str,
        act_fmt: str | None,
        dtype: torch.dtype,
        transposed: bool = False,
        *,
        requires_grad: bool = False,
    ):
        super().__init__()
        self.qdata = qdata
        self.scale = scale
        self.block_size = block_size
        self.fmt = fmt
        self.act_fmt = act_fmt
        self.transposed = transposed

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

    def tiles(self) -> dict[str, tuple[int, int] | None]:
        rows, columns = self.block_size
        return {"qdata": (1, _codes_a_byte(self.fmt)), "scale": (rows, columns)}

    def attributes_of_part(self, rows: int, columns: int) -> dict[str, object]:
        sizes = zip(self.block_size, (rows, columns), strict=True)
        return {"block_size": [min(block, size) or block for block, size in sizes]}

    def stored_values(self, output_dtype: torch.dtype) -> Tensor:
        return dequantize(self.codes, self.block_size, self.scale, self.fmt, output_dtype)

    def stored_linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return kernels.linear(x, self.qdata, self.scale, self.block_size, self.fmt, self.act_fmt, bias)

    def unit(self, device: torch.device | str | None = None) -> Unit[Any]:
        columns = self.stored_shape[1] if self.block_size[1] == -1 else self.block_size[1]
        activation = None if self.act_fmt is None else parse(self.act_fmt)
        return kernels.pick(parse(self.fmt), activation, device or self.device, columns)

    def _quantization_type(self) -> str:
        return f"fmt={self.fmt}, act_fmt={self.act_fmt}, block_size={list(self.block_size)}, shape={tuple(self.shape)}"

    def __repr__(self, *, tensor_contents: object = None) -> str:
        """Formats and shape on one line, without the codes."""
        scale = str(self.scale.dtype).removeprefix("torch.")
        return (
            f"MinifloatTensor({self._quantization_type()}, scale={scale}, dtype={self.dtype}, device='{self.device}')"
        )


def _codes_a_byte(fmt: str) -> int:
    return 2 if parse(fmt).bits <= 4 else 1


torch.serialization.add_safe_globals([MinifloatTensor])
