"""``CodebookTensor``: a weight held as 4-bit codes, a codebook index for each group and a float for each row."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fp4dit_ao import _compat
from fp4dit_ao.formats import pack, unpack
from fp4dit_ao.kernels import codebook_dispatch
from fp4dit_ao.kernels.units import Unit
from fp4dit_ao.ops.codebook import codebook_dequantize
from fp4dit_ao.tensors.quantized_weight import QuantizedWeight


class CodebookTensor(QuantizedWeight):
    """A linear weight ``(out_features, in_features)`` with codebook groups: ``row_scale * codebooks[index][codes]``.

    Tensor Attributes:
        qdata: uint8 codes ``(out_features, in_features / 2)``, two to a byte, the first in the low nibble.
        index: uint8 ``(out_features, ceil(groups / 2))``, each group's codebook, two to a byte likewise.
        row_scale: float32 ``(out_features,)``.
        codebooks: int8 ``(16, 16)``, levels by codebook and code.

    Non-Tensor Attributes:
        group_size: input features that share a codebook.
        fmt: name of the set of codebooks; the levels are those of ``codebooks``, whatever the name.
        act_fmt: format that ``linear`` quantizes its input to, token-wise and online; None leaves the input as it is.
        dtype, transposed: as in :class:`QuantizedWeight`.
    """

    tensor_data_names: ClassVar[list[str]] = ["qdata", "index", "row_scale", "codebooks"]
    tensor_attribute_names: ClassVar[list[str]] = ["group_size", "fmt", "act_fmt", "dtype"]
    format_names: ClassVar[tuple[str, ...]] = ("act_fmt",)  # the levels of the weight are data

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
        transposed: bool = False,
        *,
        requires_grad: bool = False,
    ) -> "CodebookTensor":
        rows, columns = qdata.shape[0], qdata.shape[1] * 2
        shape = (columns, rows) if transposed else (rows, columns)
        return _compat.wrapper_tensor(cls, shape, dtype, qdata.device, requires_grad)

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
        transposed: bool = False,
        *,
        requires_grad: bool = False,
    ):
        super().__init__()
        self.qdata, self.index, self.row_scale, self.codebooks = qdata, index, row_scale, codebooks
        self.group_size, self.fmt, self.act_fmt, self.transposed = group_size, fmt, act_fmt, transposed

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
        return unpack(self.index, 4)[:, : self.stored_shape[1] // self.group_size]

    def tiles(self) -> dict[str, tuple[int, int] | None]:
        return {"qdata": (1, 2), "index": (1, 2 * self.group_size), "row_scale": (1, -1), "codebooks": None}

    def stored_values(self, output_dtype: torch.dtype) -> Tensor:
        return codebook_dequantize(self.codes, self.books, self.codebooks, self.row_scale, output_dtype)

    def stored_linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return codebook_dispatch.linear(
            x, self.qdata, self.index, self.row_scale, self.codebooks, self.group_size, self.fmt, self.act_fmt, bias
        )

    def unit(self, device: torch.device | str | None = None) -> Unit[Any]:
        place = torch.device(device or self.device)
        found = codebook_dispatch.operands(self.qdata, self.group_size, self.fmt, self.act_fmt, place, self.dtype)
        return codebook_dispatch.CODEBOOK_LINEAR.pick(found)

    def _quantization_type(self) -> str:
        return f"fmt={self.fmt}, act_fmt={self.act_fmt}, group_size={self.group_size}, shape={tuple(self.shape)}"

    def __repr__(self, *, tensor_contents: object = None) -> str:
        """Formats and shape on one line, without the codes."""
        return f"CodebookTensor({self._quantization_type()}, dtype={self.dtype}, device='{self.device}')"


torch.serialization.add_safe_globals([CodebookTensor])
