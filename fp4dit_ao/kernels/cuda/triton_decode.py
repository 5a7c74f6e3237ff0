"""The Triton kernel that decodes codebook groups to bytes, int8 or E4M3, for a product of bytes. It imports triton.

A program takes a few rows of one group: their codebooks are four words a row, and a code is looked up as in the linear. What is
written is read once by the product that follows, from the second-level cache where it fits.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp4dit_ao.kernels.cuda.triton_lookup import INTERPRETED, levels, table_as_fp8, words_of_levels

ROWS = 32
"""Rows of a program: 32 groups of 128 codes are 32 codes for each of 128 threads."""
WARPS = 4
CODES_PER_WORD = 8


@triton.jit
def decode_kernel(
    qdata, index, tables, out, N, K, INDEX_ROW,
    GROUP: tl.constexpr, UNITS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr, ASSEMBLY: tl.constexpr,
    FP8: tl.constexpr,
):  # fmt: skip
    """``out[n, k] = tables[index[n, k // GROUP]][code[n, k]]`` for ``ROWS`` rows of one group.

    ``index`` holds two of 4 bits a byte, the first in the low nibble; ``tables`` has four words for each codebook, int8 levels,
    which become E4M3 here if ``FP8``. Codes and levels are words if ``WORDS``, eight codes or four levels each, else bytes;
    a group is ``GROUP`` of ``qdata``'s elements, and ``UNITS`` the power of two that holds them.
    """
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1)
    row = (n % N).to(tl.int64)  # rows past the end are read from the start again, and not stored
    unit = tl.arange(0, UNITS)
    packed = tl.load(qdata + row[:, None] * K + group * GROUP + unit[None, :], mask=(unit < GROUP)[None, :], other=0)
    pair = tl.load(index + row * INDEX_ROW + group // 2).to(tl.int32)
    book = tables + ((pair >> (group % 2 * 4)) & 15) * 4
    t0, t1, t2, t3 = tl.load(book), tl.load(book + 1), tl.load(book + 2), tl.load(book + 3)
    if FP8:
        t0, t1, t2, t3 = table_as_fp8(t0, t1, t2, t3, ASSEMBLY)
    if WORDS:
        found = words_of_levels(packed, t0[:, None], t1[:, None], t2[:, None], t3[:, None], ASSEMBLY)
    else:  # not by assembly: a thread may hold bytes of rows with different tables
        found = levels(packed, t0[:, None], t1[:, None], t2[:, None], t3[:, None], False)
    k = tl.arange(0, UNITS * 2)
    at = out + n[:, None].to(tl.int64) * (K * 2) + group * (GROUP * 2) + k[None, :]
    tl.store(at, found, mask=(n < N)[:, None] & (k < GROUP * 2)[None, :])


def decode(qdata: Tensor, index: Tensor, codebooks: Tensor, group_size: int, dtype: torch.dtype) -> Tensor:
    """Levels of a weight with codebook groups, ``(out_features, in_features)`` of ``dtype``.

    Args:
        qdata: uint8 ``(out_features, in_features / 2)``, two codes a byte, the first in the low nibble.
        index: uint8 ``(out_features, ceil(groups / 2))``, each group's codebook, packed likewise.
        codebooks: int8 ``(16, 16)``; ``dtype`` must hold every level.
        group_size: input features that share a codebook, even.
        dtype: int8 or float8_e4m3fn.
    """
    rows, columns = qdata.shape[0], qdata.shape[1] * 2
    out = torch.empty((rows, columns), dtype=torch.uint8, device=qdata.device)
    if out.numel():
        qdata, index, tables = qdata.contiguous(), index.contiguous(), codebooks.contiguous().view(torch.int32)
        by_words = group_size % CODES_PER_WORD == 0 and qdata.data_ptr() % 4 == 0
        read, written = (qdata.view(torch.int32), out.view(torch.int32)) if by_words else (qdata, out)
        group = group_size // (CODES_PER_WORD if by_words else 2)
        with torch.cuda.device_of(qdata):
            decode_kernel[(triton.cdiv(rows, ROWS), columns // group_size)](
                read, index, tables, written, rows, read.shape[1], index.shape[1],
                GROUP=group, UNITS=triton.next_power_of_2(group), ROWS=ROWS, WORDS=by_words, ASSEMBLY=not INTERPRETED,
                FP8=dtype == torch.float8_e4m3fn, num_warps=WARPS,
            )  # fmt: skip
    return out.view(dtype)
