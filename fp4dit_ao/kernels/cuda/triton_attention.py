"""The Triton kernel of attention with FP8 scores, without a mask. It imports triton.

The scores are products of E4M3 levels, twice as fast as bfloat16's; a token's scale is a factor of a row or a column of them.
The softmax keeps a running maximum and sum in float32, and its weights have v's type for the product with v, as in PyTorch's
own attention. A head of 72 features costs 128 in the scores, but 80 in the second product: v is cut into 64 and the rest.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp4dit_ao.kernels.cuda.triton_linear import tune
from fp4dit_ao.kernels.cuda.triton_lookup import INTERPRETED

_LEAST_COLUMNS = 16
_LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class Config:
    """How the work is cut: queries and keys of a tile, warps that share it, tiles of keys in flight."""

    block_m: int
    block_n: int
    warps: int
    stages: int


CONFIGS = (
    Config(128, 128, 8, 3),
    Config(128, 64, 8, 3),
    Config(128, 64, 4, 3),
    Config(128, 128, 8, 2),
    Config(64, 128, 4, 3),
)
"""Candidates; the first is taken where nothing can be timed."""
_FASTEST: dict[tuple[object, ...], Config] = {}
"""Results of tuning by device and sizes, kept while the process runs."""


@triton.jit
def larger(a, b):
    """The larger of two: :func:`tl.max` is not interpreted where Triton was imported to compile."""
    return tl.maximum(a, b)


@triton.jit
def added(a, b):
    """The sum of two."""
    return a + b


@triton.jit
def attention_kernel(
    q, q_scale, k, k_scale, v, out, HEADS, QUERIES, KEYS, factor,
    WIDTH: tl.constexpr, DIM: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``out = softmax(q k^T * q_scale * k_scale * factor / log2(e)) v`` for ``BLOCK_M`` queries of one head.

    ``q`` and ``k`` are float8_e4m3fn ``(batch, tokens, heads, WIDTH)``, ``v`` and ``out`` of one float type ``(batch, tokens,
    heads, DIM)``; scales are float32 ``(batch, heads, tokens)``. ``FIRST + REST`` columns hold ``DIM``; ``EVEN`` if blocks of
    keys are whole.
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    head = tl.program_id(1)
    batch, inside = head // HEADS, head % HEADS
    row = tl.minimum(m, QUERIES - 1).to(tl.int64)  # queries past the end repeat the last, and are not stored
    width = tl.arange(0, WIDTH)
    n = tl.arange(0, BLOCK_N)
    first = tl.arange(0, FIRST)

    q_tile = tl.load(q + ((batch * QUERIES + row) * HEADS + inside)[:, None] * WIDTH + width[None, :])
    row_factor = tl.load(q_scale + head.to(tl.int64) * QUERIES + row) * factor
    begin = batch.to(tl.int64) * KEYS * HEADS + inside
    k_at = k + begin * WIDTH + n[None, :] * (HEADS * WIDTH) + width[:, None]
    v_at = v + begin * DIM + n[:, None] * (HEADS * DIM)
    s_at = k_scale + head.to(tl.int64) * KEYS + n

    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.full((BLOCK_M,), 0.0, tl.float32)
    sum_first = tl.full((BLOCK_M, FIRST), 0.0, tl.float32)
    if REST:
        rest = FIRST + tl.arange(0, REST)
        sum_rest = tl.full((BLOCK_M, REST), 0.0, tl.float32)
    for start in range(0, KEYS, BLOCK_N):
        if EVEN:
            k_tile = tl.load(k_at)
            v_first = tl.load(v_at + first[None, :])
            column = tl.load(s_at)
        else:
            held = start + n < KEYS
            k_tile = tl.load(k_at, mask=held[None, :], other=0.0)
            v_first = tl.load(v_at + first[None, :], mask=held[:, None], other=0.0)
            column = tl.load(s_at, mask=held, other=0.0)
        scores = tl.dot(q_tile, k_tile, out_dtype=tl.float32) * column[None, :]
        if not EVEN:
            scores = tl.where(held[None, :], scores, float("-inf"))
        now = tl.maximum(largest, tl.reduce(scores, 1, larger) * row_factor)
        weights = tl.exp2(scores * row_factor[:, None] - now[:, None])
        shrink = tl.exp2(largest - now)
        total = total * shrink + tl.reduce(weights, 1, added)
        largest = now
        half = weights.to(v.dtype.element_ty)
        sum_first = tl.dot(half, v_first, sum_first * shrink[:, None])
        if REST:
            if EVEN:
                v_rest = tl.load(v_at + rest[None, :], mask=(rest < DIM)[None, :], other=0.0)
            else:
                v_rest = tl.load(v_at + rest[None, :], mask=held[:, None] & (rest < DIM)[None, :], other=0.0)
            sum_rest = tl.dot(half, v_rest, sum_rest * shrink[:, None])
        k_at += BLOCK_N * HEADS * WIDTH
        v_at += BLOCK_N * HEADS * DIM
        s_at += BLOCK_N

    stored = (m < QUERIES)[:, None]
    out_at = out + ((batch * QUERIES + row) * HEADS + inside)[:, None] * DIM
    tl.store(out_at + first[None, :], (sum_first / total[:, None]).to(out.dtype.element_ty), mask=stored)
    if REST:
        tl.store(
            out_at + rest[None, :],
            (sum_rest / total[:, None]).to(out.dtype.element_ty),
            mask=stored & (rest < DIM)[None, :],
        )


def columns(dim: int) -> tuple[int, int]:
    """Columns of v in the first product with weights and in the second, 0 if there is none: powers of two that hold ``dim``."""
    power = triton.next_power_of_2(dim)
    first = power if dim == power else power // 2
    if first < _LEAST_COLUMNS:
        return max(_LEAST_COLUMNS, power), 0
    return first, 0 if dim == first else max(_LEAST_COLUMNS, triton.next_power_of_2(dim - first))


def run(
    q: Tensor, q_scale: Tensor, k: Tensor, k_scale: Tensor, v: Tensor, scale: float, config: Config | None = None
) -> Tensor:
    """``softmax((q * q_scale) (k * k_scale)^T * scale) v``: ``(batch, queries, heads, dim)`` in the type of ``v``.

    Args:
        q: float8_e4m3fn ``(batch, queries, heads, width)``, zeros past ``dim``, the width a power of two from 32
            on; ``k`` likewise with ``keys``.
        q_scale: float32 ``(batch, heads, queries)``; ``k_scale`` with ``keys``.
        v: bfloat16 or float16 ``(batch, keys, heads, dim)``.
        scale: factor of the scores.
        config: None takes the fastest, which is measured once for sizes like these.
    """
    batch, queries, heads, wide = q.shape
    keys, dim = v.shape[1], v.shape[3]
    out = torch.empty((batch, queries, heads, dim), dtype=v.dtype, device=q.device)
    if not out.numel():
        return out
    tensors = [x.contiguous() for x in (q, q_scale, k, k_scale, v)]
    first, rest = columns(dim)

    def launch(chosen: Config) -> None:
        attention_kernel[(triton.cdiv(queries, chosen.block_m), batch * heads)](
            *tensors, out, heads, queries, keys, scale * _LOG2_E,
            WIDTH=wide, DIM=dim, FIRST=first, REST=rest, EVEN=keys % chosen.block_n == 0,
            BLOCK_M=chosen.block_m, BLOCK_N=chosen.block_n, num_warps=chosen.warps, num_stages=chosen.stages,
        )  # fmt: skip

    if config is not None or INTERPRETED:
        launch(config or CONFIGS[0])
        return out
    with torch.cuda.device(q.device):
        key = q.device, batch * heads, triton.next_power_of_2(queries), keys, dim
        if key not in _FASTEST and not torch.cuda.is_current_stream_capturing():
            _FASTEST[key] = tune(CONFIGS, launch, f"tuning attention of {queries} x {keys} x {dim}")
        launch(_FASTEST.get(key, CONFIGS[0]))
    return out
