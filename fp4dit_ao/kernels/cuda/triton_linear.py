"""The Triton kernel behind ``torch.ops.fp4dit_ao.int8_linear`` on NVIDIA GPUs. Imported on first use: it imports triton.

It computes ``Y^T = W X^T``, weights on the left. A group's scale is then one number per row of the accumulator: two registers a
thread instead of a row of them. And the tensor core may take its left operand from registers, where codes become levels, while
tokens, the larger operand, are copied to shared memory in the background and read from there.

A tile never crosses a group: integers are multiplied and summed exactly in int32, and each tile's sum is converted once.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import functools
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor
from tqdm import tqdm

from fp4dit_ao.kernels.checks import refuse
from fp4dit_ao.kernels.cuda.triton_lookup import INTERPRETED, levels

_Choice = TypeVar("_Choice")
MAX_BLOCK_K = 128
"""Inputs that a tile spans at most: 128 products of +-127 sum to less than 2^24, which float32 holds exactly."""
MIN_BLOCK_K = 32
"""The shortest product of bytes that tensor cores have."""
_BAND = 8
"""Blocks of tokens that run side by side and so read each weight from memory once."""
BAND = tl.constexpr(_BAND)
_TUNING_MS = 10
"""Milliseconds for which a candidate is timed."""


@triton.jit(do_not_specialize=["M", "t0", "t1", "t2", "t3"])
def linear_kernel(
    tokens, token_scale, weight, scale, bias, out,
    M, N, K, ROW, GROUPS, t0, t1, t2, t3,
    GROUP: tl.constexpr, SCALE_ROWS: tl.constexpr,
    PACKED: tl.constexpr, BIAS: tl.constexpr, ASSEMBLY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of ``out[m, n] = token_scale[m] * sum_g scale[n, g] * (W_g X_g^T)[n, m] + bias[n]``.

    ``tokens`` are int8 or float8_e4m3fn ``(M, K)``; ``weight`` has rows of ``ROW`` bytes, packed codes or levels of the
    tokens' type. A band of blocks of tokens walks over the weights together, so that they are fetched once.
    """
    BYTES: tl.constexpr = BLOCK_K // 2 if PACKED else BLOCK_K
    GROUP_BYTES: tl.constexpr = GROUP // 2 if PACKED else GROUP
    WHOLE: tl.constexpr = GROUP % BLOCK_K == 0
    TILES: tl.constexpr = (GROUP + BLOCK_K - 1) // BLOCK_K
    FLOAT: tl.constexpr = tokens.dtype.element_ty == tl.float8e4nv
    SUM: tl.constexpr = tl.float32 if FLOAT else tl.int32

    blocks_m, blocks_n = (M + BLOCK_M - 1) // BLOCK_M, (N + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    first = program // (BAND * blocks_n) * BAND
    height = tl.minimum(blocks_m - first, BAND)
    block_m = first + program % (BAND * blocks_n) % height
    block_n = program % (BAND * blocks_n) // height

    m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    byte = tl.arange(0, BYTES)
    # rows past the end are read from the start again, and not stored
    x_at = tokens + (m % M).to(tl.int64)[None, :] * K + k[:, None]
    w_at = weight + (n % N).to(tl.int64)[:, None] * ROW + byte[None, :]
    s_at = scale + (n % N) * GROUPS if SCALE_ROWS else scale + n * 0

    total = tl.full((BLOCK_N, BLOCK_M), 0.0, tl.float32)
    for tile in range(GROUPS * TILES):
        group = tile // TILES
        inside = tile % TILES
        x_begin = group * GROUP + inside * BLOCK_K
        w_begin = group * GROUP_BYTES + inside * BYTES
        if WHOLE:
            x, w = tl.load(x_at + x_begin), tl.load(w_at + w_begin)
        else:
            x = tl.load(x_at + x_begin, mask=(inside * BLOCK_K + k < GROUP)[:, None], other=0.0)
            w = tl.load(w_at + w_begin, mask=(inside * BYTES + byte < GROUP_BYTES)[None, :], other=0.0)
        s = tl.load(s_at + group).to(tl.float32)
        if PACKED:
            w = levels(w, t0, t1, t2, t3, ASSEMBLY)
            w = w.to(tl.float8e4nv, bitcast=True) if FLOAT else w.to(tl.int8, bitcast=True)
        product = tl.dot(w, x, out_dtype=SUM).to(tl.float32)
        total += product * s[:, None]

    total *= tl.load(token_scale + m % M)[None, :]
    if BIAS:
        total += tl.load(bias + n % N).to(tl.float32)[:, None]
    y_at = out + m.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(y_at, total.to(out.dtype.element_ty), mask=(m < M)[None, :] & (n < N)[:, None])


