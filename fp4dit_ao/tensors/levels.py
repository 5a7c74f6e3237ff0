"""``LevelTensor``: a quantized weight with a byte a level, made once from packed codes, for units that multiply bytes.

It takes twice the memory of 4-bit codes and needs no look-up. The values are the same: the conversion is exact or refused.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from fp4dit_ao import _compat
from fp4dit_ao.formats import parse
from fp4dit_ao.kernels import codebook_linear, level_linear
from fp4dit_ao.kernels.cpu.native import OUTPUTS
from fp4dit_ao.kernels.token_quantization import fits_fp8, fp8_tokens, quantize_tokens
from fp4dit_ao.kernels.units import Unit
from fp4dit_ao.tensors.codebook import CodebookTensor
from fp4dit_ao.tensors.minifloat import MinifloatTensor
from fp4dit_ao.tensors.quantized_weight import QuantizedWeight

TYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
"""Types that a level may be stored as, by the names that users give."""


def fits(levels: Tensor, dtype: torch.dtype) -> bool:
    """Whether ``dtype`` holds every level exactly. E4M3 has four significant bits, up to 448."""
    return bool((levels.to(dtype).float() == levels.float()).all())


class LevelTensor(QuantizedWeight):
    """A linear weight ``(out_features, in_features)`` as levels and scales.

    Tensor Attributes:
        qdata: int8 or float8_e4m3fn levels ``(out_features, in_features)``.
        scale: float, ``(out_features / block_size[0], in_features / block_size[1])``.

    Non-Tensor Attributes:
        block_size, fmt, act_fmt: as in ``MinifloatTensor``.
        dtype, transposed: as in ``QuantizedWeight``.
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
        act_fmt: str,
        dtype: torch.dtype,
        transposed: bool = False,
        *,
        requires_grad: bool = False,
    ) -> "LevelTensor":
        shape = qdata.shape[::-1] if transposed else qdata.shape
        return _compat.wrapper_tensor(cls, shape, dtype, qdata.device, requires_grad)

    def __init__(
        self,
        qdata: Tensor,
        scale: Tensor,
        block_size: list[int],
        fmt: str,
        act_fmt: str,
        dtype: torch.dtype,
        transposed: bool = False,
        *,
        requires_grad: bool = False,
    ):
        super().__init__()
        self.qdata, self.scale, self.block_size, self.fmt, self.act_fmt = qdata, scale, block_size, fmt, act_fmt
        self.transposed = transposed

    @classmethod
    def from_packed(cls, weight: MinifloatTensor | CodebookTensor, to: str) -> "LevelTensor":
        """The same weight as bytes. One with codebook groups has a scale for each row, and is one product over all inputs.

        Raises:
            ValueError: ``to`` is none of :data:`TYPES`, or does not hold every level of the weight or its input exactly.
        """
        if to not in TYPES:
            raise ValueError(f"weights can be unpacked to {' or '.join(TYPES)}, not to {to!r}")
        if weight.act_fmt is None:
            raise ValueError("only weights whose input is quantized can be unpacked; this one multiplies floats")
        if isinstance(weight, CodebookTensor):
            levels = codebook_linear.decode(weight.qdata, weight.index, weight.codebooks, weight.group_size)
            scale, block_size = weight.row_scale.reshape(-1, 1), [1, levels.shape[1]]
        else:
            levels = parse(weight.fmt).decode(weight.codes)
            scale, block_size = weight.scale, list(weight.block_size)
        inputs = parse(weight.act_fmt)
        held = fits_fp8(inputs) if to == "fp8" else fits(inputs.lattice, TYPES[to])
        for fmt, fitting in ((weight.fmt, fits(levels, TYPES[to])), (weight.act_fmt, held)):
            if not fitting:
                raise ValueError(f"{to} does not hold every level of {fmt}; leave this weight packed, or take int8")
        return cls(levels.to(TYPES[to]), scale, block_size, weight.fmt, weight.act_fmt, weight.dtype)

    def tiles(self) -> dict[str, tuple[int, int] | None]:
        rows, columns = self.block_size
        return {"qdata": (1, 1), "scale": (rows, columns)}

    def attributes_of_part(self, rows: int, columns: int) -> dict[str, object]:
        sizes = zip(self.block_size, (rows, columns), strict=True)
        return {"block_size": [min(block, size) or block for block, size in sizes]}

    def stored_values(self, output_dtype: torch.dtype) -> Tensor:
        groups = self.qdata.float().unflatten(1, (self.scale.shape[1], -1))
        return (groups * self.scale.float()[..., None]).flatten(1).to(output_dtype)

    def stored_linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        quantize = quantize_tokens if self.qdata.dtype == torch.int8 else fp8_tokens
        tokens, token_scale = quantize(x, self.act_fmt)
        output_dtype = x.dtype if x.dtype in OUTPUTS else torch.float32
        y: Tensor = torch.ops.fp4dit_ao.level_linear(tokens, token_scale, self.qdata, self.scale, bias, output_dtype)
        return y.to(x.dtype).reshape(*x.shape[:-1], self.qdata.shape[0])

    def unit(self, device: torch.device | str | None = None) -> Unit[Any]:
        place = torch.device(device or self.device)
        return level_linear.LEVEL_LINEAR.pick(level_linear.operands(self.qdata, self.scale, place))

    def _quantization_type(self) -> str:
        return f"levels={self.qdata.dtype}, fmt={self.fmt}, act_fmt={self.act_fmt}, shape={tuple(self.shape)}"


torch.serialization.add_safe_globals([LevelTensor])
