"""The Triton kernel that multiplies few tokens by a weight with codebook groups, looking codes up as it multiplies. It imports
triton.

It computes ``Y^T = W X^T``, as :mod:`triton_linear` does, and reads half a byte a weight: below some hundred tokens a product
takes as long as reading its weight. A tile spans one group at most, whose codebooks are four registers for each row. Scales are
outside of the loop. Where a weight has few rows, several programs share each, every one a part of the groups; their sums are
added in one order by a second kernel.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp4dit_ao.kernels.cuda.triton_linear import tune
from fp4dit_ao.kernels.cuda.triton_lookup import INTERPRETED, levels, table_as_fp8

MOST_ROWS = 1024
"""Tokens up to which the kernel is tried; more of them are faster decoded once and multiplied by the vendor's product."""
_BYTES_AT_ONCE = 4
"""Codes are looked up four bytes at once, which must be one row's."""
_SUM_BLOCK = 1024
_TOLERANCE = 2**-6
"""Largest relative difference, in bfloat16, from decoding first of a configuration that is taken."""


@dataclass(frozen=True)
class Config:
    """How the work is cut: features and tokens of a tile, programs that share a row's groups, warps, tiles in flight."""

    block_n: int
    block_m: int
    splits: int
    warps: int
    stages: int


CONFIGS: dict[int, tuple[Config, ...]] = {
    32: (Config(32, 16, 1, 4, 5), Config(32, 16, 4, 4, 5), Config(64, 16, 4, 4, 5), Config(64, 32, 2, 4, 5)),
    128: (
        Config(64, 64, 2, 4, 4),
        Config(64, 64, 1, 4, 4),
        Config(64, 128, 2, 4, 4),
        Config(64, 32, 1, 4, 5),
        Config(64, 64, 4, 4, 4),
    ),
    512: (Config(64, 128, 1, 4, 4), Config(128, 128, 1, 8, 4), Config(64, 128, 2, 4, 4), Config(128, 256, 1, 8, 3)),
    MOST_ROWS: (Config(128, 128, 1, 8, 4), Config(128, 256, 1, 8, 3)),
}
"""Candidates for up to so many tokens; the first is taken where nothing can be timed."""


