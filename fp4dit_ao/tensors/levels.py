"""``LevelTensor``: a quantized weight with a byte a level, made once from packed codes, for units that multiply bytes.

Twice the memory of 4-bit codes, and nothing to look up. The values are the same: the conversion is exact or refused.
"""

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torchao.utils import TorchAOBaseTensor

from fp4dit_ao import __version__
from fp4dit_ao.formats import parse
from fp4dit_ao.kernels import int8_backend
from fp4dit_ao.kernels.cpu.native import OUTPUTS
from fp4dit_ao.kernels.cuda import int8_linear
from fp4dit_ao.kernels.token_quantization import quantize_tokens
from fp4dit_ao.ops import LIBRARY
from fp4dit_ao.tensors.minifloat import MinifloatTensor

_ATEN = torch.ops.aten
TYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
"""What a level may be stored as."""


def fits(levels: Tensor, dtype: torch.dtype) -> bool:
    """Whether ``dtype`` holds every level exactly. E4M3 has four significant bits, up to 448."""
    return bool((levels.to(dtype).float() == levels.float()).all())


class LevelTensor(TorchAOBaseTensor):  # type: ignore[misc]
    """A linear weight ``(out_features, in_features)`` as levels and scales.

    Tensor Attributes:
        qdata: int8 or float8_e4m3fn levels ``(out_features, in_features)``.
        scale: float, ``(out_features / block_size[0], in_features / block_size[1])``.

    Non-Tensor Attributes:
        block_size, fmt, act_fmt, dtype: as in ``MinifloatTensor``.
    """

    tensor_data_names: ClassVar[list[str]] = ["qdata", "scale"]
    tensor_attribute_names: ClassVar[list[str]] = ["block_size", "fmt", "act_fmt", "dtype"]

    qdata: Tensor
    scale: Tensor

    def __new__(
        cls, qdata: Tensor, scale: Tensor, block_size: list[int], fmt: str, act_fmt: str, dtype: torch.dtype
    ) -> "LevelTensor":
        wrapper: LevelTensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, qdata.shape, dtype=dtype, device=qdata.device, requires_grad=False
        )
        return wrapper

    def __init__(self, qdata: Tensor, scale: Tensor, block_size: list[int], fmt: str, act_fmt: str, dtype: torch.dtype):
        super().__init__()
        self.qdata, self.scale, self.block_size, self.fmt, self.act_fmt = qdata, scale, block_size, fmt, act_fmt

    @classmethod
    def from_packed(cls, weight: MinifloatTensor, to: str) -> "LevelTensor":
        """The same weight as bytes.

        Raises:
            ValueError: ``to`` is none of :data:`TYPES`, or does not hold every level of the weight or its input exactly.
        """
        if to not in TYPES:
            raise ValueError(f"weights can be unpacked to {' or '.join(TYPES)}, not to {to!r}")
        if weight.act_fmt is None:
            raise ValueError("only weights whose input is quantized can be unpacked; this one multiplies floats")
        levels = parse(weight.fmt).decode(weight.codes)
        inputs = parse(weight.act_fmt).lattice
        for fmt, values in ((weight.fmt, levels), (weight.act_fmt, inputs)):
            if not fits(values, TYPES[to]):
                raise ValueError(f"{to} does not hold every level of {fmt}; leave this weight packed, or take int8")
        return cls(
            levels.to(TYPES[to]), weight.scale, list(weight.block_size), weight.fmt, weight.act_fmt, weight.dtype
        )

    def dequantize(self, output_dtype: torch.dtype | None = None) -> Tensor:
        """The weight as a float tensor of ``dtype``."""
        groups = self.qdata.float().unflatten(1, (self.scale.shape[1], -1))
        return (groups * self.scale.float()[..., None]).flatten(1).to(output_dtype or self.dtype)

    def _stable_hash_for_caching(self) -> str:
        parts = [(part.dtype, tuple(part.shape), part.stride(), part.device) for part in (self.qdata, self.scale)]
        return repr((__version__, "levels", parts, list(self.block_size), self.fmt, self.act_fmt, self.dtype))

    def _quantization_type(self) -> str:
        return f"levels={self.qdata.dtype}, fmt={self.fmt}, act_fmt={self.act_fmt}, shape={tuple(self.shape)}"


def refuse_unpacked(tensors: Iterable[object], what: str) -> None:
    """Raise ``ValueError`` if one of ``tensors`` was unpacked: graphs are rebuilt from packed codes alone."""
    if any(isinstance(x.detach(), LevelTensor) for x in tensors if isinstance(x, Tensor)):
        raise ValueError(f"{what} needs packed weights, and these were unpacked; do it before unpack_weights()")


