"""``CodebookTensor``: a weight held as 4-bit codes, a codebook index for each group and a float for each row."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torchao.utils import TorchAOBaseTensor

from fp4dit_ao import __version__
from fp4dit_ao.formats import pack, parse, unpack
from fp4dit_ao.kernels import codebook_linear  # noqa: F401, registers the operator
from fp4dit_ao.kernels.cpu import native
from fp4dit_ao.kernels.token_quantization import digits, quantize_tokens
from fp4dit_ao.ops import choose_scale, fake_quantize
from fp4dit_ao.ops.codebook import codebook_dequantize

_ATEN = torch.ops.aten
_MOST_DIGITS = 3
"""Most int8 digits of a token's level that ``codebook_linear`` takes."""


class CodebookTensor(TorchAOBaseTensor):  # type: ignore[misc]
    """A linear weight ``(out_features, in_features)`` with codebook groups: ``row_scale * codebooks[index][codes]``.

    Tensor Attributes:
        qdata: uint8 codes ``(out_features, in_features / 2)``, two to a byte, the first in the low nibble.
        index: uint8 ``(out_features, ceil(groups / 2))``, each group's codebook, two to a byte likewise.
        row_scale: float32 ``(out_features,)``.
        codebooks: int8 ``(16, 16)``, what each code stands for, by codebook.

    Non-Tensor Attributes:
        group_size: input features that share a codebook.
        fmt: name of the set of codebooks; the levels are those of ``codebooks``, whatever the name.
        act_fmt: format that ``linear`` quantizes its input to, token-wise and online; None leaves the input as it is.
        dtype: the type this tensor presents itself as, and of ``dequantize()``.
    """

    tensor_data_names: ClassVar[list[str]] = ["qdata", "index", "row_scale", "codebooks"]
    tensor_attribute_names: ClassVar[list[str]] = ["group_size", "fmt", "act_fmt", "dtype"]

    qdata: Tensor
    index: Tensor
    row_scale: Tensor
    codebooks: Tensor

    def __new__(
        cls,
        qdata: Tensor,
        index: Tensor,
        row_scale: Tensor,
        codebooks: Tensor,
        group_size: int,
        fmt: str,
        act_fmt: str | None,
        dtype: torch.dtype,
    ) -> "CodebookTensor":
        shape = (qdata.shape[0], qdata.shape[1] * 2)
        wrapper: CodebookTensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, shape, dtype=dtype, device=qdata.device, requires_grad=False
        )
        return wrapper

    def __init__(
        self,
        qdata: Tensor,
        index: Tensor,
        row_scale: Tensor,
        codebooks: Tensor,
        group_size: int,
        fmt: str,
        act_fmt: str | None,
        dtype: torch.dtype,
    ):
        super().__init__()
        self.qdata, self.index, self.row_scale, self.codebooks = qdata, index, row_scale, codebooks
        self.group_size, self.fmt, self.act_fmt = group_size, fmt, act_fmt

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        index: Tensor,
        row_scale: Tensor,
        codebooks: Tensor,
        fmt: str,
        act_fmt: str | None,
        dtype: torch.dtype,
    ) -> "CodebookTensor":
        """From unpacked uint8 codes ``(out_features, in_features)`` and codebook indices ``(out_features, groups)``."""
        group_size = codes.shape[1] // index.shape[1]
        even = F.pad(index, (0, index.shape[1] % 2))
        return cls(pack(codes, 4), pack(even, 4), row_scale, codebooks, group_size, fmt, act_fmt, dtype)

    @property
    def codes(self) -> Tensor:
        """uint8 codes, unpacked, ``(out_features, in_features)``."""
        return unpack(self.qdata, 4)

    @property
    def books(self) -> Tensor:
        """uint8, the codebook of every group, unpacked, ``(out_features, groups)``."""
        return unpack(self.index, 4)[:, : self.shape[1] // self.group_size]

    def dequantize(self, output_dtype: torch.dtype | None = None) -> Tensor:
        """The weight as a float tensor of ``dtype``."""
        return codebook_dequantize(self.codes, self.books, self.codebooks, self.row_scale, output_dtype or self.dtype)

    def _stable_hash_for_caching(self) -> str:
        """What torch's on-disk compile caches know this tensor by: everything that shapes the generated code."""
        tensors = (getattr(self, name) for name in self.tensor_data_names)
        parts = [(part.dtype, tuple(part.shape), part.stride(), part.device) for part in tensors]
        compiled = native.VERSION if native.shared_object() is not None else None
        act_fmt = self.act_fmt and parse(self.act_fmt)
        return repr((__version__, "codebook", compiled, parts, self.group_size, act_fmt, self.dtype))

    def _quantization_type(self) -> str:
        return f"fmt={self.fmt}, act_fmt={self.act_fmt}, group_size={self.group_size}, shape={tuple(self.shape)}"

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        """One line: thousands of codes tell a reader nothing."""
        return f"CodebookTensor({self._quantization_type()}, dtype={self.dtype}, device='{self.device}')"


def linear(
    x: Tensor,
    qdata: Tensor,
    index: Tensor,
    row_scale: Tensor,
    codebooks: Tensor,
    group_size: int,
    act_fmt: str | None,
    bias: Tensor | None,
) -> Tensor:
    """``x @ W^T + bias`` with ``x`` quantized token-wise to ``act_fmt``: one product of integers, exact in int32.

    Args:
        x: float ``(..., in_features)``.
        qdata, index, row_scale, codebooks, group_size: see :class:`CodebookTensor`.
        act_fmt: activation format; None multiplies ``x`` as it is. Formats whose levels do not fit three int8 digits, such as
            E5M2, are multiplied as floats, too.
        bias: ``(out_features,)`` or None.

    Returns:
        ``(..., out_features)`` in the type of ``x``.
    """
    if act_fmt is not None and (count := digits(parse(act_fmt))) <= _MOST_DIGITS:
        tokens, token_scale = quantize_tokens(x, act_fmt)
        output_dtype = x.dtype if x.dtype in native.OUTPUTS else torch.float32
        y = torch.ops.fp4dit_ao.codebook_linear(
            tokens, token_scale, qdata, index, codebooks, row_scale, bias, output_dtype, count, group_size
        )
        return y.to(x.dtype).reshape(*x.shape[:-1], qdata.shape[0])
    codes = unpack(qdata, 4)
    books = unpack(index, 4)[:, : codes.shape[1] // group_size]
    weight = codebook_dequantize(codes, books, codebooks, row_scale, torch.float32)
    values = x.float()
    if act_fmt is not None:
        block = [1] * (x.ndim - 1) + [-1]
        values = fake_quantize(x, block, choose_scale(x, block, act_fmt, torch.float32), act_fmt, torch.float32)
    return F.linear(values, weight, None if bias is None else bias.float()).to(x.dtype)


@CodebookTensor.implements(_ATEN.linear.default)  # type: ignore[untyped-decorator]
@CodebookTensor.implements_torch_function([F.linear, _ATEN.linear.default])  # type: ignore[untyped-decorator]
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    x, weight = args[0], args[1]
    bias = args[2] if len(args) > 2 else kwargs.get("bias")
    parts = (weight.qdata, weight.index, weight.row_scale, weight.codebooks)
    return linear(x, *parts, weight.group_size, weight.act_fmt, bias)


@CodebookTensor.implements(_ATEN._to_copy.default)  # type: ignore[untyped-decorator]
def _(func: Any, types: Any, args: Any, kwargs: Any) -> CodebookTensor:
    """``.to(device)`` moves codes and scales; ``.to(dtype)`` changes only what the tensor presents itself as."""
    self, device = args[0], kwargs.get("device") or args[0].device
    parts = (self.qdata.to(device), self.index.to(device), self.row_scale.to(device), self.codebooks.to(device))
    return CodebookTensor(*parts, self.group_size, self.fmt, self.act_fmt, kwargs.get("dtype") or self.dtype)


@CodebookTensor.implements(_ATEN.is_pinned.default)  # type: ignore[untyped-decorator]
def _(func: Any, types: Any, args: Any, kwargs: Any) -> bool:
    return all(getattr(args[0], name).is_pinned() for name in CodebookTensor.tensor_data_names)


@CodebookTensor.implements(_ATEN._pin_memory.default)  # type: ignore[untyped-decorator]
def _(func: Any, types: Any, args: Any, kwargs: Any) -> CodebookTensor:
    pinned: CodebookTensor = args[0]._apply_fn_to_data(lambda x: x.pin_memory())
    return pinned


torch.serialization.add_safe_globals([CodebookTensor])