@triton.jit
def codebook_linear_kernel(
    tokens, token_scale, qdata, index, tables, row_scale, bias, out,
    M, N, K, INDEX_ROW, GROUPS, PART,
    GROUP: tl.constexpr, BIAS: tl.constexpr, ASSEMBLY: tl.constexpr, BARE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of ``out[m, n] = token_scale[m] * row_scale[n] * (W X^T)[n, m] + bias[n]``, or if ``BARE`` of the products alone,
    each over ``PART`` groups, float32 or int32 ``(parts, M, N)``.

    ``tokens`` are int8 or float8_e4m3fn ``(M, K)``, ``qdata`` uint8 ``(N, K / 2)``; ``index`` holds two of 4 bits a byte, the
    first in the low nibble; ``tables`` has four words for each codebook, int8 levels.
    """
    FLOAT: tl.constexpr = tokens.dtype.element_ty == tl.float8e4nv
    SUM: tl.constexpr = tl.float32 if FLOAT else tl.int32  # in one accumulator, over all groups
    BYTES: tl.constexpr = BLOCK_K // 2
    TILES: tl.constexpr = GROUP // BLOCK_K

    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(2)
    row = (n % N).to(tl.int64)  # rows past the end are read from the start again, and not stored
    k = tl.arange(0, BLOCK_K)
    byte = tl.arange(0, BYTES)
    x_at = tokens + (m % M).to(tl.int64)[None, :] * K + k[:, None]
    w_at = qdata + row[:, None] * (K // 2) + byte[None, :]
    i_at = index + row * INDEX_ROW

    first = part * PART * TILES
    last = tl.minimum(first + PART * TILES, GROUPS * TILES)
    total = tl.full((BLOCK_N, BLOCK_M), 0, SUM)
    # tables are read a tile ahead, and which ones two tiles ahead, so that nothing waits for them
    group = first // TILES
    book = tables + ((tl.load(i_at + group // 2).to(tl.int32) >> (group % 2 * 4)) & 15) * 4
    t0, t1, t2, t3 = tl.load(book), tl.load(book + 1), tl.load(book + 2), tl.load(book + 3)
    pair = tl.load(i_at + tl.minimum(first + 1, last - 1) // TILES // 2)
    for tile in range(first, last):
        group = tl.minimum(tile + 1, last - 1) // TILES
        book = tables + ((pair.to(tl.int32) >> (group % 2 * 4)) & 15) * 4
        next0, next1, next2, next3 = tl.load(book), tl.load(book + 1), tl.load(book + 2), tl.load(book + 3)
        pair = tl.load(i_at + tl.minimum(tile + 2, last - 1) // TILES // 2)
        x = tl.load(x_at + tile * BLOCK_K)
        packed = tl.load(w_at + tile * BYTES)
        if FLOAT:
            t0, t1, t2, t3 = table_as_fp8(t0, t1, t2, t3, ASSEMBLY)
        w = levels(packed, t0[:, None], t1[:, None], t2[:, None], t3[:, None], ASSEMBLY)
        w = w.to(tl.float8e4nv, bitcast=True) if FLOAT else w.to(tl.int8, bitcast=True)
        total = tl.dot(w, x, total, out_dtype=SUM)
        t0, t1, t2, t3 = next0, next1, next2, next3

    inside = (m < M)[None, :] & (n < N)[:, None]
    if BARE:
        tl.store(out + (part * M + m).to(tl.int64)[None, :] * N + n[:, None], total, mask=inside)
    else:
        y = total.to(tl.float32) * tl.load(token_scale + m % M)[None, :] * tl.load(row_scale + row)[:, None]
        if BIAS:
            y += tl.load(bias + row).to(tl.float32)[:, None]
        tl.store(out + m.to(tl.int64)[None, :] * N + n[:, None], y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def sum_kernel(
    parts, token_scale, row_scale, bias, out, M, N, PARTS: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr
):
    """``out = token_scale * row_scale * sum(parts) + bias`` of ``parts`` ``(PARTS, M, N)``, added in their order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    size = M * N
    inside = at < size
    total = tl.load(parts + at, mask=inside, other=0)
    for part in tl.static_range(1, PARTS):
        total += tl.load(parts + part * size + at, mask=inside, other=0)
    n = at % N
    y = total.to(tl.float32) * tl.load(token_scale + at // N, mask=inside) * tl.load(row_scale + n, mask=inside)
    if BIAS:
        y += tl.load(bias + n, mask=inside).to(tl.float32)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)


def block_k(group_size: int) -> int | None:
    """Inputs that a tile spans: the largest of 128, 64 and 32 that divides the group; None if none does."""
    return next((size for size in (128, 64, 32) if group_size % size == 0), None)


def fits(config: Config, group_size: int) -> bool:
    """Whether every thread holds whole words of one row's codes in such tiles."""
    span = block_k(group_size)
    return span is not None and config.block_n * span // 2 >= _BYTES_AT_ONCE * 32 * config.warps


def candidates(rows: int, group_size: int, groups: int) -> list[Config]:
    """Configurations to try for that many tokens; none where the kernel does not take the groups, or tokens are many."""
    for most, configs in CONFIGS.items():
        if rows <= most:
            return [config for config in configs if fits(config, group_size) and config.splits <= groups]
    return []


_FASTEST: dict[tuple[object, ...], Config | None] = {}
"""Results of :func:`chosen` by device, sizes and types, kept while the process runs."""


def chosen(tokens: Tensor, features: int, group_size: int, launch: Callable[[Config | None], Tensor]) -> Config | None:
    """The fastest configuration for a product, or None if decoding first is faster; measured once for sizes like these, among
    those whose result is that of decoding first.

    Args:
        tokens: as in :func:`product`.
        features: rows of the weight.
        group_size: input features that share a codebook.
        launch: computes it with a configuration, or with None by decoding first.
    """
    rows, depth = tokens.shape
    configs = candidates(rows, group_size, depth // group_size)
    if not configs or not features:
        return None
    key = (tokens.device, triton.next_power_of_2(rows), features, depth, group_size, tokens.dtype)
    if key not in _FASTEST:
        if torch.cuda.is_current_stream_capturing():
            return configs[0]
        with torch.cuda.device(tokens.device):
            expected = launch(None)
            sound = [config for config in configs if _agrees(config, launch, expected)]
            _FASTEST[key] = tune([*sound, None], launch, f"tuning {rows} x {depth} x {features}")
    return _FASTEST[key]


def _agrees(config: Config, launch: Callable[[Config | None], Tensor], expected: Tensor) -> bool:
    """Whether a configuration runs on this GPU, and computes what decoding first does."""
    try:
        found = launch(config)
    except triton.runtime.errors.OutOfResources:
        return False
    if not found.is_floating_point():
        return torch.equal(found, expected)
    return bool((found.float() - expected.float()).norm() <= _TOLERANCE * expected.float().norm())


def product(tokens: Tensor, qdata: Tensor, index: Tensor, codebooks: Tensor, group_size: int, config: Config) -> Tensor:
    """``tokens @ levels^T``, ``(rows, out_features)``: int32 and exact for int8 tokens, float32 for FP8.

    Args:
        tokens: int8 or float8_e4m3fn ``(rows, in_features)``.
        qdata, index, codebooks, group_size: see :func:`fp4dit_ao.kernels.codebook_linear.reference_codebook_linear`; with FP8
            tokens, float8_e4m3fn must hold every level.
        config: one of :func:`candidates`.
    """
    parts = _parts(tokens, qdata, config, group_size)
    dtype = torch.float32 if tokens.dtype == torch.float8_e4m3fn else torch.int32
    out = torch.empty((parts, tokens.shape[0], qdata.shape[0]), dtype=dtype, device=tokens.device)
    if out.numel():
        _launch(tokens, qdata, index, codebooks, group_size, config, out, None)
    return out[0] if parts == 1 else out.sum(0, dtype=dtype)


def linear(
    tokens: Tensor,
    token_scale: Tensor,
    qdata: Tensor,
    index: Tensor,
    codebooks: Tensor,
    row_scale: Tensor,
    bias: Tensor | None,
    group_size: int,
    output_dtype: torch.dtype,
    config: Config,
) -> Tensor:
    """``(tokens @ levels^T) * token_scale * row_scale + bias``, ``(rows, out_features)`` of ``output_dtype``.

    Args:
        token_scale: float32 ``(rows, 1)``.
        row_scale, bias: see :func:`fp4dit_ao.kernels.codebook_linear.reference_codebook_linear`.
        output_dtype: float32, bfloat16 or float16.

    The other arguments are those of :func:`product`.
    """
    (rows, _), features = tokens.shape, qdata.shape[0]
    out = torch.empty((rows, features), dtype=output_dtype, device=tokens.device)
    if not out.numel():
        return out
    added = out if bias is None else bias.contiguous()
    scales = token_scale.float().contiguous(), row_scale.float().contiguous(), added
    parts = _parts(tokens, qdata, config, group_size)
    if parts == 1:
        _launch(tokens, qdata, index, codebooks, group_size, config, out, scales, bias is not None)
        return out
    dtype = torch.float32 if tokens.dtype == torch.float8_e4m3fn else torch.int32
    sums = torch.empty((parts, rows, features), dtype=dtype, device=tokens.device)
    _launch(tokens, qdata, index, codebooks, group_size, config, sums, None)
    with torch.cuda.device_of(tokens):
        sum_kernel[(triton.cdiv(out.numel(), _SUM_BLOCK),)](
            sums, *scales, out, rows, features, PARTS=parts, BIAS=bias is not None, BLOCK=_SUM_BLOCK
        )
    return out


def _parts(tokens: Tensor, qdata: Tensor, config: Config, group_size: int) -> int:
    """Programs that share the groups of a row: at most ``config.splits``, each with a group at least."""
    groups = tokens.shape[1] // group_size
    return triton.cdiv(groups, triton.cdiv(groups, config.splits))


def _launch(
    tokens: Tensor, qdata: Tensor, index: Tensor, codebooks: Tensor, group_size: int, config: Config, out: Tensor,
    scales: tuple[Tensor, Tensor, Tensor] | None, bias: bool = False,
) -> None:  # fmt: skip
    (rows, depth), features, groups = tokens.shape, qdata.shape[0], tokens.shape[1] // group_size
    span = block_k(group_size)
    assert span is not None
    parts = _parts(tokens, qdata, config, group_size)
    grid = triton.cdiv(features, config.block_n), triton.cdiv(rows, config.block_m), parts
    token_scale, row_scale, added = scales or (out, out, out)
    with torch.cuda.device_of(tokens):
        codebook_linear_kernel[grid](
            tokens.contiguous(), token_scale, qdata.contiguous(), index.contiguous(),
            codebooks.contiguous().view(torch.int32), row_scale, added, out,
            rows, features, depth, index.shape[1], groups, triton.cdiv(groups, config.splits),
            GROUP=group_size, BIAS=bias, ASSEMBLY=not INTERPRETED, BARE=scales is None,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=span,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