@LevelTensor.implements(_ATEN.linear.default)  # type: ignore[untyped-decorator]
@LevelTensor.implements_torch_function([F.linear, _ATEN.linear.default])  # type: ignore[untyped-decorator]
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    x, weight = args[0], args[1]
    bias = args[2] if len(args) > 2 else kwargs.get("bias")
    tokens, token_scale = quantize_tokens(x, weight.act_fmt)
    output_dtype = x.dtype if x.dtype in OUTPUTS else torch.float32
    y = torch.ops.fp4dit_ao.level_linear(
        tokens.to(weight.qdata.dtype), token_scale, weight.qdata, weight.scale, bias, output_dtype
    )
    return y.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0])


@LevelTensor.implements(_ATEN._to_copy.default)  # type: ignore[untyped-decorator]
def _(func: Any, types: Any, args: Any, kwargs: Any) -> LevelTensor:
    """``.to(device)`` moves levels and scales; ``.to(dtype)`` changes only what the tensor presents itself as."""
    self, device = args[0], kwargs.get("device") or args[0].device
    dtype = kwargs.get("dtype") or self.dtype
    return LevelTensor(
        self.qdata.to(device), self.scale.to(device), self.block_size, self.fmt, self.act_fmt, dtype
    )  # fmt: skip


def level_linear(
    tokens: Tensor, token_scale: Tensor, levels: Tensor, scale: Tensor, bias: Tensor | None, output_dtype: torch.dtype
) -> Tensor:
    """``(tokens @ levels^T, group by group times scale) * token_scale + bias``, ``(rows, out_features)``.

    int8 is exact up to the float32 sum of groups. float8_e4m3fn is, too, where the sum is kept in full float32 (CPUs); Hopper's
    tensor cores keep about 14 bits of it.

    Args:
        tokens: int8 or float8_e4m3fn ``(rows, in_features)``.
        token_scale: float32 ``(rows, 1)``.
        levels: of the tokens' type, ``(out_features, in_features)``.
        scale: float ``(out_features or 1, groups)``.
        bias: ``(out_features,)`` or None.
        output_dtype: float32, bfloat16 or float16.
    """
    groups = scale.shape[1]
    whole = groups == 1 and min(levels.shape) % 16 == 0
    if tokens.dtype == torch.float8_e4m3fn and tokens.is_cuda and whole:
        columns = scale.float().expand(levels.shape[0], 1).T.contiguous()
        y = torch._scaled_mm(tokens, levels.T, token_scale, columns, out_dtype=torch.bfloat16)
        return (y if bias is None else y + bias).to(output_dtype)
    if groups > 1 and int8_linear.supports(tokens, 4, tokens.shape[1] // groups):
        from fp4dit_ao.kernels.cuda import triton_linear

        return triton_linear.run(tokens, token_scale, levels, scale, None, bias, output_dtype)
    if tokens.dtype == torch.int8:
        y = int8_backend._products(tokens, levels, scale, tokens.shape[1] // groups)
    else:
        y = _float_products(tokens, levels, scale)
    y = y * token_scale
    return (y if bias is None else y + bias.float()).to(output_dtype)


def _float_products(tokens: Tensor, levels: Tensor, scale: Tensor) -> Tensor:
    """The sum of every group's product in float32, which holds integers up to 2^24 exactly."""
    groups = scale.shape[1]
    parts = zip(tokens.float().chunk(groups, 1), levels.float().chunk(groups, 1), scale.float().T, strict=True)
    y = torch.zeros((), dtype=torch.float32, device=tokens.device)
    for x, w, s in parts:
        y = y + F.linear(x, w) * s
    return y


LIBRARY.define(
    "level_linear(Tensor tokens, Tensor token_scale, Tensor levels, Tensor scale, Tensor? bias, ScalarType output_dtype) "
    "-> Tensor",
    tags=(torch.Tag.flexible_layout,),
)
LIBRARY.impl("level_linear", level_linear, "CPU")
LIBRARY.impl("level_linear", level_linear, "CUDA")
LIBRARY.impl(
    "level_linear",
    lambda tokens, token_scale, levels, scale, bias, output_dtype: tokens.new_empty(
        (tokens.shape[0], levels.shape[0]), dtype=output_dtype
    ),
    "Meta",
)
torch.serialization.add_safe_globals([LevelTensor])