@dataclass(frozen=True)
class Config:
    """How the work is cut: features and tokens of a tile, warps that share it, tiles of K in flight."""

    block_n: int
    block_m: int
    warps: int
    stages: int

    def shared_bytes(self, block_k: int, packed: bool) -> int:
        """Shared memory that its tiles of weights and tokens take, at least."""
        return self.stages * (self.block_n * block_k // (2 if packed else 1) + self.block_m * block_k)


CONFIGS: dict[int, tuple[Config, ...]] = {
    32: (Config(64, 16, 4, 5), Config(32, 16, 2, 6), Config(64, 32, 4, 5), Config(128, 16, 4, 4)),
    512: (Config(64, 64, 4, 4), Config(64, 128, 4, 4), Config(64, 32, 4, 5), Config(128, 64, 8, 4)),
    2**62: (Config(128, 128, 8, 3), Config(64, 128, 4, 3), Config(128, 128, 8, 4), Config(64, 128, 4, 4),
            Config(64, 256, 8, 3), Config(128, 64, 8, 4)),
}  # fmt: skip
"""Candidates for up to so many tokens; the first is taken where nothing can be timed. A tile holds an int32 and a float32
accumulator: 64 x 128 in four warps or 128 x 128 in eight is the largest that 255 registers a thread hold without spills."""

_FASTEST: dict[tuple[object, ...], Config] = {}
"""Results of :func:`tune` by device, sizes and types, kept while the process runs."""


def candidates(rows: int) -> tuple[Config, ...]:
    """Configurations to try for that many tokens."""
    return next(configs for most, configs in CONFIGS.items() if rows <= most)


def block_k(group: int) -> int:
    """Inputs that a tile spans: a divisor of the group if there is one, else enough for all of it, the rest masked."""
    whole = [size for size in (128, 64, 32) if group % size == 0]
    return whole[0] if whole else min(MAX_BLOCK_K, max(MIN_BLOCK_K, triton.next_power_of_2(group)))


@functools.cache
def table_words(table: tuple[int, ...], dtype: torch.dtype) -> tuple[int, ...]:
    """Sixteen levels as bytes of ``dtype`` (int8 or float8_e4m3fn), four to a word.

    Raises:
        ValueError: a level that the type does not hold exactly.
    """
    wanted = torch.tensor(table, dtype=torch.float32)
    held = wanted.to(dtype)
    if wanted.shape != (16,) or not torch.equal(held.float(), wanted):
        refuse(
            "int8_linear",
            "table",
            list(table),
            f"sixteen levels that {dtype} holds exactly (int8 holds all within +-127)",
        )
    return struct.unpack("<4i", held.view(torch.uint8).numpy().tobytes())


def run(
    tokens: Tensor,
    token_scale: Tensor,
    weight: Tensor,
    scale: Tensor,
    table: Sequence[int] | None,
    bias: Tensor | None,
    output_dtype: torch.dtype,
    config: Config | None = None,
) -> Tensor:
    """``(tokens @ levels^T, group by group times scale) * token_scale + bias``, as ``kernels.cpu.int8_linear.run`` on CPUs.

    With int8 tokens every product and every tile's sum is exact, and only their float32 sum is rounded. With float8_e4m3fn
    tokens the products are exact, too, but a tile's sum is as exact as the tensor core's accumulator: Hopper's keeps about
    14 bits, so that sums beyond 2^14 steps lose their last ones.

    Args:
        tokens: int8 or float8_e4m3fn ``(rows, in_features)``.
        token_scale: float32 ``(rows, 1)``.
        weight: uint8 ``(out_features, in_features / 2)`` codes with a ``table``; without, levels ``(out_features,
            in_features)`` of the tokens' type.
        scale: float ``(out_features or 1, groups)``.
        table: sixteen levels; None takes ``weight`` for levels.
        bias: ``(out_features,)`` or None.
        output_dtype: float32, bfloat16 or float16.
        config: None takes the fastest, which is measured once for sizes like these.

    Returns:
        ``(rows, out_features)`` of ``output_dtype``.

    Raises:
        ValueError: shapes, types or the table do not fit; nothing is read out of bounds.
    """
    _check(tokens, token_scale, weight, scale, table, bias)
    (rows, depth), (features, groups) = tokens.shape, (weight.shape[0], scale.shape[1])
    group, packed = depth // groups, table is not None
    out = torch.empty((rows, features), dtype=output_dtype, device=tokens.device)
    if not out.numel():
        return out
    words = table_words(tuple(table), tokens.dtype) if table is not None else (0, 0, 0, 0)
    added = out if bias is None else bias.contiguous()
    scale = scale if scale.dtype in (torch.float32, torch.bfloat16, torch.float16) else scale.float()
    tensors = [
        tokens.contiguous(),
        token_scale.float().contiguous(),
        weight.contiguous(),
        scale.contiguous(),
        added,
        out,
    ]

    def launch(chosen: Config) -> None:
        blocks = triton.cdiv(rows, chosen.block_m) * triton.cdiv(features, chosen.block_n)
        linear_kernel[(blocks,)](
            *tensors, rows, features, depth, weight.shape[1], groups, *words,
            GROUP=group, SCALE_ROWS=scale.shape[0] > 1, PACKED=packed, BIAS=bias is not None, ASSEMBLY=not INTERPRETED,
            BLOCK_M=chosen.block_m, BLOCK_N=chosen.block_n, BLOCK_K=block_k(group),
            num_warps=chosen.warps, num_stages=chosen.stages,
        )  # fmt: skip

    if config is not None or INTERPRETED:
        launch(config or candidates(rows)[0])
        return out
    with torch.cuda.device(tokens.device):
        key = (tokens.device, triton.next_power_of_2(rows), features, depth, group, packed, tokens.dtype, output_dtype)
        if key not in _FASTEST and not torch.cuda.is_current_stream_capturing():
            limit = triton.runtime.driver.active.utils.get_device_properties(tokens.device.index)["max_shared_mem"]
            fitting = [c for c in candidates(rows) if c.shared_bytes(block_k(group), packed) <= limit]
            _FASTEST[key] = tune(fitting, launch, f"tuning {rows} x {depth} x {features}")
        launch(_FASTEST.get(key, candidates(rows)[0]))
    return out


def _check(
    tokens: Tensor, token_scale: Tensor, weight: Tensor, scale: Tensor, table: Sequence[int] | None, bias: Tensor | None
) -> None:
    name = "int8_linear"
    if not tokens.ndim == weight.ndim == scale.ndim == 2:
        shapes = {"tokens": tokens.shape, "weight": weight.shape, "scale": scale.shape}
        argument, shape = next((key, tuple(found)) for key, found in shapes.items() if len(found) != 2)
        refuse(name, argument, f"shape {shape}", "two dimensions")
    (rows, depth), (features, width), (scale_rows, groups) = tokens.shape, weight.shape, scale.shape
    if tokens.dtype not in (torch.int8, torch.float8_e4m3fn):
        refuse(name, "tokens", tokens.dtype, f"{torch.int8} or {torch.float8_e4m3fn}")
    stored, a_byte = (tokens.dtype, 1) if table is None else (torch.uint8, 2)
    if weight.dtype != stored:
        refuse(
            name,
            "weight",
            weight.dtype,
            f"{stored}, {'levels' if table is None else 'codes'} for {tokens.dtype} tokens",
        )
    if width * a_byte != depth:
        refuse(name, "weight", f"rows of {width} bytes", f"{depth / a_byte:g}, for the {depth} features of tokens")
    if scale_rows != features and scale_rows != 1:
        refuse(name, "scale", f"{scale_rows} rows", f"1 or {features}, one for each row of the weight")
    if not groups or not depth or depth % groups or depth // groups % 2:
        refuse(name, "scale", f"{groups} groups", f"a number that cuts {depth} features into even groups")
    if token_scale.numel() != rows:
        refuse(name, "token_scale", f"{token_scale.numel()} scales", f"{rows}, one for each token")
    if bias is not None and bias.shape != (features,):
        refuse(name, "bias", f"shape {tuple(bias.shape)}", f"{(features,)}")


def tune(configs: Sequence[_Choice], launch: Callable[[_Choice], object], what: str) -> _Choice:
    """The quickest of ``configs``, by the median; one that the device has no room for is left out.

    Raises:
        RuntimeError: the device has room for none.
    """
    seconds: dict[_Choice, float] = {}
    for config in tqdm(configs, desc=what, leave=False):
        try:
            launch(config)  # compiles
            # in a CUDA graph: launching from Python takes longer than most of these kernels
            seconds[config] = triton.testing.do_bench_cudagraph(
                lambda c=config: launch(c), rep=_TUNING_MS, return_mode="median"
            )
        except triton.runtime.errors.OutOfResources:
            continue
    if not seconds:
        raise RuntimeError(f"{what}: this GPU has too little shared memory for any tile; run on the CPU")
    return min(seconds, key=seconds.__getitem__)
